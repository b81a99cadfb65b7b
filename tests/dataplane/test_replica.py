"""A standby has what the active has: pins, flows, health and admin states; from the stream, or from a snapshot."""

from __future__ import annotations

import os
import socket
from collections.abc import MutableMapping, Sequence
from typing import Any

import pytest
import trio

from sapin.core.dataplane import reopening
from sapin.core.dataplane import replica as replicas
from sapin.core.dataplane.runtime import Dataplane
from sapin.core.journal import FlowClosed, FlowOpened, Replicated, ServerAdmin, ServerHealth, Touched
from sapin.core.model import AdminState, Health
from sapin.core.pins import Cause, Cleared, Put, Removed
from sapin.core.snapshot import Member
from tests.dataplane.farm import (
    IKE,
    NATT,
    Client,
    Farm,
    esp,
    eventually,
    flow_of,
    framed,
    ike_message,
    no_descriptor,
    settle,
)
from tests.dataplane.twins import (
    SOURCES,
    Stream,
    again,
    document,
    outlet,
    plane_of,
    replica,
    running,
    same,
    snapshot,
    twins,
)


def pins(plane: Dataplane) -> set[tuple[Any, ...]]:
    found = plane.snapshot.groups[IKE].table.pins(0, 10_000).pins
    return {(pin.keys, pin.server, pin.since) for pin in found}


def member(plane: Dataplane, server: str) -> Member:
    return plane.snapshot.groups[IKE].members[server]


def opened(number: int, port: int, server: str = "gw1", service: str = IKE) -> FlowOpened:
    """A flow of some client of the peer."""
    client = socket.inet_aton(f"192.0.2.{number}")
    return FlowOpened(service, client, 500, b"", server, b"", port, b"", 1)


async def test_a_client_goes_on_through_the_standby(farm: Farm) -> None:
    async with twins(farm) as (active, standby, _):
        ike, natt, spi = farm.client(), farm.client(NATT), os.urandom(8)
        home, port = await farm.route(ike, ike_message(spi))
        assert (await farm.route(natt, framed(ike_message(spi))))[0] == home
        there = await farm.route(natt, esp())
        await settle()
        assert pins(standby) == pins(active)
        assert len(standby.forwarder.flows) == len(active.forwarder.flows) == 2
        assert same(active, standby)
        active.deactivate()
        standby.activate()
        assert await farm.route(again(farm, natt, NATT), esp()) == there
        assert await farm.route(again(farm, ike), ike_message(spi)) == (home, port)
        assert len(standby.forwarder.flows) == 2


async def test_upstream_sockets_are_at_the_floating_address(farm: Farm) -> None:
    async with twins(farm) as (active, standby, stream):
        client = farm.client()
        await farm.route(client, ike_message(os.urandom(8)))
        await settle()
        for number, plane in enumerate((active, standby)):
            assert flow_of(plane, client).sock.getsockname()[0] == SOURCES[number]
        assert stream.records[-1].upstream == socket.inet_aton(SOURCES[0])  # type: ignore[union-attr]


async def test_what_goes_here_goes_there(farm: Farm) -> None:
    async with twins(farm) as (active, standby, _):
        clients = [farm.client(source=f"127.0.1.{number}") for number in range(4)]
        for client in clients:
            await farm.route(client, ike_message(os.urandom(8)))
        group = active.snapshot.groups[IKE]
        active.delete_pins([(group, flow_of(active, clients[0]).key)])
        active.forwarder.flows.close(flow_of(active, clients[1]))
        outlet(active).flush()
        await settle()
        assert len(standby.forwarder.flows) == len(active.forwarder.flows) == 2
        assert pins(standby) == pins(active)
        assert len(pins(active)) == 3
        assert same(active, standby)


async def test_health_and_admin_states_follow(farm: Farm) -> None:
    async with twins(farm, checks=["udp"]) as (active, standby, _):
        active.writer.set_health(IKE, "gw1", Health.UNHEALTHY, AdminState.DRAINING, 50)
        active.set_admin(IKE, "gw2", AdminState.DRAINING)
        one, two = member(standby, "gw1"), member(standby, "gw2")
        assert (one.health, one.asked, one.share) == (Health.UNHEALTHY, AdminState.DRAINING, 50)
        assert (two.health, two.admin) == (Health.UNKNOWN, AdminState.DRAINING)
        assert (one.keeps, two.keeps, two.takes) == (False, True, False)
    async with running(plane_of(document(farm, 1), 1)) as restarted:
        assert member(restarted, "gw2").admin is AdminState.DRAINING


