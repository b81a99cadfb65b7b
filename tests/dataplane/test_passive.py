"""A standby is ready and does nothing of its own accord: no check, no expiry, nothing told."""

from __future__ import annotations

import os
import socket
import threading
from itertools import count

import pytest
import trio

from sapin.core.dataplane import pairing as pairings
from sapin.core.dataplane import udp
from sapin.core.journal import FlowOpened, ServerHealth, Touched
from sapin.core.model import AdminState, Health
from sapin.core.pins import Put, Removed
from tests.dataplane.farm import (
    IKE,
    NATT,
    Clock,
    Farm,
    advance,
    esp,
    eventually,
    flow_of,
    ike_message,
    settle,
)
from tests.dataplane.twins import Stream, document, outlet, pairing, plane_of, replica, running

CHECK = {
    "plugin": "udp",
    "interval": "100ms",
    "rise": 3,
    "fall": 1,
    "jitter": 0.0,
    "send": "00",
    "wait": "50ms",
}
PIN = b"src:" + socket.inet_aton("192.0.2.1")
FLOW = FlowOpened(IKE, socket.inet_aton("192.0.2.1"), 500, b"", "gw1", b"", 17_001, PIN, 1)


async def test_it_listens_where_the_node_has_no_address(farm: Farm) -> None:
    made = document(farm)
    for service in made["virtual_services"]:
        service["address"] = "192.0.2.10"
    async with running(plane_of(made)) as plane:
        names = {listener.sock.getsockname()[0] for listener in plane.forwarder.listeners}
        assert names == {"192.0.2.10"}


async def test_no_check_runs_until_the_node_is_active(farm: Farm) -> None:
    async with running(plane_of(document(farm, checks=[CHECK]))) as plane:
        await trio.sleep(0.3)
        assert farm.seen == []
        assert plane.prober.findings == []
        plane.activate()
        await eventually(lambda: len(plane.prober.findings) == 3 and farm.seen)
        plane.deactivate()
        await settle()
        farm.seen.clear()
        await trio.sleep(0.3)
        assert farm.seen == []


async def test_a_server_that_the_peer_found_dead_gets_no_client_at_any_moment(farm: Farm) -> None:
    """It needs as many successes as ever to be used again."""
    async with running(plane_of(document(farm, checks=[CHECK], scheduler="round-robin"))) as plane:
        for name in ("gw1", "gw2"):
            replica(plane).apply([ServerHealth(IKE, name, "unhealthy", "enabled", 100)])
        replica(plane).apply([ServerHealth(IKE, "gw3", "healthy", "enabled", 100)])
        members = plane.snapshot.groups[IKE].members
        states: list[str] = []
        plane.writer.subscribe(lambda old, new: states.append(new.groups[IKE].members["gw1"].health))
        plane.activate()
        gateways = {
            (await farm.route(farm.client(source=f"127.0.1.{n}"), ike_message(os.urandom(8))))[0]
            for n in range(1, 7)
        }
        assert gateways == {"gw3"}
        await eventually(lambda: members["gw1"].health is Health.HEALTHY)
        assert "unknown" not in states
        checked = [seen for seen in farm.seen if seen.gateway == "gw1" and seen.data == b"\0"]
        assert len(checked) >= 3


async def test_what_an_agent_asked_for_stands_until_it_speaks_or_the_configuration_changes(
    farm: Farm,
) -> None:
    made = document(farm, checks=[CHECK])
    async with running(plane_of(made)) as plane:
        replica(plane).apply([ServerHealth(IKE, "gw1", "healthy", "draining", 30)])
        plane.activate()
        member = plane.snapshot.groups[IKE].members["gw1"]
        await eventually(lambda: any(seen.gateway == "gw1" for seen in farm.seen))
        await settle()
        assert (member.asked, member.share, member.takes) == (AdminState.DRAINING, 30, False)
        made["virtual_services"][0]["checks"] = [{**CHECK, "interval": "150ms"}]
        farm.reload(plane, made)
        await eventually(lambda: member.takes)
        assert (member.asked, member.share) == (AdminState.ENABLED, 100)


