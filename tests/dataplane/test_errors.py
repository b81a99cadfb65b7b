"""What goes wrong on the servers' side, and in a part of the dataplane: it is noticed, told, and forwarding goes on."""

from __future__ import annotations

import os
import threading
from itertools import pairwise

import pytest
import trio
from trio.testing import MockClock

from sapin.core.contracts import CheckResult, Target
from sapin.core.dataplane import runtime, udp
from sapin.core.dataplane.prober import MIN_WAKE
from sapin.core.dataplane.runtime import Dataplane
from sapin.core.model import AdminState, Health
from sapin.plugins.checks.udp import UdpCheck
from sapin.plugins.schedulers.maglev import Maglev
from sapin.plugins.schedulers.round_robin import RoundRobin
from tests.dataplane.farm import (
    IKE,
    NATT,
    PATIENCE,
    SILENCE,
    Client,
    Farm,
    esp,
    eventually,
    flow_of,
    framed,
    ike_message,
    running,
    settle,
)

# refused by the server


async def test_a_refusal_is_counted_and_never_raised(farm: Farm) -> None:
    async with running(farm.document(scheduler="round-robin")) as plane:
        client = farm.client(NATT)
        home, _ = await farm.route(client, framed(ike_message(b"a_client")))
        farm.gateways[home].stop()
        for number in range(20):
            client.send(esp(number))
            await settle()
        assert plane.forwarder.errors == {"ECONNREFUSED": 20}
        assert not plane.failures
        other = farm.client(NATT, source="127.9.4.4")
        assert (await farm.route(other, framed(ike_message(b"another!"))))[0] != home


async def test_a_flow_goes_on_when_its_gateway_is_back(farm: Farm) -> None:
    async with running(farm.document()) as plane:
        client = farm.client(NATT)
        home = await farm.route(client, framed(ike_message(b"a_client")))
        farm.gateways[home[0]].stop()
        client.send(esp(1), esp(2))
        await settle()
        farm.start(home[0])
        assert await farm.route(client, esp(3)) == home
        assert plane.forwarder.errors["ECONNREFUSED"] > 0


async def test_the_first_datagram_of_a_client_may_be_refused(farm: Farm) -> None:
    async with running(farm.document()) as plane:
        for gateway in farm.gateways.values():
            gateway.stop()
        client = farm.client(IKE)
        client.send(ike_message(b"a_client"))
        await settle()
        assert plane.forwarder.errors == {"ECONNREFUSED": 1}
        farm.start()
        data = ike_message(b"a_client")
        assert await client.ask(data) == data


async def test_a_suspect_server_is_checked_at_once_rather_than_at_the_next_interval(farm: Farm) -> None:
    check = {"plugin": "udp", "wait": "10ms", "interval": "1h", "fall": 1, "rise": 1}
    async with running(farm.document(checks=[check], scheduler="round-robin")) as plane:
        members = plane.snapshot.groups[IKE].members
        await eventually(lambda: all(m.health is Health.HEALTHY for m in members.values()))
        client = farm.client(IKE)
        home, _ = await farm.route(client, ike_message(b"a_client"))
        farm.gateways[home].stop()
        client.send(ike_message(b"a_client"))
        await eventually(lambda: members[home].health is Health.UNHEALTHY)
        assert {m.name: m.health for m in members.values() if m.name != home} == {
            name: Health.HEALTHY for name in members if name != home
        }
        assert (await farm.route(client, ike_message(b"a_client")))[0] != home


