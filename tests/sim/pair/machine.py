"""A machine of the pair: its disk, its guard, and the daemon with the :class:`~sapin.cluster.pair.Pair` in it."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING

from sapin.cluster.pair import Pair
from sapin.cluster.settings import (
    Acked,
    Activate,
    Claim,
    CloseLink,
    Deactivate,
    Effect,
    Persist,
    Probe,
    Release,
    Send,
    Stopped,
)
from sapin.cluster.wire import Record
from tests.sim.pair import half
from tests.sim.pair.disk import Disk, State
from tests.sim.pair.link import Connection

if TYPE_CHECKING:
    from tests.sim.pair.world import World

FEED = 0.25
"""Seconds after which a guard that is not fed removes the addresses."""
SYNC_EVERY = 0.05
"""Seconds between two moments at which the journal is brought to the disk."""


class Machine:
    """One of the two; index 0 or 1."""

    def __init__(self, world: World, index: int) -> None:
        self.world = world
        self.index = index
        self.name = "ab"[index]
        self.disk = Disk(half.fresh())
        self.daemon: Daemon | None = None
        self.powered = True
        self.frozen = False
        self.address = False
        self.since = 0.0
        """When the addresses came, or went."""
        self.epoch = 0
        """That the guard tells for the daemon."""
        self._bereft = False
        """Whether the guard of a daemon that is gone has something to do still."""

    @property
    def peer(self) -> Machine:
        return self.world.machines[1 - self.index]

    @property
    def responds(self) -> bool:
        return bool(self.powered and not self.frozen and self.daemon and not self.daemon.stopped)

    # life and death

    def start(self) -> None:
        """The daemon starts, from the disk."""
        if self.daemon is not None or not self.powered:
            return
        if self._bereft:
            self.world.after(0.005, self.start)
            return
        self.daemon = Daemon(self)
        self.daemon.act(lambda: None)
        self.world.checker.health()

    def kill(self) -> None:
        """The daemon is gone; the kernel closes its connection, the guard removes the addresses and says so."""
        daemon = self.daemon
        if daemon is None or self.frozen:
            return
        self._end(daemon)
        self._bereft = True
        if daemon.connection:
            daemon.connection.close(self.index)
        self.world.after(0.0005 + 0.002 * self.world.random.random(), lambda: self._bereaved(daemon))

    def lose_power(self) -> None:
        daemon = self.daemon
        if daemon is not None:
            self._end(daemon)
            if daemon.connection:
                daemon.connection.close(self.index, tell=False)
        self.powered = self.frozen = False
        self.set_address(False)
        self.world.checker.lost_power(self, self.disk.lose_power())

    def _end(self, daemon: Daemon) -> None:
        daemon.dead = True
        self.daemon = None
        self.world.checker.health()

    def freeze(self) -> None:
        if self.powered and not self.frozen:
            self.frozen = True
            self.world.checker.health()

    def thaw(self, began: float) -> None:
        if not self.frozen:
            return
        self.frozen = False
        self.world.checker.health()
        if self.daemon:
            if self.world.now - began > FEED:
                self._hungry(self.daemon)
            self.daemon.resume()

    # the guard

    def starve(self, daemon: Daemon, since: float) -> None:
        """The daemon does not run since then: in time, the guard acts, unless the machine does not run either."""
        self.world.at(since + FEED, lambda: self._hungry(daemon) if daemon.stopped_since == since else None)

    def _hungry(self, daemon: Daemon) -> None:
        if self.frozen or daemon.dead or not self.address:
            return
        self.set_address(False)
        self._farewell(daemon)
        daemon.act(lambda: daemon.pair.address_lost(self.world.now))

    def _bereaved(self, daemon: Daemon) -> None:
        if self.frozen and self.powered:
            self.world.after(0.01, lambda: self._bereaved(daemon))
            return
        self._bereft = False
        if self.powered:
            self.set_address(False)
            self._farewell(daemon)

    def _farewell(self, daemon: Daemon) -> None:
        boot, epoch, peer = daemon.boot, self.epoch, self.peer

        def arrive() -> None:
            if peer.daemon:
                other = peer.daemon
                other.act(lambda: other.pair.farewell(boot, epoch, self.world.now))

        for network in self.world.networks:
            network.datagram(self.index, arrive)

    def set_address(self, here: bool) -> None:
        if self.address != here:
            self.address, self.since = here, self.world.now
            self.world.checker.moved(self)

    def probe(self) -> None:
        """Asks the peer's guard whether its daemon is alive, over both networks."""
        for network in self.world.networks:
            network.datagram(self.index, lambda network=network: self.peer.probed(network))  # type: ignore[misc]

    def probed(self, network: object) -> None:
        """The peer's probe has come over that network."""
        world, peer, daemon = self.world, self.peer, self.daemon
        if not self.powered or self.frozen:
            return
        if daemon and (daemon.stopped_since is None or world.now < daemon.stopped_since + FEED):
            epoch, holds = self.epoch, self.address

            def arrive() -> None:
                if other := peer.daemon:
                    other.act(lambda: other.pair.answered(epoch, holds, world.now))
        elif daemon is None:

            def arrive() -> None:
                if other := peer.daemon:
                    other.act(lambda: other.pair.refused(world.now))
        else:
            return
        network.datagram(self.index, arrive)  # type: ignore[attr-defined]


