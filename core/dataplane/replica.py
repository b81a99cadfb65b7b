"""What replication needs of the dataplane: its state as records, and a way for the peer's records into it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

from sapin.core.journal import Replicated

Replicate = Callable[[Sequence[Replicated]], int]
"""Gets the local changes of one flush; answers the sequence that replies have to wait for, 0 for none."""


class Replica(Protocol):
    """The pins, flows and states of one node, as its peer's stream changes them."""

    def walk(self) -> Iterator[Sequence[Replicated]]:
        """A fuzzy snapshot in chunks of at most 250 records, each as of when it is asked for."""

    def apply(self, records: Sequence[Replicated]) -> None:
        """Make the peer's changes, in their order. They are journaled, and not told to the peer again."""

    def begin(self) -> None:
        """A snapshot begins: what is not put from now on goes at :meth:`finish`."""

    def finish(self) -> bool:
        """One step of at most 0.5 ms of removing what was not put since :meth:`begin`; true when done."""

    def digest(self) -> int:
        """64 bits of all pins and flows, in no order: the same on two nodes that have the same ones."""
