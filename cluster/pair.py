"""One node's half of a pair, as one pure machine: what happens goes in, what is to be done comes out.

It joins the role (:mod:`~sapin.cluster.role`), the two streams (:mod:`~sapin.cluster.replication`) and the watch over the peer
(:mod:`~sapin.cluster.watch`). No clock, no socket, no chance: a node (:mod:`sapin.cluster.node`) drives it, and a simulation does.

Every method is an input; after each, take :meth:`Pair.effects` and carry them out in their order.
Call :meth:`Pair.wake` at :attr:`Pair.deadline`, after everything that has come in by then was told.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

from sapin.cluster import wire
from sapin.cluster.alarms import Alarms, Name
from sapin.cluster.effects import (
    Acked,
    Activate,
    Claim,
    CloseLink,
    Deactivate,
    Effect,
    Failover,
    Persist,
    Probe,
    Release,
    Send,
    Settings,
    Status,
)
from sapin.cluster.replication import Limits, Replica, Sink, Source, Sync
from sapin.cluster.role import Action, Event, Rank, Saved, State, after
from sapin.cluster.watch import PROBE_EVERY, Verdict, Watch

REPEAT_AFTER = 1.0
"""Seconds without any progress after which everything that was not acknowledged is sent again."""
ASK_EVERY = 0.2
"""Seconds until a snapshot that does not come is asked for again."""
MAX_SKEW = 2.0
"""Seconds that the two wall clocks may differ by."""

_STREAM = wire.Delta | wire.Begin | wire.End | wire.Mark | wire.Join


class _Peer(NamedTuple):
    """What the peer has said of itself last."""

    boot: int
    rank: Rank
    beat: int
    state: State
    epoch: int
    version: int
    synced: bool
    """Whether it thinks that this node has everything that it has."""


class Pair:
    """One node's half.

    Args:
        settings: what the configuration says.
        replica: the node's state.
        saved: what was persisted last.
        boot: a number by chance, not 0.
        now: seconds of a clock that never goes back.
        wall: what to add to it for the time of day.
        limits: bounds of what waits for the peer.
    """

    def __init__(
        self,
        settings: Settings,
        replica: Replica,
        saved: Saved,
        boot: int,
        now: float,
        wall: float = 0.0,
        limits: Limits | None = None,
    ) -> None:
        self.state = State.STARTING
        self.epoch = saved.epoch
        """The highest that this node has used or heard of."""
        self.alarms = Alarms()
        self.refused: Counter[str] = Counter()
        """What came over the link and was not understood, by reason."""
        self.failover: Failover | None = None
        self.source = Source(boot, replica, limits)
        self.sink = Sink(replica)
        self.sink.whole = saved.synced or saved.active
        self.settings = settings
        self._replica = replica
        self._saved = saved
        self._rank = Rank(saved.rank, settings.priority, settings.node)
        self._boot = boot
        self._wall = wall
        self._peer: _Peer | None = None
        self._greeting: wire.Hello | None = None
        self._watch = Watch(settings.heartbeat, settings.missed, now)
        self._effects: list[Effect] = []
        self._beat = 0
        self._next_beat = now
        self._waiting: deque[tuple[int, float]] = deque()
        """Sequences that replies wait for, and until when."""
        self._progress = (0, now)
        self._asked = -ASK_EVERY
        self._base = 0
        """Where this node's own stream was when it became active."""
        self._handing = False
        """The peer is handing over: what it says is applied, though this node is active."""
        self._started = now
        self._synced_since: float | None = None
        self._left_by: float | None = None
        """When a handover has to be taken, or, once it is, when its grace is over."""
        self._taken = False
        self._claiming: tuple[str, float] | None = None
        self._releasing = False
        self.deadline = now
        """When :meth:`wake` is due."""

    # inputs: the link

    def connected(self, now: float) -> None:
        """There is a connection to the peer, which has proved who it is."""
        self._peer = self._greeting = None
        self._watch.connect(now)
        self._hello(now)

    def disconnected(self, now: float) -> None:
        """The connection is gone."""
        self._watch.disconnect(now)
        self.source.disconnect()
        self._let_go()
        self._handing = False
        if self._peer is not None:
            self.alarms.note("link lost", f"the connection to {self.settings.peer} is closed", now)
        self._wake_soon(now)

    def received(self, data: bytes, now: float) -> None:
        """A message has come."""
        message = wire.decode(data, self._peer.version if self._peer else wire.NEWEST)
        match message:
            case wire.Refused():
                self._refuse(message.reason)
            case wire.Hello():
                self._greeted(message, now)
            case _ if self._peer is None:
                self.refused["before its hello"] += 1
            case _:
                self._watch.heard(now)
                self._said(message, now)

    def _said(self, message: wire.Message, now: float) -> None:
        match message:
            case wire.Heartbeat():
                self._beaten(message, now)
            case wire.Ack():
                self._acknowledged(message, now)
            case wire.Nak():
                self.source.missing(message)
                self._stream()
            case wire.Resync():
                self._resync(message.reason, now)
            case wire.Handover() | wire.Claimed() | wire.Released() | wire.Request():
                self._role_said(message, now)
            case wire.Delta() | wire.Begin() | wire.End() | wire.Mark() | wire.Join():
                self._streamed(message, now)

    def _role_said(
        self, message: wire.Handover | wire.Claimed | wire.Released | wire.Request, now: float
    ) -> None:
        match message:
            case wire.Handover() if not self.state.forwards and self._peer and message.epoch > self._peer.epoch:
                self._handing = True
                self.epoch = max(self.epoch, message.epoch - 1)
                self._become(Event.ASKED, "handed over", now)
            case wire.Claimed() if self.state is State.LEAVING and message.epoch > self.epoch:
                self._become(Event.TAKEN, "", now)
            case wire.Released() if self._handing:
                self._handed(now)
            case wire.Request() if self.state is State.ACTIVE and self.source.state is Sync.SYNCED:
                self.alarms.note("pre-emption", f"{self.settings.peer} has the higher priority", now)
                self._become(Event.STEP_DOWN, "", now)

    # inputs: the service network, and whoever else moves the addresses

    def answered(self, now: float) -> None:
        """The peer has answered a probe: it is alive."""
        self._watch.answered(now)

    def refuses(self, now: float) -> None:
        """The peer's machine has answered a probe by "nobody is there"."""
        self._watch.refused()
        self._wake_soon(now)

    def farewell(self, boot: int, epoch: int, now: float) -> None:
        """The peer's guard says that its daemon is gone and the addresses are removed."""
        if self._peer is None or self._peer.boot != boot or epoch < self._peer.epoch:
            self.refused["farewell of somebody else"] += 1
            return
        self._watch.gone()
        self.alarms.note("farewell", f"the daemon of {self.settings.peer} is gone", now)
        if self.state is State.STANDBY and self.settings.decides:
            self._become(Event.PEER_GONE, "the peer's daemon is gone", now)

    def address_gained(self, now: float) -> None:
        """The virtual addresses are here, whoever put them."""
        if not self.settings.decides:
            self._become(Event.GAINED, "the addresses were moved here", now)

    def address_lost(self, now: float) -> None:
        """The virtual addresses are not here."""
        if not self.settings.decides:
            self._become(Event.LOST, "the addresses were moved away", now)

    # inputs: the node itself

    def changed(self, records: Sequence[wire.Record], now: float) -> int:
        """This node has made changes; which sequence replies have to wait for, 0 for none."""
        sequence = self.source.append(records, now)
        if self.source.state is not Sync.SYNCED:
            return 0
        self._waiting.append((sequence, now + self.settings.sync_timeout))
        self._stream()
        self.deadline = min(self.deadline, self._waiting[0][1])
        return sequence

    def claimed(self, now: float) -> None:
        """The addresses are here and announced."""
        if self._claiming is not None:
            cause, since = self._claiming
            self._claiming = None
            self.failover = Failover(cause, now + self._wall, max(now - since, 0.0), self.epoch)
            self.alarms.note("takeover", f"{cause}; epoch {self.epoch}, {now - since:.3f} s", now)
        if self.state.forwards:
            self._send(wire.Claimed(self.epoch))

    def released(self, now: float) -> None:
        """The addresses are not here any more, and the last change was told."""
        self._releasing = False
        if self.state.forwards:
            return
        if self._taken:
            self._stream()
            self._send(wire.Released(self.epoch))
        self.source.disconnect()
        self._let_go()
        if not self._taken and self._watch.connected:
            self._hello(now)
        self._taken = False
        self._persist(active=False, synced=False)

    def step_down(self, force: bool, now: float) -> str | None:
        """Hand over to the peer; why not, if that cannot be."""
        if self.state is not State.ACTIVE:
            return f"this node is {self.state}, not active"
        if not self._watch.connected or self._peer is None:
            return f"{self.settings.peer} is not connected"
        if self.source.state is not Sync.SYNCED and not force:
            return f"{self.settings.peer} is not in sync: clients that it does not know would be decided anew"
        self._become(Event.STEP_DOWN, "", now)
        return None

    def wake(self, now: float) -> None:
        """The deadline has passed, and everything that came before was told."""
        if now - self.deadline > 2 * self.settings.heartbeat:
            self._watch.paused(now)
        self._answer(self.sink.step())
        self._look_at_replies(now)
        self._look_for_progress(now)
        if now >= self._next_beat:
            self._next_beat = now + self.settings.heartbeat
            self._heartbeat(now)
        self._look_at_handover(now)
        self._look_at_peer(now)
        self._look_at_sync(now)
        self._set_deadline(now)

    def effects(self) -> Sequence[Effect]:
        """What is to be done now, in this order."""
        done, self._effects = self._effects, []
        return done

    # what was said

    def _greeted(self, hello: wire.Hello, now: float) -> None:
        version = wire.agreed((wire.OLDEST, wire.NEWEST), hello)
        settings = self.settings
        if (hello.cluster, hello.node) != (settings.cluster, settings.peer):
            self._refuse("hello of another cluster or node")
        elif version is None:
            self._refuse(f"versions {hello.oldest} to {hello.newest} are not spoken here")
        elif hello.role not in list(State):
            self._refuse("hello of an unknown role")
        elif self._peer is None or self._peer.boot != hello.boot or hello.beat > self._peer.beat:
            rank = Rank(hello.rank, hello.priority, hello.node)
            self._peer = _Peer(
                hello.boot, rank, hello.beat, State(hello.role), hello.epoch, version, synced=False
            )
            self._greeting = hello
            self._watch.heard(now)
            self.alarms.clear(Name.PEER_LOST, now)
            self._check_clock(hello.clock, now)
            self.sink.connect(hello.boot)
            self._tell_everything()
            self._compare(now)

    def _tell_everything(self) -> None:
        """Bring the peer up to date from what it said in its hello, if that is for this node to do."""
        hello, peer = self._greeting, self._peer
        if hello and peer and self.state.forwards and not peer.state.forwards and not self._handing:
            self.source.connect(hello)
            self._stream()

    def _beaten(self, beat: wire.Heartbeat, now: float) -> None:
        assert self._peer is not None
        if beat.beat <= self._peer.beat or beat.role not in list(State):
            return
        self._peer = self._peer._replace(
            beat=beat.beat, state=State(beat.role), epoch=beat.epoch, synced=beat.synced
        )
        self._check_clock(beat.clock, now)
        if beat.seen == self._boot:
            self._acknowledged(wire.Ack(beat.applied, beat.whole), now)
        self._compare(now)
        if self.sink.lost and self._listens and now - self._asked >= ASK_EVERY:
            self._asked = now
            self._send(wire.Resync("not whole"))

    def _compare(self, now: float) -> None:
        """Hold what the peer is against what this node is."""
        assert self._peer is not None
        if self._peer.state.forwards:
            self._compare_with_active(self._peer, now)
            return
        self.alarms.clear(Name.TWO_ACTIVES, now)
        if self.settings.decides and not self.state.forwards:
            better = self._rank.better(self._peer.rank)
            event = Event.PEER_WORSE if better else Event.PEER_BETTER
            self._become(event, "the better rank of two that start", now)

    def _compare_with_active(self, peer: _Peer, now: float) -> None:
        if not self.state.forwards:
            self.alarms.clear(Name.TWO_ACTIVES, now)
            self._learn(peer.epoch)
            self._become(Event.PEER_ACTIVE, "", now)
        elif self.state is State.LEAVING and peer.epoch > self.epoch:
            # The epoch of a node that leaves stays the lower one until it has left.
            self._become(Event.TAKEN, "", now)
        elif not (peer.state is State.LEAVING and peer.epoch < self.epoch):
            self._two_actives(peer, now)

    def _two_actives(self, peer: _Peer, now: float) -> None:
        self.alarms.set(
            Name.TWO_ACTIVES,
            f"{self.settings.node} (epoch {self.epoch}) and {self.settings.peer} (epoch {peer.epoch}) were both "
            "active: check the networks between them",
            now,
        )
        ours = self.epoch
        outdone = peer.epoch > ours or (peer.epoch == ours and peer.rank.better(self._rank))
        if outdone and self.state is State.ACTIVE:
            self._learn(peer.epoch)
            if self.settings.decides:
                self._become(Event.OUTDONE, "", now)

    def _acknowledged(self, ack: wire.Ack, now: float) -> None:
        self.source.acknowledged(ack)
        if self.source.acked > self._progress[0]:
            self._progress = (self.source.acked, now)
        released = 0
        while self._waiting and self._waiting[0][0] <= self.source.acked:
            released = self._waiting.popleft()[0]
        if released:
            self._effects.append(Acked(released))
        self._stream()

    def _resync(self, reason: str, now: float) -> None:
        if self.state.forwards:
            self.alarms.note("resync", f"{self.settings.peer} asks for a snapshot: {reason:.100}", now)
            self.source.resync()
            if self.source.state is not Sync.SYNCED:
                self._let_go()
            self._stream()

    @property
    def _listens(self) -> bool:
        """Whether the peer's stream is applied here."""
        return not self.state.forwards or self._handing

    def _streamed(self, message: _STREAM, now: float) -> None:
        if self._listens:
            self._answer(self.sink.received(message, self.state is State.STANDBY, now))
            if self.sink.busy:
                self._wake_soon(now)
        else:
            self.refused["of a stream, though this node is active"] += 1

    def _handed(self, now: float) -> None:
        """The peer has said its last word as the active node: from now on it follows this node's stream."""
        self._handing = False
        if self.state.forwards and self._watch.connected:
            self.source.go_on(self._base)
            self._stream()
            self.source.mark(now)

    # saying

    def _send(self, message: wire.Message) -> None:
        if self._watch.connected:
            version = self._peer.version if self._peer else wire.OLDEST
            self._effects.append(Send(wire.encode(message, version)))

    def _answer(self, answer: wire.Ack | wire.Nak | wire.Resync | None) -> None:
        if answer is not None:
            self._send(answer)

    def _stream(self) -> None:
        if self._watch.connected:
            for message in self.source.messages():
                self._send(message)

    def _hello(self, now: float) -> None:
        self._beat += 1
        self._rank = Rank(self._saved.rank, self.settings.priority, self.settings.node)
        self._send(
            wire.Hello(
                wire.OLDEST,
                wire.NEWEST,
                self.settings.cluster,
                self.settings.node,
                self._boot,
                self._beat,
                self.epoch,
                self.state,
                self.settings.priority,
                self._rank.data,
                self.sink.seen,
                self.sink.applied,
                self.sink.whole,
                self._replica.digest(),
                now + self._wall,
            )
        )

    def _heartbeat(self, now: float) -> None:
        self._beat += 1
        self._send(
            wire.Heartbeat(
                self._beat,
                self.epoch,
                self.state,
                self.source.state is Sync.SYNCED,
                self.sink.seen,
                self.sink.applied,
                self.sink.whole,
                now + self._wall,
            )
        )

    def _refuse(self, reason: str) -> None:
        self.refused[reason] += 1
        self._effects.append(CloseLink(reason))

    def _check_clock(self, theirs: float, now: float) -> None:
        skew = theirs - (now + self._wall)
        if abs(skew) > MAX_SKEW:
            text = f"the clock of {self.settings.peer} differs by {skew:+.1f} s: set both by NTP"
            self.alarms.set(Name.CLOCK_SKEW, text, now)
        else:
            self.alarms.clear(Name.CLOCK_SKEW, now)

    # the role

    def _become(self, event: Event, cause: str, now: float) -> None:
        before = self.state
        self.state, action = after(before, event)
        if self.state is not before:
            self.alarms.note(f"{before} → {self.state}", str(event), now)
        match action:
            case Action.CLAIM:
                self._claim(cause, now)
            case Action.RELEASE:
                self._release()
            case Action.HAND_OVER:
                self._taken = False
                self._left_by = now + self.settings.handover_wait
                self._send(wire.Handover(self.epoch + 1))
            case Action.LINGER if not self._taken:
                self._taken = True
                self._left_by = now + self.settings.grace
            case Action.GO_ON:
                self._left_by = None
                self.alarms.note("step-down failed", str(event), now)
        self._wake_soon(now)

    def _claim(self, cause: str, now: float) -> None:
        stale = not self._saved.synced and not self._saved.active and self._saved.epoch > 0
        self.epoch += 1
        if self.epoch > self._saved.epoch:
            self._persist_now(replace(self._saved, epoch=self.epoch))
        self._effects += [Claim(self.epoch), Activate()]
        self._base = self.source.sequence
        self.sink.taken_over()
        self._claiming = (cause, self._watch.since if self._peer else now)
        self._persist(active=True, synced=True)
        self._tell_everything()
        if stale:
            text = (
                "this node was not in sync when it took over: clients that it does not know are decided anew"
            )
            self.alarms.set(Name.STALE_TAKEOVER, text, now)

    def _release(self) -> None:
        self._left_by = None
        self._releasing = True
        self._effects += [Deactivate(), Release()]

    def _learn(self, epoch: int) -> None:
        """The peer has that epoch; the one after it is reserved before it is needed."""
        self.epoch = max(self.epoch, epoch)
        if self._saved.epoch <= self.epoch:
            self._saved = replace(self._saved, epoch=self.epoch + 1)
            self._effects.append(Persist(self._saved, now=False))

    def _persist(self, *, active: bool, synced: bool) -> None:
        data = max(self._saved.data, self.epoch) if active or synced else self._saved.data
        saved = replace(self._saved, data=data, active=active, synced=synced)
        if saved != self._saved:
            self._saved = saved
            self._effects.append(Persist(saved, now=False))

    def _persist_now(self, saved: Saved) -> None:
        self._saved = saved
        self._effects.append(Persist(saved, now=True))

    # time

    def _wake_soon(self, now: float) -> None:
        self.deadline = min(self.deadline, now)

    def _let_go(self) -> None:
        """Nobody waits for the peer any more."""
        if self._waiting:
            self._effects.append(Acked(self._waiting[-1][0]))
            self._waiting.clear()

    def _look_at_replies(self, now: float) -> None:
        if self._waiting and self._waiting[0][1] <= now:
            self.source.desync()
            self._let_go()

    def _look_for_progress(self, now: float) -> None:
        behind = self.source.state is not Sync.ABSENT and (
            self.source.lag or self.source.state is Sync.RESYNC
        )
        if not behind:
            self._progress = (self.source.acked, now)
        elif now - self._progress[1] >= REPEAT_AFTER:
            self._progress = (self.source.acked, now)
            self.source.repeat()
            self._stream()

    def _look_at_handover(self, now: float) -> None:
        if self.state is State.LEAVING and self._left_by is not None and now >= self._left_by:
            self._become(Event.GRACE_OVER if self._taken else Event.NOT_TAKEN, "", now)

    def _look_at_peer(self, now: float) -> None:
        verdict = self._watch.verdict(now, self._patience)
        if verdict is Verdict.FINE:
            return
        if not self.state.forwards and self._watch.probe_due(now):
            self._effects.append(Probe())
        if verdict is Verdict.REACHABLE:
            self._not_in_sync()
        if verdict is not Verdict.SUSPECT:
            self._tell_lost(verdict, now)
        if self.state is State.STARTING:
            self._look_for_peer(verdict, now)
        elif verdict is Verdict.GONE:
            self._lose_peer(now)

    def _tell_lost(self, verdict: Verdict, now: float) -> None:
        where = (
            "but answers on the service network" if verdict is Verdict.REACHABLE else "and answers no probe"
        )
        text = f"nothing is heard of {self.settings.peer} over the link, {where}: check it and the link"
        self.alarms.set(Name.PEER_LOST, text, now)

    def _lose_peer(self, now: float) -> None:
        if self._watch.connected:
            self._effects.append(CloseLink("the peer is silent"))
            self.disconnected(now)
        if self.state is State.STANDBY and self.settings.decides:
            self._become(Event.PEER_GONE, "the peer is silent", now)
        elif self.state is State.LEAVING and not self._taken:
            self._become(Event.PEER_GONE, "", now)
        elif self._handing:
            self._handing = False

    def _look_for_peer(self, verdict: Verdict, now: float) -> None:
        """A node that starts and has no peer."""
        fresh = self._saved.synced or self._saved.active or self._saved.epoch == 0
        wait = self.settings.start_wait * (1.0 if fresh else self.settings.stale_factor)
        if verdict is Verdict.REACHABLE or self._watch.connected or now - self._started < wait:
            return
        if self.settings.decides:
            self._become(Event.ALONE, "no peer was found", now)

    @property
    def _patience(self) -> float:
        """A node that is not in sync is in no hurry to take over."""
        hasty = self.state is not State.STANDBY or self._saved.synced
        return 1.0 if hasty else self.settings.stale_factor

    def _not_in_sync(self) -> None:
        """The active node goes on without this one."""
        self._synced_since = None
        if not self.state.forwards:
            self._persist(active=False, synced=False)

    def _look_at_sync(self, now: float) -> None:
        if self.state is State.ACTIVE:
            self._look_at_source(now)
        if self.state is not State.STANDBY or not self._watch.connected or self._peer is None:
            return
        if not (self.sink.whole and self._peer.state.forwards and self._peer.synced):
            self._not_in_sync()
            return
        self._persist(active=False, synced=True)
        self.alarms.clear(Name.STALE_TAKEOVER, now)
        self._synced_since = now if self._synced_since is None else self._synced_since
        ripe = now - self._synced_since >= self.settings.preempt_after
        if ripe and self.settings.preempt and self.settings.priority > self._peer.rank.priority:
            self._synced_since = now
            self._send(wire.Request(self.epoch))

    def _look_at_source(self, now: float) -> None:
        if self.source.state is Sync.RESYNC:
            text = f"{self.settings.peer} has not everything yet: a failover now would cost what it lacks"
            self.alarms.set(Name.DESYNCHRONISED, text, now)
        elif self.source.state is Sync.SYNCED:
            self.alarms.clear(Name.DESYNCHRONISED, now)
            self.alarms.clear(Name.STALE_TAKEOVER, now)

    def _set_deadline(self, now: float) -> None:
        due = [self._next_beat]
        if self._waiting:
            due.append(self._waiting[0][1])
        if self._left_by is not None:
            due.append(self._left_by)
        if not self.state.forwards and self._watch.verdict(now, self._patience) is Verdict.SUSPECT:
            due.append(now + PROBE_EVERY)
        self.deadline = now if self.sink.busy else max(min(due), now)

    def status(self, now: float) -> Status:
        """The pair as this node sees it."""
        source, sink, peer = self.source, self.sink, self._peer
        following = not self.state.forwards
        in_sync = self._saved.synced if following else source.state is Sync.SYNCED
        return Status(
            node=self.settings.node,
            state=self.state,
            epoch=self.epoch,
            peer=self.settings.peer,
            connected=self._watch.connected,
            peer_state=str(peer.state) if peer else None,
            peer_epoch=peer.epoch if peer else None,
            last_heard=now - self._watch.last_heard,
            verdict=self._watch.verdict(now, self._patience),
            replication=str(source.state) if not following else ("synced" if in_sync else "resync"),
            in_sync=in_sync,
            sequence=sink.applied if following else source.sequence,
            acked=sink.applied if following else source.acked,
            lag=0 if following else source.lag,
            digest=self._replica.digest(),
            snapshots=source.snapshots,
            resumed=source.resumed,
            divergences=sink.divergences,
            desyncs=source.desyncs,
            overflows=source.overflows,
            failover=self.failover,
        )
