"""Smooth weighted round robin: turns in proportion to the weights, spread evenly (:mod:`.turns`)."""

from __future__ import annotations

from collections.abc import Sequence

from sapin.core.contracts import Candidate, Request
from sapin.plugins.schedulers.turns import take_turn


class WeightedRoundRobin:
    """Of any ``sum(weights)`` picks in a row, each candidate gets as many as its weight."""

    def __init__(self) -> None:
        self._candidates: Sequence[Candidate] = ()
        self._weights: list[int] = []
        self._total = 1
        self._balances: list[int] = []

    def pick(self, request: Request, candidates: Sequence[Candidate]) -> Candidate:
        """The candidate whose turn it is."""
        if candidates is not self._candidates:
            self._adopt(candidates)
        return candidates[take_turn(self._balances, self._weights, self._total)]

    def _adopt(self, candidates: Sequence[Candidate]) -> None:
        """Balances stay with their servers, or a pool that often changes would always start with the same one."""
        kept = {c.name: balance for c, balance in zip(self._candidates, self._balances, strict=True)}
        weights = [c.weight for c in candidates]
        total = sum(weights)
        self._balances = [kept.get(c.name, 0) * total // self._total for c in candidates]
        self._candidates, self._weights, self._total = candidates, weights, total
