"""What a node tells its peer of its own changes, and the flows whose answers wait until the peer has them.

At each flush of the journal, the changes since the last one go to the peer as one message with a sequence
number. The flows that were opened meanwhile, or whose clients got keys, are *held*: their upstream sockets are not
read, so that what a server answers waits in the kernel. When the peer has acknowledged the sequence they are
read again. So no client ever depends on a pin that only one node knows. What nobody releases is released
after :data:`AT_MOST`, whatever became of those who should have: a client must not wait for the cluster.

The outlet is open on the active node alone. The changes of a standby are its peer's, or will be undone by it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, NamedTuple

from sapin.core.dataplane.store import Store
from sapin.core.journal import Record, Replicated

if TYPE_CHECKING:
    from sapin.core.dataplane.flows import Flow

AT_MOST = 2.0
"""Seconds that a flow may be held, twice the longest sync_timeout: beyond that something is wrong."""

Replicate = Callable[[Sequence[Replicated]], int]
"""Gets all local changes of one flush, so that they and the digest are of one moment; answers the sequence that replies have to wait for, 0 for none."""


class _Held(NamedTuple):
    sequence: int
    since: float
    flows: list[Flow]


class Outlet:
    """The journal of the node's own changes.

    Args:
        store: gets every change too.
        clock: seconds, never going back.
    """

    def __init__(self, store: Store, clock: Callable[[], float]) -> None:
        self.open = False
        """Whether changes go to the peer."""
        self.records: list[Replicated] = []
        """The changes since the last flush."""
        self.replicate: Replicate | None = None
        """Takes what goes to the peer; ``None`` before there is a link to any."""
        self.overdue = 0
        """Flows that nobody released in time."""
        self._store = store
        self._clock = clock
        self._resume: Callable[[Iterable[Flow]], None] | None = None
        self._fresh: list[Flow] = []
        self._held: deque[_Held] = deque()

    def feed(self, resume: Callable[[Iterable[Flow]], None]) -> None:
        """Say how flows that are held no longer are read again."""
        self._resume = resume

    @property
    def held(self) -> int:
        """How many flows wait for the peer; those that were closed meanwhile count too."""
        return sum(len(each.flows) for each in self._held)

    def append(self, record: Record) -> None:
        """A change that this node has made, to the next flush."""
        self._store.append(record)
        if self.open:
            self.records.append(record)  # type: ignore[arg-type]  # ticks and ends are no changes

    def tell(self, record: Replicated) -> None:
        """A change for the peer alone, to the next flush."""
        if self.open:
            self.records.append(record)

    def tell_now(self, record: Replicated) -> None:
        """A change for the peer alone, at once."""
        self.tell(record)
        self.flush()

    def hold(self, flow: Flow) -> bool:
        """Whether the flow is to be held until the peer has the changes since the last flush."""
        if self.open:
            self._fresh.append(flow)
        return self.open

    def flush(self) -> None:
        """Hands what was appended to the kernel and to the peer."""
        self._store.flush()
        if not self.records:
            return
        records, self.records = self.records, []
        flows, self._fresh = self._fresh, []
        sequence = 0
        try:
            sequence = self.replicate(records) if self.replicate else 0
        finally:
            if sequence and flows:
                self._held.append(_Held(sequence, self._clock(), flows))
            else:
                self._resume_now(flows)

    def _resume_now(self, flows: list[Flow]) -> None:
        if flows and self._resume:
            self._resume(flows)

    def release(self, sequence: int) -> None:
        """The peer has everything up to this sequence."""
        while self._held and self._held[0].sequence <= sequence:
            self._resume_now(self._held.popleft().flows)
        self.flush()  # where one could not be resumed, it is closed

    def release_overdue(self) -> None:
        """Release what has been held for too long."""
        latest = self._clock() - AT_MOST
        while self._held and self._held[0].since < latest:
            flows = self._held.popleft().flows
            self.overdue += len(flows)
            self._resume_now(flows)

    def close(self) -> None:
        """Nothing goes to the peer from now on, and nothing waits for it."""
        self.flush()
        self.open = False
        while self._held:
            self._resume_now(self._held.popleft().flows)
