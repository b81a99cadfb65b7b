"""A node's state and its disk: real affinity tables, and what of them outlives which failure.

The journal is what was written, in order; what the kernel has of it outlives the daemon, and what was synced
outlives the power. So does what was persisted.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from sapin.cluster.wire import Record, Revision
from sapin.core.journal import FlowClosed, FlowOpened, ServerAdmin, ServerHealth, Touched
from sapin.core.pins import Change, Cleared, Put, Removed
from sapin.core.replicated import ReplicatedTable, mix

GROUP = "ike"
SERVERS = ("vpn-1", "vpn-2", "vpn-3")
CHUNK = 7
LOOKS = 64
TIMEOUT = 1_000_000


FRESH: dict[tuple[str, ...], Record] = {
    ("revision",): Revision(0, 0, "00", ""),
    **{
        ("ServerHealth", GROUP, name): ServerHealth(GROUP, name, "unknown", "enabled", 100)
        for name in SERVERS
    },
    **{("ServerAdmin", GROUP, name): ServerAdmin(GROUP, name, "enabled") for name in SERVERS},
}
"""What every node begins with."""


@dataclass(eq=False)
class Server:
    """What pins point to."""

    name: str
    pinned: int = 0


@dataclass
class Disk:
    """What a node has written."""

    saved: Any
    journal: list[Record] = field(default_factory=list)
    synced: int = 0
    """So many records outlive the loss of power."""

    def lose_power(self) -> list[Record]:
        """What is lost."""
        lost = self.journal[self.synced :]
        del self.journal[self.synced :]
        return lost


class State:
    """A node's pins, flows and states; fulfils :class:`~sapin.cluster.replication.Replica`."""

    def __init__(self, disk: Disk) -> None:
        self.members = {name: Server(name) for name in SERVERS}
        self.told: list[Change] = []
        self.table: ReplicatedTable[Server] = ReplicatedTable(GROUP, 300, TIMEOUT, self.told.append)
        self.flows: dict[tuple[str, bytes, int, bytes], FlowOpened] = {}
        self.states_: dict[tuple[str, ...], Record] = dict(FRESH)
        self._disk = disk
        self._stale: set[tuple[str, bytes, int, bytes]] | None = None
        self._rest = 0
        was = list(disk.journal)
        disk.journal.clear()
        for record in was:
            self._apply(record)
        disk.synced = len(disk.journal)

    # of this node

    def put(self, keys: Sequence[bytes], server: str) -> Sequence[Record]:
        self.table.put(keys, self.members[server], 1)
        return self._flush()

    def remove(self, key: bytes) -> Sequence[Record]:
        self.table.remove(key)
        return self._flush()

    def clear(self, server: str) -> Sequence[Record]:
        self.table.clear(self.members[server])
        return self._flush()

    def set(self, record: Record) -> Sequence[Record]:
        """A flow or a state, as it is from now on."""
        self._apply(record)
        return [record]

    def touch(self, key: bytes) -> Sequence[Record]:
        self.table.touch(key, 2)
        return [Touched(GROUP, (key,))]

    def _flush(self) -> Sequence[Record]:
        told = list(self.told)
        self.told.clear()
        self._disk.journal += told
        return told

    # of the peer

    def walk(self) -> Iterator[Sequence[Record]]:
        yield list(self.states_.values())
        start: int | None = 0
        while start is not None:
            part = self.table.puts(start, CHUNK)
            yield part.puts
            start = part.next
        for each in list(self.flows):
            if each in self.flows:
                yield [self.flows[each]]

    def states(self) -> Sequence[Record]:
        return list(self.states_.values())

    def apply(self, records: Sequence[Record]) -> None:
        for record in records:
            self._apply(record)

    def begin(self) -> None:
        self.table.begin()
        self._stale = set(self.flows)

    def finish(self) -> bool:
        gone, done = self.table.finish(LOOKS)
        self._disk.journal += gone
        if done and self._stale:
            self._apply(FlowClosed(*self._stale.pop()))
            return False
        return done

    def digest(self) -> int:
        flows = sum(mix(b"%r%r" % (each, flow.upstream_port)) for each, flow in self.flows.items())
        return (self.table.digest() + flows) % 2**64

    def _apply(self, record: Record) -> None:
        match record:
            case Put() | Removed() | Cleared():
                self._disk.journal += self.table.apply([record], self.members, 1)
                return
            case FlowOpened():
                each = (record.service, record.client, record.client_port, record.local)
                self.flows[each] = record
                if self._stale is not None:
                    self._stale.discard(each)
            case FlowClosed():
                self.flows.pop(tuple(record), None)
            case Touched():
                return
            case ServerHealth() | ServerAdmin():
                self.states_[type(record).__name__, record.group, record.server] = record
            case Revision():
                self.states_[("revision",)] = record
        self._disk.journal.append(record)

    # for the checker

    def value(self, thing: tuple[str, bytes]) -> object:
        """The server of a key, or the port of a flow."""
        kind, name = thing
        if kind == "pin":
            member = self.table.get(name)
            return member.name if member else None
        flow = self.flows.get(("vpn", name, 500, b""))
        return flow.upstream_port if flow else None

    def contents(self) -> tuple[object, ...]:
        """Everything that two nodes have to agree on."""
        pins: dict[bytes, str] = {}
        start: int | None = 0
        while start is not None:
            part = self.table.puts(start, 1_000)
            pins.update((key, put.server) for put in part.puts for key in put.keys)
            start = part.next
        return pins, {each: flow.upstream_port for each, flow in self.flows.items()}, self.states_


def changed_by(records: Sequence[Record]) -> Iterator[tuple[tuple[str, bytes], object]]:
    """Which things have which value after these records; a clear is for the caller to know."""
    for record in records:
        match record:
            case Put():
                yield from ((("pin", key), record.server) for key in record.keys)
            case Removed():
                yield from ((("pin", key), None) for key in record.keys)
            case FlowOpened():
                yield ("flow", record.client), record.upstream_port
            case FlowClosed():
                yield ("flow", record.client), None
