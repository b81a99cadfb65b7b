"""A node's whole state for its peer: the dataplane's, and the configuration's revision beside it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from sapin.cluster.wire import Record, Revision
from sapin.core.dataplane import replica
from sapin.core.journal import Replicated


class Replica:
    """What :class:`~sapin.cluster.replica.Replica` asks for.

    Args:
        plane: the dataplane's.
        revision: the one in force, where that is for this node to say.
        said: is told the peer's.
    """

    def __init__(
        self,
        plane: replica.Replica,
        revision: Callable[[], Revision | None],
        said: Callable[[Revision], None],
    ) -> None:
        self._plane = plane
        self._revision = revision
        self._said = said
        self.begin = plane.begin
        self.finish = plane.finish
        self.digest = plane.digest

    def walk(self) -> Iterator[Sequence[Record]]:
        """A fuzzy snapshot, the configuration first: what comes after it is for servers that it has."""
        yield self._revisions()
        yield from self._plane.walk()

    def states(self) -> Sequence[Record]:
        """What is neither pin nor flow."""
        return [*self._revisions(), *self._plane.states()]

    def apply(self, records: Sequence[Record]) -> None:
        """Make the peer's changes, in their order."""
        theirs: list[Replicated] = []
        for record in records:
            if isinstance(record, Revision):
                self._said(record)
            else:
                theirs.append(record)
        if theirs:
            self._plane.apply(theirs)

    def _revisions(self) -> Sequence[Record]:
        revision = self._revision()
        return [revision] if revision is not None else []
