"""What has to be true of a pair, whatever happens to it.

1. An *acknowledged* change (the peer's acknowledgement let its reply go, and not the timeout) is not lost: whoever has the
   addresses has that value of the key or flow, or one that was set later.
2. While the service network is whole, the addresses are on both nodes for no longer than :data:`BOTH`. A machine that did
   not run at all is given that time from when it runs again.
3. While a node is healthy, the addresses are nowhere for no longer than :data:`NOBODY`.
4. No epoch is claimed twice, and nobody takes over from an active node that answers, while the service network is whole.
5. What waits and what is kept is bounded.
6. When the faults are over, nodes that are in sync have equal tables, and the pair converges (:func:`difference`): see :mod:`tests.sim.pair.world`.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from typing import TYPE_CHECKING

from sapin.cluster.wire import Record
from sapin.core.pins import Cleared
from tests.sim.pair import half
from tests.sim.pair.disk import changed_by

if TYPE_CHECKING:
    from tests.sim.pair.machine import Daemon, Machine
    from tests.sim.pair.world import World

BOTH = 0.5
NOBODY = 6.0
SETTLED = 0.5
"""Seconds after a takeover in which what was changed on both nodes meanwhile is found and put right."""
WELL = 0.5
"""Seconds for which all has to have been well for a takeover to be a mistake."""
Thing = tuple[str, bytes]


class Violation(AssertionError):
    """An invariant does not hold."""


class _History:
    """The values of one thing, in the order in which they were set."""

    __slots__ = ("acked", "values")

    def __init__(self) -> None:
        self.values: list[tuple[int, object]] = []
        self.acked = 0
        """The version that was acknowledged last; 0 for none."""

    def allows(self, value: object) -> bool:
        return not self.acked or any(each == value for version, each in self.values if version >= self.acked)

    def acknowledge(self, version: int) -> None:
        if version > self.acked:
            self.acked = version
            self.values = [each for each in self.values if each[0] >= version]


class Checker:
    """Watches one simulation."""

    def __init__(self, world: World) -> None:
        self.acknowledged = 0
        self.takeovers = 0
        self._world = world
        self._things: defaultdict[Thing, _History] = defaultdict(_History)
        self._version = 0
        self._waiting: defaultdict[Daemon, list[tuple[int, int, set[Thing]]]] = defaultdict(list)
        self._fragile: tuple[set[Thing], set[Thing]] = (set(), set())
        """What each node lost with its power."""
        self._epochs: dict[int, str] = {}
        self._both_since: float | None = None
        self._nobody_since: float | None = None
        self._well_since: list[float | None] = [None, None, None]
        """Of the service network and the two machines."""

    # 1

    def changed(self, daemon: Daemon, records: Iterable[Record], sequence: int) -> None:
        """A node has made changes, whose replies wait for the sequence, if that is not 0."""
        self._version += 1
        things: set[Thing] = set()
        for record in records:
            values = list(changed_by([record]))
            if isinstance(record, Cleared):
                values = [(thing, None) for thing in self._cleared(daemon, record.server)]
                self._may_be_cleared(record.server)
            for thing, value in values:
                history = self._things[thing]
                # A clear means nothing to a node on which the key went elsewhere meanwhile.
                if not isinstance(record, Cleared) or history.values[-1][1] == record.server:
                    things.add(thing)
                history.values.append((self._version, value))
        if sequence:
            self._waiting[daemon].append((sequence, self._version, things))

    def _may_be_cleared(self, server: str) -> None:
        """What the other node has pinned to that server, in a handover, may go when it hears of it."""
        for thing, history in self._things.items():
            if thing[0] == "pin" and any(value == server for _, value in history.values):
                history.values.append((self._version, None))
                latest = history.values[-2]
                history.values.append((self._version, latest[1]))

    def _cleared(self, daemon: Daemon, server: str) -> list[Thing]:
        """What was pinned to a server, and is not now."""
        pins = [(thing, history) for thing, history in self._things.items() if thing[0] == "pin"]
        had = [thing for thing, history in pins if any(value == server for _, value in history.values)]
        return [thing for thing in had if daemon.state.value(thing) is None]

    def released(self, daemon: Daemon, sequence: int) -> None:
        """Replies up to that sequence may go."""
        waiting = self._waiting[daemon]
        in_sync = half.synced(daemon.pair)
        while waiting and waiting[0][0] <= sequence:
            _, version, things = waiting.pop(0)
            if in_sync:
                self.acknowledged += 1
                for thing in things:
                    self._things[thing].acknowledge(version)

    def lost_power(self, machine: Machine, lost: Iterable[Record]) -> None:
        """The end of a journal is gone: if the other node does not have it either, it is lost for good."""
        lost = list(lost)
        gone = {thing for thing, _ in changed_by(lost)}
        if any(isinstance(record, Cleared) for record in lost):
            gone |= {thing for thing in self._things if thing[0] == "pin"}
        self._fragile[machine.index].update(gone)

    def has_everything(self, machine: Machine) -> None:
        """The node is in sync: it has again what it lost with its power."""
        self._fragile[machine.index].clear()

    def _check_things(self, machine: Machine) -> None:
        if machine.daemon is None:
            return
        state, fragile = machine.daemon.state, self._fragile[machine.index]
        for thing, history in self._things.items():
            value = state.value(thing)
            if history.allows(value):
                continue
            if thing not in fragile:
                self.fail(
                    f"{machine.name} has {value} for {thing}, of which {history.values} is acknowledged"
                )
            history.acked, history.values = 0, [(self._version, value)]
        fragile.clear()

    # 2, 3, 4

    def moved(self, machine: Machine) -> None:
        """The addresses came to a machine, or left it."""
        if machine.address:
            self.takeovers += 1
            self._check_things(machine)
        self.health()

    def claims(self, machine: Machine, epoch: int) -> None:
        """A node takes over."""
        peer, well = machine.peer, self._well_since
        active = peer.address and peer.daemon is not None and half.active(peer.daemon.pair)
        if active and None not in well and self._world.now - max(filter(None, well)) > WELL:
            self.fail(f"{machine.name} takes over from a node that is active and answers")
        if epoch in self._epochs:
            self.fail(f"{machine.name} claims epoch {epoch}, as {self._epochs[epoch]} did before")
        self._epochs[epoch] = machine.name

    def health(self) -> None:
        """Something has changed: networks, machines, addresses."""
        now, machines = self._world.now, self._world.machines
        self.check_times()
        for at, well in enumerate((self._world.service.whole, *(machine.responds for machine in machines))):
            self._well_since[at] = (self._well_since[at] or now) if well else None
        both = machines[0].address and machines[1].address
        excused = not self._world.service.whole or machines[0].frozen or machines[1].frozen
        if not both or excused:
            self._both_since = None
        elif self._both_since is None:
            self._both_since = now
        nobody = not machines[0].address and not machines[1].address
        if not nobody or not any(machine.responds for machine in machines):
            self._nobody_since = None
        elif self._nobody_since is None:
            self._nobody_since = now

    def check_times(self) -> None:
        now = self._world.now
        if self._both_since is not None and now - self._both_since > BOTH:
            self.fail(f"both have the addresses since {self._both_since:.3f}")
        if self._nobody_since is not None and now - self._nobody_since > NOBODY:
            self.fail(f"nobody has the addresses since {self._nobody_since:.3f}")

    # 5

    def bounded(self, daemon: Daemon) -> None:
        source = half.source(daemon.pair)
        if source.weight > half.LIMITS.ring + 3_000:
            self.fail(f"{daemon.machine.name} keeps {source.weight}")
        if half.waiting(daemon.pair) > 200:
            self.fail(f"{half.waiting(daemon.pair)} replies wait")

    # 6

    def difference(self) -> str | None:
        """What the pair lacks to be one active node and one standby that has everything."""
        a, b = self._world.machines
        if a.daemon is None or b.daemon is None:
            return "a daemon is not there"
        if a.address == b.address:
            return "both have the addresses" if a.address else "nobody has the addresses"
        holder, other = (a.daemon, b.daemon) if a.address else (b.daemon, a.daemon)
        if not half.active(holder.pair) or not half.standby(other.pair):
            return "the roles are not settled"
        if not holder.active or other.active:
            return "the dataplanes are not as the roles are"
        if not half.synced(holder.pair) or half.source(holder.pair).lag:
            return "not in sync"
        if holder.pair.epoch != other.pair.epoch:
            return "the epochs differ"
        if holder.state.contents() != other.state.contents():
            if self._world.now - max(a.since, b.since) > SETTLED:
                self.fail("in sync, but the tables differ")
            return "the tables differ"
        return None

    def converged(self) -> None:
        """Looked at once, when the pair has come to rest."""
        a, b = self._world.machines
        assert a.daemon is not None
        assert b.daemon is not None
        if a.daemon.state.digest() != b.daemon.state.digest():
            self.fail("the digests differ of tables that are equal")
        self._check_things(a if a.address else b)

    def fail(self, what: str) -> None:
        raise Violation(f"at {self._world.now:.3f}: {what}")
