"""What replication needs of a node's state; that of a dataplane is :mod:`sapin.core.dataplane.replica`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol

from sapin.cluster.wire import Record


class Replica(Protocol):
    """A node's state, as replication shows and changes it."""

    def walk(self) -> Iterator[Sequence[Record]]:
        """A fuzzy snapshot in chunks of some hundred records, each as of when it is asked for."""
        ...

    def states(self) -> Sequence[Record]:
        """What is neither pin nor flow: health and admin states, the configuration."""
        ...

    def apply(self, records: Sequence[Record]) -> None:
        """Make the peer's changes, in their order; they are journaled when it returns."""
        ...

    def begin(self) -> None:
        """A snapshot begins: what is not put from now on goes at :meth:`finish`."""
        ...

    def finish(self) -> bool:
        """A short step of removing what was not put since :meth:`begin`; true when done."""
        ...

    def digest(self) -> int:
        """64 bits of all pins and flows, in no order."""
        ...
