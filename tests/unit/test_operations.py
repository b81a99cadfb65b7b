"""The operations of a real dataplane on loopback, with clients that send real datagrams."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack, asynccontextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st

from sapin.api.keys import client_of, parse_key, show_key
from sapin.api.operations import PAGE, STEP, Operations
from sapin.api.refused import Refused
from sapin.core.config import parse
from sapin.core.dataplane.runtime import Dataplane
from sapin.core.registry import Registry
from sapin.core.writer import UnknownObject

NETWORK = f"127.{128 + os.getpid() % 100}"  # so that two runs at a time do not meet
BALANCER = f"{NETWORK}.0.1"
GATEWAYS = {"gw1": f"{NETWORK}.1.1", "gw2": f"{NETWORK}.1.2", "gw3": f"{NETWORK}.1.3"}
ALICE, BOB, CAROL = (f"{NETWORK}.9.{n}" for n in (1, 2, 3))
IKE, NATT = 10_500, 14_500


class Farm:
    """A running dataplane, sockets where its servers are, and clients."""

    def __init__(self, folder: Path, persistence: str, stack: ExitStack) -> None:
        self.config = folder / "sapin.toml"
        self._persistence = persistence
        self._stack = stack
        self.write("gw1", "gw2")
        registry = Registry()
        self.dataplane = Dataplane(parse(self.config.read_bytes(), registry), registry, 1024)
        self.operations = Operations(self.dataplane, registry, self.config)
        for address in GATEWAYS.values():
            for port in (IKE, NATT):
                self._socket(address, port)

    def write(self, *servers: str, state_dir: Path | None = None, extra: str = "") -> None:
        listed = ", ".join(f'{{ name = "{name}", address = "{GATEWAYS[name]}" }}' for name in servers)
        self.config.write_text(f"""
            [node]
            name = "lb"
            state_dir = "{state_dir or self.config.parent}"
            max_flows = 100
            max_pins = 10_000
            {extra}

            [[virtual_services]]
            name = "ike"
            address = "{BALANCER}"
            port = {IKE}
            framing = "ike"
            scheduler = "round-robin"
            persistence = "{self._persistence}"
            real_servers = [{listed}]

            [[virtual_services]]
            name = "ike-natt"
            address = "{BALANCER}"
            port = {NATT}
            framing = "ike-natt"
            follows = "ike"
        """)

    async def visit(self, address: str, *ports: int) -> list[int]:
        """A client sends something to the ports, from a port of its own for each; which those are."""
        wanted = len(self.dataplane.forwarder.flows) + len(ports)
        sockets = [self._socket(address, 0) for _ in ports]
        for sock, port in zip(sockets, ports, strict=True):
            sock.sendto(b"hello", (BALANCER, port))
        await self.settle(wanted)
        return [int(sock.getsockname()[1]) for sock in sockets]

    async def settle(self, flows: int) -> None:
        with trio.fail_after(5):
            while len(self.dataplane.forwarder.flows) != flows:  # noqa: ASYNC110 (the forwarder tells nobody)
                await trio.sleep(0.005)

    def server(self, name: str) -> dict[str, Any]:
        (group,) = self.operations.status()["groups"]
        return next(row for row in group["servers"] if row["name"] == name)

    def _socket(self, host: str, port: int) -> socket.socket:
        sock = self._stack.enter_context(socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
        sock.bind((host, port))
        return sock


@asynccontextmanager
async def running(persistence: str = "source-address") -> AsyncIterator[Farm]:
    with TemporaryDirectory(prefix="sapin-") as folder, ExitStack() as stack:
        farm = Farm(Path(folder), persistence, stack)
        async with trio.open_nursery() as nursery:
            await nursery.start(farm.dataplane.run)
            yield farm
            nursery.cancel_scope.cancel()


@pytest.fixture
async def farm() -> AsyncIterator[Farm]:
    async with running() as made:
        yield made


# seeing


async def test_status_shows_services_servers_and_what_passed(farm: Farm) -> None:
    await farm.visit(ALICE, IKE, NATT)
    status = farm.operations.status()
    json.dumps(status)
    (group,) = status["groups"]
    assert status["flows"] == 2
    assert group["pins"]["size"] == 1
    assert [(row["name"], row["port"], row["follows"]) for row in group["services"]] == [
        ("ike", IKE, None),
        ("ike-natt", NATT, "ike"),
    ]
    assert [row["packets_in"] for row in group["services"]] == [1, 1]
    assert farm.server("gw1")["pinned"] == 1
    assert farm.server("gw1")["packets_in"] == 2
    assert farm.server("gw1")["endpoints"] == {
        "ike": f"{GATEWAYS['gw1']}:{IKE}",
        "ike-natt": f"{GATEWAYS['gw1']}:{NATT}",
    }


async def test_plugins_are_listed_with_their_use(farm: Farm) -> None:
    rows = {(row["kind"], row["name"]): row for row in farm.operations.plugins()}
    json.dumps(list(rows.values()))
    assert rows["scheduler", "round-robin"]["instances"] == 1
    assert rows["scheduler", "maglev"]["instances"] == 0
    assert {kind for kind, _ in rows} == {"scheduler", "persistence", "following", "check"}


async def test_pins_are_listed_page_by_page_each_once(farm: Farm) -> None:
    for address in (ALICE, BOB, CAROL):
        await farm.visit(address, IKE)
    seen: list[str] = []
    cursor: str | None = None
    while True:
        page = await farm.operations.pins(cursor=cursor, limit=1)
        assert len(page["pins"]) <= 1
        seen += [key for pin in page["pins"] for key in pin["keys"]]
        cursor = page["next"]
        if cursor is None:
            break
    assert sorted(seen) == [f"src:{address}" for address in (ALICE, BOB, CAROL)]


@pytest.mark.parametrize(
    ("wanted", "found"),
    [
        ({"server": "gw1"}, {ALICE, CAROL}),
        ({"client": BOB}, {BOB}),
        ({"client": f"src:{BOB}"}, {BOB}),
        ({"client": BOB, "server": "gw1"}, set()),
        ({"service": "ike-natt"}, {ALICE, BOB, CAROL}),
        ({"server": "no such"}, set()),
    ],
)
async def test_pins_are_filtered(farm: Farm, wanted: dict[str, str], found: set[str]) -> None:
    for address in (ALICE, BOB, CAROL):
        await farm.visit(address, IKE)
    page = await farm.operations.pins(**wanted)
    assert {key for pin in page["pins"] for key in pin["keys"]} == {f"src:{address}" for address in found}


@pytest.mark.parametrize("cursor", ["", "x", "0", "0:", ":0", "0:-1", "99:0", "0:0:0", "0:" + "9" * 50])
async def test_a_cursor_that_is_none_is_refused(farm: Farm, cursor: str) -> None:
    with pytest.raises(Refused, match="is not a cursor"):
        await farm.operations.pins(cursor=cursor)


async def test_a_long_search_gives_way_and_ends(farm: Farm) -> None:
    group = farm.dataplane.snapshot.groups["ike"]
    member = group.members["gw1"]
    now = int(farm.dataplane.clock())
    for number in range(20 * STEP):
        group.table.put((b"spi:" + number.to_bytes(8),), member, now)
    steps = 0

    async def count() -> None:
        nonlocal steps
        while True:
            await trio.lowlevel.checkpoint()
            steps += 1

    async with trio.open_nursery() as nursery:
        nursery.start_soon(count)
        page = await farm.operations.pins(client=ALICE)
        nursery.cancel_scope.cancel()
    assert page == {"pins": [], "next": None}
    assert steps >= 19
    page = await farm.operations.pins(limit=10**9)
    assert len(page["pins"]) == PAGE


# explain


async def test_a_pinned_client_is_explained(farm: Farm) -> None:
    ike_port, natt_port = await farm.visit(ALICE, IKE, NATT)
    told = await farm.operations.explain(ALICE)
    json.dumps(told)
    assert {(flow["service"], flow["port"], flow["server"]) for flow in told["flows"]} == {
        ("ike", ike_port, "gw1"),
        ("ike-natt", natt_port, "gw1"),
    }
    assert {flow["key"] for flow in told["flows"]} == {f"src:{ALICE}"}
    assert all(row["reason"] == "pinned" and row["server"] == "gw1" for row in told["services"])
    assert all(row["pinned_since"] <= farm.dataplane.clock() for row in told["services"])


async def test_flows_are_explained_by_port_and_service(farm: Farm) -> None:
    ike_port, _ = await farm.visit(ALICE, IKE, NATT)
    by_port = await farm.operations.explain(ALICE, port=ike_port)
    assert [flow["service"] for flow in by_port["flows"]] == ["ike"]
    by_service = await farm.operations.explain(ALICE, service="ike-natt")
    assert [flow["service"] for flow in by_service["flows"]] == ["ike-natt"]
    assert [row["service"] for row in by_service["services"]] == ["ike-natt"]


async def test_asking_about_a_new_client_changes_nothing(farm: Farm) -> None:
    answers = [await farm.operations.explain(BOB) for _ in range(3)]
    assert [answer["services"][0]["server"] for answer in answers] == ["gw1"] * 3
    assert answers[0]["services"][0]["reason"] == "scheduled"
    await farm.visit(BOB, IKE)
    assert farm.server("gw1")["pinned"] == 1


async def test_it_says_who_is_left_out_and_why(farm: Farm) -> None:
    farm.operations.set_state("gw1", "draining")
    told = await farm.operations.explain(BOB, service="ike")
    (row,) = told["services"]
    assert (row["server"], row["left_out"]) == ("gw2", {"gw1": "draining"})
    farm.operations.set_state("gw2", "disabled")
    (row,) = (await farm.operations.explain(BOB, service="ike"))["services"]
    assert (row["server"], row["reason"]) == (None, "no-server")
    assert row["left_out"] == {"gw1": "draining", "gw2": "disabled"}


@pytest.mark.parametrize(
    ("wanted", "error", "says"),
    [
        ({"client": "nobody"}, Refused, "is not an IPv4 or IPv6 address"),
        ({"client": ALICE, "port": 0}, Refused, "is not a port"),
        ({"client": ALICE, "port": 65_536}, Refused, "is not a port"),
        ({"client": ALICE, "service": "ikee"}, UnknownObject, "there is: ike, ike-natt"),
    ],
)
async def test_a_question_that_makes_no_sense_is_refused(
    farm: Farm, wanted: dict[str, Any], error: type[Exception], says: str
) -> None:
    with pytest.raises(error, match=says):
        await farm.operations.explain(**wanted)


async def test_clients_of_one_address_have_pins_of_their_own_by_tuple() -> None:
    async with running("ike-spi") as farm:
        await farm.visit(ALICE, IKE, IKE)
        told = await farm.operations.explain(ALICE)
        assert {flow["server"] for flow in told["flows"]} == {"gw1", "gw2"}
        page = await farm.operations.pins(client=ALICE)
        assert len(page["pins"]) == 2


# deleting


@pytest.mark.parametrize(
    ("wanted", "left"),
    [
        ({"client": ALICE}, {BOB}),
        ({"server": "gw2"}, {ALICE}),
        ({"key": f"src:{BOB}"}, {ALICE}),
        ({"key": f"src:{BOB}", "server": "gw1"}, {ALICE, BOB}),
        ({"key": f"src:{CAROL}"}, {ALICE, BOB}),
        ({"service": "ike"}, set()),
    ],
)
async def test_pins_are_deleted_with_their_flows(farm: Farm, wanted: dict[str, str], left: set[str]) -> None:
    await farm.visit(ALICE, IKE, NATT)
    await farm.visit(BOB, IKE, NATT)
    assert await farm.operations.delete_pins(**wanted) == {"deleted": 2 - len(left), "next": None}
    page = await farm.operations.pins()
    assert {key for pin in page["pins"] for key in pin["keys"]} == {f"src:{address}" for address in left}
    await farm.settle(2 * len(left))


async def test_not_everything_is_deleted_by_mistake(farm: Farm) -> None:
    with pytest.raises(Refused, match="say which pins"):
        await farm.operations.delete_pins()
    with pytest.raises(Refused, match="is not a key"):
        await farm.operations.delete_pins(key="nonsense")


# states


async def test_a_draining_server_keeps_its_clients_and_gets_no_new_ones(farm: Farm) -> None:
    await farm.visit(ALICE, IKE)
    answer = farm.operations.set_state("gw1", "draining")
    assert answer == {"server": "gw1", "state": "draining", "services": ["ike", "ike-natt"], "pinned": 1}
    for address in (BOB, CAROL):
        await farm.visit(address, IKE)
    assert (farm.server("gw1")["pinned"], farm.server("gw2")["pinned"]) == (1, 2)


async def test_a_disabled_server_loses_its_clients(farm: Farm) -> None:
    await farm.visit(ALICE, IKE, NATT)
    assert farm.operations.set_state("gw1", "disabled")["pinned"] == 0
    await farm.settle(0)
    farm.operations.set_state("gw1", "enabled", service="ike-natt")
    assert farm.server("gw1")["takes_new_clients"]


@pytest.mark.parametrize(
    ("arguments", "error", "says"),
    [
        (("gw1", "drained"), Refused, "must be one of enabled, draining, disabled"),
        (("gw9", "draining"), UnknownObject, "there is: gw1, gw2"),
        (("gw1", "draining", "ikee"), UnknownObject, "there is: ike, ike-natt"),
        (("gw9", "draining", "ike"), UnknownObject, "it has: gw1, gw2"),
    ],
)
async def test_a_state_that_cannot_be_set_is_refused(
    farm: Farm, arguments: tuple[str, ...], error: type[Exception], says: str
) -> None:
    with pytest.raises(error, match=says):
        farm.operations.set_state(*arguments)


# reload


async def test_a_reload_says_what_it_changed_and_leaves_the_rest(farm: Farm) -> None:
    await farm.visit(ALICE, IKE)
    assert farm.operations.reload() == {"changes": []}
    farm.write("gw1", "gw2", "gw3")
    assert farm.operations.reload()["changes"] == ["ike/gw3: added", "ike-natt/gw3: added"]
    assert farm.server("gw1")["pinned"] == 1
    assert len(farm.dataplane.forwarder.flows) == 1


def faulty(farm: Farm) -> Iterator[str]:
    farm.write("gw1", "gw2", extra='rubbish = "1"')
    yield r"has faults, nothing was changed:\nnode.rubbish"
    farm.write("gw1", "gw2", state_dir=farm.config.parent / "elsewhere")
    yield "state_dir cannot be changed"
    farm.config.unlink()
    yield "cannot be read"


async def test_a_reload_that_cannot_be_done_changes_nothing(farm: Farm) -> None:
    before = farm.dataplane.snapshot
    for says in faulty(farm):
        with pytest.raises(Refused, match=says):
            farm.operations.reload()
        assert farm.dataplane.snapshot is before


# keys


@pytest.mark.parametrize(
    ("key", "shown"),
    [
        (b"src:\xc0\x00\x02\x01", "src:192.0.2.1"),
        (b"src:" + bytes(15) + b"\x01", "src:::1"),
        (b"client:\xc0\x00\x02\x01", "client:192.0.2.1"),
        (b"spi:\x01\x23\x45\x67\x89\xab\xcd\xef", "spi:0123456789abcdef"),
        (b"tuple:\xc0\x00\x02\x01\x04\x00\x11\x94", "tuple:192.0.2.1/1024/4500"),
        (b"of-a-plugin:\x00\xff", "of-a-plugin:00ff"),
        (b"src:\x01\x02", "src:0102"),
    ],
)
def test_keys_are_shown(key: bytes, shown: str) -> None:
    assert show_key(key) == shown


@given(st.sampled_from(["src", "client", "tuple", "spi", "mine"]), st.binary(max_size=24))
def test_keys_are_read_as_they_are_shown(kind: str, value: bytes) -> None:
    key = kind.encode() + b":" + value
    assert parse_key(show_key(key)) == key
    client_of(key)


@given(st.text(max_size=40) | st.text("src:tuple/0123456789.", max_size=30))
def test_text_that_is_no_key_is_refused(text: str) -> None:
    with suppress(ValueError):
        assert isinstance(parse_key(text), bytes)


@pytest.mark.parametrize(
    "text", ["", "src", "src:x", "src:1.2.3", "tuple:1.2.3.4/5", "tuple:1.2.3.4/5/70000", "spi:0"]
)
def test_what_is_no_key_is_told_what_one_looks_like(text: str) -> None:
    with pytest.raises(ValueError, match=r"is not a key, as in src:192\.0\.2\.1"):
        parse_key(text)
