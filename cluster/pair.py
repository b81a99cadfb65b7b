"""A node of the pair as a pure machine: what happens goes in, what is to be done comes out.

Composes the role (:mod:`~sapin.cluster.role`), replication (:mod:`~sapin.cluster.stream`), the watch over the peer
(:mod:`~sapin.cluster.detector`) and the alarms (:mod:`~sapin.cluster.alarms`). The shell calls the inputs, carries out
:meth:`Pair.effects` after each, in their order, and calls :meth:`Pair.wake` at :attr:`Pair.deadline`.

Who may take over, and when:

* The peer is **certainly not active** (its guard's farewell, its own word that it released): at once if in sync.
* The peer is **gone** (:class:`~sapin.cluster.detector.Detector`): at once if in sync.
* **Not in sync**: ten times the time of silence later, with an alarm. The other one may come back with what is missing here.
* **At a start**: the peer is waited for; of two that are not active the better one takes over (:class:`~sapin.cluster.role.Merit`).
* **The link is cut** and nobody is active, as the probes' answers say: after the wait, the one of the later epoch, or the one
  whose name sorts first; the other one after three waits.

What the peer says of itself may be late; that it is active with a higher epoch is always true enough to yield.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from sapin.cluster import wire
from sapin.cluster.alarms import Alarm, Failover, Name
from sapin.cluster.dialogue import Dialogue
from sapin.cluster.replication import Sync
from sapin.cluster.role import (
    FOLLOWING,
    HOLDING,
    LEAVING,
    Signal,
    State,
)
from sapin.cluster.settings import (
    Effect,
)
from sapin.cluster.stream import ROOM


@dataclass(frozen=True, slots=True)
class Status:
    """A node of the pair, as an operator sees it; times in seconds of the pair's clock."""

    role: str
    """``active`` or ``standby``."""
    state: str
    epoch: int
    peer: str
    connected: bool
    peer_role: str
    """As it said last; empty before it said anything."""
    last_heard: float
    synced: bool
    """Whether both nodes have everything, as far as this one knows."""
    replication: str
    """``in-sync``, ``resync``, ``absent``."""
    sequence: int
    acked: int
    lag: int
    ack_p50: float | None
    digest: int
    counts: Mapping[str, int]
    """snapshots, resumed, desyncs, overflows, divergences, gaps, repeated, two_actives, pauses, takeovers, stale; missing is none."""
    last_failover: Failover | None
    alarms: tuple[Alarm, ...]
    refused: Mapping[str, int]
    """Messages that made no sense, by reason."""


