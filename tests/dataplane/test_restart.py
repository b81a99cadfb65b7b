"""A restart loses no pin and no flow: not by SIGTERM, not by kill -9, not at any moment of writing to the disk."""

from __future__ import annotations

import os
import signal
import socket
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import trio

from sapin.core.dataplane import runtime
from sapin.core.dataplane.recovery import StoreError
from sapin.core.model import AdminState
from tests.dataplane.farm import (
    IKE,
    NATT,
    VIP,
    Client,
    Clock,
    Daemon,
    Document,
    Farm,
    esp,
    flow_of,
    framed,
    gateways,
    ike_message,
    plane_of,
    running,
    settle,
)

Route = tuple[str, int]
MakeDaemon = Callable[..., Daemon]


@pytest.fixture
async def document(farm: Farm) -> Document:
    return farm.document(persistence="ike-spi", scheduler="round-robin")


class Tunnels:
    """Clients with an IKE SA on 500, then IKE and ESP on 4500."""

    def __init__(self, farm: Farm, number: int) -> None:
        self.farm = farm
        self.spis = [os.urandom(8) for _ in range(number)]
        self.ike = [farm.client(IKE) for _ in self.spis]
        self.natt = [farm.client(NATT) for _ in self.spis]

    async def connect(self) -> list[tuple[Route, Route]]:
        """Every client speaks IKE on both ports; where it reaches its gateway, and from which upstream ports."""
        return [
            (
                await self.farm.route(ike, ike_message(spi)),
                await self.farm.route(natt, framed(ike_message(spi))),
            )
            for spi, ike, natt in zip(self.spis, self.ike, self.natt, strict=True)
        ]

    async def esp(self) -> list[Route]:
        """Every client sends ESP only."""
        return [await self.farm.route(natt, esp(number)) for number, natt in enumerate(self.natt)]

    async def keep_sending(self) -> None:
        """ESP from every client and answers to it, whether or not anybody forwards."""
        number = 0
        while True:
            for client in self.natt:
                number += 1
                with suppress(ConnectionRefusedError):  # nobody forwards just now
                    client.send(esp(number))
            self.drain()
            await trio.sleep(0.002)

    async def quiet(self) -> None:
        """Until all that is on its way has come."""
        for number, client in enumerate((*self.ike, *self.natt)):
            client.send(last := esp(number))
            await client.hear(last)

    def drain(self) -> None:
        """Forget what has come."""
        for client in (*self.ike, *self.natt):
            with suppress(BlockingIOError):
                while True:
                    with suppress(ConnectionRefusedError):
                        client.plain.recv(65_535, socket.MSG_DONTWAIT)


# kill -9


@pytest.mark.slow
async def test_tunnels_go_on_through_kills_under_traffic(
    farm: Farm, document: Document, daemon: MakeDaemon
) -> None:
    """Five times, with a checkpoint due all the time."""
    document["node"]["state_dir"] = str(farm.state_dir)
    node = daemon(document, compact_at=500)
    await node.start()
    tunnels = Tunnels(farm, 12)
    before = await tunnels.connect()
    assert {home for (home, _), _ in before} == set(farm.gateways)
    checkpoints = 0
    for number in range(5):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(tunnels.keep_sending)
            newcomers = [farm.client(NATT) for _ in range(10)]  # the journal has something to do meanwhile
            for client in newcomers:
                client.send(framed(ike_message(os.urandom(8))))
            await trio.sleep(1.1 if number % 2 else 0.05)
            checkpoints += (await node.call("status"))["store"]["checkpoints"]
            await node.kill()
            await node.start()
            nursery.cancel_scope.cancel()
        await tunnels.quiet()
        assert await tunnels.esp() == [natt for _, natt in before], f"ESP, after {number + 1} kills"
        assert await tunnels.connect() == before, f"IKE, after {number + 1} kills"
        (report,) = node.events("state restored")
        assert " 0 files damaged" in report["found"]
    assert checkpoints > 0


