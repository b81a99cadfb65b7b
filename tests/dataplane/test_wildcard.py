"""Services on the wildcard address: the answer comes from the very address that the client sent to."""

from __future__ import annotations

import os
import socket
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from sapin.core.dataplane import listeners, udp
from sapin.core.dataplane.runtime import Dataplane
from tests.dataplane.farm import (
    IKE,
    NATT,
    Farm,
    esp,
    flow_of,
    framed,
    free_ports,
    gateways,
    ike_message,
    no_descriptor,
    running,
    settle,
)

LOCALS = ["127.0.0.1", "127.0.0.5", "127.0.0.6"]


@pytest.fixture
async def farm(tmp_path: Path) -> AsyncIterator[Farm]:
    addresses = {"gw1": "127.9.1.1", "gw2": "127.9.1.2", "gw6": "::1"}
    async with gateways(tmp_path / "state", addresses, apart=True) as farm:
        yield farm


@pytest.fixture
async def plane(farm: Farm) -> AsyncIterator[Dataplane]:
    """Dual stack."""
    async with running(farm.document(vip="::", persistence="ike-spi", scheduler="round-robin")) as plane:
        yield plane


async def test_the_ipv4_wildcard_answers_from_each_local_address(farm: Farm) -> None:
    document = farm.document(vip="0.0.0.0")
    del document["virtual_services"][0]["real_servers"][2]
    async with running(document) as plane:
        for host in LOCALS:
            for service, data in ((IKE, ike_message(b"a_client")), (NATT, esp(1)), (NATT, b"\xff")):
                client = farm.client(service, host=host)
                for _ in range(3):
                    assert await client.ask(data) == data
        assert not plane.forwarder.drops
        bound = {str(listener.address) for listener in plane.forwarder.listeners}
        assert bound == {"0.0.0.0", *LOCALS}


@pytest.mark.parametrize("host", [*LOCALS, "::1"])
async def test_the_ipv6_wildcard_is_dual_stack(farm: Farm, plane: Dataplane, host: str) -> None:
    client = farm.client(NATT, host=host)
    for number in range(3):
        data = esp(number)
        assert await client.ask(data) == data
        version = 6 if ":" in farm.gateways[farm.where(data).gateway].address else 4
        assert version == (6 if ":" in host else 4), "clients reach servers of their own family"
    assert flow_of(plane, client).listener.wildcard is False


async def test_one_port_at_two_local_addresses_is_two_flows(farm: Farm, plane: Dataplane) -> None:
    (port,) = free_ports(1)
    first = farm.client(NATT, host="127.0.0.5", source="127.0.0.1", source_port=port)
    second = farm.client(NATT, host="127.0.0.6", source="127.0.0.1", source_port=port)
    for number in range(2):
        for client in (first, second):
            data = esp(number)
            assert await client.ask(data) == data
    assert len({seen.upstream for seen in farm.seen}) == 2


async def test_a_burst_before_the_address_has_its_socket_is_answered_in_order(
    farm: Farm, plane: Dataplane
) -> None:
    """The first datagrams wait in the wildcard's own socket."""
    client, other = farm.client(NATT, host="127.0.0.5"), farm.client(NATT, host="::1")
    sent = [esp(number, number) for number in range(200)]
    client.send(*sent)
    other.send(*sent)
    assert await client.receive(200) == sent
    assert await other.receive(200) == sent


async def test_merged_datagrams_reach_a_wildcard_too(farm: Farm, plane: Dataplane) -> None:
    for host in ("127.0.0.5", "::1"):
        client = farm.client(NATT, host=host)
        for _ in range(2):
            data = os.urandom(1050)
            client.send_segmented(data, 100)
            assert await client.receive(11) == [data[at : at + 100] for at in range(0, 1050, 100)]


async def test_a_roaming_client_keeps_its_server_within_its_family_only(farm: Farm, plane: Dataplane) -> None:
    message = framed(ike_message(b"roaming!"))
    home, _ = await farm.route(farm.client(NATT, host="127.0.0.5"), message)
    away, _ = await farm.route(farm.client(NATT, host="127.0.0.6", source="127.9.9.9"), message)
    assert home == away
    six, _ = await farm.route(farm.client(NATT, host="::1"), message)
    assert six == "gw6"


async def test_without_a_server_of_its_family_a_client_is_dropped(farm: Farm) -> None:
    document = farm.document(vip="::")
    del document["virtual_services"][0]["real_servers"][2]
    async with running(document) as plane:
        farm.client(IKE, host="::1").send(ike_message(b"a_client"))
        await settle()
        assert plane.forwarder.drops == {"no-server": 1}
        assert (await farm.route(farm.client(IKE, host="127.0.0.5"), ike_message(b"a_client")))[0] != "gw6"


async def test_so_many_local_addresses_and_no_more(
    farm: Farm, plane: Dataplane, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(udp, "MAX_LOCALS", 5)
    clients = [farm.client(NATT, host=f"127.9.6.{number}") for number in range(1, 7)]
    for client in clients:
        client.send(esp())
    await settle()
    assert plane.forwarder.drops == {"no-local-address": 3}, "two sockets are the wildcards' own"
    for client in clients[:3]:
        await client.receive()
        data = esp()
        assert await client.ask(data) == data
    assert not plane.failures


async def test_other_services_are_not_counted_among_the_local_addresses(
    farm: Farm, plane: Dataplane, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(udp, "MAX_LOCALS", 3)
    for service, data in ((IKE, ike_message(b"a_client")), (NATT, framed(ike_message(b"a_client")))):
        await farm.route(farm.client(service, host="127.0.0.5"), data)


async def test_a_local_address_that_another_program_has_stays_its_own(farm: Farm, plane: Dataplane) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as other:
        other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        other.bind(("127.0.0.7", farm.ports[NATT]))
        other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 0)
        other.settimeout(5)
        farm.client(NATT, host="127.0.0.7").send(b"for the other")
        assert other.recv(100) == b"for the other"
        (wildcard,) = [
            each
            for each in plane.forwarder.listeners
            if each.wildcard and each.family == socket.AF_INET and each.service.name == NATT
        ]
        with pytest.raises(listeners.ListenError, match="another program"):
            listeners.Listener(wildcard.service, listeners.ip_address("127.0.0.7"), 4096, wildcard.counters)


async def test_no_descriptor_for_a_local_address_is_a_drop(farm: Farm, plane: Dataplane) -> None:
    client = farm.client(NATT, host="127.0.0.5")
    with no_descriptor():
        client.send(esp())
        await settle()
    assert plane.forwarder.drops == {"no-local-address": 1}
    assert not plane.failures
    data = esp()
    assert await client.ask(data) == data