class Daemon:
    """One run of the daemon."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self.world = machine.world
        self.dead = False
        self.stopped_since: float | None = None
        self.active = False
        """Whether the dataplane is."""
        self.connection: Connection | None = None
        self.state = State(machine.disk)
        self.boot = self.world.random.getrandbits(48) + 1
        world = self.world
        self.pair: Pair = world.pair_of(
            half.settings(machine.name, machine.peer.name, **world.settings[machine.index]),
            self.state,
            machine.disk.saved,
            self.boot,
            world.now,
        )
        self._backlog: deque[Callable[[], object]] = deque()
        self._pending: deque[Effect] = deque()
        self._floor = self._floor_put = self._put = self._written_put = 0
        self._disk_at = 0.0
        self._due: float | None = None
        self._guard_at = 0.0
        self._emptying = False
        world.after(SYNC_EVERY * world.random.random(), self._sync)

    @property
    def stopped(self) -> bool:
        return self.stopped_since is not None or self.machine.frozen

    def act(self, told: Callable[[], object]) -> None:
        """Gives the pair an input, now or when the daemon runs again, and carries out what it answers."""
        if self.dead:
            return
        if self.stopped:
            self._backlog.append(told)
            return
        told()
        self._carry_out()
        self._set_alarm()

    def stop(self) -> None:
        """SIGSTOP."""
        if self.stopped_since is None:
            self.stopped_since = self.world.now
            self.machine.starve(self, self.world.now)
            self.world.checker.health()

    def go_on(self) -> None:
        """SIGCONT."""
        self.stopped_since = None
        self.world.checker.health()
        self.resume()

    def resume(self) -> None:
        while self._backlog and not self.stopped and not self.dead:
            self.act(self._backlog.popleft())
        if not self.stopped:
            self._due = None
            self._set_alarm()

    def _set_alarm(self) -> None:
        due = self.pair.deadline
        if self._due is None or due < self._due:
            late = self.world.random.random() * self.world.lateness
            self._due = at = max(due, self.world.now) + late
            self.world.at(at, lambda: self._wake(at))

    def _wake(self, at: float) -> None:
        if self.dead or self._due != at or self.stopped:
            return
        self._due = None
        if self.pair.deadline <= self.world.now:
            self.act(lambda: self.pair.wake(self.world.now))
        else:
            self._set_alarm()

    def _sync(self) -> None:
        if not self.dead:
            if not self.machine.frozen:
                self.machine.disk.synced = len(self.machine.disk.journal)
            self.world.after(SYNC_EVERY, self._sync)

    # the link

    def met(self, connection: Connection) -> None:
        index = self.machine.index

        def told() -> None:
            if connection.open[index]:
                self.connection = connection
                self.pair.connected(self.world.now)

        self.act(told)

    def heard(self, connection: Connection, data: bytes) -> None:
        def told() -> None:
            if self.connection is connection:
                self.pair.received(data, self.world.now)
                self.world.checker.bounded(self)

        self.act(told)

    def hung_up(self, connection: Connection) -> None:
        def told() -> None:
            if self.connection is connection:
                self.connection = None
                self.pair.disconnected(self.world.now)

        self.act(told)

    def _empty(self) -> None:
        """Tells the pair when what it sent is on its way."""
        if self._emptying:
            return
        self._emptying = True

        def told() -> None:
            self._emptying = False
            if self.connection is not None and self.connection.holds(self.machine.index):
                self._empty()
            else:
                self.pair.writable(self.world.now)

        self.world.after(0.001, lambda: self.act(told))

    # the dataplane

    def changed(self, records: list[Record]) -> None:
        """The dataplane has made changes."""
        if records:
            now = self.world.now
            sequence = self.pair.changed(records, now)
            self.world.checker.changed(self, records, sequence)

    # effects

    def _carry_out(self) -> None:
        self._pending.extend(self.pair.effects())
        while self._pending and not self._waits_for_disk():
            self._do(self._pending.popleft())
            self._pending.extend(self.pair.effects())

    def _waits_for_disk(self) -> bool:
        """As in the session of a node: a claim waits for the floor, and nothing else for anything."""
        return isinstance(self._pending[0], Claim) and self._written_put < self._floor_put

    def _do(self, effect: Effect) -> None:  # noqa: C901  # one case for each effect
        machine, world = self.machine, self.world
        if world.told and not isinstance(effect, Send | Probe | Acked):
            world.told(f"{world.now:8.3f} {machine.name} {effect}")
        match effect:
            case Send() if self.connection:
                self.connection.send(machine.index, effect.data)
                self._empty()
            case Persist():
                self._persist(effect)
            case Acked():
                world.checker.released(self, effect.sequence)
            case Probe():
                machine.probe()
            case Claim():
                machine.epoch = effect.epoch
                world.checker.claims(machine, effect.epoch)
                self._guard(lambda: self._added(effect.epoch))
            case Release():
                self._guard(self._removed)
            case Activate():
                self.active = True
            case Deactivate():
                self.active = False
            case CloseLink() if self.connection:
                self.connection.close(machine.index)
                self.connection = None
            case Stopped():
                machine.kill()

    def _persist(self, effect: Persist) -> None:
        """Written in their order, some time later."""
        self._put = number = self._put + 1
        if effect.saved.floor > self._floor:
            self._floor, self._floor_put = effect.saved.floor, number
        self._disk_at = max(self.world.now + self.world.disk_delay(), self._disk_at)
        self.world.at(self._disk_at, lambda: self._written(effect, number))

    def _written(self, effect: Persist, number: int) -> None:
        if not self.machine.powered or self.dead:
            return
        self.machine.disk.saved = effect.saved
        self._written_put = number
        self.act(lambda: None)

    def _guard(self, act: Callable[[], None]) -> None:
        """The guard does things in their order."""
        world = self.world
        self._guard_at = max(world.now + 0.0001 + 0.001 * world.random.random(), self._guard_at)
        world.at(self._guard_at, lambda: self._by_guard(act))

    def _by_guard(self, act: Callable[[], None]) -> None:
        if self.dead or not self.machine.powered:
            return
        if self.machine.frozen:
            self.world.after(0.005, lambda: self._by_guard(act))
            return
        act()

    def _added(self, epoch: int) -> None:
        hungry = self.stopped_since is not None and self.world.now > self.stopped_since + FEED
        if hungry:
            self.act(lambda: self.pair.address_lost(self.world.now))
            return
        self.machine.set_address(True)
        self.act(lambda: self.pair.claimed(self.world.now))

    def _removed(self) -> None:
        self.machine.set_address(False)
        self.act(lambda: self.pair.released(self.world.now))