async def test_nothing_expires_until_the_node_is_active(farm: Farm, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    plane = plane_of(document(farm))
    monkeypatch.setattr(plane, "clock", clock)
    monkeypatch.setattr(pairing(plane), "_clock", clock)
    async with running(plane):
        replica(plane).apply([Put(IKE, (PIN,), "gw1", 1), FLOW])
        await settle()
        clock.ahead = 30 * 86_400
        for _ in range(3):
            await advance(plane)
        table = plane.snapshot.groups[IKE].table
        assert (len(table), len(plane.forwarder.flows)) == (1, 1)
        plane.activate()
        stream = Stream(plane)
        clock.ahead += 3_000
        await advance(plane)
        outlet(plane).flush()
        assert (len(table), len(plane.forwarder.flows)) == (0, 1)  # the flow has a whole timeout from now
        assert [type(record) for record in stream.records] == [Removed]
        clock.ahead += 4_000
        await advance(plane)
        assert len(plane.forwarder.flows) == 0


async def test_what_is_put_off_takes_no_memory(farm: Farm, monkeypatch: pytest.MonkeyPatch) -> None:
    """A standby may be one for years; a second that is over must leave nothing behind."""
    clock = Clock()
    plane = plane_of(document(farm, persistence={"plugin": "source-address", "timeout": "5s"}))
    monkeypatch.setattr(plane, "clock", clock)
    async with running(plane):
        table = plane.snapshot.groups[IKE].table
        for second in range(300):
            clock.ahead = second
            table.put([b"src:%d" % second], plane.snapshot.groups[IKE].members["gw1"], int(clock()))
            await advance(plane)
        assert len(table) == 300
        assert len(table._wheel._seconds) < 130


async def test_what_was_cleared_is_given_back(farm: Farm) -> None:
    async with running(plane_of(document(farm))) as plane:
        replica(plane).apply([Put(IKE, (b"src:%d" % n,), "gw1", 1) for n in range(300)])
        replica(plane).apply([ServerHealth(IKE, "gw1", "unhealthy", "enabled", 100)])
        await advance(plane)
        assert plane.snapshot.groups[IKE].table.stats().unswept == 0


async def test_it_closes_no_flow_of_a_server_that_fails_before_it_is_told(farm: Farm) -> None:
    async with running(plane_of(document(farm, checks=[CHECK]))) as plane:
        replica(plane).apply([Put(IKE, (PIN,), "gw1", 1), FLOW])
        await settle()
        replica(plane).apply([ServerHealth(IKE, "gw1", "unhealthy", "enabled", 100)])
        await settle()
        assert len(plane.forwarder.flows) == 1
        plane.activate()
        await eventually(lambda: len(plane.forwarder.flows) == 0)


async def test_a_node_that_hands_over_keeps_what_it_has(farm: Farm) -> None:
    async with running(plane_of(document(farm))) as plane:
        plane.activate()
        client = farm.client()
        there = await farm.route(client, ike_message(os.urandom(8)))
        stream = Stream(plane)
        plane.deactivate()
        assert (len(plane.snapshot.groups[IKE].table), len(plane.forwarder.flows)) == (1, 1)
        assert (
            await farm.route(client, ike_message(os.urandom(8))) == there
        )  # what was on its way still goes on
        await farm.route(farm.client(NATT), esp())
        assert stream.told == []


async def test_to_be_told_twice_is_no_different(farm: Farm) -> None:
    async with running(plane_of(document(farm, checks=[CHECK]))) as plane:
        for _ in range(2):
            plane.activate()
            await eventually(lambda: len(plane.prober.findings) == 3)
        for _ in range(2):
            plane.deactivate()
        await eventually(lambda: not plane.prober.findings)
        assert not plane.active


async def test_without_a_peer_a_node_is_always_active(farm: Farm) -> None:
    async with running(plane_of(document(farm, checks=[CHECK]))) as paired:
        assert not paired.active


async def test_touches_go_to_the_peer_now_and_then(farm: Farm, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pairings, "TOUCHES", 1.1)
    async with running(plane_of(document(farm))) as plane:
        plane.activate()
        stream = Stream(plane)
        client = farm.client()
        await farm.route(client, ike_message(os.urandom(8)))
        key = flow_of(plane, client).key
        await eventually(lambda: Touched(IKE, (key,)) in stream.records)
        plane.deactivate()
        stream.told.clear()
        await trio.sleep(1.3)
        assert stream.told == []


async def test_the_forwarder_gives_way_to_a_descriptor_that_is_watched(
    farm: Farm, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Amid traffic it keeps the loop for HOLD at a time, and would let the peer's messages lie for as long."""
    monkeypatch.setattr(udp, "HOLD", 1.0)
    async with running(plane_of(document(farm))) as plane:
        client, (ours, theirs), over = farm.client(), socket.socketpair(), threading.Event()

        def load() -> None:
            """Traffic without a pause, and a message now and then, with the time that it was sent."""
            for number in count():
                if over.wait(0.002):
                    return
                client.plain.send(ike_message(bytes(8)))
                if number % 50 == 25:
                    theirs.send(b"%20.9f" % trio_time())

        trio_time = trio.lowlevel.current_clock().current_time
        with ours, theirs:
            plane.forwarder.watch(ours.fileno())
            plane.forwarder.watch(ours.fileno())
            waits: list[float] = []
            async with trio.open_nursery() as nursery:
                nursery.start_soon(trio.to_thread.run_sync, load)
                try:
                    while len(waits) < 8:
                        await trio.lowlevel.wait_readable(ours.fileno())
                        waits.append(trio_time() - float(ours.recv(20)))
                finally:
                    over.set()
            plane.forwarder.unwatch(ours.fileno())
            plane.forwarder.unwatch(ours.fileno())
        assert sum(waits) / len(waits) < 0.1
        assert not plane.failures


async def test_a_watched_descriptor_that_its_reader_has_seen_to_holds_nobody_up(
    farm: Farm, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both tasks are woken by it; when the reader comes first, the forwarder must not wait for more in vain."""
    monkeypatch.setattr(udp, "HOLD", 0.5)
    async with running(plane_of(document(farm))) as plane:
        ours, theirs = socket.socketpair()
        with ours, theirs:
            plane.forwarder.watch(ours.fileno())
            began = trio.current_time()
            for _ in range(20):
                theirs.send(b"x")
                await trio.lowlevel.wait_readable(ours.fileno())
                ours.recv(1)
                await trio.sleep(0.001)
            assert trio.current_time() - began < 0.5
            plane.forwarder.unwatch(ours.fileno())


async def test_a_watched_descriptor_that_was_closed_is_no_trouble(farm: Farm) -> None:
    async with running(plane_of(document(farm))) as plane:
        ours, theirs = socket.socketpair()
        plane.forwarder.watch(ours.fileno())
        theirs.close()
        await settle_soon(plane)
        ours.close()
        message = ike_message(os.urandom(8))
        assert await farm.client().ask(message) == message
        assert not plane.failures
        assert outlet(plane).held == 0


async def settle_soon(plane: object) -> None:
    """A closed pipe is readable for ever, so tasks never block: a moment has to do."""
    await trio.sleep(0.02)
