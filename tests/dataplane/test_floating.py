"""Sockets at addresses that a node does not have yet, and what they do once it has them; in a namespace of its own."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import AsyncIterator
from ipaddress import ip_address
from pathlib import Path
from random import Random

import pytest

from sapin.core.config import parse
from sapin.core.dataplane import flows
from sapin.core.dataplane.runtime import Dataplane
from sapin.core.journal import FlowOpened
from sapin.core.pins import Put
from tests.dataplane.farm import DESCRIPTORS, IKE, REGISTRY, Client, Farm, gateways, ike_message, settle, text
from tests.dataplane.test_namespace import ip, namespace
from tests.dataplane.twins import replica, running

pytestmark = [pytest.mark.root("a network namespace"), pytest.mark.programs("ip")]

__all__ = ["namespace"]

VIP = {4: "198.18.0.1", 6: "fd00:18::1"}
SOURCE = {4: "10.60.0.1", 6: "fd00:60::1"}
SERVERS = {
    4: {"gw1": "10.60.0.11", "gw2": "10.60.0.12"},
    6: {"gw1": "fd00:60::11", "gw2": "fd00:60::12"},
}
CLIENT = {4: "203.0.113.7", 6: "fd00:203::7"}
PORT = 17_001


def addresses(version: int, verb: str) -> None:
    """To add the virtual addresses is what a takeover is.

    Linux gives an IPv6 address its local route in a task of its own (addrconf_dad_work), so that is waited for.
    """
    bits, nodad = {4: (32, ""), 6: (128, "nodad" if verb == "add" else "")}[version]
    ip(*(f"address {verb} {each[version]}/{bits} dev back {nodad}" for each in (VIP, SOURCE)))
    if verb == "add":
        for each in (VIP, SOURCE):
            while not is_local(each[version]):
                time.sleep(0.002)


def is_local(address: str) -> bool:
    """Whether what is sent to the address stays on this node."""
    shown = subprocess.run(["ip", "route", "get", address], capture_output=True, text=True, check=False)
    return shown.stdout.startswith("local")


@pytest.fixture(params=[4, 6])
async def standby(
    request: pytest.FixtureRequest, namespace: None, tmp_path: Path
) -> AsyncIterator[tuple[int, Farm, Dataplane]]:
    """A standby whose servers are there, and that has no virtual address."""
    version: int = request.param
    ip("link add back type veth peer name far", "link set far up", "link set back up")
    bits = {4: 24, 6: 64}[version]
    own = [*SERVERS[version].values(), CLIENT[version]]
    ip(*(f"address add {address}/{bits} dev back nodad" for address in own))
    async with gateways(tmp_path / "state", SERVERS[version]) as farm:
        config = parse(text(farm.document(vip=VIP[version])), REGISTRY)
        floating = {version: ip_address(SOURCE[version])}
        async with running(Dataplane(config, REGISTRY, DESCRIPTORS, Random(1), floating)) as plane:
            yield version, farm, plane


def tell_of(plane: Dataplane, client: Client, version: int) -> None:
    """The peer has a pin and a flow of that client."""
    address = ip_address(CLIENT[version]).packed
    key = b"src:" + address
    flow = FlowOpened(IKE, address, client.port, b"", "gw2", b"", PORT, key, 1)
    replica(plane).apply([Put(IKE, (key,), "gw2", 1), flow])


def client_of(farm: Farm, version: int) -> Client:
    """A client whose next datagram will reach the virtual address, when there is one."""
    addresses(version, "add")
    client = farm.client(host=VIP[version], source=CLIENT[version])
    addresses(version, "del")
    return client


async def test_everything_is_open_before_the_addresses_come(standby: tuple[int, Farm, Dataplane]) -> None:
    version, farm, plane = standby
    client = client_of(farm, version)
    tell_of(plane, client, version)
    await settle()
    (flow,) = plane.forwarder.flows
    assert flow.sock.getsockname()[:2] == (SOURCE[version], PORT)
    assert {each.sock.getsockname()[0] for each in plane.forwarder.listeners} == {VIP[version]}
    digest = replica(plane).digest()
    addresses(version, "add")
    plane.activate()
    assert await farm.route(client, ike_message(os.urandom(8))) == ("gw2", PORT)
    assert replica(plane).digest() == digest
    assert list(plane.forwarder.flows) == [flow]


async def test_a_server_that_speaks_first_reaches_its_client(standby: tuple[int, Farm, Dataplane]) -> None:
    version, farm, plane = standby
    client = client_of(farm, version)
    tell_of(plane, client, version)
    await settle()
    addresses(version, "add")
    await farm.gateways["gw2"].socks[IKE].sendto(b"from the server", (SOURCE[version], PORT))
    assert await client.receive() == [b"from the server"]


async def test_without_the_capability_flows_open_with_the_addresses(
    standby: tuple[int, Farm, Dataplane], monkeypatch: pytest.MonkeyPatch
) -> None:
    """An IPv4 socket that may not be transparent cannot be connected from where the node is not; an IPv6 one can."""
    version, farm, plane = standby
    monkeypatch.setattr(flows, "_TRANSPARENT", flows.FREEBIND)
    client = client_of(farm, version)
    tell_of(plane, client, version)
    await settle()
    assert len(plane.reopener) == (1 if version == 4 else 0)
    addresses(version, "add")
    plane.activate()
    assert await farm.route(client, ike_message(os.urandom(8))) == ("gw2", PORT)
    assert (len(plane.forwarder.flows), len(plane.reopener)) == (1, 0)


async def test_new_clients_of_the_new_active_come_from_the_floating_address(
    standby: tuple[int, Farm, Dataplane],
) -> None:
    version, farm, plane = standby
    client = client_of(farm, version)
    addresses(version, "add")
    plane.activate()
    await farm.route(client, ike_message(os.urandom(8)))
    (flow,) = plane.forwarder.flows
    assert flow.sock.getsockname()[0] == SOURCE[version]
