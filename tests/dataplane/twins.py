"""Two dataplanes of one configuration in this process, and a stream between them that tests direct.

Each twin has a virtual address and a floating source of its own, since one machine cannot have the same twice; a
flow is the same flow all the same, for its identity is the client's.
"""

from __future__ import annotations

import socket
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from ipaddress import ip_address
from random import Random
from typing import Any

import trio

from sapin.core.config import parse
from sapin.core.dataplane.outlet import Outlet
from sapin.core.dataplane.pairing import Pairing
from sapin.core.dataplane.replica import Replica
from sapin.core.dataplane.runtime import Dataplane
from sapin.core.journal import Replicated
from tests.dataplane.farm import DESCRIPTORS, IKE, REGISTRY, Client, Document, Farm, text

VIPS = ("127.9.0.1", "127.9.0.5")
SOURCES = ("127.9.0.2", "127.9.0.6")


def document(farm: Farm, number: int = 0, **leader: Any) -> Document:
    """The configuration of the first or second twin."""
    made = farm.document(vip=VIPS[number], **leader)
    made["node"]["state_dir"] += f"-{number}"
    return made


def plane_of(made: Document, number: int = 0, descriptors: int = DESCRIPTORS) -> Dataplane:
    """A dataplane that has a peer, ready to run."""
    floating = {4: ip_address(SOURCES[number])}
    return Dataplane(parse(text(made), REGISTRY), REGISTRY, descriptors, Random(number), floating)


def pairing(plane: Dataplane) -> Pairing:
    """What the dataplane has because it has a peer."""
    assert plane.pairing is not None
    return plane.pairing


def outlet(plane: Dataplane) -> Outlet:
    return pairing(plane).outlet


def replica(plane: Dataplane) -> Replica:
    return pairing(plane).replica


@asynccontextmanager
async def running(plane: Dataplane) -> AsyncIterator[Dataplane]:
    """The dataplane runs while the context lasts."""
    async with trio.open_nursery() as nursery:
        await nursery.start(plane.run)
        yield plane
        nursery.cancel_scope.cancel()


class Stream:
    """What a twin tells, and who is told."""

    def __init__(self, source: Dataplane, sink: Dataplane | None = None, *, waits: bool = False) -> None:
        self.told: list[Sequence[Replicated]] = []
        self.sink = sink
        self.waits = waits
        """Whether answers wait for :meth:`Outlet.release`."""
        outlet(source).replicate = self._replicate

    @property
    def records(self) -> list[Replicated]:
        """All that was told."""
        return [record for part in self.told for record in part]

    def _replicate(self, records: Sequence[Replicated]) -> int:
        self.told.append(records)
        if self.sink is not None:
            replica(self.sink).apply(records)
        return len(self.told) if self.waits else 0


@asynccontextmanager
async def twins(farm: Farm, **leader: Any) -> AsyncIterator[tuple[Dataplane, Dataplane, Stream]]:
    """An active and a standby that is told everything."""
    active, standby = (plane_of(document(farm, number, **leader), number) for number in (0, 1))
    async with running(active), running(standby):
        active.activate()
        yield active, standby, Stream(active, standby)


def snapshot(source: Dataplane, sink: Dataplane) -> None:
    """A whole snapshot, from one to the other."""
    replica(sink).begin()
    for chunk in replica(source).walk():
        replica(sink).apply(chunk)
    while not replica(sink).finish():
        pass


def same(one: Dataplane, other: Dataplane) -> bool:
    return replica(one).digest() == replica(other).digest()


def again(farm: Farm, client: Client, service: str = IKE) -> Client:
    """The client's address and port once more, towards the second twin."""
    client.plain.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    return farm.client(service, host=VIPS[1], source="127.0.0.1", source_port=client.port)
