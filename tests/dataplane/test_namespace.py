"""What takes root: ICMP messages of routers, small MTUs, full queues, many IPv6 addresses; in a namespace of its own."""

from __future__ import annotations

import ctypes
import os
import socket
import struct
import subprocess
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
import trio

from sapin.core.dataplane import udp
from sapin.core.dataplane.batch import Batch, peer_name, peer_of
from sapin.core.dataplane.runtime import Dataplane
from tests.dataplane.conftest import GATEWAYS
from tests.dataplane.farm import (
    IKE,
    NATT,
    Client,
    Farm,
    esp,
    flow_of,
    framed,
    gateways,
    ike_message,
    running,
    settle,
)

pytestmark = [pytest.mark.root("a network namespace"), pytest.mark.programs("ip")]

CLONE_NEWNET = 0x40000000
UNREACHABLE = 3
"""ICMP type (RFC 792)."""
FRAGMENTATION_NEEDED, PROHIBITED = 4, 13
"""Its codes (RFC 792, RFC 1812 section 5.2.7.1)."""
SIX = {f"gw{number}": f"fd00::1:{number}" for number in (1, 2, 3)}


def ip(*commands: str) -> None:
    subprocess.run(["ip", "-batch", "-"], input="\n".join(commands), text=True, check=True)


@pytest.fixture
async def namespace() -> AsyncIterator[None]:
    """This thread, and the sockets that it opens, are in a namespace that ends with the test."""
    async with trio.open_nursery() as nursery:
        # Threads that trio keeps for later are made now, outside: a new one would be born in the namespace.
        for _ in range(4):
            nursery.start_soon(trio.to_thread.run_sync, time.sleep, 0.01)
    libc = ctypes.CDLL(None, use_errno=True)
    with Path("/proc/thread-self/ns/net").open() as outside:  # noqa: ASYNC230
        assert libc.unshare(CLONE_NEWNET) == 0, os.strerror(ctypes.get_errno())
        try:
            ip("link set lo up", *(f"address add {address}/128 dev lo nodad" for address in SIX.values()))
            yield
        finally:
            assert libc.setns(outside.fileno(), CLONE_NEWNET) == 0, os.strerror(ctypes.get_errno())


@pytest.fixture
async def farm(namespace: None, tmp_path: Path) -> AsyncIterator[Farm]:
    async with gateways(tmp_path / "state", GATEWAYS) as farm:
        yield farm


@pytest.fixture
async def plane(farm: Farm) -> AsyncIterator[Dataplane]:
    async with running(farm.document(persistence="ike-spi")) as plane:
        yield plane


# ICMP


def checksum(data: bytes) -> int:
    """RFC 1071."""
    total = sum(struct.unpack(f"!{len(data) // 2}H", data))
    total = (total >> 16) + (total & 0xFFFF)
    return ~(total + (total >> 16)) & 0xFFFF


def icmp(code: int, flow: tuple[str, int], endpoint: tuple[str, int], mtu: int = 0) -> bytes:
    """An ICMP "unreachable" about a datagram of the flow, as a router in between sends it."""
    addresses = socket.inet_aton(flow[0]) + socket.inet_aton(endpoint[0])
    quoted = struct.pack("!BBHHHBBH", 0x45, 0, 128, 1, 0, 64, socket.IPPROTO_UDP, 0) + addresses
    quoted += struct.pack("!HHHH", flow[1], endpoint[1], 108, 0)
    head, tail = struct.pack("!BB", UNREACHABLE, code), struct.pack("!HH", 0, mtu)
    return head + struct.pack("!H", checksum(head + tail + quoted)) + tail + quoted


@pytest.fixture
def router(namespace: None) -> Iterator[socket.socket]:
    """Sends ICMP messages of one's own making."""
    with socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP) as sock:
        yield sock


def forward(plane: Dataplane, client: Client) -> None:
    """What clients have sent goes before anything else is looked at."""
    plane.forwarder._from_clients(flow_of(plane, client).listener)


async def test_a_firewall_that_prohibits_makes_a_server_suspect_and_costs_nothing_else(
    farm: Farm, plane: Dataplane, router: socket.socket
) -> None:
    client = farm.client(NATT)
    await farm.route(client, esp(0))
    flow = flow_of(plane, client)
    address, port = flow.sock.getsockname()
    router.sendto(icmp(PROHIBITED, (address, port), flow.endpoint), (address, 0))
    client.send(data := esp(1))
    forward(plane, client)
    await settle()
    assert [seen.data for seen in farm.seen[1:]] == [data]
    assert plane.forwarder.errors == {"EHOSTUNREACH": 1}


async def test_a_smaller_mtu_on_the_way_to_a_server_costs_no_datagram(
    farm: Farm, plane: Dataplane, router: socket.socket
) -> None:
    """What is too long for the path is fragmented, as it would be without the balancer."""
    client = farm.client(NATT)
    await farm.route(client, esp(0))
    flow = flow_of(plane, client)
    address, port = flow.sock.getsockname()
    router.sendto(icmp(FRAGMENTATION_NEEDED, (address, port), flow.endpoint, 1280), (address, 0))
    sent = [esp(1), esp(2, 1400), esp(3)]
    for data in sent:
        client.send(data)
        forward(plane, client)
    await settle()
    assert [seen.data for seen in farm.seen[1:]] == sent
    assert not plane.forwarder.drops
    assert not plane.forwarder.errors


