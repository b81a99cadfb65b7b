"""Datagrams that the kernel merges on the way in and cuts on the way out are the same ones at the far end."""

from __future__ import annotations

import socket
import struct
from collections.abc import AsyncIterator
from random import Random

import pytest

from sapin.core.dataplane import listeners, udp
from sapin.core.dataplane.runtime import Dataplane
from tests.dataplane.farm import (
    IKE,
    NATT,
    SOL_UDP,
    UDP_SEGMENT,
    Client,
    Farm,
    esp,
    flow_of,
    framed,
    ike_message,
    running,
    settle,
)

GSO_SIZES = [(1000, 64), (1, 64), (1472, 44), (333, 7), (1400, 1)]
"""Size and number of datagrams in one send."""


@pytest.fixture
async def plane(farm: Farm) -> AsyncIterator[Dataplane]:
    async with running(farm.document(persistence="ike-spi")) as plane:
        yield plane


def cut(data: bytes, size: int) -> list[bytes]:
    return [data[at : at + size] for at in range(0, len(data), size)]


async def answer_segmented(farm: Farm, client: Client, data: bytes, size: int) -> None:
    """Have the client's gateway send datagrams of that size in one call."""
    seen = next(seen for seen in reversed(farm.seen) if seen.service == IKE)
    sock = farm.gateways[seen.gateway].socks[IKE]
    control = [(SOL_UDP, UDP_SEGMENT, struct.pack("H", size))]
    await sock.sendmsg([data], control, 0, ("127.0.0.1", seen.upstream))


