"""Round robin: each real server in its turn, whatever its weight."""

from __future__ import annotations

from collections.abc import Sequence

from sapin.core.contracts import Candidate, Request


class RoundRobin:
    """Takes the candidates in their order, over and over."""

    def __init__(self) -> None:
        self._turn = -1

    def pick(self, request: Request, candidates: Sequence[Candidate]) -> Candidate:
        """The candidate after the one that was picked last."""
        self._turn = turn = (self._turn + 1) % len(candidates)
        return candidates[turn]
