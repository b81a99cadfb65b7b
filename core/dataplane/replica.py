"""What replication needs of the dataplane: its state as records, and a way for the peer's records into it.

The peer's records are applied through the same tables, writer and journal as this node's own changes, and are on
disk when :meth:`Replica.apply` returns: a standby that restarts has them all. They are not told to the peer
again, for the outlet of a standby is closed. Flows are opened a little later (:mod:`~.reopening`).

Times are this node's own: a pin that the peer put or touched is due here a timeout later, and
:data:`GRACE` more, since touches come late. So clocks of the two nodes need not agree.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from itertools import chain, groupby, islice
from math import inf
from typing import Any, cast

from sapin.core.dataplane.batch import peer_of
from sapin.core.dataplane.flows import Flow
from sapin.core.dataplane.outlet import Outlet
from sapin.core.dataplane.reopening import Reopener
from sapin.core.dataplane.store import Store
from sapin.core.dataplane.udp import Forwarder
from sapin.core.journal import (
    FlowClosed,
    FlowOpened,
    Replicated,
    ServerAdmin,
    ServerHealth,
    Touched,
)
from sapin.core.model import AdminState, Health
from sapin.core.pins import Change, Cleared, Put, Removed
from sapin.core.replicated import ReplicatedTable, mix
from sapin.core.snapshot import Group, Member
from sapin.core.writer import Writer

CHUNK, FLOWS = 250, 100
"""Pins or flows in one chunk of a walk: some 0.3 ms to make, and 1 ms to apply."""
LOOKS, CLOSES = 2_000, 24
"""Pins that one step of :meth:`Replica.finish` looks at, or flows that it closes: less than 0.5 ms."""
PATIENCE = 5.0
"""Seconds after a part of a snapshot until it counts as broken off."""
GRACE = 90
"""Seconds that a pin outlives its timeout on a standby: touches are told about every minute."""
_PINS = (Put, Removed, Cleared)
_MASK = 2**64 - 1


class Replica:
    """The pins, flows and states of a node, as its peer's stream shows and changes them.

    Args:
        saved: called after admin states have changed, to keep them; may raise OSError.
        clock: seconds, never going back.
    """

    def __init__(
        self,
        writer: Writer,
        forwarder: Forwarder,
        reopener: Reopener,
        outlet: Outlet,
        store: Store,
        saved: Callable[[], None],
        clock: Callable[[], float],
    ) -> None:
        self.strange: Counter[str] = Counter()
        """Records that could not be applied, by the reason: the nodes have different configurations, or worse."""
        self._writer = writer
        self._forwarder = forwarder
        self._reopener = reopener
        self._outlet = outlet
        self._store = store
        self._saved = saved
        self._clock = clock
        self._heard = -inf
        """When a part of a snapshot was last applied."""
        self._mark = 0
        self._unsaved = False
        self._snapshot = False
        """One has begun, and was not finished yet."""
        self._rest: Iterator[bool] = iter(())
        """What is left to do of finishing a snapshot, step by step."""

    @property
    def receiving(self) -> bool:
        """Whether a snapshot is coming in: not the time for a checkpoint, which would have to be written again."""
        return self._clock() - self._heard < PATIENCE

    def digest(self) -> int:
        """64 bits of all pins and flows, in no order: the same on two nodes that have the same ones."""
        groups = self._writer.snapshot.groups.values()
        pins = sum(_table(group).digest() * (2 * mix(group.name.encode()) + 1) for group in groups)
        return (pins + self._forwarder.flows.digest + self._reopener.digest) & _MASK

    # to the peer

    def walk(self) -> Iterator[Sequence[Replicated]]:
        """A fuzzy snapshot in chunks of at most 250 records, each as of when it is asked for."""
        yield from _chunks(iter(self.states()), CHUNK)
        for group in self._writer.snapshot.groups.values():
            start: int | None = 0
            while start is not None:
                found = _table(group).puts(start, CHUNK)
                yield found.puts
                start = found.next
        yield from _chunks(self._flows(), FLOWS)

    def states(self) -> Sequence[Replicated]:
        """What is neither pin nor flow, and in no digest: health and admin states."""
        return [
            state
            for group in self._writer.snapshot.groups.values()
            for member in group.members.values()
            for state in (ServerAdmin(group.name, member.name, member.admin), health_of(group, member))
        ]

    def touches(self, second: int) -> Iterator[Touched]:
        """The pins that were put or touched after that second, some hundred slots at a time; none for many of them."""
        for group in self._writer.snapshot.groups.values():
            table = _table(group)
            start: int | None = 0
            while start is not None:
                keys, start = table.touched(start, CHUNK, second + table.timeout)
                yield Touched(group.name, tuple(keys))

    def _flows(self) -> Iterator[FlowOpened]:
        table = self._forwarder.flows
        flows = list(table)
        live = (table.record(flow) for flow in flows if table.by_fd.get(flow.fd) is flow)
        return chain(live, self._reopener.records())

    # from the peer

    def apply(self, records: Sequence[Replicated]) -> None:
        """Make the peer's changes, in their order. They are journaled, and not told to the peer again."""
        was_open, self._outlet.open = self._outlet.open, False
        if self._snapshot:
            self._heard = self._clock()
        try:
            for (name, are_pins), run in groupby(records, _group_and_kind):
                if are_pins:
                    self._apply_pins(name, cast("list[Change]", list(run)))
                else:
                    for record in run:
                        self._apply_other(record)
        finally:
            self._outlet.open = was_open
        self._store.flush()
        if self._unsaved:
            self._save()

    def begin(self) -> None:
        """A snapshot begins: what is not put from now on goes at :meth:`finish`."""
        self._mark += 1
        for group in self._writer.snapshot.groups.values():
            _table(group).begin()
        self._rest = self._finishing()
        self._snapshot = True

    def finish(self) -> bool:
        """One step of at most 0.5 ms of removing what was not put since :meth:`begin`; true when done."""
        done = not next(self._rest, False)
        self._store.flush()
        if done:
            self._snapshot, self._heard = False, -inf
        return done

    def _save(self) -> None:
        """Keep the admin states, once for all that changed; they are in force even where that fails."""
        self._unsaved = False
        try:
            self._saved()
        except OSError as error:
            self.strange[f"admin states not saved: {error.strerror}"] += 1

    def _apply_pins(self, name: str, changes: list[Change]) -> None:
        group = self._writer.snapshot.groups.get(name)
        if group is None:
            self.strange["unknown group"] += len(changes)
            return
        table, now = _table(group), int(self._clock()) + GRACE
        try:
            made = table.apply(changes, group.members, now)
        except ValueError:
            made = []
            for change in changes:
                try:
                    made += table.apply([change], group.members, now) or [change]
                except ValueError:
                    self.strange["impossible keys"] += 1
        for change in made:
            self._store.append(change)

    def _apply_other(self, record: Replicated) -> None:
        match record:
            case FlowOpened():
                self._open(record)
            case FlowClosed():
                self._close(record)
            case Touched():
                self._touch(record)
            case ServerHealth():
                self._set_health(record)
            case ServerAdmin():
                self._set_admin(record)
            case _:
                self.strange["unknown kind"] += 1

    def _open(self, record: FlowOpened) -> None:
        if not (0 < record.upstream_port < 65_536 and 0 < record.client_port < 65_536):
            self.strange["impossible ports"] += 1
            return
        flow = self._flow(record)
        if flow is not None:
            if (flow.member.name, flow.port) == (record.server, record.upstream_port):
                flow.mark = self._mark
                if record.key and record.key != flow.key:
                    self._forwarder.flows.change_key(flow, record.key)
                return
            self._forwarder.flows.close(flow)
        flows = self._forwarder.flows
        if len(flows.by_fd) + len(self._reopener) >= 2 * flows.limit:
            self.strange["more flows than max_flows"] += 1
            return
        self._reopener.remember(record, self._mark)
        self._store.append(record)

    def _close(self, record: FlowClosed) -> None:
        if self._reopener.forget(record):
            self._store.append(record)
        flow = self._flow(record)
        if flow is not None:
            self._forwarder.flows.close(flow)

    def _flow(self, record: FlowOpened | FlowClosed) -> Flow | None:
        """The open flow of that identity."""
        listener = self._forwarder.listener(record.service, record.local)
        if listener is None or len(record.client) != listener.address.max_prefixlen // 8:
            return None
        return listener.flows.get(peer_of(record.client, record.client_port))

    def _touch(self, record: Touched) -> None:
        group = self._writer.snapshot.groups.get(record.group)
        if group is None:
            self.strange["unknown group"] += 1
            return
        touch, now = group.table.touch, int(self._clock()) + GRACE
        for key in record.keys:
            touch(key, now)

    def _set_health(self, record: ServerHealth) -> None:
        try:
            health, asked = Health(record.health), AdminState(record.asked)
        except ValueError:
            self.strange["unknown state"] += 1
        else:
            self._writer.set_health(record.group, record.server, health, asked, record.share)

    def _set_admin(self, record: ServerAdmin) -> None:
        group = self._writer.snapshot.groups.get(record.group)
        member = group.members.get(record.server) if group else None
        if member is None or record.state not in list(AdminState):
            self.strange["unknown server" if member is None else "unknown state"] += 1
        elif member.admin != record.state:
            self._writer.set_admin(record.group, record.server, AdminState(record.state))
            self._unsaved = True

    def _finishing(self) -> Iterator[bool]:
        """Yields after each step."""
        for group in list(self._writer.snapshot.groups.values()):
            done = False
            while not done:
                gone, done = _table(group).finish(LOOKS)
                for change in gone:
                    self._store.append(change)
                yield True
        table, mark = self._forwarder.flows, self._mark
        flows = iter(list(table))
        while part := list(islice(flows, LOOKS)):
            stale = [flow for flow in part if flow.mark != mark and table.by_fd.get(flow.fd) is flow]
            for at in range(0, len(stale), CLOSES):
                table.close_some(stale[at : at + CLOSES], lambda flow: flow.mark == mark)
                yield True
            yield True
        for forgotten in self._reopener.forget_unmarked(mark):
            for each in forgotten:
                self._store.append(FlowClosed(*each))
            yield True


def health_of(group: Group, member: Member) -> ServerHealth:
    """What is found of the server, as a record."""
    return ServerHealth(group.name, member.name, member.health, member.asked, member.share)


def _table(group: Group) -> ReplicatedTable[Member]:
    return cast("ReplicatedTable[Member]", group.table)


def _group_and_kind(record: Any) -> tuple[str, bool]:
    are_pins = type(record) in _PINS
    return (record.group if are_pins else "", are_pins)


def _chunks(records: Iterator[Replicated], size: int) -> Iterator[Sequence[Replicated]]:
    while chunk := list(islice(records, size)):
        yield chunk
