"""Least connections: the real server that the fewest clients hold.

A VPN client stays for hours, so what counts is the clients that are pinned, not those that came last.
Equals take turns: an empty pool, or one whose clients leave at once, would otherwise give everything to the
first server.
"""

from __future__ import annotations

from collections.abc import Sequence

from sapin.core.contracts import Candidate, Request


class LeastConnections:
    """Takes the lowest ``pinned``."""

    def __init__(self) -> None:
        self._start = 0

    def pick(self, request: Request, candidates: Sequence[Candidate]) -> Candidate:
        """The candidate with the fewest clients; among equals, the next after the last pick."""
        count = len(candidates)
        start = self._start % count
        best = start
        fewest = candidates[start].pinned
        # Indexes below zero count from the end, so this walks once around the pool from ``start``.
        for index in range(start - count + 1, start):
            pinned = candidates[index].pinned
            if pinned < fewest:
                best, fewest = index, pinned
        self._start = (best + 1) % count
        return candidates[best]


class WeightedLeastConnections:
    """Takes the lowest ``pinned / weight``, compared without rounding."""

    def __init__(self) -> None:
        self._start = 0

    def pick(self, request: Request, candidates: Sequence[Candidate]) -> Candidate:
        """The candidate with the fewest clients for its weight; among equals, the next after the last pick."""
        count = len(candidates)
        start = self._start % count
        best = start
        fewest, weight = candidates[start].pinned, candidates[start].weight
        for index in range(start - count + 1, start):
            candidate = candidates[index]
            if candidate.pinned * weight < fewest * candidate.weight:
                best, fewest, weight = index, candidate.pinned, candidate.weight
        self._start = (best + 1) % count
        return candidates[best]