@pytest.mark.parametrize("share", [0.3, 0.6, 0.9])
async def test_a_torn_write_costs_what_it_tore_and_nothing_before(
    farm: Farm, document: Document, logs: list[dict[str, Any]], share: float
) -> None:
    async with running(document):
        tunnels = Tunnels(farm, 10)
        before = await tunnels.connect()
    journal = max(farm.state_dir.glob("journal-*"))
    os.truncate(journal, int(journal.stat().st_size * share))
    async with running(document) as plane:
        (report,) = [entry for entry in logs if entry["event"] == "state restored"][1:]
        assert " 0 torn bytes" not in report["found"]
        kept = len(plane.snapshot.groups[IKE].table)
        assert 10 * share - 2 <= kept <= 10 * share + 1
        after = await tunnels.connect()
        assert after[: kept - 1] == before[: kept - 1]
    async with running(document):
        assert await tunnels.connect() == after


async def test_sigterm_ends_the_daemon_and_loses_nothing(
    farm: Farm, document: Document, daemon: MakeDaemon
) -> None:
    node = daemon(document)
    await node.start()
    tunnels = Tunnels(farm, 4)
    before = await tunnels.connect()
    assert node.process is not None
    node.process.send_signal(signal.SIGTERM)
    assert await node.wait() == 0
    assert node.events("stopping")
    assert not (farm.state_dir / "control.sock").exists()
    await node.start()
    assert await tunnels.esp() == [natt for _, natt in before]


async def test_a_second_daemon_on_the_state_directory_is_refused(
    farm: Farm, document: Document, daemon: MakeDaemon
) -> None:
    async with running(document) as plane:
        client = farm.client(NATT)
        home = await farm.route(client, esp(1))
        second = daemon(document)
        second.launch()
        assert await second.wait() == 1
        assert f"is in use by process {os.getpid()}" in second.output()
        with pytest.raises(StoreError, match="is in use by process"):
            plane_of(document)
        assert await farm.route(client, esp(2)) == home
        assert len(plane.forwarder.flows) == 1


# what is different when the daemon comes back


async def test_a_flow_whose_server_is_gone_is_decided_anew_and_the_others_are_restored(
    farm: Farm, document: Document
) -> None:
    async with running(document):
        tunnels = Tunnels(farm, 6)
        before = await tunnels.connect()
    del document["virtual_services"][0]["real_servers"][1]
    async with running(document) as plane:
        assert len(plane.forwarder.flows) == 8
        after = await tunnels.connect()
        assert "gw2" not in {home for pair in after for home, _ in pair}
        assert all(new == old for old, new in zip(before, after, strict=True) if old[0][0] != "gw2")
    async with running(document):
        assert await tunnels.connect() == after


@pytest.mark.parametrize("change", ["disabled", "renamed", "service"])
async def test_flows_of_what_the_configuration_took_away_meanwhile_are_gone(
    farm: Farm, document: Document, change: str
) -> None:
    async with running(document):
        client = farm.client(NATT)
        home, _ = await farm.route(client, framed(ike_message(b"a_client")))
    if change == "service":
        document["virtual_services"].pop()
    servers = document["virtual_services"][0]["real_servers"]
    (server,) = [server for server in servers if server["name"] == home]
    server |= {"disabled": {"state": "disabled"}, "renamed": {"name": "another"}}.get(change, {})
    async with running(document) as plane:
        assert len(plane.forwarder.flows) == 0
        assert not plane.failures
    async with running(document) as plane:
        assert len(plane.forwarder.flows) == 0, "it is told to the disk too"


async def test_a_draining_server_keeps_its_restored_clients(farm: Farm, document: Document) -> None:
    async with running(document):
        client = farm.client(NATT)
        home = await farm.route(client, framed(ike_message(b"a_client")))
    for server in document["virtual_services"][0]["real_servers"]:
        server["state"] = "draining"
    async with running(document):
        assert await farm.route(client, esp(1)) == home
        assert await farm.route(client, framed(ike_message(b"a_client"))) == home


async def test_a_port_that_another_program_took_costs_that_flow_only(farm: Farm, document: Document) -> None:
    async with running(document):
        tunnels = Tunnels(farm, 3)
        before = await tunnels.connect()
    gone = before[0][1][1]
    with Client(VIP, 9, source="127.9.5.1", source_port=gone).sock as thief:
        thief.setsockopt(1, 2, 0)  # SOL_SOCKET, SO_REUSEADDR
        async with running(document) as plane:
            assert len(plane.forwarder.flows) == 5
            after = await tunnels.connect()
            assert after[1:] == before[1:]
            assert after[0][1][0] == before[0][1][0], "its pin is there all the same"
            assert after[0][1][1] != gone


async def test_pins_that_expired_while_away_are_gone_and_living_flows_are_not(
    farm: Farm, document: Document, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The flow may well live on: its client knows nothing of the outage."""
    clock = Clock()
    monkeypatch.setattr(runtime, "steady_wall_clock", lambda: clock)
    document["virtual_services"][0]["persistence"] = {"plugin": "ike-spi", "timeout": "10m"}
    async with running(document):
        tunnels = Tunnels(farm, 6)
        before = await tunnels.connect()
    clock.ahead += 500
    async with running(document) as plane:
        assert len(plane.snapshot.groups[IKE].table) == 6
    clock.ahead += 601
    async with running(document) as plane:
        assert len(plane.snapshot.groups[IKE].table) == 0
        assert await tunnels.connect() == before
        assert len(plane.snapshot.groups[IKE].table) == 6


async def test_a_clock_that_is_set_right_after_the_start_ages_no_pin(
    farm: Farm, document: Document, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A machine that boots with a wrong clock: the next start must not take the correction for an outage."""
    document["virtual_services"][0]["persistence"] = {"plugin": "ike-spi", "timeout": "10m"}
    year = 365 * 86_400
    async with running(document) as plane:
        await Tunnels(farm, 3).connect()
        plane._wall = lambda: time.time() + year
    clock = Clock()
    clock.ahead = year
    monkeypatch.setattr(runtime, "steady_wall_clock", lambda: clock)
    async with running(document) as plane:
        assert len(plane.snapshot.groups[IKE].table) == 3


async def test_flows_of_wildcard_services_are_restored_at_their_local_address(tmp_path: Path) -> None:
    async with gateways(tmp_path / "state", {"gw1": "127.9.1.1", "gw6": "::1"}, apart=True) as farm:
        document = farm.document(vip="::", persistence="ike-spi")
        hosts = ["127.0.0.5", "127.0.0.6", "::1"]
        async with running(document):
            clients = [farm.client(NATT, host=host) for host in hosts]
            before = [await farm.route(client, framed(ike_message(os.urandom(8)))) for client in clients]
        async with running(document) as plane:
            assert {str(flow.listener.address) for flow in plane.forwarder.flows} == set(hosts)
            for client, (home, upstream) in zip(clients, before, strict=True):
                sock = farm.gateways[home].socks[NATT]
                source = "::1" if home == "gw6" else "127.0.0.1"
                await sock.sendto(b"the server speaks first", (source, upstream))
                assert await client.receive() == [b"the server speaks first"]
            assert [await farm.route(client, esp()) for client in clients] == before


@pytest.mark.parametrize(("was", "will_be"), [("0.0.0.0", VIP), (VIP, "0.0.0.0"), ("0.0.0.0", "::")])
async def test_a_service_that_became_or_was_a_wildcard_meanwhile(
    tmp_path: Path, was: str, will_be: str
) -> None:
    """No flow may be left where its client's datagrams do not come any more."""
    addresses = {"gw1": "127.9.1.1"}
    async with gateways(tmp_path / "state", addresses, apart=True) as farm:
        document = farm.document(vip=was)
        client = farm.client(NATT)
        async with running(document):
            home = await farm.route(client, esp(1))
        for service in document["virtual_services"]:
            service["address"] = will_be
        async with running(document, seed=2) as plane:
            for number in range(2):
                gateway, upstream = await farm.route(client, esp(number))
                assert gateway == home[0]
                assert (upstream == home[1]) == (will_be == "::")
            assert len(plane.forwarder.flows) == 1
            assert flow_of(plane, client).listener.wildcard is False


async def test_a_service_that_changed_its_address_family_meanwhile(tmp_path: Path) -> None:
    async with gateways(tmp_path / "state", {"gw1": "127.9.1.1"}, apart=True) as farm:
        document = farm.document()
        async with running(document):
            await farm.route(farm.client(NATT), esp(1))
        for service in document["virtual_services"]:
            service["address"] = "::1"
        document["virtual_services"][0]["real_servers"][0]["address"] = "::1"
        async with running(document) as plane:
            assert len(plane.forwarder.flows) == 0
            assert not plane.failures


async def test_states_set_at_run_time_survive(farm: Farm, document: Document) -> None:
    async with running(document) as plane:
        clients = [farm.client(NATT) for _ in range(6)]
        before = [await farm.route(client, esp(n)) for n, client in enumerate(clients)]
        plane.set_admin(NATT, "gw1", AdminState.DRAINING)
        plane.set_admin(IKE, "gw2", AdminState.DISABLED)
        await settle()
    async with running(document) as plane:
        members = plane.snapshot.groups[IKE].members
        assert [members[name].admin for name in ("gw1", "gw2", "gw3")] == ["draining", "disabled", "enabled"]
        assert len(plane.forwarder.flows) == 4
        for client, home in zip(clients, before, strict=True):
            assert await farm.route(client, esp()) == home or home[0] == "gw2"
        assert {(await farm.route(farm.client(NATT), esp(n)))[0] for n in range(3)} == {"gw3"}


async def test_admin_states_that_cannot_be_saved_are_in_force_and_told(
    farm: Farm, document: Document
) -> None:
    async with running(document) as plane:
        (farm.state_dir / "admin-states.tmp").mkdir()
        with pytest.raises(OSError, match="directory"):
            plane.set_admin(IKE, "gw1", AdminState.DISABLED)
        assert plane.snapshot.groups[IKE].members["gw1"].admin is AdminState.DISABLED
        (farm.state_dir / "admin-states.tmp").rmdir()
    async with running(document) as plane:
        assert plane.snapshot.groups[IKE].members["gw1"].admin is AdminState.ENABLED


# what goes to the disk


async def test_everything_is_on_disk_before_an_answer_can_pass(farm: Farm, document: Document) -> None:
    """Whatever the disk shows when a client has heard from its server, a restart could begin with."""
    async with running(document) as plane:
        for _ in range(10):
            client = farm.client(NATT)
            await farm.route(client, framed(ike_message(os.urandom(8))))
            assert plane.store._pending == []


async def test_closed_flows_do_not_come_back(farm: Farm, document: Document) -> None:
    async with running(document) as plane:
        clients = [farm.client(NATT) for _ in range(3)]
        for number, client in enumerate(clients):
            await farm.route(client, framed(ike_message(bytes([number + 1]) * 8)))
        group = plane.snapshot.groups[IKE]
        assert plane.delete_pins([(group, b"spi:" + b"\x01" * 8)]) == 1
    async with running(document) as plane:
        assert len(plane.forwarder.flows) == 2
        assert len(plane.snapshot.groups[IKE].table) == 2


async def test_a_state_that_is_damaged_is_told_and_the_rest_is_used(
    farm: Farm, document: Document, logs: list[dict[str, Any]]
) -> None:
    async with running(document):
        tunnels = Tunnels(farm, 3)
        before = await tunnels.connect()
    journal = max(farm.state_dir.glob("journal-*"))
    data = bytearray(journal.read_bytes())
    data[len(data) * 2 // 3] ^= 0xFF
    journal.write_bytes(data)
    async with running(document) as plane:
        assert [entry for entry in logs if entry["event"].startswith("a state file is damaged")]
        assert 0 < len(plane.forwarder.flows) < 6
        after = await tunnels.connect()
    assert after[0] == before[0]
    async with running(document):
        assert await tunnels.connect() == after
