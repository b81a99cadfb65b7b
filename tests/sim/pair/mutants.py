"""Pairs with a bug each, planted to see whether the simulation finds it.

A mutant is a :class:`~sapin.cluster.pair.Pair` that is wrong in one thing, and works as long as nothing happens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from sapin.cluster.detector import Detector
from sapin.cluster.pair import Pair
from sapin.cluster.replication import Sync
from sapin.cluster.role import FOLLOWING, HOLDING
from sapin.cluster.settings import Acked, Effect, Persist
from sapin.cluster.wire import Delta, Record


class _Replica:
    """Passes everything on."""

    def __init__(self, real: Any) -> None:
        self.real = real

    def __getattr__(self, name: str) -> Any:
        return getattr(self.real, name)


class _LateReplica(_Replica):
    def __init__(self, real: Any) -> None:
        super().__init__(real)
        self.late: list[Record] = []

    def apply(self, records: Sequence[Record]) -> None:
        self.late += records


class AcksBeforeItApplies(Pair):
    """Acknowledges what it has read; what it applies, it applies at its next turn."""

    def __init__(self, settings: Any, replica: Any, *rest: Any) -> None:
        self.late = _LateReplica(replica)
        super().__init__(settings, self.late, *rest)

    def wake(self, now: float) -> None:
        super().wake(now)
        if self.role.state in FOLLOWING:
            self.late.real.apply(self.late.late)
            self.late.late = []


class ForgetsItsEpoch(Pair):
    """Does not keep on disk which epochs were used."""

    def effects(self) -> list[Effect]:
        effects = super().effects()
        return [Persist(e.saved._replace(floor=0, epoch=0)) if isinstance(e, Persist) else e for e in effects]


class _GreedyReplica(_Replica):
    def finish(self) -> bool:
        return True


class ForgetsDeletions(Pair):
    """Keeps what a snapshot does not have."""

    def __init__(self, settings: Any, replica: Any, *rest: Any) -> None:
        super().__init__(settings, _GreedyReplica(replica), *rest)


class DoesNotYield(Pair):
    """Stays active though the peer has the higher epoch."""

    def _compare(self, epoch: int, now: float, here: bool = True) -> None:
        if self.role.state not in HOLDING or epoch < self.epoch:
            super()._compare(epoch, now, here)


class _DeafDetector(Detector):
    def answered(self, now: float) -> None:
        pass


class ClaimsWithoutProbing(Pair):
    """Silence on the link is enough for it."""

    def __init__(self, settings: Any, *rest: Any) -> None:
        super().__init__(settings, *rest)
        self._detector = _DeafDetector(settings.heartbeat, settings.missed, rest[3])


class _BlindReplica(_Replica):
    def digest(self) -> int:
        return 1


class ComparesNoDigest(Pair):
    """Takes any two tables for the same."""

    def __init__(self, settings: Any, replica: Any, *rest: Any) -> None:
        super().__init__(settings, _BlindReplica(replica), *rest)


class ReleasesTooEarly(Pair):
    """Lets replies go before the peer has what they depend on."""

    def changed(self, records: Sequence[Record], now: float) -> int:
        sequence = super().changed(records, now)
        if sequence:
            self._effects.append(Acked(sequence))
        return sequence


class ReplaysFromElsewhere(Pair):
    """Goes on with its stream one message too far, under the numbers that are expected."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        source = self._stream.source
        real = source.connect

        def connect(hello: Any) -> None:
            real(hello)
            ring = source._ring
            if source.state is Sync.RESYNC and source._walk is None and len(ring) > 1:
                shifted = [after.message._replace(sequence=entry.message.sequence)  # type: ignore[call-arg]
                           for entry, after in zip(ring, list(ring)[1:], strict=False)]  # fmt: skip
                messages = [*shifted, Delta(source.sequence, [])]
                for at, message in enumerate(messages):
                    ring[at] = ring[at]._replace(message=message)

        source.connect = connect  # type: ignore[method-assign]


MUTANTS: dict[Callable[..., Pair], int] = {
    AcksBeforeItApplies: 300,
    ForgetsItsEpoch: 100,
    ForgetsDeletions: 100,
    DoesNotYield: 200,
    ClaimsWithoutProbing: 100,
    ComparesNoDigest: 200,
    ReleasesTooEarly: 300,
    ReplaysFromElsewhere: 200,
}
"""Each mutant, and within how many seeds it has to be caught."""
