"""How the peer's stream is taken in: in order, once, and only from where it leads to the peer's state.

Pure. The rules of both ends are in :mod:`sapin.cluster.replication`.
"""

from __future__ import annotations

from sapin.cluster.replica import Replica
from sapin.cluster.wire import Ack, Begin, Delta, End, Join, Mark, Nak, Numbered, Resync

NAK_EVERY = 0.05
"""Seconds until a missing sequence is asked for again."""


class Sink:
    """Takes the peer's stream in.

    A *position* in that stream (:attr:`seen`, :attr:`applied`) is given by a snapshot's beginning or a :class:`Join`, and is lost when this
    node makes changes of its own, for then what comes next in the stream does not lead to the peer's state any more.

    Args:
        replica: what it is applied to.
    """

    def __init__(self, replica: Replica) -> None:
        self.applied = 0
        """Everything up to this sequence is applied."""
        self.whole = False
        """Whether the state here is what some active node had, rather than half of a snapshot."""
        self.divergences = self.gaps = self.repeated = 0
        """Digests that differed, sequences that were missing, messages that came twice."""
        self._replica = replica
        self._boot = self._seen = 0
        self._own = False
        """This node makes, or has made, changes of its own."""
        self._loading = self._finishing = False
        self._naked = (0, 0.0)

    @property
    def seen(self) -> int:
        """The boot in whose stream the position is; 0 for none."""
        return 0 if self._own else self._seen

    def connect(self, boot: int) -> None:
        """A connection to the run of that boot begins."""
        self._boot = boot
        if boot != self._seen:
            self._seen = self.applied = 0
            self._loading = self._finishing = False
        self._naked = (0, 0.0)

    def received(self, message: Numbered | Join, compare: bool, now: float) -> Ack | Nak | Resync | None:
        """Take a message in; what is to be answered.

        Args:
            message: of the peer's stream.
            compare: whether this node follows, so that digests mean something: not while it makes changes of its own.
            now: seconds.
        """
        if isinstance(message, Join):
            return self._join(message)
        if self._own and compare:
            self._seen = self.applied = 0
        if message.sequence <= self.applied:
            self.repeated += 1
            return Ack(self.applied, self.whole)
        if message.sequence != self.applied + 1 and not isinstance(message, Begin):
            return self._gap(now)
        if self._own and not compare:
            return self._take_late(message)
        return self._take(message)

    def _take(self, message: Numbered) -> Ack | Resync:
        if self.lost and not isinstance(message, Begin):
            return Resync("there was no snapshot")
        match message:
            case Delta():
                self._replica.apply(message.records)
            case Begin():
                self._replica.begin()
                self._seen, self._own = self._boot, False
                self._loading, self.whole, self._finishing = True, False, False
            case End() if self._loading:
                self._loading, self._finishing = False, True
            case Mark() if self.whole and message.digest != self._replica.digest():
                self.applied = message.sequence
                return self._diverged()
        self.applied = message.sequence
        return Ack(self.applied, self.whole)

    def _take_late(self, message: Numbered) -> Ack:
        """What the peer says last, while it hands over: this node's own state stays, whatever it does not know of."""
        if isinstance(message, Delta):
            self._replica.apply(message.records)
        self.applied = message.sequence
        return Ack(self.applied, self.whole)

    @property
    def lost(self) -> bool:
        """Whether it takes a snapshot or a :class:`Join` to go on, and none is coming in yet."""
        return not self.seen or not (self.whole or self._loading or self._finishing)

    def step(self) -> Ack | None:
        """One short step of what is left to do after a snapshot; an answer when that is done."""
        if not self._finishing or not self._replica.finish():
            return None
        self._finishing, self.whole = False, True
        return Ack(self.applied, True)

    @property
    def busy(self) -> bool:
        """Whether :meth:`step` has something to do."""
        return self._finishing

    @property
    def loading(self) -> bool:
        """Whether a snapshot is coming in."""
        return self._loading

    def taken_over(self) -> None:
        """This node is active now: what it has counts, and what is left of a snapshot, nobody will send."""
        self._loading = self._finishing = False
        self._own = self.whole = True

    def _join(self, message: Join) -> Ack | Resync:
        followed = self.seen == self._boot and self.applied >= message.sequence
        if self._loading or self._finishing or followed:
            self.repeated += 1
            return Ack(self.applied, self.whole)
        if message.digest and message.digest != self._replica.digest():
            return self._diverged()
        self._seen, self._own = self._boot, False
        self.applied, self.whole = message.sequence, True
        return Ack(self.applied, True)

    def _gap(self, now: float) -> Nak | None:
        missing, asked = self._naked
        if missing == self.applied + 1 and now - asked < NAK_EVERY:
            return None
        self.gaps += 1
        self._naked = (self.applied + 1, now)
        return Nak(self.applied + 1)

    def _diverged(self) -> Resync:
        self.divergences += 1
        self.whole = False
        return Resync("the digests differ")
