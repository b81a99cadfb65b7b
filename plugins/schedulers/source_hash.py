"""Source hash: the client's address decides, by weighted highest random weight (rendezvous) hashing.

Each candidate draws a number from the client's address and its own name; the highest number wins (Thaler
and Ravishankar, IEEE/ACM Transactions on Networking 6(1), 1998). No candidate's number depends on the
others, so

* when a server goes, its clients and no others move; when it comes back, they and no others return;
* two balancers with the same servers agree, without any shared state.

Weights: a draw ``u``, even on (0, 1), counts as ``ln(u) / weight``; then the highest is a certain
candidate's with a probability of exactly its share of the weights (the exponential distribution's minimum).
Raising a weight only moves clients to that server.

State: two numbers per candidate. Cost: grows with the number of candidates, by some 0.5 µs each; maglev's
does not. Clients behind one address share a server.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import inf, log

from sapin.core.contracts import Candidate, Request
from sapin.plugins.schedulers.hashing import stable_hash

_MULTIPLIER = 0x9E3779B97F4A7C15
"""2**64 divided by the golden ratio, made odd: its multiples are spread as evenly as can be (Knuth, The
Art of Computer Programming, volume 3, section 6.4)."""
_MASK = (1 << 64) - 1
_SCALE = 2.0**-64


class SourceHash:
    """Takes the same candidate for the same client address."""

    def __init__(self) -> None:
        self._candidates: Sequence[Candidate] = ()
        self._draws: list[tuple[int, int, Candidate]] = []

    def pick(self, request: Request, candidates: Sequence[Candidate]) -> Candidate:
        """The candidate with the highest draw for the client's address."""
        if candidates is not self._candidates:
            self._candidates = candidates
            self._draws = [(stable_hash(c.name.encode()), c.weight, c) for c in candidates]
        client = stable_hash(request.client.address)
        best, highest = candidates[0], -inf
        for seed, weight, candidate in self._draws:
            # Two hashes make a third, at a quarter of the price: both halves of their product, folded.
            product = (client ^ seed) * _MULTIPLIER
            draw = log(((product ^ product >> 64) & _MASK | 1) * _SCALE) / weight
            if draw > highest:
                best, highest = candidate, draw
        return best
