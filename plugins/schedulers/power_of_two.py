"""Power of two choices: of two candidates drawn at random, the one with fewer clients for its weight.

Two draws are nearly as even as looking at every candidate: the fullest of n servers exceeds the average by
O(log log n), with one draw by the square root of the average (Mitzenmacher, IEEE TPDS 12(10), 2001; Berenbrink
et al., SIAM J. Comput. 35(6), 2006). The cost does not grow with the pool, and balancers that do not know of
each other's picks do not all run to the same server.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate

from sapin.core.contracts import Candidate, Request


class PowerOfTwoChoices:
    """Draws two different candidates with chances by weight, and takes the lower ``pinned / weight``."""

    def __init__(self) -> None:
        self._candidates: Sequence[Candidate] = ()
        self._ends: list[int] = []

    def pick(self, request: Request, candidates: Sequence[Candidate]) -> Candidate:
        """The better of two; of equals, the first drawn."""
        if candidates is not self._candidates:
            self._candidates = candidates
            self._ends = list(accumulate(candidate.weight for candidate in candidates))
        if len(candidates) == 1:
            return candidates[0]
        random, ends = request.random.random, self._ends
        index = bisect_right(ends, int(random() * ends[-1]))
        first = candidates[index]
        # The second draw is from what is left when the first one's stretch is cut out.
        point = int(random() * (ends[-1] - first.weight))
        if point >= ends[index] - first.weight:
            point += first.weight
        second = candidates[bisect_right(ends, point)]
        return second if second.pinned * first.weight < first.pinned * second.weight else first
