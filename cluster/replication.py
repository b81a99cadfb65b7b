"""Replication: one numbered stream of a node's own changes, and how the peer takes it in.

Pure. A :class:`Source` numbers what its node changes; a :class:`~sapin.cluster.sink.Sink` applies the peer's stream. The rules:

* **One stream** for each run of a daemon, named by its *boot*. Changes, the chunks of a snapshot, its beginning and end, and
  digests all have numbers in it, so that order, acknowledgement, window and repetition are one mechanism.
* **Records are absolute** (:mod:`sapin.core.journal`), so a snapshot may be walked piece by piece while changes go on in
  between, and a record may come twice. What a snapshot does not say is removed at its end: that is how
  deletions are not forgotten.
* **Acknowledged** means applied and journaled. A sink in the middle of a snapshot acknowledges what it applied, but is not *whole*.
* **After a gap in the connection** the stream goes on where the sink is, if the source still has what came since (its *ring*); or from now on,
  if both have the same digest; or else with a snapshot.
* **Nothing is unbounded.** What is on its way is at most a window; what waits is at most the ring. When the ring is full, its oldest part is
  dropped, and a snapshot replaces it. So a slow or silent peer costs a bounded amount of memory, and never time.
* **A digest at a place of the stream** is compared by the sink at the same place. A difference is repaired by a snapshot.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple

from sapin.cluster.replica import Replica
from sapin.cluster.sink import Sink
from sapin.cluster.wire import (
    MAX_RECORDS,
    Ack,
    Begin,
    Delta,
    End,
    Hello,
    Join,
    Mark,
    Nak,
    Numbered,
    Record,
    Revision,
)
from sapin.core.journal import Touched
from sapin.core.pins import Put, Removed

__all__ = ["Limits", "Replica", "Sink", "Source", "Sync", "weight"]

MARK_EVERY, MARK_SELDOM = 1.0, 64.0
"""Seconds between two digests in the stream, at least; and when a snapshot does not help against a difference."""


class Sync(StrEnum):
    """What the peer has of this node's state, as far as the node knows."""

    ABSENT = "absent"
    """It is not there, or not to be told."""
    RESYNC = "resync"
    """It is being brought up to date."""
    SYNCED = "synced"
    """It has all that it was told, or will have it within the timeout."""


@dataclass(frozen=True, slots=True)
class Limits:
    """Bounds of a source, in weights (:func:`weight`: roughly bytes)."""

    window: int = 1024 * 1024
    """On their way, not acknowledged."""
    ring: int = 16 * 1024 * 1024
    """Kept for repetition, on their way or waiting. More than twice the window, or no snapshot would get through."""

    def __post_init__(self) -> None:
        if self.ring <= 2 * self.window:
            raise ValueError(f"a ring of {self.ring} is not more than twice a window of {self.window}")


class _Entry(NamedTuple):
    message: Numbered
    weight: int


def weight(records: Sequence[Record]) -> int:
    """About how many bytes the records take, in memory as on the wire; quick rather than exact."""
    total = 100 + 100 * len(records)
    for record in records:
        if type(record) is Revision:
            total += len(record.text)
        elif isinstance(record, Put | Removed | Touched):
            total += 24 * len(record.keys)
    return total


def _server(record: Record) -> str:
    return record.server if type(record) is Put else ""


