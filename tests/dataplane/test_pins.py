"""Pins against living flows: what an operator or a check does to a server reaches its clients at once."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Mapping
from random import Random

import pytest

from sapin.core.dataplane import runtime
from sapin.core.dataplane.runtime import Dataplane
from sapin.core.model import AdminState, Health
from sapin.core.snapshot import Group
from tests.dataplane.farm import (
    IKE,
    NATT,
    Client,
    Clock,
    Document,
    Farm,
    advance,
    esp,
    eventually,
    flow_of,
    framed,
    ike_message,
    running,
    settle,
)


class Pair:
    """A client's two ports, and one IKE SA."""

    def __init__(self, farm: Farm, source: str = "") -> None:
        self.farm = farm
        self.spi = os.urandom(8)
        self.clients = {service: farm.client(service, source=source) for service in (IKE, NATT)}

    async def home(self) -> str:
        """Both ports speak; the gateway that they reach."""
        one, _ = await self.farm.route(self.clients[IKE], ike_message(self.spi))
        other, _ = await self.farm.route(self.clients[NATT], framed(ike_message(self.spi)))
        assert one == other
        return one

    async def esp(self) -> str:
        """Only ESP flows; the gateway that it reaches."""
        return (await self.farm.route(self.clients[NATT], esp()))[0]


def rotating(farm: Farm, persistence: str = "ike-spi") -> Document:
    return farm.document(persistence=persistence, scheduler="round-robin")


def group_of(plane: Dataplane) -> Group:
    return plane.snapshot.groups[IKE]


async def test_a_disabled_server_loses_its_clients_and_nobody_else_moves(farm: Farm) -> None:
    async with running(rotating(farm)) as plane:
        pairs = [Pair(farm) for _ in range(6)]
        before = [await pair.home() for pair in pairs]
        ports = {flow.port for flow in plane.forwarder.flows if flow.member.name != "gw1"}
        plane.set_admin(IKE, "gw1", AdminState.DISABLED)
        await eventually(lambda: len(plane.forwarder.flows) == 8)
        assert {flow.port for flow in plane.forwarder.flows} == ports, "the others keep their flows"
        assert group_of(plane).members["gw1"].pinned == 0
        after = [await pair.home() for pair in pairs]
        assert "gw1" not in after
        assert all(new == old for old, new in zip(before, after, strict=True) if old != "gw1")


async def test_a_moved_client_moves_with_esp_alone(farm: Farm) -> None:
    """Its gateway is gone, so the ESP is lost on the new one; but a dead path would never end."""
    async with running(rotating(farm)) as plane:
        pair = Pair(farm)
        old = await pair.home()
        plane.set_admin(IKE, old, AdminState.DISABLED)
        assert await pair.esp() != old
        assert await pair.home() != old, "its ports agree again from its next IKE message on"


async def test_a_draining_server_keeps_its_clients_and_gets_no_new_ones(farm: Farm) -> None:
    async with running(rotating(farm)) as plane:
        pair = Pair(farm)
        home = await pair.home()
        upstream = {flow.port for flow in plane.forwarder.flows}
        plane.set_admin(IKE, home, AdminState.DRAINING)
        assert await pair.home() == home
        assert await pair.esp() == home
        assert {flow.port for flow in plane.forwarder.flows} == upstream
        assert home not in [await Pair(farm).home() for _ in range(6)]
        rekeyed, pair.spi = pair.spi, os.urandom(8)
        assert await pair.home() == home, "a new SPI on its tuples is not a new client"
        roamed = Pair(farm, "127.9.8.8")
        roamed.spi = rekeyed
        assert await roamed.home() == home


async def test_an_unhealthy_server_loses_its_clients_on_both_ports(farm: Farm) -> None:
    """Even those that only send ESP, before their next packet."""
    check = {"plugin": "udp", "wait": "10ms", "interval": "100ms", "fall": 1}
    document = rotating(farm)
    document["virtual_services"][0]["checks"] = [check]
    async with running(document) as plane:
        members = group_of(plane).members
        pairs = [Pair(farm) for _ in range(6)]
        before = [await pair.home() for pair in pairs]
        await eventually(lambda: all(m.health is Health.HEALTHY for m in members.values()))
        farm.gateways["gw2"].stop()
        await eventually(lambda: members["gw2"].health is Health.UNHEALTHY)
        await eventually(lambda: all(flow.member.name != "gw2" for flow in plane.forwarder.flows))
        assert members["gw2"].pinned == 0
        assert group_of(plane).table.counts().get("gw2") is None
        assert "gw2" not in [await pair.esp() for pair in pairs]
        after = [await pair.home() for pair in pairs]
        assert "gw2" not in after
        assert all(new == old for old, new in zip(before, after, strict=True) if old != "gw2")
        farm.start("gw2")
        await eventually(lambda: members["gw2"].health is Health.HEALTHY)
        assert [await pair.home() for pair in pairs] == after, "nobody moves back"
        assert "gw2" in [await Pair(farm).home() for _ in range(3)]


