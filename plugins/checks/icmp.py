"""Does the host answer a ping? It proves the host and the way to it, not that a VPN daemon runs there.

A ping socket needs no privilege where ``net.ipv4.ping_group_range`` (it rules IPv6 as well) includes the
daemon's group; a raw socket needs CAP_NET_RAW. The check takes the first that it may have.
"""

from __future__ import annotations

import secrets
import socket
from struct import Struct

import trio

from sapin.core.contracts import CheckResult, Target
from sapin.plugins.checks.common import family

_ECHO = Struct("!BBHHH")  # type, code, checksum, identifier, sequence: RFC 792, RFC 4443 section 4.1
_ECHO_REQUEST = {socket.AF_INET: 8, socket.AF_INET6: 128}
_ECHO_REPLY = {socket.AF_INET: 0, socket.AF_INET6: 129}
_PROTOCOL = {socket.AF_INET: socket.IPPROTO_ICMP, socket.AF_INET6: socket.IPPROTO_ICMPV6}
_TOKEN_LENGTH = 16
_MAX_PACKET = 2_048


class IcmpCheck:
    """Healthy: the echo reply came back; its round trip is measured."""

    async def check(self, target: Target) -> CheckResult:
        """Send one echo request, and wait for its reply.

        Raises:
            OSError: it cannot be sent, or the way to the host reports that it is unreachable.
            RuntimeError: this process may open neither kind of socket, which says nothing about the server.
        """
        address = target.endpoint.address
        token = secrets.token_bytes(_TOKEN_LENGTH)
        with open_socket(family(address)) as sock:
            await sock.connect((str(address), 0))
            started = trio.current_time()
            await sock.send(echo_request(sock.family, token))
            while not is_reply(sock.family, sock.type, await sock.recv(_MAX_PACKET), token):
                pass
            return CheckResult(True, "echo reply", trio.current_time() - started)


def open_socket(
    address_family: int, kinds: tuple[socket.SocketKind, ...] = (socket.SOCK_DGRAM, socket.SOCK_RAW)
) -> trio.socket.SocketType:
    """An ICMP socket of the first kind that this process may open.

    Raises:
        RuntimeError: it may open none.
        OSError: none can be opened for another reason.
    """
    for kind in kinds:
        try:
            return trio.socket.socket(address_family, kind, _PROTOCOL[socket.AddressFamily(address_family)])
        except PermissionError:
            continue
    raise RuntimeError(
        "not permitted to ping: add the daemon's group to net.ipv4.ping_group_range, or give it CAP_NET_RAW"
    )


def echo_request(address_family: int, token: bytes) -> bytes:
    """An echo request that carries ``token``; the kernel fills in what else a ping socket needs."""
    kind = _ECHO_REQUEST[socket.AddressFamily(address_family)]
    identifier = int.from_bytes(token[:2], "big")
    unsummed = _ECHO.pack(kind, 0, 0, identifier, 1) + token
    return _ECHO.pack(kind, 0, checksum(unsummed), identifier, 1) + token


def is_reply(address_family: int, kind: int, packet: bytes, token: bytes) -> bool:
    """Whether the packet is the echo reply that carries ``token``."""
    if address_family == socket.AF_INET and kind == socket.SOCK_RAW:
        packet = packet[4 * (packet[0] & 0x0F) :] if packet else b""  # behind the IP header, RFC 791
    reply = _ECHO_REPLY[socket.AddressFamily(address_family)]
    return len(packet) >= _ECHO.size and packet[0] == reply and packet[_ECHO.size :] == token


def checksum(data: bytes) -> int:
    """The Internet checksum (RFC 1071) of an even number of bytes."""
    total = sum(int.from_bytes(data[n : n + 2], "big") for n in range(0, len(data), 2))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF
