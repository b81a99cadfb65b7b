"""A reload touches what it changes and nothing else, and one that cannot be done changes nothing."""

from __future__ import annotations

import signal
import socket
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
import trio
from structlog.testing import capture_logs

from sapin.api import daemon as daemon_module
from sapin.api.operations import Operations
from sapin.api.refused import Refused
from sapin.core.dataplane.listeners import ListenError
from sapin.core.dataplane.runtime import Dataplane
from sapin.core.model import AdminState, Health
from tests.dataplane.farm import (
    IKE,
    NATT,
    REGISTRY,
    VIP,
    Client,
    Daemon,
    Document,
    Farm,
    esp,
    eventually,
    flow_of,
    framed,
    gateways,
    ike_message,
    plane_of,
    running,
    settle,
    text,
)


@pytest.fixture
async def document(farm: Farm) -> Document:
    return farm.document(persistence="ike-spi", scheduler="round-robin")


@pytest.fixture
async def plane(document: Document) -> AsyncIterator[Dataplane]:
    async with running(document) as plane:
        yield plane


def leader(document: Document) -> dict[str, Any]:
    found: dict[str, Any] = document["virtual_services"][0]
    return found


def state_of(plane: Dataplane) -> dict[str, Any]:
    """All that a reload might have touched."""
    return {
        "snapshot": plane.snapshot,
        "flows": {(flow.port, flow.fd): flow for flow in plane.forwarder.flows},
        "listeners": {each: (each.fd, each.service) for each in plane.forwarder.listeners},
        "pins": [group.table.pins().pins for group in plane.snapshot.groups.values()],
        "overrides": {name: dict(states) for name, states in plane.writer.overrides.items()},
    }


async def homes(farm: Farm, clients: list[Client]) -> list[tuple[str, int]]:
    return [await farm.route(client, esp(number)) for number, client in enumerate(clients)]


# what is left alone


async def test_the_same_configuration_touches_nothing(
    farm: Farm, document: Document, plane: Dataplane
) -> None:
    clients = [farm.client(NATT) for _ in range(6)]
    before = await homes(farm, clients)
    was = state_of(plane)
    farm.reload(plane, document)
    await settle()
    assert {key: value for key, value in state_of(plane).items() if key != "snapshot"} == {
        key: value for key, value in was.items() if key != "snapshot"
    }
    assert await homes(farm, clients) == before


async def test_weights_timeouts_checks_and_scheduler_change_in_place(
    farm: Farm, document: Document, plane: Dataplane
) -> None:
    clients = [farm.client(NATT) for _ in range(6)]
    before = await homes(farm, clients)
    flows = state_of(plane)["flows"]
    leader(document)["persistence"] = {"plugin": "ike-spi", "timeout": "2h"}
    leader(document)["scheduler"] = "fixed-weighting"
    leader(document)["checks"] = [{"plugin": "udp", "wait": "10ms"}]
    leader(document)["real_servers"][2]["weight"] = 9
    document["virtual_services"][1]["flow_timeout"] = "20m"
    farm.reload(plane, document)
    assert state_of(plane)["flows"] == flows
    assert await homes(farm, clients) == before
    assert {flow.listener.flow_timeout for flow in plane.forwarder.flows} == {1200}
    assert plane.snapshot.groups[IKE].table.timeout == 7200
    assert {(await farm.route(farm.client(NATT), esp(n)))[0] for n in range(4)} == {"gw3"}


async def test_a_new_server_takes_new_clients_and_a_removed_one_loses_its_own(
    farm: Farm, document: Document, plane: Dataplane
) -> None:
    servers = leader(document)["real_servers"]
    leader(document)["real_servers"] = servers[:2]
    farm.reload(plane, document)
    clients = [farm.client(NATT) for _ in range(4)]
    before = await homes(farm, clients)
    assert {home for home, _ in before} == {"gw1", "gw2"}
    leader(document)["real_servers"] = servers[1:]
    farm.reload(plane, document)
    await eventually(lambda: len(plane.forwarder.flows) == 2)
    after = await homes(farm, clients)
    assert "gw1" not in {home for home, _ in after}
    assert all(new == old for old, new in zip(before, after, strict=True) if old[0] != "gw1")


async def test_a_server_with_a_new_address_is_another_server(
    farm: Farm, document: Document, plane: Dataplane
) -> None:
    """It knows nothing of the old one's tunnels."""
    clients = [farm.client(NATT) for _ in range(3)]
    before = dict(zip(clients, await homes(farm, clients), strict=True))
    leader(document)["real_servers"][0]["address"] = "127.9.1.9"
    farm.reload(plane, document)
    assert plane.snapshot.groups[IKE].members["gw1"].pinned == 0
    await eventually(lambda: len(plane.forwarder.flows) == 2)
    for client, home in before.items():
        if home[0] != "gw1":
            assert await farm.route(client, esp()) == home


async def test_reloads_leave_nothing_of_servers_that_are_gone(
    farm: Farm, document: Document, plane: Dataplane
) -> None:
    """Many reloads with ever other servers must not fill the memory."""
    for number in range(1, 6):
        leader(document)["real_servers"] = [{"name": f"gw{number}", "address": f"127.9.9.{number}"}]
        farm.reload(plane, document)
        farm.client(NATT).send(esp(number))
        await settle()
    flows = plane.forwarder.flows
    assert {flow.member.name for flow in flows} == {"gw5"}
    assert {host for host, _ in flows._ports} == {"127.9.9.5"}
    assert all(set(counters) <= {"gw5"} for counters in plane._binder.counters.values())


async def test_faults_are_reported_once(plane: Dataplane) -> None:
    """What was told last minute is not told again because the newest fault has another text."""
    persistence = plane.snapshot.groups[IKE].persistence
    with capture_logs() as first:
        persistence.fault("one", 0)
        plane._report()
    with capture_logs() as second:
        persistence.fault("another", 0)
        plane._report()
    for logs in (first, second):
        (entry,) = [entry for entry in logs if entry["event"] == "in the last minute"]
        (faults,) = [number for what, number in entry.items() if what.startswith("faults of persistence")]
        assert faults == 1


async def test_a_follower_whose_servers_are_served_elsewhere_moves_its_flows(
    farm: Farm, document: Document, plane: Dataplane
) -> None:
    ike, natt = farm.client(IKE), farm.client(NATT)
    home, upstream = await farm.route(ike, ike_message(b"a_client"))
    assert (await farm.route(natt, framed(ike_message(b"a_client"))))[0] == home
    document["virtual_services"][1]["following"] = {"plugin": "port", "port": farm.ports[IKE]}
    farm.reload(plane, document)
    await eventually(lambda: len(plane.forwarder.flows) == 1)
    assert await farm.route(ike, ike_message(b"a_client")) == (home, upstream)
    data = framed(ike_message(b"a_client"))
    assert (await farm.route(natt, data))[0] == home
    assert farm.where(data).service == IKE, "the port that it is now"


async def test_a_check_with_new_options_does_not_forget_who_is_unhealthy(
    farm: Farm, document: Document, plane: Dataplane
) -> None:
    farm.gateways["gw2"].stop()
    check = {"plugin": "udp", "wait": "10ms", "interval": "100ms", "fall": 1}
    leader(document)["checks"] = [check]
    farm.reload(plane, document)
    member = plane.snapshot.groups[IKE].members["gw2"]
    await eventually(lambda: member.health is Health.UNHEALTHY)
    leader(document)["checks"] = [{**check, "interval": "1h"}]
    farm.reload(plane, document)
    heard: list[Health] = []
    plane.writer.subscribe(lambda old, new: heard.append(member.health))
    await trio.sleep(0.1)
    assert member.health is Health.UNHEALTHY
    assert Health.UNKNOWN not in heard
    leader(document)["checks"] = []
    farm.reload(plane, document)
    await eventually(lambda: member.health is Health.UNKNOWN)


# services that come, go and move


async def test_a_service_comes_and_goes(farm: Farm, document: Document, plane: Dataplane) -> None:
    old = farm.client(NATT)
    home = await farm.route(old, esp(1))
    servers = [{**server, "port": farm.ports[IKE]} for server in leader(document)["real_servers"]]
    extra = {**leader(document), "name": "extra", "port": farm.spare_port, "real_servers": servers}
    document["virtual_services"].append(extra)
    farm.reload(plane, document)
    with Client(VIP, farm.spare_port).sock as sock:
        await sock.send(b"hello")
        with trio.fail_after(5):
            assert await sock.recv(100) == b"hello"
    document["virtual_services"].pop()
    farm.reload(plane, document)
    assert {flow.listener.service.name for flow in plane.forwarder.flows} == {NATT}
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as other:
        other.bind((VIP, farm.spare_port))
    assert await farm.route(old, esp(2)) == home


async def test_a_service_moves_to_another_port(farm: Farm, document: Document, plane: Dataplane) -> None:
    await farm.route(farm.client(IKE), ike_message(b"a_client"))
    leader(document)["real_servers"] = [
        {**server, "port": farm.ports[IKE]} for server in leader(document)["real_servers"]
    ]
    leader(document)["port"] = farm.spare_port
    farm.reload(plane, document)
    with pytest.raises(ConnectionRefusedError):
        await farm.client(IKE).ask(b"x")
    moved = Client(VIP, farm.spare_port)
    with moved.sock:
        assert (await farm.route(moved, ike_message(b"new_spi!")))[0] in farm.gateways
    assert [flow.listener.service.port for flow in plane.forwarder.flows] == [farm.spare_port]


async def test_a_renamed_service_is_reloaded_like_any_other(
    farm: Farm, document: Document, plane: Dataplane
) -> None:
    """The one that goes has the address of the one that comes."""
    client = farm.client(NATT)
    await farm.route(client, esp(1))
    leader(document)["name"] = "ikev2"
    document["virtual_services"][1] |= {"name": "ikev2-natt", "follows": "ikev2"}
    farm.reload(plane, document)
    assert set(plane.snapshot.services) == {"ikev2", "ikev2-natt"}
    assert await client.ask(b"hello again") == b"hello again"
    assert flow_of(plane, client).listener.service.name == "ikev2-natt"
    assert not plane.failures


async def test_two_services_change_places(farm: Farm, document: Document, plane: Dataplane) -> None:
    one, other = leader(document), document["virtual_services"][1]
    one["real_servers"] = [{**server, "port": farm.ports[IKE]} for server in one["real_servers"]]
    other["following"] = {"plugin": "port", "port": farm.ports[NATT]}
    farm.reload(plane, document)
    one["port"], other["port"] = other["port"], one["port"]
    farm.reload(plane, document)
    assert {each.service.name: each.sock.getsockname()[1] for each in plane.forwarder.listeners} == {
        IKE: farm.ports[NATT],
        NATT: farm.ports[IKE],
    }
    assert await farm.client(IKE).ask(b"hello") == b"hello"


async def test_a_service_moves_to_the_wildcard_and_back(tmp_path: Path) -> None:
    async with gateways(tmp_path / "state", {"gw1": "127.9.1.1"}, apart=True) as farm:
        document = farm.document()
        async with running(document) as plane:
            for vip, host in (
                ("0.0.0.0", "127.9.0.7"),
                (VIP, VIP),
                ("0.0.0.0", VIP),
                ("127.9.0.7", "127.9.0.7"),
            ):
                for service in document["virtual_services"]:
                    service["address"] = vip
                farm.reload(plane, document)
                for service in (IKE, NATT):
                    assert await farm.client(service, host=host).ask(b"hello") == b"hello"
                assert {each.service.address for each in plane.forwarder.listeners} == {
                    service.address for service in plane.snapshot.config.virtual_services
                }
            with pytest.raises(ConnectionRefusedError):
                await farm.client(IKE).ask(b"nobody listens at the old address")
            assert not plane.failures


# what cannot be done


async def test_a_port_that_is_in_use_changes_nothing(
    farm: Farm, document: Document, plane: Dataplane
) -> None:
    clients = [farm.client(NATT) for _ in range(3)]
    before = await homes(farm, clients)
    was = state_of(plane)
    port = leader(document)["port"]
    leader(document)["real_servers"] = leader(document)["real_servers"][:1]
    document["virtual_services"][1]["address"] = "127.9.0.2"
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as other:
        other.bind((VIP, farm.spare_port))
        leader(document)["port"] = farm.spare_port
        with pytest.raises(
            ListenError, match=f"cannot listen on UDP {VIP}:{farm.spare_port}: .*another program"
        ):
            farm.reload(plane, document)
        assert state_of(plane) == was
        assert await homes(farm, clients) == before
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as free:
            free.bind(("127.9.0.2", farm.ports[NATT]))  # given back
    leader(document)["port"] = port
    farm.reload(plane, document)
    assert (await farm.route(farm.client(IKE), ike_message(b"a_client")))[0] == "gw1"


async def test_a_port_that_is_in_use_at_the_start_leaves_nothing_open(farm: Farm, document: Document) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as other:
        other.bind((VIP, farm.ports[NATT]))
        with pytest.raises(ListenError):
            plane_of(document)
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as free:
            free.bind((VIP, farm.ports[IKE]))
    async with running(document):
        assert await farm.client(IKE).ask(b"hello") == b"hello"


@pytest.mark.parametrize(
    "fault",
    [
        "not TOML",
        "[node]\nname = 'lb'\nnonsense = 1",
        "[node]\nname = 'lb'\n[[virtual_services]]\nname = 'ike'\naddress = '127.9.0.1'\nport = 500",
    ],
)
async def test_a_faulty_file_changes_nothing(
    farm: Farm, document: Document, plane: Dataplane, tmp_path: Path, fault: str
) -> None:
    path = tmp_path / "sapin.toml"
    operations = Operations(plane, REGISTRY, path)
    was = state_of(plane)
    with pytest.raises(Refused, match="cannot be read"):
        operations.reload()
    path.write_text(fault)
    with pytest.raises(Refused, match="nothing was changed"):
        operations.reload()
    assert state_of(plane) == was
    path.write_text(text(document))
    assert operations.reload() == {"changes": []}


async def test_a_state_dir_cannot_be_changed(
    farm: Farm, document: Document, plane: Dataplane, tmp_path: Path
) -> None:
    path = tmp_path / "sapin.toml"
    document["node"]["state_dir"] = str(tmp_path / "elsewhere")
    path.write_text(text(document))
    was = state_of(plane)
    with pytest.raises(Refused, match="restart the daemon"):
        Operations(plane, REGISTRY, path).reload()
    assert state_of(plane) == was


# admin states


async def test_a_state_set_at_run_time_stands_until_the_file_says_another(
    farm: Farm, document: Document, plane: Dataplane
) -> None:
    member = plane.snapshot.groups[IKE].members["gw1"]
    plane.set_admin(NATT, "gw1", AdminState.DRAINING)
    leader(document)["scheduler"] = "least-connections"
    farm.reload(plane, document)
    assert plane.snapshot.groups[IKE].members["gw1"] is member
    assert member.admin is AdminState.DRAINING
    leader(document)["real_servers"][0]["state"] = "disabled"
    farm.reload(plane, document)
    assert member.admin is AdminState.DISABLED
    leader(document)["real_servers"][0]["state"] = "enabled"
    farm.reload(plane, document)
    assert member.admin is AdminState.ENABLED


# the daemon


async def test_sighup_reloads_and_a_fault_is_logged_and_survived(
    farm: Farm, document: Document, daemon: Callable[..., Daemon]
) -> None:
    node = daemon(document)
    await node.start()
    assert node.process is not None
    client = farm.client(NATT)
    home = await farm.route(client, esp(1))
    node.config.write_text("nonsense")
    node.process.send_signal(signal.SIGHUP)
    await eventually(lambda: node.events("configuration not reloaded"))
    assert await farm.route(client, esp(2)) == home
    leader(document)["real_servers"] = [s for s in leader(document)["real_servers"] if s["name"] == home[0]]
    node.configure(document)
    node.process.send_signal(signal.SIGHUP)
    await eventually(lambda: node.events("configuration reloaded"))
    assert {(await farm.route(farm.client(NATT), esp(n)))[0] for n in range(4)} == {home[0]}
    assert await farm.route(client, esp(3)) == home
    assert (await node.call("reload")) == {"changes": []}


def test_a_reload_that_fails_in_an_unforeseen_way_does_not_end_the_daemon(logs: list[Any]) -> None:
    class Broken(Operations):
        def __init__(self) -> None:
            pass

        def reload(self) -> dict[str, Any]:
            raise LookupError("a fault of ours")

    daemon_module._reload(Broken())
    assert logs[-1]["log_level"] == "error"