async def test_an_unhealthy_server_does_not_keep_clients_without_pins(farm: Farm) -> None:
    async with running(rotating(farm, "none")) as plane:
        clients = [farm.client(NATT) for _ in range(6)]
        for number, client in enumerate(clients):
            await farm.route(client, esp(number))
        plane.writer.set_health(IKE, "gw3", Health.UNHEALTHY, AdminState.ENABLED, 100)
        assert "gw3" not in [(await farm.route(client, esp(9)))[0] for client in clients]
        assert group_of(plane).members["gw3"].pinned == 0


async def test_the_client_of_a_deleted_pin_is_decided_anew(farm: Farm) -> None:
    async with running(rotating(farm)) as plane:
        pair, other = Pair(farm), Pair(farm)
        home, elsewhere = await pair.home(), await other.home()
        kept = {flow_of(plane, client).port for client in other.clients.values()}
        group = group_of(plane)
        assert plane.delete_pins([(group, b"spi:" + pair.spi)]) == 1
        assert plane.delete_pins([(group, b"spi:" + pair.spi)]) == 0
        assert {flow.port for flow in plane.forwarder.flows} == kept, "both ports of it, and nothing else"
        assert await pair.home() not in (home, elsewhere), "round robin goes on"
        assert await other.home() == elsewhere


async def test_a_deleted_pin_of_one_group_leaves_the_client_alone_in_another(farm: Farm) -> None:
    """Two farms behind one balancer: the keys of a client are the same in both."""
    document = farm.document(persistence="source-address")
    leader = document["virtual_services"][0]
    servers = [{**server, "port": farm.ports[IKE]} for server in leader["real_servers"]]
    document["virtual_services"].append(
        {**leader, "name": "other", "port": farm.spare_port, "real_servers": servers}
    )
    async with running(document) as plane:
        here, there = farm.client(IKE), Client("127.9.0.1", farm.spare_port)
        with there.sock:
            await farm.route(here, ike_message(b"a_client"))
            home = await farm.route(there, ike_message(b"a_client"))
            assert plane.delete_pins([(group_of(plane), flow_of(plane, here).key)]) == 1
            assert len(plane.forwarder.flows) == 1
            assert await farm.route(there, ike_message(b"a_client")) == home


