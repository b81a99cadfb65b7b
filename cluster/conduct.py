"""What a node of the pair does: its answers to messages, its judgement of the peer, and the acts of its role.

Pure. The inputs are in :mod:`sapin.cluster.pair`, with the rules in words.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

from sapin.cluster import wire
from sapin.cluster.alarms import Alarms, Failover, Name
from sapin.cluster.detector import Detector, Verdict
from sapin.cluster.replication import Replica, Sync
from sapin.cluster.role import (
    FOLLOWING,
    HOLDING,
    LEAVING,
    SAID,
    Act,
    Merit,
    Role,
    Signal,
    State,
    following,
    rank,
)
from sapin.cluster.settings import (
    Activate,
    Claim,
    CloseLink,
    Deactivate,
    Effect,
    Event,
    Persist,
    Probe,
    Release,
    Saved,
    Send,
    Settings,
    Stopped,
)
from sapin.cluster.stream import Stream

MAX_SKEW = 2.0
"""Seconds that the wall clocks of two nodes may differ."""
HUNG = 0.75
"""Seconds of silence after which a connection is made anew, at least."""
PATIENCE = 10
"""So many times longer waits a node that does not have everything."""
DRAIN = 1.0
"""Seconds that the peer has to acknowledge the last changes of a node that steps down."""
RIVALRY = 0.5
"""Seconds that two active nodes count as seen."""


class Conduct:
    """A node; as :class:`~sapin.cluster.pair.Pair`, without its inputs."""

    def __init__(
        self, settings: Settings, replica: Replica, saved: Saved, boot: int, now: float, wall: float = 0.0
    ) -> None:
        self.settings = settings
        self.boot = boot
        self.wall = wall
        self.role = Role()
        self.epoch = saved.epoch
        """The one that this node took, or that of the active node that it follows."""
        self.alarms = Alarms()
        self.refused_messages: Counter[str] = Counter()
        self.counts: Counter[str] = Counter()
        self.last_failover: Failover | None = None
        self._effects: list[Effect] = []
        self._replica = replica
        self._saved = saved
        self._used = saved.floor
        """Epochs up to this one may have been used by this node."""
        self._stream = Stream(settings, replica, boot, self._send, self._effects)
        self._stream.sink.whole = saved.whole or saved.active
        self._detector = Detector(settings.heartbeat, settings.missed, now)
        self._connected = self._greeted = False
        self._hello: wire.Hello | None = None
        self._said: Merit | None = None
        """What this node has said of itself in its hello."""
        self._version = settings.versions[1]
        self._peer_boot = self._peer_epoch = 0
        self._peer_role = ""
        self._peer_priority = 0
        self._peer_synced = False
        self._answer: tuple[int, bool] | None = None
        """Epoch, and whether active, as the peer's beacon said since the link is silent."""
        self._began = self._changed = self._vacant = now
        """When this node started, last changed its state, and last knew that somebody was active."""
        self._freed = False
        """Whether the peer is certainly not active any more."""
        self._free_since = 0.0
        self._in_sync_since: float | None = None
        self._asked = now
        self._handing = False
        """Whether the peer, from which this node takes over, still sends its late changes."""
        self._base = 0
        """Where the own stream was when this node took over."""
        self._draining: float | None = None
        self._stopping = self._here = self._noticed = False
        self._abstains_until = now
        self._cause = "start"
        self._claimed_by: tuple[float, bool] = (now, False)
        self._rival_at: float | None = None
        self._skew = 0.0
        self._said_count = self._heard_count = 0
        self._next_beat = now
        self._at = self._due = now
        self._met = now
        """When the connection was made."""
        self._free_cause = ""

    @property
    def active(self) -> bool:
        """Whether the addresses are this node's, or about to be."""
        return self.role.state in HOLDING

    @property
    def in_sync(self) -> bool:
        """Whether the node that is not active has everything, as far as both know; of the active one, the other."""
        if self.role.state in HOLDING:
            return self._stream.source.state is Sync.SYNCED
        if self.role.state is State.STARTING:
            return self._saved.whole or self._saved.active
        return self._stream.sink.whole and self._peer_synced

    # time

    def _awake(self, now: float) -> None:
        """Every input begins here: was this node asleep since it was due?"""
        if now - self._due > 2 * self.settings.heartbeat:
            self.counts["pauses"] += 1
            self._detector.afresh(now)
            self._stream.extend(now)
        self._at = now

    def _beat(self, now: float) -> None:
        if self._connected:
            if not self._greeted and now - self._met > HUNG:
                self._close("the peer does not say who it is", now)
            elif now - self._detector.last_heard > max(HUNG, PATIENCE * self._silence):
                self._close("the peer is silent", now)
            elif self._stream.room > 0:
                self._send_heartbeat(now)
            self._stream.repeat(now)
        if self._greeted and self.role.state in FOLLOWING and self._peer_role == "active":
            self._stream.ask(now)
        self._preempt(now)
        self._elect_anew(now)
        self._alarm(now)

    def _expire(self, now: float) -> None:
        lasted = now - self._changed
        state = self.role.state
        if (state is State.GRACE and lasted >= self.settings.grace) or (
            state is State.HANDING and lasted >= self.settings.handover
        ):
            self._signal(Signal.TIMEOUT, now)
        elif self._draining is not None and (now >= self._draining or not self._stream.source.lag):
            self._drained(now)
        if self._handing and lasted >= self.settings.handover + DRAIN:
            self._handing = False

    @property
    def _silence(self) -> float:
        return self.settings.missed * self.settings.heartbeat

    # what the peer says

    def _hear(self, now: float) -> None:
        self._detector.heard(now)
        self._answer = None
        if self.role.knows(Signal.HEARD):
            self._signal(Signal.HEARD, now)

    def _greet(self, now: float) -> None:
        sink, saved = self._stream.sink, self._saved
        merit = 0 if now < self._abstains_until else rank(saved.epoch, saved.active, saved.whole)
        self._met = now
        self._said = Merit(merit, self.settings.priority, self.settings.node)
        self._send(
            wire.Hello(
                *self.settings.versions,
                self.settings.cluster,
                self.settings.node,
                self.boot,
                self._count(),
                self.epoch,
                self._word,
                self.settings.priority,
                merit,
                sink.seen,
                sink.applied,
                sink.whole,
                self._replica.digest(),
                now + self.wall,
            )
        )

    def _on_hello(self, hello: wire.Hello, now: float) -> None:
        version = wire.agreed(self.settings.versions, hello)
        wrong = _wrong(self.settings, hello, version)
        if wrong or version is None:
            self.refused_messages[wrong] += 1
            self._close(f"the peer is refused: {wrong}", now)
            return
        if self._greeted:
            return
        self._version, self._greeted, self._hello = version, True, hello
        self._peer_boot, self._peer_priority = hello.boot, hello.priority
        self._peer_synced, self._heard_count = False, hello.beat
        self._skew = hello.clock - (now + self.wall)
        self._stream.connect(hello.boot, now)
        self._observe(hello.epoch, hello.role, now)
        state = self.role.state
        if state in HOLDING and hello.role != "active":
            self._stream.source.connect(hello)
        elif state in FOLLOWING and hello.role in ("starting", "standby"):
            self._elect(hello, now)

    def _elect(self, hello: wire.Hello, now: float) -> None:
        assert self._said is not None
        self._freed = False
        if not self.settings.moves:
            return
        if self._said.beats(Merit(hello.rank, hello.priority, hello.node)) and not self._stopping:
            self._cause = "start" if self.role.state is State.STARTING else "election"
            self._signal(Signal.ELECTED, now)
            self._stream.source.connect(hello)
        else:
            self._signal(Signal.PASSED, now)

    def _observe(self, epoch: int, role: str, now: float) -> None:
        """The peer has said what it is."""
        before, self._peer_role = self._peer_role, role
        if role == "active":
            self._peer_epoch = max(epoch, self._peer_epoch) if self.active else epoch
            self._compare(epoch, now)
        elif role == "standby" and before in ("active", "leaving"):
            self._handing = False
            if self.role.state in FOLLOWING:
                self._free("released", now)
        if role == "active" or self.active:
            self._vacant = now

    def _compare(self, epoch: int, now: float, here: bool = True) -> None:
        """The peer is active, with that epoch; ``here``: it says so itself, over the link."""
        state = self.role.state
        if state in FOLLOWING:
            if here:
                self._follow(epoch, now)
        elif state in LEAVING:
            return
        elif (epoch, self.settings.node) > (self.epoch, self.settings.peer):
            if state is not State.HANDING:
                self._rival(now)
            self._signal(Signal.FOUND, now)
        elif not self._handing and state in HOLDING:
            self._rival(now)
            if here:
                self._signal(Signal.RIVAL, now)

    def _follow(self, epoch: int, now: float) -> None:
        self._freed = False
        self.epoch = epoch
        if self.settings.moves:
            self._reserve()
        if self.role.state is not State.STANDBY:
            self._signal(Signal.FOUND, now)

    def _rival(self, now: float) -> None:
        if self._rival_at is None or now - self._rival_at > RIVALRY:
            self.counts["two_actives"] += 1
        self._rival_at = now

    def _on_heartbeat(self, message: wire.Heartbeat, now: float) -> None:
        if message.beat <= self._heard_count:
            return
        self._heard_count = message.beat
        self._peer_synced = message.synced
        self._skew = message.clock - (now + self.wall)
        self._observe(message.epoch, message.role, now)
        self._note_whole()
        if message.seen == self.boot and (message.applied or message.whole):
            self._on_ack(wire.Ack(message.applied, message.whole), now)

    def _on_handover(self, message: wire.Handover, now: float) -> None:
        able = (
            not self._stream.sink.lost
            and self._stream.sink.whole
            and self.settings.moves
            and not self._stopping
        )
        if self.role.knows(Signal.ASKED) and able:
            self._cause = "step-down"
            self._signal(Signal.ASKED, now)
        elif self.role.state in FOLLOWING:
            self._tell("refused to take over", asked_with=message.epoch)

    def _on_claimed(self, message: wire.Claimed, now: float) -> None:
        self._observe(message.epoch, "active", now)

    def _on_released(self, message: wire.Released, now: float) -> None:
        del message
        if self.role.state in HOLDING and self._handing:
            self._stream.source.go_on(self._base)
            self._stream.source.mark(now)
        self._handing = False
        self._observe(self._peer_epoch, "standby", now)

    def _on_request(self, message: wire.Request, now: float) -> None:
        del message
        if self.role.state is State.ACTIVE and self._ready() and self.settings.moves:
            self._tell("hands over to a node of higher priority")
            self._signal(Signal.STEP_DOWN, now)

    def _on_stream(self, message: wire.Numbered | wire.Join, now: float) -> None:
        state = self.role.state
        if state in HOLDING:
            if not self._handing or not isinstance(message, wire.Delta | wire.Mark):
                self.counts["stale"] += 1
                return
        elif state in LEAVING or self._draining is not None:
            self.counts["stale"] += 1
            return
        self._stream.received(message, state in FOLLOWING, now)
        self._note_whole()

    def _on_ack(self, message: wire.Ack, now: float) -> None:
        self._stream.acknowledged(message, now)
        self._stream.settle()
        if self._draining is not None and not self._stream.source.lag:
            self._drained(now)

    def _on_nak(self, message: wire.Nak, now: float) -> None:
        del now
        self._stream.source.missing(message)
        self._stream.settle()

    def _on_resync(self, message: wire.Resync, now: float) -> None:
        if self._peer_role in ("standby", "starting"):
            if self._stream.source.state is Sync.SYNCED:
                self._tell("resynchronises the peer", reason=message.reason)
            self._stream.source.resync()
            self._stream.settle()
        del now

    _HANDLERS: ClassVar[Mapping[type[Any], Callable[[Any, Any, float], None]]] = {
        wire.Heartbeat: _on_heartbeat,
        wire.Handover: _on_handover,
        wire.Claimed: _on_claimed,
        wire.Released: _on_released,
        wire.Request: _on_request,
        wire.Delta: _on_stream,
        wire.Begin: _on_stream,
        wire.End: _on_stream,
        wire.Mark: _on_stream,
        wire.Join: _on_stream,
        wire.Ack: _on_ack,
        wire.Nak: _on_nak,
        wire.Resync: _on_resync,
    }

    # judgement

    def _look(self, now: float) -> None:
        """See what the silence of the peer means by now."""
        if self.role.state is State.STOPPED:
            return
        verdict = self._detector.look(now)
        if self._detector.probe(now):
            self._effects.append(Probe())
        if verdict is not Verdict.SPEAKS and self.role.knows(Signal.SILENT):
            self._signal(Signal.SILENT, now)
        self._judge(verdict, now)

    def _judge(self, verdict: Verdict, now: float) -> None:
        """Take over if that is due."""
        if self.role.state not in FOLLOWING or self._stopping:
            return
        if not self.settings.moves:
            if self._here and (self._freed or verdict is Verdict.GONE or self._peer_role == "standby"):
                self._adopt(now)
            return
        found = self._vacancy(verdict)
        if found is not None and now >= max(found[0], self._abstains_until):
            self._cause = found[1]
            self._signal(Signal.GONE, now)

    def _vacancy(self, verdict: Verdict) -> tuple[float, str] | None:
        """From when on this node may take over, and why."""
        patience = PATIENCE if not self.in_sync else 0
        if self._freed:
            return self._free_since + patience * self._silence, self._free_cause
        if self._connected:
            return None if verdict is not Verdict.GONE else self._from_gone(patience)
        if verdict is Verdict.GONE:
            if self.role.state is State.STARTING:
                return self._began + self.settings.wait * max(1, patience), "start"
            return self._from_gone(patience)
        if verdict is Verdict.ALIVE and self._answer is not None and not self._answer[1]:
            better = (self._saved.epoch, self.settings.peer) > (self._answer[0], self.settings.node)
            waits = (1 if better else 3) * max(1, patience)
            return self._vacant + waits * self.settings.wait, "nobody was active"
        return None

    def _from_gone(self, patience: int) -> tuple[float, str] | None:
        since = self._detector.gone_since
        return None if since is None else (since + patience * self._silence, "silence")

    def _free(self, cause: str, now: float) -> None:
        """Certainly the peer is not active any more."""
        if not self._freed:
            self._freed, self._free_since, self._free_cause = True, now, cause
        self._judge(self._detector.look(now), now)

    def _ready(self) -> bool:
        """Whether the peer can be asked to take over."""
        return self._greeted and self._peer_role == "standby" and self._stream.source.state is Sync.SYNCED

    def _preempt(self, now: float) -> None:
        if not self.in_sync or self.role.state is not State.STANDBY:
            self._in_sync_since = None
            return
        if self._in_sync_since is None:
            self._in_sync_since = now
        wants = self.settings.preempt and self.settings.moves and self.settings.priority > self._peer_priority
        settled = now - max(self._in_sync_since, self._asked, self._abstains_until) >= self.settings.settled
        if wants and settled and self._greeted:
            self._asked = now
            self._send(wire.Request(self.epoch))

    def _elect_anew(self, now: float) -> None:
        """What a new connection, and new hellos, put right."""
        if not self._greeted or self._peer_role not in ("standby", "starting"):
            return
        if self.role.state in FOLLOWING and self.settings.moves:
            if now - max(self._vacant, self._met, self._changed) > self.settings.wait:
                self._close("neither node is active", now)
        elif self.role.state is State.ACTIVE and self._stream.source.state is Sync.ABSENT:
            self._close("the peer is to be brought up to date", now)

    def _alarm(self, now: float) -> None:
        silent = self._detector.since is not None and now - self._detector.last_heard >= self._silence
        grown = now - self._began >= self.settings.wait
        alive = self._detector.since is not None and self._answer is not None
        lost = "the peer is silent on the link" + (", but answers probes" if alive else "")
        rivals = self._rival_at is not None and now - self._rival_at < RIVALRY
        set_ = self.alarms.set
        set_(Name.PEER_LOST, silent and grown, lost, now)
        set_(
            Name.DESYNCHRONISED, self._greeted and not self.in_sync, "the standby lacks something still", now
        )
        set_(Name.TWO_ACTIVES, rivals, "both nodes were active", now)
        skewed = self._greeted and abs(self._skew) > MAX_SKEW
        set_(Name.CLOCK_SKEW, skewed, f"the peer's clock is {self._skew:+.1f} s off ours", now)
        if self.active and self.in_sync:
            set_(Name.UNSYNCED_TAKEOVER, False, "", now)
        for alarm, raised in self.alarms.changes(now):
            self._tell("alarm", alarm=alarm.name.value, raised=raised, text=alarm.text)

    # what the role asks for

    def _signal(self, signal: Signal, now: float) -> None:
        before = self.role.state
        acts = self.role.signal(signal)
        if self.role.state is not before:
            self._changed = now
            self._tell("role", before=before.value, state=self.role.state.value, by=signal.value)
        for act in acts:
            self._ACTS[act](self, now)

    def _reserve(self) -> int:
        """The epoch of the next takeover, durably this node's own."""
        known = max(self.epoch, self._peer_epoch, self._used, self._saved.epoch)
        epoch = following(known, self.settings.node, self.settings.peer)
        self._save(floor=max(epoch, self._saved.floor))
        return epoch

    def _take(self, now: float) -> None:
        synced = self.in_sync
        certain = self._cause in ("start", "election")
        if (not synced and not certain) or (not synced and self._saved.epoch and not self._greeted):
            text = (
                "this node took over without having everything; clients that it did not know are decided anew"
            )
            self.alarms.set(Name.UNSYNCED_TAKEOVER, True, text, now)
        self._claimed_by = (now if self._cause != "silence" else self._detector.last_heard, synced)
        self.epoch = self._used = self._reserve()
        self._freed = self._handing = False
        self._base = self._stream.source.sequence
        self._stream.sink.taken_over()
        self._effects.append(Activate())

    def _claim(self, now: float) -> None:
        handed = self._connected and self._cause == "step-down" and self._peer_role == "active"
        elected = self._connected and self._cause in ("start", "election")
        self._take(now)
        self._effects.append(Claim(self.epoch))
        self._save(epoch=self.epoch, active=True, whole=True)
        if handed:
            self._handing = True
        elif self._connected and not elected:
            self._close("this node takes over", now)

    def _adopt_acts(self, now: float) -> None:
        self._take(now)
        self._save(epoch=self.epoch, active=True, whole=True)
        if self._connected:
            self._stream.source.disconnect()

    def _adopt(self, now: float) -> None:
        if not self.settings.moves and self.role.knows(Signal.GAINED):
            self._cause = "address"
            self._signal(Signal.GAINED, now)

    def _announce(self, now: float) -> None:
        since, synced = self._claimed_by
        self.counts["takeovers"] += 1
        self._tell("took over", cause=self._cause, epoch=self.epoch, seconds=now - since, synced=synced)
        if self._cause != "start":
            self.last_failover = Failover(self._cause, self.epoch, now, now - since, synced)
        if self._connected:
            self._send(wire.Claimed(self.epoch))
            self._send_heartbeat(now)

    def _insist(self, now: float) -> None:
        if self._connected:
            self._send_heartbeat(now)

    def _hand_over(self, now: float) -> None:
        del now
        self._send(wire.Handover(following(self.epoch, self.settings.peer, self.settings.node)))

    def _keep(self, now: float) -> None:
        self._tell("the peer did not take over")
        if self._stopping:
            self._signal(Signal.STOP, now)

    def _yield(self, now: float) -> None:
        self._stream.source.disconnect()
        self._stream.free()
        self._give_up(now)

    def _give_up(self, now: float) -> None:
        self._effects += (Deactivate(), Release())
        if not self.settings.moves:
            self._signal(Signal.RELEASED, now)

    def _drop(self, now: float) -> None:
        del now
        self._effects.append(Deactivate())

    def _drain(self, now: float) -> None:
        self._draining = now + DRAIN
        self._vacant = now
        if self._stream.source.state is not Sync.SYNCED or not self._stream.source.lag:
            self._drained(now)

    def _drained(self, now: float) -> None:
        """This node is a standby for good: its last changes are with the peer, or lost."""
        source = self._stream.source
        clean = source.state is Sync.SYNCED and not source.lag
        self._draining = None
        self._stream.free()
        source.leave()
        self._save(active=False, whole=clean)
        if self._connected:
            self._send(wire.Released(self.epoch))
            if not clean:
                self._close("what this node had not told the peer is undone", now)
        if self._stopping and self.role.knows(Signal.STOP):
            self._signal(Signal.STOP, now)

    def _finish(self, now: float) -> None:
        del now
        self._effects.append(Stopped())

    _ACTS: ClassVar[Mapping[Act, Callable[[Any, float], None]]] = {
        Act.CLAIM: _claim,
        Act.ADOPT: _adopt_acts,
        Act.ANNOUNCE: _announce,
        Act.INSIST: _insist,
        Act.HAND_OVER: _hand_over,
        Act.KEEP: _keep,
        Act.YIELD: _yield,
        Act.GIVE_UP: _give_up,
        Act.DROP: _drop,
        Act.DRAIN: _drain,
        Act.FINISH: _finish,
    }

    # small things

    def _note_whole(self) -> None:
        """Keep on disk whether this node has everything."""
        sink = self._stream.sink
        if self.role.state not in FOLLOWING or not self._greeted:
            return
        if sink.loading and (self._saved.whole or self._saved.active):
            self._save(whole=False, active=False)
        elif sink.whole and sink.seen and self._peer_synced and self._peer_role == "active":
            self._save(whole=True, active=False, epoch=self._peer_epoch)

    def _save(self, **fields: Any) -> None:
        saved = self._saved._replace(**fields)
        if saved != self._saved:
            self._saved = saved
            self._effects.append(Persist(saved))

    def _send(self, message: wire.Message) -> int:
        data = wire.encode(message, self._version)
        self._effects.append(Send(data))
        return len(data)

    def _send_heartbeat(self, now: float) -> None:
        sink = self._stream.sink
        synced = self._stream.source.state is Sync.SYNCED
        self._send(
            wire.Heartbeat(
                self._count(),
                self.epoch,
                self._word,
                synced,
                sink.seen,
                sink.applied,
                sink.whole,
                now + self.wall,
            )
        )

    @property
    def _word(self) -> str:
        """What this node is, to its peer."""
        return "leaving" if self._draining is not None else SAID[self.role.state]

    def _count(self) -> int:
        self._said_count += 1
        return self._said_count

    def _close(self, reason: str, now: float) -> None:
        self._effects.append(CloseLink(reason))
        self._hang_up(now)

    def _hang_up(self, now: float) -> None:
        self._connected = self._greeted = self._handing = False
        self._hello = None
        self._stream.source.disconnect()
        self._stream.free()
        self._stream.forget_ack()
        if self._draining is not None:
            self._drained(now)

    def _tell(self, name: str, **fields: str | float | bool) -> None:
        self._effects.append(Event(name, fields))


def _wrong(settings: Settings, hello: wire.Hello, version: int | None) -> str:
    """What is wrong with the peer; empty if nothing is."""
    if version is None:
        return f"it speaks versions {hello.oldest} to {hello.newest}"
    if hello.cluster != settings.cluster:
        return "it is of another cluster"
    if hello.node != settings.peer or not hello.boot:
        return "it is not the peer"
    if hello.role not in SAID.values():
        return "its role is unknown"
    return ""