async def test_admin_states_are_saved_once_for_all_and_hold_even_where_that_fails(
    farm: Farm, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []

    def fail() -> None:
        calls.append(1)
        raise OSError(28, "No space left on device")

    async with running(plane_of(document(farm, 1), 1)) as standby:
        monkeypatch.setattr(replica(standby), "_saved", fail)
        replica(standby).apply([ServerAdmin(IKE, name, "draining") for name in ("gw1", "gw2", "gw3")])
        assert {each.admin for each in standby.snapshot.groups[IKE].members.values()} == {AdminState.DRAINING}
        assert calls == [1]
        assert replica(standby).strange == {"admin states not saved: No space left on device": 1}


async def test_a_server_that_fails_loses_its_clients_on_both(farm: Farm) -> None:
    async with twins(farm) as (active, standby, _):
        home, _ = await farm.route(farm.client(), ike_message(os.urandom(8)))
        active.writer.set_health(IKE, home, Health.UNHEALTHY, AdminState.ENABLED, 100)
        await settle()
        assert pins(active) == pins(standby) == set()
        await eventually(lambda: not len(standby.forwarder.flows) + len(standby.reopener))
        assert same(active, standby)


async def test_a_snapshot_makes_any_standby_the_same(farm: Farm) -> None:
    async with twins(farm) as (active, standby, stream):
        clients = [farm.client(source=f"127.0.1.{number}") for number in range(6)]
        for client in clients[:4]:
            await farm.route(client, ike_message(os.urandom(8)))
        await settle()
        stream.sink = None  # away for a while
        for client in clients[4:]:
            await farm.route(client, ike_message(os.urandom(8)))
        active.delete_pins([(active.snapshot.groups[IKE], flow_of(active, clients[0]).key)])
        active.set_admin(IKE, "gw3", AdminState.DRAINING)
        replica(standby).apply([opened(9, 17_000), Put(IKE, (b"src:gone",), "gw2", 5)])
        await settle()
        assert not same(active, standby)
        snapshot(active, standby)
        assert same(active, standby)
        await settle()
        assert same(active, standby)
        assert pins(standby) == pins(active)
        ports = {flow.port for flow in active.forwarder.flows}
        assert {flow.port for flow in standby.forwarder.flows} == ports
        assert member(standby, "gw3").admin is AdminState.DRAINING


async def test_a_snapshot_may_be_mixed_with_changes(farm: Farm) -> None:
    async with twins(farm) as (active, standby, stream):
        stream.sink = None
        group = active.snapshot.groups[IKE]
        for number in range(700):
            group.table.put([b"src:%d" % number], group.members["gw1"], 1)
        outlet(active).flush()
        stream.sink = standby
        replica(standby).begin()
        for chunk in replica(active).walk():
            replica(standby).apply(chunk)
            for number in (0, 350, 699):
                group.table.put([b"src:%d" % number], group.members["gw2"], 2)
                group.table.remove(b"src:%d" % (number ^ 1))
            await farm.route(farm.client(), ike_message(os.urandom(8)))
        while not replica(standby).finish():
            group.table.put([b"src:1000"], group.members["gw3"], 3)
            outlet(active).flush()
        assert pins(standby) == pins(active)
        assert same(active, standby)


async def test_what_a_snapshot_removes_is_gone_after_a_restart_too(farm: Farm) -> None:
    async with running(plane_of(document(farm, 1), 1)) as standby:
        replica(standby).apply([Put(IKE, (b"src:1",), "gw1", 5), Put(IKE, (b"src:2",), "gw1", 5)])
        replica(standby).apply([opened(1, 17_001), opened(2, 17_002, "gw2")])
        await settle()
        replica(standby).begin()
        replica(standby).apply([Put(IKE, (b"src:2",), "gw1", 5), opened(2, 17_002, "gw2")])
        while not replica(standby).finish():
            pass
        before = replica(standby).digest()
    async with running(plane_of(document(farm, 1), 1)) as standby:
        await settle()
        assert [pin[0] for pin in pins(standby)] == [(b"src:2",)]
        assert [flow.port for flow in standby.forwarder.flows] == [17_002]
        assert replica(standby).digest() == before


async def test_no_checkpoint_is_written_while_a_snapshot_comes_in(
    farm: Farm, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would be most of the work, and have to be written again; but a peer that goes away must not put it off for ever."""
    async with running(plane_of(document(farm, 1), 1)) as standby:
        monkeypatch.setattr(standby.store, "_checkpoint_at", 0)
        replica(standby).begin()
        replica(standby).apply([Put(IKE, (b"src:1",), "gw1", 5)])
        assert replica(standby).receiving
        await trio.sleep(1.2)
        assert standby.store.statistics.checkpoints == 0
        clock = standby.clock
        monkeypatch.setattr(replica(standby), "_clock", lambda: clock() + replicas.PATIENCE)
        await eventually(lambda: standby.store.statistics.checkpoints > 0)
        while not replica(standby).finish():
            pass
        assert not replica(standby).receiving
        assert not pins(standby) - {((b"src:1",), "gw1", 5)}


# flows that cannot be opened


async def test_a_flow_whose_port_is_taken_waits_and_is_opened_when_it_is_free(
    farm: Farm, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reopening, "RETRY", 0.05)
    made = document(farm, 1)
    async with running(plane_of(made, 1)) as standby:
        flow = opened(1, 17_003)
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as other:
            other.bind((SOURCES[1], 17_003))
            replica(standby).apply([flow])
            digest = replica(standby).digest()
            await settle()
            assert (len(standby.forwarder.flows), len(standby.reopener)) == (0, 1)
            assert flow in [record for chunk in standby._live() for record in chunk]
            assert flow in [record for chunk in replica(standby).walk() for record in chunk]
        await eventually(lambda: len(standby.forwarder.flows) == 1)
        assert len(standby.reopener) == 0
        assert replica(standby).digest() == digest


async def test_a_flow_waits_through_a_restart(farm: Farm) -> None:
    made = document(farm, 1)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as other:
        other.bind((SOURCES[1], 17_004))
        async with running(plane_of(made, 1)) as standby:
            replica(standby).apply([opened(1, 17_004)])
            digest = replica(standby).digest()
        async with running(plane_of(made, 1)) as standby:
            assert (len(standby.forwarder.flows), len(standby.reopener)) == (0, 1)
            assert replica(standby).digest() == digest
            replica(standby).apply([FlowClosed(*opened(1, 17_004)[:4])])
            assert replica(standby).digest() == 0
    async with running(plane_of(made, 1)) as standby:
        assert (len(standby.forwarder.flows), len(standby.reopener)) == (0, 0)


async def test_a_dormant_flow_is_opened_for_its_client(farm: Farm, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reopening, "RETRY", 1_000)
    async with running(plane_of(document(farm, 1), 1)) as standby:
        client = farm.client(host="127.9.0.5", source="127.0.0.1")
        key = b"src:" + socket.inet_aton("127.0.0.1")
        flow = FlowOpened(IKE, socket.inet_aton("127.0.0.1"), client.port, b"", "gw2", b"", 17_005, key, 1)
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as other:
            other.bind((SOURCES[1], 17_005))
            replica(standby).apply([Put(IKE, (key,), "gw2", 1), flow])
            await settle()
        standby.activate()
        assert await farm.route(client, ike_message(os.urandom(8))) == ("gw2", 17_005)


async def test_a_client_whose_flow_cannot_be_opened_is_decided_anew_by_its_pin(farm: Farm) -> None:
    async with running(plane_of(document(farm, 1), 1)) as standby:
        client = farm.client(host="127.9.0.5", source="127.0.0.1")
        key = b"src:" + socket.inet_aton("127.0.0.1")
        flow = FlowOpened(IKE, socket.inet_aton("127.0.0.1"), client.port, b"", "gw2", b"", 17_006, key, 1)
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as other:
            other.bind((SOURCES[1], 17_006))
            replica(standby).apply([Put(IKE, (key,), "gw2", 1), flow])
            standby.activate()
            stream = Stream(standby)
            gateway, port = await farm.route(client, ike_message(os.urandom(8)))
            assert gateway == "gw2"
            assert port != 17_006
            assert [type(record) for record in stream.records] == [FlowClosed, FlowOpened]
            assert len(standby.reopener) == 0


async def test_a_dormant_flow_that_nobody_uses_is_forgotten(
    farm: Farm, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reopening, "RETRY", 0.05)
    async with running(plane_of(document(farm, 1), 1)) as standby:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as other:
            other.bind((SOURCES[1], 17_007))
            replica(standby).apply([opened(1, 17_007)])
            await settle()
            standby.activate()
            stream = Stream(standby)
            await settle()
            assert len(standby.reopener) == 1
            clock = standby.clock
            monkeypatch.setattr(standby.reopener, "_clock", lambda: clock() + 3_601)
            await eventually(lambda: len(standby.reopener) == 0)
            assert stream.records == [FlowClosed(*opened(1, 17_007)[:4])]


async def test_two_flows_of_the_peer_never_share_an_upstream_port(farm: Farm) -> None:
    """The kernel would give the answers of both to one of them."""
    async with running(plane_of(document(farm, 1), 1)) as standby:
        replica(standby).apply([opened(1, 17_008), opened(2, 17_008), opened(3, 17_008, "gw2")])
        await settle()
        assert {flow.member.name for flow in standby.forwarder.flows} == {"gw1", "gw2"}
        assert len(standby.reopener) == 1
        replica(standby).apply([FlowClosed(*opened(1, 17_008)[:4])])
        standby.activate()
        await eventually(lambda: len(standby.reopener) == 0)


async def test_a_port_of_the_peer_is_not_given_to_a_new_client(farm: Farm) -> None:
    async with running(plane_of(document(farm, 1), 1)) as standby:
        standby.activate()
        first = farm.client(host="127.9.0.5", source="127.0.1.1")
        home, port = await farm.route(first, ike_message(os.urandom(8)))
        standby.deactivate()
        replica(standby).apply([opened(1, port + 1, home), FlowClosed(IKE, b"nobody", 1, b"")])
        await settle()
        standby.activate()
        for number in range(2, 8):
            client = farm.client(host="127.9.0.5", source=f"127.0.1.{number}")
            assert (await farm.route(client, ike_message(os.urandom(8))))[1] != port + 1


async def test_a_flow_that_moved_is_opened_where_it_is_now(farm: Farm) -> None:
    async with running(plane_of(document(farm, 1), 1)) as standby:
        replica(standby).apply([opened(1, 17_010)])
        await settle()
        replica(standby).apply([opened(1, 17_011, "gw3")])
        await settle()
        (flow,) = standby.forwarder.flows
        assert (flow.member.name, flow.port) == ("gw3", 17_011)


async def test_a_node_with_fewer_descriptors_says_so(
    farm: Farm, logs: list[MutableMapping[str, Any]]
) -> None:
    async with running(plane_of(document(farm, 1), 1)) as standby:
        with no_descriptor():
            replica(standby).apply([opened(number, 17_100 + number) for number in range(40)])
            await settle()
        assert (len(standby.forwarder.flows), len(standby.reopener)) == (0, 40)
        (told,) = [each for each in logs if "cannot open all flows" in each["event"]]
        assert (told["short_of"], told["dormant"]) == ("file descriptors", 40)


async def test_a_node_with_a_lower_limit_is_bounded(farm: Farm, logs: list[MutableMapping[str, Any]]) -> None:
    made = document(farm, 1)
    made["node"]["max_flows"] = 10
    async with running(plane_of(made, 1)) as standby:
        replica(standby).apply([opened(number, 17_100 + number) for number in range(40)])
        await settle()
        assert (len(standby.forwarder.flows), len(standby.reopener)) == (10, 10)
        assert replica(standby).strange == {"more flows than max_flows": 20}
        assert [each["short_of"] for each in logs if "cannot open" in each["event"]] == ["max_flows"]


# what is odd


@pytest.mark.parametrize(
    "records",
    [
        [Put("nobody", (b"src:1",), "gw1", 1)],
        [Put(IKE, (), "gw1", 1)],
        [Put(IKE, (b"",), "gw1", 1)],
        [Put(IKE, (b"x" * 256,), "gw1", 1)],
        [Touched("nobody", (b"src:1",))],
        [ServerHealth(IKE, "gw1", "dead", "enabled", 100)],
        [ServerAdmin(IKE, "gw1", "asleep")],
        [ServerAdmin(IKE, "gw9", "draining")],
        [opened(1, 0)],
        [opened(1, 70_000)],
    ],
)
async def test_what_makes_no_sense_is_counted_and_costs_nothing_else(
    farm: Farm, records: Sequence[Replicated]
) -> None:
    fine: list[Replicated] = [Put(IKE, (b"src:2",), "gw1", 1), opened(2, 17_012)]
    async with running(plane_of(document(farm, 1), 1)) as standby:
        replica(standby).apply([fine[0], *records, fine[1]])
        await settle()
        assert sum(replica(standby).strange.values()) == 1
        assert (len(pins(standby)), len(standby.forwarder.flows)) == (1, 1)


@pytest.mark.parametrize(
    "record",
    [
        opened(1, 17_013, server="gw9"),
        opened(1, 17_013, service="nobody"),
        opened(1, 17_013)._replace(client=b"abc"),
        opened(1, 17_013)._replace(local=b"abcd"),
        FlowClosed(IKE, b"abc", 500, b""),
        FlowClosed("nobody", b"abcd", 500, b""),
        Removed(IKE, (b"src:1", b""), "gw1", Cause.DELETED),
        Cleared(IKE, "gw9"),
        ServerHealth(IKE, "gw9", "healthy", "enabled", 100),
    ],
)
async def test_what_is_of_no_use_here_does_no_harm(farm: Farm, record: Replicated) -> None:
    async with running(plane_of(document(farm, 1), 1)) as standby:
        replica(standby).apply([record, Put(IKE, (b"src:2",), "gw1", 1)])
        await settle()
        standby.activate()
        await settle()
        assert len(pins(standby)) == 1
        assert len(standby.forwarder.flows) == 0


async def test_a_flow_whose_pin_has_another_key_now_is_told_again(farm: Farm) -> None:
    """Else the standby would hold the flow against a key that it may have lost, or take it for one without a pin."""
    async with twins(farm, persistence="ike-spi") as (active, standby, _):
        client = farm.client()
        for _ in range(3):
            await farm.route(client, ike_message(os.urandom(8)))
        await settle()
        assert flow_of(standby, client).key == flow_of(active, client).key


async def test_touches_are_told(farm: Farm) -> None:
    async with twins(farm) as (active, standby, stream):
        clients = [farm.client(source=f"127.0.1.{number}") for number in range(2)]
        for client in clients:
            await farm.route(client, ike_message(os.urandom(8)))
        keys = [flow_of(active, client).key for client in clients]
        table, there = (plane.snapshot.groups[IKE].table for plane in (active, standby))
        for each in (table, there):
            each.touch(keys[0], 50)
            each.touch(keys[1], 50)
        table.touch(keys[1], 52)
        told = [touched for touched in replica(active).touches(51) if touched.keys]
        assert told == [Touched(IKE, (keys[1],))]
        replica(standby).apply(told)
        first, second = (there.describe(key) for key in keys)
        assert first is not None
        assert second is not None
        assert first.due == 50 + there.timeout
        assert second.due >= int(standby.clock()) + there.timeout - 1
        assert stream.sink is standby


async def test_a_flow_goes_on_by_its_pin_whatever_clock_the_peer_has(farm: Farm) -> None:
    async with running(plane_of(document(farm, 1), 1)) as standby:
        now = int(standby.clock())
        replica(standby).apply([Put(IKE, (b"src:1",), "gw1", now + 300), Put(IKE, (b"src:2",), "gw1", 0)])
        due = [pin.due - now for pin in standby.snapshot.groups[IKE].table.pins().pins]
        assert len(set(due)) == 1
        assert due[0] >= standby.snapshot.groups[IKE].table.timeout


async def test_a_client_is_the_same_whichever_socket_it_has(farm: Farm) -> None:
    async with twins(farm) as (active, standby, _):
        client: Client = farm.client()
        await farm.route(client, ike_message(os.urandom(8)))
        await settle()
        assert flow_of(active, client).peer == flow_of(standby, client).peer
