"""Two nodes in this process: real dataplanes, a real link over TLS on loopback, and guards that only pretend."""

from __future__ import annotations

import secrets
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from ipaddress import ip_address, ip_interface
from pathlib import Path
from typing import Any

import trio

from sapin.cluster import guarding
from sapin.cluster.config import Cluster, Side, VirtualAddress
from sapin.cluster.guarding import Guard, Told
from sapin.cluster.membership import Folder, Membership
from sapin.cluster.node import Node
from sapin.core.dataplane.runtime import Dataplane
from tests.cluster.pairs import Authority, members, until
from tests.dataplane.farm import Farm
from tests.dataplane.twins import SOURCES, VIPS, document, plane_of

SHARED = """\
# What both share.
[[virtual_services]]
name = "ike"
"""


class ServiceNetwork:
    """Where guards hear of one another, and who has the addresses."""

    def __init__(self) -> None:
        self.guards: dict[str, PretendedGuard] = {}
        self.whole = True


class PretendedGuard:
    """Does at once what it is asked for."""

    def __init__(self, network: ServiceNetwork, name: str, peer: str, boot: int, holding: int) -> None:
        self.network, self.name, self.peer, self.boot = network, name, peer, boot
        self.here = bool(holding)
        self.epoch = self.fed = 0
        self._send, self._receive = trio.open_memory_channel[Told](1_000)

    async def __aenter__(self) -> Guard:
        self.network.guards[self.name] = self
        return self

    async def __aexit__(self, *details: object) -> None:
        """The daemon is gone: what a guard says then."""
        del self.network.guards[self.name]
        other = self.network.guards.get(self.peer)
        if self.here and other is not None:
            other.tell(guarding.Farewell(self.boot, self.epoch))

    def tell(self, told: Told) -> None:
        if self.network.whole:
            self._send.send_nowait(told)

    def feed(self, epoch: int) -> None:
        self.epoch = epoch
        self.fed += 1

    def claim(self, epoch: int) -> None:
        self.here, self.epoch = True, epoch
        self._send.send_nowait(guarding.Claimed())

    def release(self) -> None:
        self.here = False
        self._send.send_nowait(guarding.Released())

    def disown(self) -> int:
        return self.epoch if self.here else 0

    def probe(self) -> None:
        other = self.network.guards.get(self.peer)
        if other is not None:
            self.tell(guarding.Answered(other.epoch, other.here))
        else:
            self.tell(guarding.Refused())

    async def told(self) -> Told:
        return await self._receive.receive()


class Half:
    """One of the nodes, which can be started and ended."""

    def __init__(self, couple: Couple, number: int, config: Path) -> None:
        self.name = f"lb-{'ab'[number]}"
        self.number, self.config = number, config
        self.plane: Dataplane
        self.node: Node
        self.used: list[str] = []
        self._couple = couple
        self._scope = trio.CancelScope()
        self.ended = trio.Event()

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """A daemon's life."""
        self.ended = trio.Event()
        self.plane = plane_of(document(self._couple.farm, self.number, **self._couple.leader), self.number)
        cluster = Cluster(
            (ip_address("127.0.0.1"),),
            (
                VirtualAddress(ip_interface(f"{VIPS[self.number]}/32"), "lo"),
                VirtualAddress(ip_interface(f"{SOURCES[self.number]}/32"), "lo", Side.SERVERS),
            ),
            sync_timeout=0.5,
        )
        self.node = Node(cluster, self.plane, self.config, self.config.read_text(), self._use, self._guard)
        with trio.CancelScope() as self._scope:
            async with trio.open_nursery() as nursery:
                await nursery.start(self.plane.run)
                nursery.start_soon(self.node.run)
                task_status.started()
        self.ended.set()

    async def kill(self) -> None:
        self._scope.cancel()
        await self.ended.wait()

    def _use(self, text: str) -> None:
        self.used.append(text)

    def _guard(
        self, _: Cluster, membership: Membership, secret: bytes, boot: int, holding: int
    ) -> PretendedGuard:
        assert len(secret) == 32
        peer = membership.peer.name if membership.peer else ""
        return PretendedGuard(self._couple.network, membership.node, peer, boot, holding)

    @property
    def status(self) -> dict[str, Any]:
        return self.node.describe()

    @property
    def role(self) -> str:
        return str(self.status.get("role", ""))

    @property
    def in_sync(self) -> bool:
        return self.status.get("replication", {}).get("in_sync") is True


class Couple:
    """Both nodes; members of one cluster from the start on."""

    def __init__(self, farm: Farm, folder: Path, **leader: Any) -> None:
        self.farm, self.leader = farm, leader
        self.network = ServiceNetwork()
        authority, both, secret = Authority.new(), members(), secrets.token_bytes(32)
        self.halves: list[Half] = []
        for number, own in enumerate(both):
            config = folder / f"{own.name}.toml"
            config.write_text(f'[node]\nname = "{own.name}"\n\n{SHARED}')
            self.halves.append(Half(self, number, config))
            state = Folder(Path(document(farm, number, **leader)["node"]["state_dir"]))
            credentials = authority.issue(own.name)
            for name, data in (
                ("ca.crt", credentials.ca),
                ("ca.key", authority.key),
                ("node.crt", credentials.certificate),
                ("node.key", credentials.key),
                ("secret", secret),
            ):
                state.write(name, data)
            state.write_membership(Membership(cluster="0" * 32, node=own.name, members=both))

    @property
    def active(self) -> Half:
        return next(half for half in self.halves if half.role == "active")

    @property
    def standby(self) -> Half:
        return next(half for half in self.halves if half is not self.active)

    async def settled(self) -> None:
        """Wait until one is active and the other in sync."""
        await until(
            lambda: (
                sorted(half.role for half in self.halves) == ["active", "standby"]
                and all(half.in_sync for half in self.halves)
            )
        )


@asynccontextmanager
async def couple(farm: Farm, folder: Path, **leader: Any) -> AsyncIterator[tuple[Couple, trio.Nursery]]:
    """Two nodes that run."""
    made = Couple(farm, folder, **leader)
    async with trio.open_nursery() as nursery:
        for half in made.halves:
            await nursery.start(half.run)
        await made.settled()
        yield made, nursery
        nursery.cancel_scope.cancel()
