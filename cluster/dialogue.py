"""What a node makes of what its peer says.

Pure. What is said is in :mod:`sapin.cluster.wire`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

from sapin.cluster import wire
from sapin.cluster.conduct import RIVALRY
from sapin.cluster.judgement import Judgement
from sapin.cluster.replication import Sync
from sapin.cluster.role import (
    FOLLOWING,
    HOLDING,
    LEAVING,
    SAID,
    Merit,
    Signal,
    State,
    rank,
)
from sapin.cluster.settings import (
    Settings,
)


class Dialogue(Judgement):
    """A node's answers."""

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
            self._freed = False
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
        elif state not in HOLDING:
            return
        elif (epoch, self.settings.node) > (self.epoch, self.settings.peer):
            if state is not State.HANDING:
                self._rival(now)
            self._signal(Signal.FOUND, now)
        elif not self._handing:
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