async def make_bulk(farm: Farm, plane: Dataplane, client: Client) -> None:
    """Have the server send until its flow is read in batches."""
    await farm.route(client, b"hello")
    for _ in range(udp.BULK // 64 + 1):
        await answer_segmented(farm, client, bytes(64 * 100), 100)
        assert await client.receive(64) == [bytes(100)] * 64
    assert flow_of(plane, client).bulk


@pytest.mark.parametrize(("size", "number"), GSO_SIZES)
@pytest.mark.parametrize("tail", [0, 1])
async def test_a_client_with_gso_reaches_a_server_without_gro(
    farm: Farm, plane: Dataplane, size: int, number: int, tail: int
) -> None:
    """The gateways' sockets do not ask for merged datagrams, and get none."""
    client = farm.client(NATT)
    await farm.route(client, b"\xff")
    data = Random(size).randbytes(size * number + min(tail, size - 1))
    client.send_segmented(data, size)
    expected = cut(data, size)
    assert await client.receive(len(expected)) == expected
    assert [seen.data for seen in farm.seen[1:]] == expected
    assert flow_of(plane, client).segment, "it was segmented by the kernel, not one by one"


async def test_datagrams_of_mixed_sizes_and_flows_in_one_batch_stay_what_they_were(
    farm: Farm, plane: Dataplane
) -> None:
    random = Random(5)
    clients = [farm.client(NATT, source=f"127.9.3.{n}") for n in range(1, 5)]
    sent: dict[Client, list[bytes]] = {client: [] for client in clients}
    for _ in range(8):
        round_begins = {client: len(sent[client]) for client in clients}
        for _ in range(12):
            client = random.choice(clients)
            size = random.choice((1, 64, 64, 900, 1300))
            if random.random() < 0.4:
                data = random.randbytes(size * random.randrange(1, 7) + random.randrange(size))
                client.send_segmented(data, size)
                sent[client] += cut(data, size)
            else:
                sent[client].append(random.randbytes(random.choice((0, size))))
                client.send(sent[client][-1])
        for client, begin in round_begins.items():
            assert await client.receive(len(sent[client]) - begin) == sent[client][begin:]
    for client in clients:
        flow = flow_of(plane, client)
        assert [seen.data for seen in farm.seen if seen.upstream == flow.port] == sent[client]


async def test_equal_datagrams_that_came_singly_arrive_singly(farm: Farm, plane: Dataplane) -> None:
    client = farm.client(NATT)
    sent = [esp(number) for number in range(100)]
    client.send(*sent)
    assert await client.receive(100) == sent
    assert [seen.data for seen in farm.seen] == sent


async def test_ike_in_a_merged_datagram_decides_like_any_other(farm: Farm, plane: Dataplane) -> None:
    client = farm.client(NATT)
    message = framed(ike_message(b"merged!!"))
    client.send_segmented(message * 3, len(message))
    assert await client.receive(3) == [message] * 3
    assert plane.snapshot.groups[IKE].table.get(b"spi:merged!!") is not None


async def test_a_server_with_gso_reaches_a_client_without_gro(farm: Farm, plane: Dataplane) -> None:
    client = farm.client(IKE)
    await farm.route(client, b"hello")
    for size, number in GSO_SIZES:
        data = Random(size).randbytes(size * number)
        await answer_segmented(farm, client, data, size)
        assert await client.receive(number) == cut(data, size)


async def test_bulk_from_a_server_keeps_the_boundaries_of_datagrams(farm: Farm, plane: Dataplane) -> None:
    client = farm.client(IKE)
    await make_bulk(farm, plane, client)
    for size, number in GSO_SIZES:
        data = Random(size).randbytes(size * number + min(1, size - 1))
        await answer_segmented(farm, client, data, size)
        expected = cut(data, size)
        assert await client.receive(len(expected)) == expected
    assert flow_of(plane, client).segment


async def test_single_datagrams_of_all_sizes_in_bulk_stay_what_they_were(
    farm: Farm, plane: Dataplane
) -> None:
    client = farm.client(IKE)
    await make_bulk(farm, plane, client)
    random = Random(3)
    for _ in range(6):
        sent = [random.randbytes(random.choice((0, 0, 1, 100, 100, 100, 1472, 9000))) for _ in range(40)]
        client.send(*sent)
        assert await client.receive(len(sent)) == sent
    data = random.randbytes(65_507)
    assert await client.ask(data) == data


async def test_a_flow_that_turns_to_bulk_in_the_middle_loses_nothing(farm: Farm, plane: Dataplane) -> None:
    client = farm.client(IKE)
    gateway, upstream = await farm.route(client, b"hello")
    sent = [b"%d" % number for number in range(udp.BULK + 100)]
    sock = farm.gateways[gateway].socks[IKE]
    for at in range(0, len(sent), 50):
        for data in sent[at : at + 50]:
            await sock.sendto(data, ("127.0.0.1", upstream))
        assert await client.receive(len(sent[at : at + 50])) == sent[at : at + 50]
    assert flow_of(plane, client).bulk


async def test_a_flow_without_segmentation_sends_one_by_one(farm: Farm, plane: Dataplane) -> None:
    """As after the kernel or the path refused to segment it."""
    client = farm.client(IKE)
    await make_bulk(farm, plane, client)
    flow_of(plane, client).segment = False
    data = Random(1).randbytes(20 * 500 + 7)
    client.send_segmented(data, 500)
    assert await client.receive(21) == cut(data, 500)
    await answer_segmented(farm, client, data, 500)
    assert await client.receive(21) == cut(data, 500)


async def test_a_kernel_without_gro_is_served_too(farm: Farm, monkeypatch: pytest.MonkeyPatch) -> None:
    """Linux before 5.0 does not know the option."""
    unknown = 9_999
    with (
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock,
        pytest.raises(OSError, match="not available"),
    ):
        sock.setsockopt(SOL_UDP, unknown, 1)
    monkeypatch.setattr(listeners, "UDP_GRO", unknown)
    async with running(farm.document()):
        client = farm.client(IKE)
        client.send_segmented(b"x" * 1000, 100)
        assert await client.receive(10) == [b"x" * 100] * 10


async def test_a_kernel_without_gro_serves_bulk_too(
    farm: Farm, plane: Dataplane, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = farm.client(IKE)
    await farm.route(client, b"hello")
    monkeypatch.setattr(udp, "UDP_GRO", 9_999)
    plane.forwarder._make_bulk(flow_of(plane, client))
    await answer_segmented(farm, client, bytes(1000), 100)
    assert await client.receive(10) == [bytes(100)] * 10


async def test_datagrams_of_one_batch_whose_client_moves_in_between_all_arrive(
    farm: Farm, plane: Dataplane
) -> None:
    """Behind a NAT where all clients have one port: two SPIs of two gateways on one tuple."""
    group = plane.snapshot.groups[IKE]
    for spi, server in ((b"spi_one!", "gw1"), (b"spi_two!", "gw2")):
        group.table.put([b"spi:" + spi], group.members[server], plane.started)
    client = farm.client(NATT)
    sent = [framed(ike_message(spi)) for spi in (b"spi_one!", b"spi_two!")]
    client.send(*sent)
    await settle()
    assert {(seen.gateway, seen.data) for seen in farm.seen} == {("gw1", sent[0]), ("gw2", sent[1])}
