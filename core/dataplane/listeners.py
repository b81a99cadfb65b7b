"""Listening sockets: one per virtual service and address that clients send to.

A service on a wildcard address gets one socket more for each local address that a client has sent to, bound to
just that address. The kernel prefers it from then on, and what leaves through it has the
right source address, so that the hot path need not care where a datagram was sent to.
"""

from __future__ import annotations

import errno
import socket
import sys
from collections.abc import Iterator
from contextlib import suppress
from ipaddress import IPv4Address, ip_address

from sapin.core.dataplane.batch import SOL_UDP, UDP_GRO, ancillary
from sapin.core.dataplane.flows import FREEBIND, NO_PATH_MTU, Counters, Flow, Peer
from sapin.core.model import Endpoint, IPAddress, VirtualService

IP_PKTINFO = 8
"""From linux/in.h."""
_SO_RCVBUFFORCE, _SO_SNDBUFFORCE = 33, 32
MAX_LOCALS = 256
"""Local addresses that one wildcard service may be reached at."""

_REMEDY = {
    errno.EACCES: "a port below 1024 needs CAP_NET_BIND_SERVICE",
    errno.EPERM: "a port below 1024 needs CAP_NET_BIND_SERVICE",
    errno.EADDRINUSE: "another program has this address and port: see `ss -ulpn`",
    errno.EADDRNOTAVAIL: "this machine does not have the address: see `ip address`",
}


class ListenError(Exception):
    """A virtual service cannot listen; the text names it, its address, the reason and a remedy."""


class Listener:
    """A bound UDP socket of a virtual service, and the flows of the clients that send to it.

    Args:
        service: whose datagrams it takes.
        address: where to bind; the service's own, or a local address of a wildcard service.
        counters: those of the service, by server; shared by all its listeners.
        share: bind beside a listener that shares its address (:meth:`share`).
        floating: the node need not have the address now.

    Raises:
        ListenError: it cannot be bound.
    """

    def __init__(
        self,
        service: VirtualService,
        address: IPAddress,
        buffer: int,
        counters: dict[str, Counters],
        *,
        share: bool = False,
        floating: bool = False,
    ) -> None:
        self.address = address
        self.local = b"" if address == service.address else address.packed
        """The packed local address if the service is on a wildcard, else empty; part of a flow's identity."""
        self.wildcard = address.is_unspecified
        self.family = socket.AF_INET if address.version == 4 else socket.AF_INET6
        self.counters = counters
        self.flows: dict[Peer, Flow] = {}
        share = share or service.address.is_unspecified
        self.sock = _bind(service, Endpoint(address, service.port), self.family, share, floating)
        self.fd = self.sock.fileno()
        self.buffer = _grow(self.sock, buffer)
        """Bytes of receive buffer that the kernel has given."""
        self.update(service)

    def update(self, service: VirtualService) -> None:
        """Take over what a reload may change while the socket stays."""
        self.service = service
        self.flow_timeout = int(service.flow_timeout)

    def share(self, shared: bool) -> None:
        """Whether another listener may be bound to the same address, while one takes the place of the other."""
        self.sock.setsockopt(
            socket.SOL_SOCKET, socket.SO_REUSEADDR, shared or self.service.address.is_unspecified
        )

    def close(self) -> None:
        """Close the socket; the flows are up to the caller."""
        self.sock.close()


def addresses(service: VirtualService) -> Iterator[IPAddress]:
    """What a service binds first: its address; for the IPv6 wildcard that of IPv4 too (dual stack)."""
    yield service.address
    if service.address.version == 6 and service.address.is_unspecified:
        yield IPv4Address(0)


def local_address(control: bytes) -> IPAddress | None:
    """The address that a datagram was sent to, from its control data (ip(7), RFC 3542 section 6)."""
    for level, kind, data in ancillary(control):
        if level == socket.IPPROTO_IP and kind == IP_PKTINFO and len(data) >= 12:
            return ip_address(data[8:12])
        if level == socket.IPPROTO_IPV6 and kind == socket.IPV6_PKTINFO and len(data) >= 16:
            return ip_address(data[:16])
    return None


def merged_size(control: bytes) -> int:
    """The segment size of a datagram that the kernel put together from several (UDP_GRO), else 0."""
    for level, kind, data in ancillary(control):
        if level == SOL_UDP and kind == UDP_GRO and len(data) >= 2:
            return int.from_bytes(data[:2], sys.byteorder)
    return 0


def _bind(
    service: VirtualService, endpoint: Endpoint, family: socket.AddressFamily, share: bool, floating: bool
) -> socket.SocketType:
    wildcard = endpoint.address.is_unspecified
    sock = None
    try:
        sock = socket.socket(family, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
        with suppress(OSError):  # a kernel before 5.0 gives every datagram singly
            sock.setsockopt(SOL_UDP, UDP_GRO, 1)
        if family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        sock.setsockopt(*NO_PATH_MTU[family])
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, share)
        if wildcard and family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_RECVPKTINFO, 1)
        elif wildcard:
            sock.setsockopt(socket.IPPROTO_IP, IP_PKTINFO, 1)
        if floating:
            sock.setsockopt(*FREEBIND[family], 1)
        sock.bind((str(endpoint.address), endpoint.port))
    except OSError as error:
        if sock is not None:
            sock.close()
        remedy = _REMEDY.get(error.errno or 0)
        raise ListenError(
            f"virtual service {service.name!r} cannot listen on UDP {endpoint}: {error.strerror}"
            + (f" ({remedy})" if remedy else "")
        ) from error
    return sock


def _grow(sock: socket.SocketType, size: int) -> int:
    """Ask for socket buffers; what the kernel gives for receiving (it counts double, socket(7))."""
    for force, plain in (
        (_SO_SNDBUFFORCE, socket.SO_SNDBUF),
        (_SO_RCVBUFFORCE, socket.SO_RCVBUF),
    ):
        try:
            sock.setsockopt(socket.SOL_SOCKET, force, size)
        except PermissionError:
            sock.setsockopt(socket.SOL_SOCKET, plain, size)
    return sock.getsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF) // 2
