"""What a node of the pair is, and what it does when its role changes.

Pure. The inputs are in :mod:`sapin.cluster.pair`, with the rules in words; what is judged from silence in
:mod:`sapin.cluster.judgement`, what the peer says in :mod:`sapin.cluster.dialogue`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

from sapin.cluster import wire
from sapin.cluster.alarms import Alarms, Failover, Name
from sapin.cluster.detector import Detector
from sapin.cluster.replication import Replica, Sync
from sapin.cluster.role import (
    FOLLOWING,
    HOLDING,
    SAID,
    Act,
    Merit,
    Role,
    Signal,
    State,
    following,
)
from sapin.cluster.settings import (
    Activate,
    Claim,
    CloseLink,
    Deactivate,
    Effect,
    Event,
    Persist,
    Release,
    Saved,
    Send,
    Settings,
    Stopped,
)
from sapin.cluster.stream import Stream

DRAIN = 1.0
"""Seconds that the peer has to acknowledge the last changes of a node that steps down."""
RIVALRY = 0.5
"""Seconds that two active nodes count as seen."""


class Conduct:
    """A node; the state of a :class:`~sapin.cluster.pair.Pair`, and the acts of its role."""

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
        self._free_epoch = 0
        """The peer's epoch when it became free."""
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
        self._was_synced = False
        """Whether this node was in sync before its last transition."""
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
            return self._saved.whole or self._saved.active or self._saved == Saved()
        return self._stream.sink.whole and self._peer_synced

    # what the role asks for

    def _signal(self, signal: Signal, now: float) -> None:
        before, self._was_synced = self.role.state, self.in_sync
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
        synced = self._was_synced
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
        self._stream.leave(now)
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