async def test_a_pin_that_expired_under_a_living_flow_is_made_again(
    farm: Farm, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock()
    monkeypatch.setattr(runtime, "steady_wall_clock", lambda: clock)
    document = farm.document(persistence={"plugin": "ike-spi", "timeout": "1m"}, scheduler="round-robin")
    async with running(document) as plane:
        pair = Pair(farm)
        for _ in range(2):
            home = await pair.home()
        clock.ahead += 100
        await advance(plane)
        assert len(group_of(plane).table) == 0
        assert await pair.esp() == home
        assert await pair.home() == home
        assert len(group_of(plane).table) == 1


async def test_traffic_keeps_a_pin(farm: Farm, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    monkeypatch.setattr(runtime, "steady_wall_clock", lambda: clock)
    document = farm.document(persistence={"plugin": "ike-spi", "timeout": "1m"}, scheduler="round-robin")
    async with running(document) as plane:
        pair = Pair(farm)
        await pair.home()
        for _ in range(5):
            clock.ahead += 40
            await advance(plane)
            await farm.route(pair.clients[NATT], b"\xff")
        pin = group_of(plane).table.describe(b"spi:" + pair.spi)
        assert pin is not None
        assert pin.due >= clock() + 59


# the count of clients that hold a server


def assert_counts(plane: Dataplane) -> None:
    """A server is held by its pins, and by the flows that have none."""
    for group in plane.snapshot.groups.values():
        keyless = Counter(flow.member for flow in plane.forwarder.flows if not flow.key)
        pins = group.table.counts()
        for member in group.members.values():
            assert member.pinned == pins.get(member.name, 0) + keyless[member], member
    for service, view in plane.snapshot.services.items():
        open_now = Counter(
            flow.member.name for flow in plane.forwarder.flows if flow.listener.service.name == service
        )
        counted = {name: each.flows for name, each in plane.counters(service).items() if each.flows}
        assert counted == dict(open_now), view.service


class Chaos:
    """Does what operators, checks, clients and time do, at random."""

    def __init__(self, farm: Farm, plane: Dataplane, document: Document, clock: Clock, seed: int) -> None:
        self.farm, self.plane, self.document, self.clock = farm, plane, document, clock
        self.random = Random(seed)
        self.clients = [
            farm.client(self.random.choice((IKE, NATT)), source=f"127.9.7.{n % 5 + 1}") for n in range(24)
        ]
        self.spis = [bytes([n + 1]) * 8 for n in range(12)]
        self.servers = list(document["virtual_services"][0]["real_servers"])

    @property
    def steps(self) -> Mapping[Callable[[], None], int]:
        """What may happen, and how often."""
        return {
            self.speak: 12,
            self.set_admin: 2,
            self.set_health: 2,
            self.delete_pins: 2,
            self.pass_time: 2,
            self.change_servers: 1,
            self.change_persistence: 1,
        }

    def speak(self) -> None:
        for client in self.random.sample(self.clients, 6):
            spi = self.random.choice(self.spis)
            client.send(self.random.choice((esp(), ike_message(spi), framed(ike_message(spi)), b"\xff")))

    def set_admin(self) -> None:
        server = self.random.choice(list(group_of(self.plane).members))
        self.plane.set_admin(IKE, server, self.random.choice(list(AdminState)))

    def set_health(self) -> None:
        server = self.random.choice(list(group_of(self.plane).members))
        state = self.random.choice((AdminState.ENABLED, AdminState.ENABLED, AdminState.DRAINING))
        self.plane.writer.set_health(IKE, server, self.random.choice(list(Health)), state, 100)

    def delete_pins(self) -> None:
        group = group_of(self.plane)
        pins = group.table.pins(0, 1000).pins
        chosen = self.random.sample(pins, min(len(pins), 3))
        self.plane.delete_pins([(group, self.random.choice(pin.keys)) for pin in chosen])

    def pass_time(self) -> None:
        self.clock.ahead += self.random.choice((1, 20, 31, 70))
        self.plane.forwarder.tick()

    def change_servers(self) -> None:
        kept = self.random.sample(self.servers, self.random.randrange(1, 4))
        moved = [{**server, "weight": self.random.randrange(3)} for server in kept]
        self.document["virtual_services"][0]["real_servers"] = moved
        self.farm.reload(self.plane, self.document)

    def change_persistence(self) -> None:
        plugin = self.random.choice(("ike-spi", "source-address", "none"))
        self.document["virtual_services"][0]["persistence"] = {"plugin": plugin, "timeout": "1m"}
        self.farm.reload(self.plane, self.document)


@pytest.mark.parametrize("seed", range(6))
async def test_the_counts_are_right_whatever_happens(
    farm: Farm, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    clock = Clock()
    monkeypatch.setattr(runtime, "steady_wall_clock", lambda: clock)
    document = farm.document(
        persistence={"plugin": ("ike-spi", "source-address", "none")[seed % 3], "timeout": "1m"},
        scheduler="least-connections",
    )
    document["node"] |= {"max_pins": 10, "max_flows": 20}
    async with running(document) as plane:
        chaos = Chaos(farm, plane, document, clock, seed)
        steps, weights = zip(*chaos.steps.items(), strict=True)
        for _ in range(50):
            step = chaos.random.choices(steps, weights)[0]
            step()
            assert_counts(plane)
            await plane._expire(int(clock()))
            assert_counts(plane)
            await settle()
            assert_counts(plane)
        assert not plane.failures
        assert len(plane.forwarder.flows) <= 20
        assert sum(group_of(plane).table.counts().values()) <= 10
    async with running(document) as plane:
        assert_counts(plane)
        chaos = Chaos(farm, plane, document, clock, seed)
        chaos.speak()
        await settle()
        assert_counts(plane)