# MTU


async def test_datagrams_longer_than_the_mtu_cannot_be_segmented_and_pass_all_the_same(
    farm: Farm, plane: Dataplane
) -> None:
    ip("link set lo mtu 1500")
    client = farm.client(NATT)
    await farm.route(client, esp(0))
    flow = flow_of(plane, client)
    plane.forwarder._make_bulk(flow)
    for number in range(3):
        sent = [esp(number, 4000) for _ in range(5)] + [esp(number, size) for size in (10, 1400, 1400, 0)]
        client.send(*sent)
        assert await client.receive(len(sent)) == sent
    assert not flow.segment, "the kernel has refused"
    assert not plane.forwarder.drops


async def test_an_mtu_that_shrinks_under_a_flow_with_segments_costs_nothing(
    farm: Farm, plane: Dataplane
) -> None:
    client = farm.client(NATT)
    await farm.route(client, esp(0))
    for mtu in (65_536, 1500, 600):
        ip(f"link set lo mtu {mtu}")
        sent = [esp(number, 1000) for number in range(20)]
        client.send(*sent)
        assert await client.receive(20) == sent
    assert not plane.forwarder.drops


# full queues


async def test_what_does_not_fit_the_sockets_buffer_is_left_out(namespace: None) -> None:
    """Nobody answers ARP, so that datagrams stay in the sender's buffer."""
    ip(
        "link add here type veth peer name there",
        "link set here up",
        "link set there up",
        "address add 198.18.0.1/24 dev here",
    )
    batch = Batch(socket.AF_INET, 64, control=False)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK) as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 8192)
        name = peer_name(peer_of(socket.inet_aton("198.18.0.2"), 500))
        sent = [batch.send(sock.fileno(), [name] * 64, [1000] * 64) for _ in range(2)]
        assert 0 < sent[0] < 20, "some fit, and then no more"
        assert sent[1] == 0
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 212_992)
        assert batch.send(sock.fileno(), [name] * 64, [1000] * 64) > 20


# IPv6 with more addresses than one


@pytest.fixture
async def farm6(namespace: None, tmp_path: Path) -> AsyncIterator[Farm]:
    ip(*(f"address add fd00::{number}/128 dev lo nodad" for number in (5, 6, 7)))
    async with gateways(tmp_path / "state", SIX) as farm:
        yield farm


async def test_both_ports_of_an_ipv6_client_reach_one_gateway(farm6: Farm) -> None:
    document = farm6.document(vip="fd00::5", persistence="ike-spi", scheduler="round-robin")
    async with running(document):
        for number in range(6):
            spi = bytes([number + 1]) * 8
            natt = farm6.client(NATT, host="fd00::5")
            home, _ = await farm6.route(farm6.client(IKE, host="fd00::5"), ike_message(spi))
            assert home == f"gw{number % 3 + 1}"
            assert (await farm6.route(natt, framed(ike_message(spi))))[0] == home
            assert (await farm6.route(natt, esp(number)))[0] == home


async def test_an_ipv6_prefix_is_one_client(farm6: Farm) -> None:
    persistence = {"plugin": "source-address", "prefix6": 64}
    document = farm6.document(vip="fd00::5", persistence=persistence, scheduler="round-robin")
    async with running(document):
        reached = {
            (await farm6.route(farm6.client(NATT, host="fd00::5", source=source), esp(number)))[0]
            for number, source in enumerate(["fd00::6", "fd00::7", "fd00::1:1"])
        }
        assert len(reached) == 1
        assert (await farm6.route(farm6.client(NATT, host="fd00::5", source="::1"), esp(9)))[0] not in reached


async def test_the_ipv6_wildcard_answers_from_each_local_address(namespace: None, tmp_path: Path) -> None:
    ip(*(f"address add fd00::{number}/128 dev lo nodad" for number in (5, 6)))
    both = {"gw4": "127.9.1.1", "gw6": "fd00::1:1"}
    async with (
        gateways(tmp_path / "state", both, apart=True) as farm,
        running(farm.document(vip="::")) as plane,
    ):
        for host in ("fd00::5", "fd00::6", "::1", "127.0.0.5"):
            client = farm.client(NATT, host=host)
            for number in range(3):
                client.send_segmented(data := os.urandom(950), 100)
                assert b"".join(await client.receive(10)) == data, number
            home, _ = await farm.route(client, esp())
            assert home == ("gw6" if ":" in host else "gw4")
        assert not plane.forwarder.drops


async def test_bulk_over_ipv6_keeps_boundaries(farm6: Farm) -> None:
    async with running(farm6.document(vip="fd00::5")) as plane:
        client = farm6.client(NATT, host="fd00::5")
        home, upstream = await farm6.route(client, esp())
        for _ in range(udp.BULK // 50 + 2):
            sent = [os.urandom(size) for size in (1200, 1200, 1200, 80, 0) * 10]
            for data in sent:
                await farm6.gateways[home].socks[NATT].sendto(data, ("fd00::1:1", upstream))
            assert await client.receive(50) == sent
        assert flow_of(plane, client).bulk