class Pair(Dialogue):
    """One node.

    Args:
        replica: the node's pins, flows and states.
        saved: what :class:`~sapin.cluster.settings.Persist` kept last.
        boot: a number by chance for this run of the daemon, not 0.
        now: seconds, never going back; as that of every input.
        wall: what has to be added to ``now`` for the wall clock's seconds.
    """

    # what the shell asks

    def effects(self) -> list[Effect]:
        """What is to be done, in order; call it after each input."""
        if self._connected:
            self._stream.pump()
        found = self._effects[:]
        self._effects.clear()
        self._due = self.deadline
        return found

    @property
    def deadline(self) -> float:
        """When :meth:`wake` is due."""
        due = [self._next_beat, self._detector.deadline]
        if self._stream.sink.busy or (self._stream.more and self._connected):
            due.append(self._at)
        if self._stream.deadline is not None:
            due.append(self._stream.deadline)
        if self.role.state is State.GRACE:
            due.append(self._changed + self.settings.grace)
        return min(due)

    @property
    def room(self) -> int:
        """Bytes that may still be asked to be sent before the shell is writable again; 0 or less for none."""
        return self._stream.room

    def status(self) -> Status:
        """The node as it is now."""
        source, sink = self._stream.source, self._stream.sink
        counts = dict(self.counts) | {
            "snapshots": source.snapshots,
            "resumed": source.resumed,
            "desyncs": source.desyncs,
            "overflows": source.overflows,
            "divergences": sink.divergences,
            "gaps": sink.gaps,
            "repeated": sink.repeated,
        }
        holding = self.role.state in HOLDING | LEAVING
        following_state = "in-sync" if self.in_sync else "resync" if self._connected else "absent"
        own_state = {Sync.SYNCED: "in-sync", Sync.RESYNC: "resync", Sync.ABSENT: "absent"}[source.state]
        return Status(
            role="active" if holding else "standby",
            state=self.role.state.value,
            epoch=self.epoch,
            peer=self.settings.peer,
            connected=self._connected,
            peer_role=self._peer_role,
            last_heard=self._detector.last_heard,
            synced=self.in_sync,
            replication=own_state if holding else following_state,
            sequence=source.sequence if holding else sink.applied,
            acked=source.acked if holding else sink.applied,
            lag=source.lag if holding else 0,
            ack_p50=self._stream.ack_p50,
            digest=self._replica.digest(),
            counts=counts,
            last_failover=self.last_failover,
            alarms=self.alarms.standing,
            refused=dict(self.refused_messages),
        )

    # inputs: the link

    def connected(self, now: float) -> None:
        """A connection to the peer stands; nothing was received on it yet."""
        self._awake(now)
        if self.role.state is State.STOPPED:
            return
        if self._connected:
            self._hang_up(now)
        self._connected, self._greeted, self._hello = True, False, None
        self._stream.room = ROOM
        self._hear(now)
        self._greet(now)

    def disconnected(self, now: float) -> None:
        """The connection ended, without this node's having asked for that."""
        self._awake(now)
        if self._connected:
            self._hang_up(now)
            self._detector.closed(now)
            self._look(now)

    def received(self, data: bytes, now: float) -> None:
        """A message of the peer."""
        self._awake(now)
        if not self._connected or self.role.state is State.STOPPED:
            return
        message = wire.decode(data, self._version)
        if isinstance(message, wire.Refused):
            self.refused_messages[message.reason] += 1
            self._close(f"a message of the peer makes no sense: {message.reason}", now)
            return
        self._hear(now)
        if isinstance(message, wire.Hello):
            self._on_hello(message, now)
        elif self._greeted:
            self._HANDLERS[type(message)](self, message, now)

    def writable(self, now: float) -> None:
        """Everything that was to be sent so far is sent."""
        self._awake(now)
        self._stream.room = ROOM

    # inputs: the rest of the world

    def answered(self, epoch: int, active: bool, now: float) -> None:
        """The peer's beacon has answered a probe, and says what it is."""
        self._awake(now)
        self._detector.answered(now)
        state = self.role.state
        if active:
            self._vacant = now
            self._peer_epoch = max(self._peer_epoch, epoch)
            if epoch > self._free_epoch:
                self._freed = False  # it was free, and the peer has taken over again
        if state is State.SUSPECTING:
            self._peer_synced = False  # it goes on without this node
            self._save(whole=False)
            self._signal(Signal.ANSWERED, now)
        self._answer = (epoch, active)
        if active:
            self._compare(epoch, now, here=False)
        self._look(now)

    def refused(self, now: float) -> None:
        """The peer's machine refuses probes: nobody listens there."""
        self._awake(now)
        self._detector.refused()
        self._look(now)

    def farewell(self, boot: int, epoch: int, now: float) -> None:
        """The peer's guard says that it has released the addresses, as the daemon of this boot had them with this epoch."""
        self._awake(now)
        if boot == self._peer_boot and epoch >= self._peer_epoch and self._peer_role in ("active", "leaving"):
            self._peer_role = "standby"
            self._free("farewell", now)

    def claimed(self, now: float, pins: int = 0) -> None:
        """The addresses are here, as asked for by :class:`~sapin.cluster.settings.Claim`; ``pins``: how many this node has."""
        self._awake(now)
        self._here = True
        if self.role.knows(Signal.CLAIMED):
            self._signal(Signal.CLAIMED, now)
            if self.last_failover and self.last_failover.epoch == self.epoch:
                self.last_failover = replace(self.last_failover, pins=pins)

    def released(self, now: float) -> None:
        """The addresses are gone, as asked for by :class:`~sapin.cluster.settings.Release`."""
        self._awake(now)
        self._here = False
        if self.role.knows(Signal.RELEASED):
            self._signal(Signal.RELEASED, now)

    def address_gained(self, now: float) -> None:
        """Something else has brought the addresses here."""
        self._awake(now)
        self._here = True
        self._adopt(now)

    def address_lost(self, now: float) -> None:
        """The addresses are not here any more, or could not be had; nobody asked for that."""
        self._awake(now)
        self._here = False
        if self.role.knows(Signal.LOST):
            self._abstains_until = now + self.settings.wait
            self._signal(Signal.LOST, now)

    def changed(self, records: Sequence[wire.Record], now: float) -> int:
        """Changes of this node's own, of one flush; the sequence that replies have to wait for, 0 for none."""
        if self.role.state in FOLLOWING or self.role.state is State.STOPPED:
            return 0
        return self._stream.changed(records, now)

    def survived(self, answered: int) -> None:
        """Say how many of the pins that were taken over have had an answer of their server since."""
        if self.last_failover:
            self.last_failover = replace(self.last_failover, answered=answered)

    def notice(self, name: Name, holds: bool, text: str, now: float) -> None:
        """Say whether something holds that only the shell can know: certificates, configurations."""
        self.alarms.set(name, holds, text, now)

    # inputs: the operator

    def step_down(self, now: float, force: bool = False) -> str | None:
        """Hand over to the peer; why not, if that cannot be.

        With ``force`` the addresses are released even if the peer does not have everything, or is not there.
        """
        self._awake(now)
        if self.role.state is not State.ACTIVE:
            return f"this node is {self.role.state.value}, not active"
        if not self.settings.moves:
            return "the addresses are moved by something else, and have to be moved there"
        if self._ready():
            self._cause = "step-down"
            self._signal(Signal.STEP_DOWN, now)
            return None
        if not force:
            return "the peer is not in sync" if self._connected else "the peer is not there"
        self._abstains_until = now + self.settings.abstain
        self._signal(Signal.LEAVE, now)
        return None

    def stop(self, now: float) -> None:
        """The daemon is to end; :class:`~sapin.cluster.settings.Stopped` says when it may."""
        self._awake(now)
        self._stopping = True
        if self.role.state is State.ACTIVE and self._ready() and self.settings.moves:
            self._signal(Signal.STEP_DOWN, now)
        elif self.role.knows(Signal.STOP) and self._draining is None:
            self._signal(Signal.STOP, now)

    def wake(self, now: float) -> None:
        """Time has passed."""
        self._awake(now)
        if self.role.state is State.STOPPED:
            self._next_beat = now + self.settings.heartbeat
            return
        self._stream.step()
        self._note_whole()
        if self._stream.overdue(now):
            self._tell("desynchronised", sequence=self._stream.source.sequence)
        self._look(now)
        self._expire(now)
        if now >= self._next_beat:
            self._next_beat = now + self.settings.heartbeat
            self._beat(now)
