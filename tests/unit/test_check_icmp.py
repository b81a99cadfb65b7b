from __future__ import annotations

import os
import socket
from ipaddress import ip_address

import pytest
import trio

from sapin.core.contracts import HealthCheck, Target
from sapin.core.model import Endpoint, Framing
from sapin.plugins.checks import icmp
from sapin.plugins.checks.icmp import IcmpCheck

TOKEN = bytes(range(16))


DGRAM, RAW = socket.SOCK_DGRAM, socket.SOCK_RAW
V4, V6 = socket.AF_INET, socket.AF_INET6


def permitted(family: int, *kinds: socket.SocketKind) -> bool:
    """Whether this process may ping in that family with one of these kinds of sockets."""
    loopback = "::1" if family == V6 else "127.0.0.1"
    protocol = socket.IPPROTO_ICMPV6 if family == V6 else socket.IPPROTO_ICMP
    for kind in kinds:
        try:
            with socket.socket(family, DGRAM) as sock, socket.socket(family, kind, protocol):
                sock.bind((loopback, 0))
        except OSError:
            continue
        return True
    return False


def needs(family: int, *kinds: socket.SocketKind) -> pytest.MarkDecorator:
    names = {DGRAM: "a ping socket (net.ipv4.ping_group_range)", RAW: "a raw socket (CAP_NET_RAW)"}
    wanted = " or ".join(names[kind] for kind in kinds)
    return pytest.mark.skipif(
        not permitted(family, *kinds), reason=f"needs IPv{6 if family == V6 else 4} and {wanted}"
    )


@pytest.mark.parametrize(
    "host",
    [
        pytest.param("127.0.0.1", marks=needs(V4, DGRAM, RAW)),
        pytest.param("127.0.0.7", marks=needs(V4, DGRAM, RAW)),
        pytest.param("::1", marks=needs(V6, DGRAM, RAW)),
    ],
)
async def test_a_living_host_is_healthy(host: str) -> None:
    with trio.fail_after(5):
        result = await IcmpCheck().check(Target("gw1", Endpoint(ip_address(host), 500), Framing.IKE))
    assert result.healthy
    assert result.reason == "echo reply"
    assert result.round_trip is not None
    assert 0 < result.round_trip < 1


@pytest.mark.parametrize(
    ("host", "family", "kind"),
    [
        pytest.param("127.0.0.1", V4, DGRAM, marks=needs(V4, DGRAM)),
        pytest.param("127.0.0.1", V4, RAW, marks=needs(V4, RAW)),
        pytest.param("::1", V6, DGRAM, marks=needs(V6, DGRAM)),
        pytest.param("::1", V6, RAW, marks=needs(V6, RAW)),
    ],
)
async def test_both_kinds_of_sockets_hear_their_own_reply(
    host: str, family: socket.AddressFamily, kind: socket.SocketKind
) -> None:
    with icmp.open_socket(family, (kind,)) as sock, trio.fail_after(5):
        await sock.connect((host, 0))
        await sock.send(icmp.echo_request(family, b"another token 16"))
        await sock.send(icmp.echo_request(family, TOKEN))
        # A raw socket on loopback hears the requests as well.
        packets = [await sock.recv(2_048) for _ in range(4 if kind == RAW else 2)]
    heard = [packet for packet in packets if icmp.is_reply(family, kind, packet, TOKEN)]
    assert len(heard) == 1


def test_the_request_is_a_valid_echo() -> None:
    request = icmp.echo_request(V4, TOKEN)
    assert request[:2] == b"\x08\x00"
    assert request.endswith(TOKEN)
    assert icmp.checksum(request) == 0  # RFC 1071: the sum over data with its checksum is all ones
    assert icmp.echo_request(V6, TOKEN)[:2] == b"\x80\x00"


def test_checksum_of_the_example() -> None:
    """RFC 1071 section 3."""
    assert icmp.checksum(bytes.fromhex("0001f203f4f5f6f7")) == ~0xDDF2 & 0xFFFF


@pytest.mark.parametrize("packet", [b"", b"\x45", b"\x4f" + bytes(30), b"\xff" * 40, os.urandom(200)])
@pytest.mark.parametrize("kind", [DGRAM, RAW])
@pytest.mark.parametrize("family", [V4, V6])
def test_garbage_is_no_reply(family: int, kind: int, packet: bytes) -> None:
    assert not icmp.is_reply(family, kind, packet, TOKEN)


def test_a_reply_needs_the_token_and_the_type() -> None:
    reply = b"\x00" * 8 + TOKEN
    ip_header = b"\x46" + bytes(23)
    assert icmp.is_reply(V4, DGRAM, reply, TOKEN)
    assert icmp.is_reply(V4, RAW, ip_header + reply, TOKEN)
    assert not icmp.is_reply(V4, DGRAM, b"\x08" + reply[1:], TOKEN)
    assert not icmp.is_reply(V4, DGRAM, reply[:-1], TOKEN)
    assert not icmp.is_reply(V4, DGRAM, reply, TOKEN[::-1])


async def test_without_permission_the_reason_is_clear() -> None:
    assert isinstance(IcmpCheck(), HealthCheck)
    with pytest.raises(RuntimeError, match=r"ping_group_range.*CAP_NET_RAW"):
        icmp.open_socket(V4, ())
