"""The loop is the control socket's and the checks' too: nothing that the dataplane does holds it for long."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
import trio

from sapin.core.dataplane.batch import peer_of
from sapin.core.dataplane.limits import RESERVED
from sapin.core.dataplane.runtime import Dataplane
from sapin.core.model import AdminState
from tests.dataplane.farm import (
    DESCRIPTORS,
    IKE,
    NATT,
    Farm,
    esp,
    eventually,
    framed,
    ike_message,
    running,
)

GENEROUS = 0.25
"""Seconds that a task may have to wait on a busy machine; on an idle one it is some 5 ms."""
MANY = min(3_000, DESCRIPTORS - RESERVED - 200)


@asynccontextmanager
async def ticking(what: str) -> AsyncIterator[None]:
    """Measure how late a task comes that wants to run every millisecond."""
    worst = 0.0

    async def tick() -> None:
        nonlocal worst
        while True:
            due = trio.current_time() + 0.001
            await trio.sleep_until(due)
            worst = max(worst, trio.current_time() - due)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(tick)
        yield
        await trio.sleep(0.005)
        nursery.cancel_scope.cancel()
    print(f"{what}: worst lateness {worst * 1000:.1f} ms")
    assert worst < GENEROUS


def flood(plane: Dataplane, number: int) -> None:
    """Open flows of clients that nobody is."""
    (listener,) = [each for each in plane.forwarder.listeners if each.service.name == NATT]
    for client in range(number):
        peer = peer_of(bytes([10, *client.to_bytes(3)]), 4500)
        message = framed(ike_message(client.to_bytes(8, "little").replace(b"\0", b"\xaa")))
        assert plane.forwarder.admission.admit(listener, peer, None, memoryview(message)) is not None
    plane.store.flush()


async def test_under_full_load(farm: Farm) -> None:
    async with running(farm.document(persistence="ike-spi")) as plane:
        clients = [farm.client(NATT, source=f"127.9.3.{n % 20 + 1}") for n in range(40)]
        async with ticking("2,000 datagrams"):
            for number in range(10):
                for client in clients:
                    client.send(*[esp(number)] * 5)
                for client in clients:
                    await client.receive(5)
        assert not plane.forwarder.drops
        assert sum(c.packets_in for c in plane.counters(NATT).values()) == 2_000


async def test_new_flows(farm: Farm) -> None:
    async with running(farm.document(persistence="ike-spi")) as plane, ticking("500 new flows"):
        clients = [farm.client(NATT) for _ in range(500)]
        for client in clients:
            client.send(framed(ike_message(str(client.port).encode().ljust(8))))
        for client in clients:
            await client.receive()
        assert len(plane.forwarder.flows) == 500


@pytest.mark.parametrize("what", ["disabled", "deleted", "expired"])
async def test_many_flows_that_end_at_once(farm: Farm, what: str) -> None:
    document = farm.document(persistence="ike-spi")
    document["node"]["max_pins"] = MANY
    async with running(document) as plane:
        flood(plane, MANY)
        group = plane.snapshot.groups[IKE]
        async with ticking(f"{MANY:,} flows {what}"):
            match what:
                case "disabled":
                    for name in farm.gateways:
                        plane.set_admin(IKE, name, AdminState.DISABLED)
                case "deleted":
                    pins = group.table.pins(0, MANY + 1).pins
                    for at in range(0, len(pins), 500):
                        plane.delete_pins((group, pin.keys[0]) for pin in pins[at : at + 500])
                        await trio.lowlevel.checkpoint()
                case "expired":
                    await plane._expire(int(plane.clock()) + 10_000_000)
            await eventually(lambda: not len(plane.forwarder.flows))
        assert not plane.failures
        assert {member.pinned for member in group.members.values()} == {0}


async def test_a_configuration_of_many_servers(farm: Farm) -> None:
    servers = [{"name": f"gw{n}", "address": f"127.{n // 250 + 20}.1.{n % 250 + 1}"} for n in range(1000)]
    check = {"plugin": "udp", "interval": "1h", "wait": "1ms"}
    document = farm.document(real_servers=servers, checks=[check])
    async with running(document) as plane:
        await eventually(lambda: len(plane.prober.findings) == 1000)
        async with ticking("a reload with 1,000 servers"):
            document["virtual_services"][0]["checks"] = [{**check, "wait": "2ms"}]
            farm.reload(plane, document)
            await trio.sleep(0.2)
        async with ticking("1,000 suspects"):
            for server in servers:
                plane.prober.suspect(IKE, str(server["name"]))
            await trio.sleep(0.2)
        assert not plane.failures
