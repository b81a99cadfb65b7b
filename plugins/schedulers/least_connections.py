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
        for index in around(start, count):
            pinned = candidates[index].pinned
            if pinned < fewest:
                best, fewest = index, pinned
        self._start = best + 1
        return candidates[best]


class WeightedLeastConnections:
    """Takes the lowest ``pinned / weight``."""

    def __init__(self) -> None:
        self._start = 0

    def pick(self, request: Request, candidates: Sequence[Candidate]) -> Candidate:
        """The candidate with the fewest clients for its weight; among equals, the next after the last pick."""
        best = least(candidates, [candidate.weight for candidate in candidates], self._start)
        self._start = best + 1
        return candidates[best]


def least(candidates: Sequence[Candidate], weights: Sequence[int], start: int) -> int:
    """The index of the lowest ``pinned / weight``, compared without rounding.

    Args:
        candidates: at least one.
        weights: one per candidate; a weight of 0 is never chosen while another is higher.
        start: the index that comes first among equals; then those after it, around the pool.
    """
    count = len(candidates)
    best = start % count
    # To start with: one client for no weight, which is worse than any.
    fewest, heaviest = 1, 0
    for index in around(best, count):
        pinned = candidates[index].pinned
        if pinned * heaviest < fewest * weights[index]:
            best, fewest, heaviest = index, pinned, weights[index]
    return best % count


def around(start: int, count: int) -> range:
    """Indexes of a whole turn around a sequence, from ``start`` on; below zero they count from the end."""
    return range(start - count, start)