class Source:
    """The stream of this node's changes.

    Args:
        boot: names the stream; by chance, not 0.
        replica: what a snapshot is made of.
    """

    def __init__(self, boot: int, replica: Replica, limits: Limits | None = None) -> None:
        self.boot = boot
        self.state = Sync.ABSENT
        self.sequence = 0
        """Of the last numbered message; sequences begin with 1."""
        self.acked = 0
        """Everything up to this one is known to be applied and journaled by the peer."""
        self.snapshots = self.resumed = self.desyncs = self.overflows = 0
        """How often a snapshot was begun, the stream was gone on with, the peer fell behind, the ring was full."""
        self._replica = replica
        self._limits = limits or Limits()
        self._ring: deque[_Entry] = deque()
        self._weight = 0
        self._sent = 0
        """The last sequence that was sent on this connection."""
        self._in_flight = 0
        self._walk: Iterator[Sequence[Record]] | None = None
        self._goal = 0
        """The peer is synced when it has acknowledged this one, whole."""
        self._begun = 0
        """The beginning of the last snapshot."""
        self._marked = 0.0
        self._mark_at = 0
        """The sequence of a digest whose outcome is not known; 0 for none."""
        self._patience = MARK_EVERY
        self._join: Join | None = None
        self._joined: Join | None = None

    @property
    def lag(self) -> int:
        """Numbered messages that the peer has not acknowledged."""
        return self.sequence - self.acked

    @property
    def weight(self) -> int:
        """What is kept for repetition."""
        return self._weight

    def append(self, records: Sequence[Record], now: float) -> int:
        """Number the changes of one flush; the sequence of the last message."""
        for at in range(0, len(records), MAX_RECORDS):
            part = records[at : at + MAX_RECORDS]
            self._number(Delta(self.sequence + 1, part), weight(part))
        self.tick(now)
        return self.sequence

    def tick(self, now: float) -> None:
        """Have the peer compare digests if it is time to. Only when every change so far was appended."""
        if self.state is Sync.SYNCED and not self._mark_at and now - self._marked >= self._patience:
            self.mark(now)

    def mark(self, now: float) -> None:
        """Have the peer compare digests here. Only when every change so far was appended."""
        if self.state is not Sync.ABSENT and self._walk is None:
            self._marked = now
            self._number(Mark(self.sequence + 1, self._replica.digest()), 50)
            self._mark_at = self.sequence

    def connect(self, hello: Hello) -> None:
        """The peer is there, and is to be brought up to date in the cheapest way that is right."""
        self._begin_connection()
        if hello.seen == self.boot and hello.whole and self._has(hello.applied):
            self.resumed += 1
            self._go_on_from(hello.applied)
        elif hello.whole and hello.digest == self._replica.digest():
            self.resumed += 1
            self._forget_all()
            self._say_join(Join(self.sequence, hello.digest))
        else:
            self._begin_snapshot()

    def go_on(self, base: int) -> None:
        """The peer, from which this node took over, is where the stream was at ``base``; a digest will tell."""
        self._begin_connection()
        if not self._has(base):
            self._begin_snapshot()
            return
        self.resumed += 1
        self._go_on_from(base)
        self._say_join(Join(base, 0))

    def _say_join(self, join: Join) -> None:
        """Have the peer go on from there; a digest does not cover the states, so they are said anew."""
        self._join = self._joined = join
        states = self._replica.states()
        if states:
            self._number(Delta(self.sequence + 1, states), weight(states))
        self._goal = self.sequence

    def disconnect(self) -> None:
        """The peer is not there any more. What it has not acknowledged is kept, as far as it fits."""
        if self._walk is not None:
            self._forget_all()  # half of a snapshot, which nobody could go on with
        self.state = Sync.ABSENT
        self._walk = self._join = self._joined = None
        self._in_flight = 0

    def leave(self) -> None:
        """This node is not active any more: what its stream has said is not repeated, the peer's state is the one that counts."""
        self.disconnect()
        self._forget_all()

    def acknowledged(self, ack: Ack) -> None:
        """The peer has everything up to a sequence."""
        if self.state is Sync.ABSENT or not self.acked <= ack.sequence <= self._sent:
            return
        self.acked = ack.sequence
        self._drop_to(ack.sequence)
        if ack.whole and 0 < self._mark_at <= ack.sequence:
            self._mark_at, self._patience = 0, MARK_EVERY
        if self.state is Sync.SYNCED:
            if not ack.whole:
                self._begin_snapshot()
        elif ack.whole and ack.sequence >= self._goal and self._walk is None:
            self.state = Sync.SYNCED
            self._joined = None

    def missing(self, nak: Nak) -> None:
        """The peer lacks a sequence, though a later one came."""
        if self.state is Sync.ABSENT or nak.sequence > self._sent:
            return
        if nak.sequence > self.acked:
            self._rewind(nak.sequence - 1)
        elif self._begun > self.acked or self._joined is not None:
            self.repeat()  # it lacks what allows it to go on here
        else:
            self._begin_snapshot()

    def resync(self) -> None:
        """The peer asks for a snapshot."""
        if self.state is not Sync.ABSENT and self._begun <= self.acked and self._walk is None:
            self._begin_snapshot()

    def desync(self) -> None:
        """The peer has not acknowledged in time: nobody waits for it until it has everything again."""
        if self.state is Sync.SYNCED:
            self.state = Sync.RESYNC
            self.desyncs += 1
            self._goal = self.sequence

    def repeat(self) -> None:
        """Send everything again that was not acknowledged: on a link that loses, when nothing was heard for long."""
        if self.state is Sync.ABSENT:
            return
        self._rewind(self.acked)
        if self._joined is not None and self._joined.sequence == self.acked:
            self._join = self._joined

    def messages(self) -> Iterator[Numbered | Join]:
        """What may be sent now: take as many as the link has room for. Each counts as sent when it is taken."""
        while self.state is not Sync.ABSENT:
            if self._join is not None:
                join, self._join = self._join, None
                yield join
            elif self._in_flight >= self._limits.window or not self._more():
                return
            elif self._sent < self.sequence:  # unless numbering a chunk has filled the ring
                entry = self._ring[self._sent + 1 - self._first]
                self._sent += 1
                self._in_flight += entry.weight
                yield entry.message

    def _more(self) -> bool:
        """Whether there is something to send; the next chunk of a snapshot is fetched if nothing else waits."""
        if self._sent < self.sequence:
            return True
        while self._walk is not None:
            chunk = next(self._walk, None)
            if chunk is None:
                self._walk = None
                self._number(End(self.sequence + 1), 50)
                self._goal = self.sequence
                return True
            # Pins of a walk are distinct, so their order is free; those of one server together are quick to apply.
            chunk = sorted(chunk, key=_server)
            for at in range(0, len(chunk), MAX_RECORDS):
                part = chunk[at : at + MAX_RECORDS]
                self._number(Delta(self.sequence + 1, part), weight(part))
            if chunk:
                return True
        return False

    @property
    def _first(self) -> int:
        """The sequence of the oldest entry of the ring."""
        return self.sequence + 1 - len(self._ring)

    def _has(self, applied: int) -> bool:
        """Whether the ring has everything after a sequence."""
        return self._first - 1 <= applied <= self.sequence

    def _number(self, message: Numbered, size: int) -> None:
        self.sequence += 1
        self._ring.append(_Entry(message, size))
        self._weight += size
        if self._weight > self._limits.ring:
            self._overflow()

    def _overflow(self) -> None:
        """What is kept has become too much: drop the oldest half. Who lacks it needs a snapshot."""
        self.overflows += 1
        while self._weight > self._limits.ring // 2:
            self._weight -= self._ring.popleft().weight
        if self.state is not Sync.ABSENT and self.acked < self._first - 1:
            self.desync()
            self._begin_snapshot()

    def _begin_connection(self) -> None:
        self.state = Sync.RESYNC
        self._walk = self._join = self._joined = None
        self._in_flight = 0

    def _go_on_from(self, applied: int) -> None:
        self.acked = applied
        self._drop_to(applied)
        self._sent = applied
        self._in_flight = 0
        self._goal = self.sequence

    def _begin_snapshot(self) -> None:
        """Begin a snapshot. What waited is not needed any more; what is appended from now on comes after the beginning."""
        if self._mark_at:
            # Its digest differed, most likely. If that comes again and again, nobody is to be kept busy with it.
            self._mark_at, self._patience = 0, min(2 * self._patience, MARK_SELDOM)
        self.state = Sync.RESYNC
        self._join = self._joined = None
        self._forget_all()
        self.snapshots += 1
        self._number(Begin(self.sequence + 1), 50)
        self._begun = self._goal = self.sequence
        self._walk = self._replica.walk()

    def _forget_all(self) -> None:
        self._ring.clear()
        self._weight = self._in_flight = 0
        self._sent = self.acked = self._goal = self.sequence

    def _drop_to(self, applied: int) -> None:
        """Forget what the peer has."""
        while self._ring and self._first <= applied:
            entry = self._ring.popleft()
            self._weight -= entry.weight
            self._in_flight -= entry.weight
        self._in_flight = max(self._in_flight, 0)

    def _rewind(self, applied: int) -> None:
        """Send again what comes after a sequence."""
        if applied < self._sent:
            self._sent = applied
            self._in_flight = 0