async def test_a_server_that_is_suspect_all_the_time_is_not_checked_all_the_time(
    farm: Farm, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs: list[float] = []

    async def check(self: UdpCheck, target: Target) -> CheckResult:
        runs.append(trio.current_time())
        return CheckResult(True, "counted")

    monkeypatch.setattr(UdpCheck, "check", check)
    document = farm.document(checks=[{"plugin": "udp", "interval": "1h"}])
    del document["virtual_services"][0]["real_servers"][1:]
    async with running(document) as plane:
        await eventually(lambda: runs)
        until = trio.current_time() + 2.5 * MIN_WAKE
        while trio.current_time() < until:
            plane.prober.suspect(IKE, "gw1")
            await trio.sleep(0.01)
        assert 2 <= len(runs) <= 4
        assert min(later - earlier for earlier, later in pairwise(runs)) >= MIN_WAKE


# errors that are reported at the next send: an ICMP message that came while a batch was at work


def pend(plane: Dataplane, farm: Farm, client: Client) -> None:
    """An error waits in the client's upstream socket, although its server is there again."""
    flow = flow_of(plane, client)
    farm.gateways[flow.member.name].stop()
    flow.sock.send(b"lost")
    farm.start(flow.member.name)


def forward(plane: Dataplane, client: Client) -> None:
    """What clients have sent goes before anything else is looked at."""
    plane.forwarder._from_clients(flow_of(plane, client).listener)


async def test_the_datagram_after_a_pending_error_is_not_lost(farm: Farm) -> None:
    async with running(farm.document()) as plane:
        client = farm.client(NATT)
        await farm.route(client, esp(0))
        pend(plane, farm, client)
        client.send(data := esp(1))
        forward(plane, client)
        assert await client.receive() == [data]
        assert plane.forwarder.errors == {"ECONNREFUSED": 1}
        assert not plane.forwarder.drops


@pytest.mark.parametrize("size", [100, 101], ids=["one-run", "several-runs"])
async def test_the_datagrams_after_a_pending_error_are_not_lost(farm: Farm, size: int) -> None:
    async with running(farm.document()) as plane:
        client = farm.client(NATT)
        await farm.route(client, esp(0))
        pend(plane, farm, client)
        sent = [esp(1), esp(2, size), esp(3)]
        client.send(*sent)
        forward(plane, client)
        await settle()
        assert [seen.data for seen in farm.seen[1:]] == sent


async def test_a_pending_error_does_not_end_the_reading_of_a_bulk_flow(farm: Farm) -> None:
    async with running(farm.document()) as plane:
        client = farm.client(NATT)
        await farm.route(client, esp(0))
        plane.forwarder._make_bulk(flow_of(plane, client))
        pend(plane, farm, client)
        await settle()
        assert plane.forwarder.errors == {"ECONNREFUSED": 1}
        data = esp(1)
        assert await client.ask(data) == data


# servers that cannot be reached from here at all


async def test_a_server_that_cannot_be_reached_from_here_is_a_drop_and_a_suspect(farm: Farm) -> None:
    """A broadcast address stands for whatever connect(2) refuses."""
    document = farm.document()
    document["virtual_services"][0]["real_servers"] = [{"name": "far", "address": "127.255.255.255"}]
    suspects: list[tuple[str, str]] = []
    async with running(document) as plane:
        plane.forwarder.admission._suspect = lambda *who: suspects.append(who)
        client = farm.client(IKE)
        client.send(ike_message(b"a_client"))
        await settle()
        assert plane.forwarder.drops == {"server-unreachable": 1}
        assert suspects == [(IKE, "far")]
        assert not len(plane.forwarder.flows)
        assert not plane.failures


async def test_nobody_to_serve_is_a_drop(farm: Farm) -> None:
    async with running(farm.document()) as plane:
        for name in farm.gateways:
            plane.set_admin(IKE, name, AdminState.DISABLED)
        farm.client(IKE).send(ike_message(b"a_client"))
        await settle()
        assert plane.forwarder.drops == {"no-server": 1}
        plane.set_admin(IKE, "gw2", AdminState.ENABLED)
        assert (await farm.route(farm.client(IKE), ike_message(b"a_client")))[0] == "gw2"


# parts that fail


async def test_a_round_that_raises_is_counted_and_forwarding_goes_on(
    farm: Farm, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with running(farm.document()) as plane:
        client = farm.client(IKE)
        home = await farm.route(client, ike_message(b"a_client"))
        whole = udp.Forwarder._from_clients
        monkeypatch.setattr(udp.Forwarder, "_from_clients", lambda self, listener: 1 // 0)
        client.send(b"still in the socket's queue")
        await eventually(lambda: plane.failures["forwarder"] == 1)
        monkeypatch.setattr(udp.Forwarder, "_from_clients", whole)
        assert await client.receive() == [b"still in the socket's queue"]
        assert await farm.route(client, ike_message(b"a_client")) == home


@pytest.mark.parametrize(
    ("part", "broken"),
    [
        ("checks", "sapin.core.dataplane.prober.Prober._reconcile"),
        ("housekeeping", "sapin.core.dataplane.store.Store.maintain"),
        ("time", "sapin.core.dataplane.flows.FlowTable.expire"),
        ("stale flows", "sapin.core.dataplane.flows.FlowTable.close_some"),
        ("preparation", "sapin.core.dataplane.runtime.Dataplane._prepare"),
    ],
)
async def test_a_part_that_fails_takes_no_other_part_with_it(
    farm: Farm, monkeypatch: pytest.MonkeyPatch, part: str, broken: str
) -> None:
    monkeypatch.setattr(runtime, "RESTART", (0.001, 0.002))
    async with running(farm.document(scheduler="round-robin")) as plane:
        client = farm.client(IKE)
        home, _ = await farm.route(client, ike_message(b"a_client"))
        with monkeypatch.context() as context:
            context.setattr(broken, lambda *_: 1 // 0)
            plane.prober._changed.set()
            plane.set_admin(IKE, home, AdminState.DISABLED)
            await eventually(lambda: plane.failures[part])
            assert set(plane.failures) == {part}
            assert (await farm.route(client, ike_message(b"a_client")))[0] != home
        await trio.sleep(SILENCE)
        plane.failures.clear()
        await trio.sleep(SILENCE)
        assert not plane.failures, "it works again once its cause is gone"


async def test_flows_of_a_disabled_server_are_closed_although_the_first_attempt_failed(
    farm: Farm, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its clients are silent: nothing else would close them before their timeout."""
    async with running(farm.document(scheduler="round-robin")) as plane:
        home, _ = await farm.route(farm.client(IKE), ike_message(b"a_client"))
        with monkeypatch.context() as context:
            context.setattr("sapin.core.dataplane.flows.FlowTable.close_some", lambda *_: 1 // 0)
            plane.set_admin(IKE, home, AdminState.DISABLED)
            await eventually(lambda: plane.failures["stale flows"])
        await eventually(lambda: not len(plane.forwarder.flows))


async def test_a_disk_that_hangs_does_not_stop_the_time(farm: Farm, monkeypatch: pytest.MonkeyPatch) -> None:
    async def maintain(*_: object) -> None:
        await trio.sleep_forever()

    monkeypatch.setattr("sapin.core.dataplane.store.Store.maintain", maintain)
    async with running(farm.document()) as plane:
        begin = plane.forwarder.admission.tick
        await eventually(lambda: plane.forwarder.admission.tick >= begin + 2)


async def test_a_scheduler_whose_preparation_hangs_holds_up_nobody(
    farm: Farm, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither the start, nor the other schedulers, nor the end."""
    monkeypatch.setattr(runtime, "PREPARATION", (0.05, 0.1))
    released = threading.Event()
    prepared: list[object] = []
    monkeypatch.setattr(RoundRobin, "prepare", lambda *_: released.wait(30), raising=False)
    monkeypatch.setattr(Maglev, "prepare", lambda self, candidates: prepared.append(candidates))
    document = farm.document(scheduler="round-robin")
    servers = [{**each, "port": farm.ports[IKE]} for each in document["virtual_services"][0]["real_servers"]]
    other = {"name": "other", "port": farm.spare_port, "scheduler": "maglev", "real_servers": servers}
    document["virtual_services"].append({**document["virtual_services"][0], **other})
    try:
        with trio.fail_after(PATIENCE):
            async with running(document) as plane:
                await farm.route(farm.client(IKE), ike_message(b"a_client"))
                scheduler = plane.snapshot.groups[IKE].pools[4].scheduler
                await eventually(lambda: prepared and scheduler.faults.total)
                assert "prepare" in scheduler.faults.last
    finally:
        released.set()


async def test_a_check_plugin_that_raises_says_nothing_about_the_server(
    farm: Farm, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def check(self: UdpCheck, target: Target) -> CheckResult:
        raise LookupError("a fault of the plugin")

    monkeypatch.setattr(UdpCheck, "check", check)
    async with running(farm.document(checks=[{"plugin": "udp", "interval": "100ms", "fall": 1}])) as plane:
        await eventually(lambda: plane.prober.findings and plane.prober.findings[0].hosted.faults.total)
        assert {m.health for m in plane.snapshot.groups[IKE].members.values()} == {Health.UNKNOWN}
        assert not plane.failures
        await farm.route(farm.client(IKE), ike_message(b"a_client"))


async def test_a_check_without_a_file_descriptor_says_nothing_about_the_server(
    farm: Farm, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Our own shortage must not look like the death of every server."""

    async def check(self: UdpCheck, target: Target) -> CheckResult:
        raise OSError(24, os.strerror(24))  # EMFILE

    monkeypatch.setattr(UdpCheck, "check", check)
    async with running(farm.document(checks=[{"plugin": "udp", "interval": "100ms", "fall": 1}])) as plane:
        await eventually(lambda: any(finding.last for finding in plane.prober.findings))
        (reason,) = {finding.last.reason for finding in plane.prober.findings if finding.last}
        assert reason == "could not be checked: Too many open files"
        assert {m.health for m in plane.snapshot.groups[IKE].members.values()} == {Health.UNKNOWN}


async def test_checks_that_start_again_remember_who_was_unhealthy(farm: Farm) -> None:
    check = {"plugin": "udp", "wait": "10ms", "interval": "1h", "fall": 1}
    async with running(farm.document(checks=[check])) as plane:
        members = plane.snapshot.groups[IKE].members
        await eventually(lambda: all(m.health is Health.HEALTHY for m in members.values()))
        farm.gateways["gw2"].stop()
        plane.prober.suspect(IKE, "gw2")
        await eventually(lambda: members["gw2"].health is Health.UNHEALTHY)
        heard: list[Health] = []
        plane.writer.subscribe(lambda old, new: heard.append(members["gw2"].health))
        old, plane.prober._reconcile = plane.prober._reconcile, lambda nursery: 1 // 0  # type: ignore[assignment]
        plane.prober._changed.set()
        await eventually(lambda: plane.failures["checks"])
        plane.prober._reconcile = old  # type: ignore[method-assign]
        await trio.sleep(2 * SILENCE)
        assert members["gw2"].health is Health.UNHEALTHY
        assert not heard


async def test_a_part_that_failed_long_ago_is_started_again_as_quickly_as_the_first_time(
    farm: Farm, autojump_clock: MockClock
) -> None:
    """Else a fault a month would end in outages of the longest pause."""
    starts: list[float] = []

    async def part() -> None:
        starts.append(trio.current_time())
        await trio.sleep(100 if len(starts) > 12 else 0)
        raise ValueError("again")

    plane = Dataplane.__new__(Dataplane)
    plane.failures = runtime.Counter()
    with trio.move_on_after(1000):
        await plane._supervise("a part", part)
    pauses = [later - earlier for earlier, later in pairwise(starts)]
    assert pauses[0] == pytest.approx(runtime.RESTART[0])
    assert pauses[11] == pytest.approx(runtime.RESTART[1])
    assert pauses[13] == pytest.approx(100 + runtime.RESTART[0])
