"""Both directions of replication, with the clock: who waits for what, what is sent when, what is repeated.

Pure. :mod:`sapin.cluster.replication` knows what is to be said; this knows when. Semi-synchronous replication is here:
a reply waits for the sequence that :meth:`Stream.changed` answers, for at most ``sync_timeout``.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from typing import NamedTuple

from sapin.cluster.replication import Replica, Sink, Source, Sync
from sapin.cluster.settings import Acked, Effect, Settings
from sapin.cluster.wire import Ack, Join, Message, Numbered, Record, Resync

ROOM = 256 * 1024
"""Bytes that the shell takes before it has to be writable again; one message more may come."""
STEP = 4
"""Numbered messages made in one go: a chunk of a snapshot takes up to 0.4 ms to make."""
REPEAT = 0.1, 3.2
"""Seconds without an acknowledgement after which everything is sent again: at first, and at most."""
RESYNC_EVERY = 0.2
"""Seconds until a snapshot is asked for again."""
_LATENCIES = 512


class _Waiting(NamedTuple):
    sequence: int
    since: float
    due: float


class Stream:
    """A source and a sink under a clock.

    Args:
        boot: names this run.
        send: encodes and queues a message; answers its size.
        effects: where effects go.
    """

    def __init__(
        self,
        settings: Settings,
        replica: Replica,
        boot: int,
        send: Callable[[Message], int],
        effects: list[Effect],
    ) -> None:
        self.source = Source(boot, replica, settings.limits)
        self.sink = Sink(replica)
        self.room = ROOM
        self.more = False
        """Whether there is more to send, room given, than one step may make."""
        self._settings = settings
        self._send = send
        self._effects = effects
        self._waiting: deque[_Waiting] = deque()
        self._latencies: deque[float] = deque(maxlen=_LATENCIES)
        self._ack: Ack | None = None
        self._progress = 0.0
        self._patience = REPEAT[0]
        self._asked = 0.0

    # what this node changes

    def changed(self, records: Sequence[Record], now: float) -> int:
        """Changes of this node; the sequence that replies have to wait for, 0 for none."""
        if not self.source.lag:
            self._progress = now
        sequence = self.source.append(records, now)
        if self.source.state is not Sync.SYNCED:
            return 0
        self._waiting.append(_Waiting(sequence, now, now + self._settings.sync_timeout))
        return sequence

    def acknowledged(self, ack: Ack, now: float) -> None:
        """The peer has applied and journaled up to there."""
        before = self.source.acked
        self.source.acknowledged(ack)
        acked = self.source.acked
        if acked <= before:
            return
        self._progress, self._patience = now, REPEAT[0]
        released = 0
        while self._waiting and self._waiting[0].sequence <= acked:
            waited = self._waiting.popleft()
            released = waited.sequence
            self._latencies.append(now - waited.since)
        if released:
            self._effects.append(Acked(released))

    def free(self) -> None:
        """Nobody waits for the peer any more."""
        if self._waiting:
            self._effects.append(Acked(self._waiting[-1].sequence, held=False))
            self._waiting.clear()

    def overdue(self, now: float) -> bool:
        """Whether the peer has just been too slow; then nobody waits for it until it has everything again."""
        if not self._waiting or now < self._waiting[0].due:
            return False
        self.source.desync()
        self.free()
        return True

    def leave(self, now: float) -> None:
        """This node is not active any more: the peer says where its own stream goes on, and is given the time to."""
        self.source.leave()
        self._asked = now

    def extend(self, now: float) -> None:
        """This node was asleep: acknowledgements may be here, unread."""
        due = now + self._settings.sync_timeout
        self._waiting = deque(each._replace(due=max(each.due, due)) for each in self._waiting)

    def settle(self) -> None:
        """After whatever may have ended synchrony: nobody waits for a peer that is not in sync."""
        if self.source.state is not Sync.SYNCED:
            self.free()

    def repeat(self, now: float) -> None:
        """Send again what has not been acknowledged for long; compare digests when nothing changes, too."""
        self.source.tick(now)
        if self.source.state is Sync.ABSENT or not self.source.lag:
            self._progress = now
        elif now - self._progress >= self._patience:
            self.source.repeat()
            self._progress, self._patience = now, min(2 * self._patience, REPEAT[1])

    def pump(self) -> None:
        """Queue what may be sent now, a few messages at a time; the pending acknowledgement too."""
        if self._ack is not None:
            ack, self._ack = self._ack, None
            self._send(ack)
        self.more = False
        if self.room <= 0:
            return
        for count, message in enumerate(self.source.messages(), 1):
            self.room -= self._send(message)
            if self.room <= 0:
                return
            if count >= STEP:
                self.more = True
                return

    # what the peer changes

    def connect(self, boot: int, now: float) -> None:
        """The peer's run of that boot is there."""
        self.sink.connect(boot)
        self._asked = now

    def received(self, message: Numbered | Join, compare: bool, now: float) -> None:
        """A message of the peer's stream."""
        answer = self.sink.received(message, compare, now)
        if isinstance(answer, Ack):
            self._ack = answer
        elif answer is not None:
            if isinstance(answer, Resync):
                self._asked = now
            self._send(answer)

    def step(self) -> None:
        """One short step of finishing a snapshot."""
        self._ack = self.sink.step() or self._ack

    def ask(self, now: float) -> None:
        """Ask for a snapshot, if it takes one to go on; not too often."""
        if self.sink.lost and now - self._asked >= RESYNC_EVERY:
            self._asked = now
            self._send(Resync("it does not have everything"))

    def forget_ack(self) -> None:
        """The connection that it was for is gone."""
        self._ack = None

    @property
    def deadline(self) -> float | None:
        """When :meth:`overdue` is due."""
        return self._waiting[0].due if self._waiting else None

    @property
    def ack_p50(self) -> float | None:
        """Seconds that half of the latest changes waited for their acknowledgement, at most."""
        ordered = sorted(self._latencies)
        return ordered[len(ordered) // 2] if ordered else None
