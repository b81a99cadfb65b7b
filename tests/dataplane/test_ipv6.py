"""The same over IPv6: sizes, segmentation, errors, and a restart."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from pathlib import Path
from random import Random

import pytest

from sapin.core.dataplane import udp
from sapin.core.dataplane.runtime import Dataplane
from tests.dataplane.farm import (
    IKE,
    NATT,
    Farm,
    esp,
    flow_of,
    framed,
    gateways,
    ike_message,
    running,
    settle,
)

SIZES = [0, 1, 1452, 1453, 9000, 65_527]
"""An Ethernet MTU just filled and just missed, a jumbo frame's payload, the most that IPv6 allows."""


@pytest.fixture
async def farm(tmp_path: Path) -> AsyncIterator[Farm]:
    async with gateways(tmp_path / "state", {"gw6": "::1"}, apart=True) as farm:
        yield farm


@pytest.fixture
async def plane(farm: Farm) -> AsyncIterator[Dataplane]:
    async with running(farm.document(vip="::1", persistence="ike-spi")) as plane:
        yield plane


async def test_every_size_passes_both_ways_byte_for_byte(farm: Farm, plane: Dataplane) -> None:
    random = Random(7)
    client = farm.client(IKE, host="::1")
    for size in SIZES:
        data = random.randbytes(size)
        assert await client.ask(data) == data
    assert [len(seen.data) for seen in farm.seen] == SIZES
    assert not plane.forwarder.drops


async def test_flows_keep_their_order_and_their_clients_apart(farm: Farm, plane: Dataplane) -> None:
    clients = [farm.client(NATT, host="::1") for _ in range(20)]
    sent = [[esp(number, number % 3) for number in range(20)] for _ in clients]
    for number in range(20):
        for client, datagrams in zip(clients, sent, strict=True):
            client.send(datagrams[number])
    for client, datagrams in zip(clients, sent, strict=True):
        assert await client.receive(20) == datagrams
    assert len(plane.forwarder.flows) == 20


async def test_segmented_datagrams_are_the_same_ones(farm: Farm, plane: Dataplane) -> None:
    client = farm.client(NATT, host="::1")
    await farm.route(client, b"\xff")
    data = os.urandom(1000 * 60 + 5)
    expected = [data[at : at + 1000] for at in range(0, len(data), 1000)]
    for _ in range(udp.BULK // 60 + 2):
        client.send_segmented(data, 1000)
        assert await client.receive(61) == expected
    assert [seen.data for seen in farm.seen[-61:]] == expected


async def test_bulk_from_the_server(farm: Farm, plane: Dataplane) -> None:
    client = farm.client(NATT, host="::1")
    _, upstream = await farm.route(client, b"\xff")
    sock = farm.gateways["gw6"].socks[NATT]
    for _ in range(udp.BULK // 40 + 3):
        sent = [os.urandom(size) for size in (0, 1, 700, 700, 700, 1400) * 7]
        for data in sent:
            await sock.sendto(data, ("::1", upstream))
        assert await client.receive(len(sent)) == sent
    assert flow_of(plane, client).bulk


async def test_a_refusal_is_counted_and_the_flow_goes_on(farm: Farm, plane: Dataplane) -> None:
    client = farm.client(NATT, host="::1")
    home = await farm.route(client, framed(ike_message(b"a_client")))
    farm.gateways["gw6"].stop()
    client.send(esp(1))
    await settle()
    assert plane.forwarder.errors == {"ECONNREFUSED": 1}
    farm.start("gw6")
    assert await farm.route(client, esp(2)) == home


async def test_a_restart_restores_flows(farm: Farm) -> None:
    document = farm.document(vip="::1", persistence="ike-spi")
    async with running(document):
        client = farm.client(NATT, host="::1")
        home = await farm.route(client, framed(ike_message(b"a_client")))
    async with running(document) as plane:
        assert flow_of(plane, client).port == home[1]
        assert await farm.route(client, esp()) == home
