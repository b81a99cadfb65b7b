"""Fixed weighting: everything to the real server with the highest weight that is alive.

For a main gateway with others in reserve: give each a weight of its own, the highest to the main one.
"""

from __future__ import annotations

from collections.abc import Sequence
from operator import attrgetter

from sapin.core.contracts import Candidate, Request

_weight = attrgetter("weight")


class FixedWeighting:
    """Takes the highest weight; of equal weights, the first in the configuration."""

    def pick(self, request: Request, candidates: Sequence[Candidate]) -> Candidate:
        """The candidate with the highest weight."""
        return max(candidates, key=_weight)
