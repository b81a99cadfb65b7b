"""Weighted response time: turns in proportion to ``weight / response time``, spread evenly (:mod:`.turns`).

A server that answers its checks in half the time gets twice the clients. It does not get all of them: a rule
that always takes the fastest sends every client to one server until its next check shows how that went.
"""

from __future__ import annotations

from collections.abc import Sequence

from sapin.core.contracts import Candidate, Request
from sapin.plugins.schedulers.turns import take_turn

RESOLUTION = 0.001
"""Seconds; response times below it count as equal. On a local network they say more about the balancer's
own event loop than about the server."""


class WeightedResponseTime:
    """Speed is ``weight / response_time``; a server without a response time counts as fast as the average."""

    def __init__(self) -> None:
        self._candidates: Sequence[Candidate] = ()
        self._times: list[float | None] = []
        self._shares: list[float] = []
        self._balances: list[float] = []

    def pick(self, request: Request, candidates: Sequence[Candidate]) -> Candidate:
        """The candidate whose turn it is."""
        times = [candidate.response_time for candidate in candidates]
        if candidates is not self._candidates:
            self._adopt(candidates)
        if times != self._times:
            self._times = times
            self._shares = _shares([candidate.weight for candidate in candidates], times)
        return candidates[take_turn(self._balances, self._shares, 1.0)]

    def _adopt(self, candidates: Sequence[Candidate]) -> None:
        """Balances stay with their servers; they count in shares of all turns, so they need no scaling."""
        kept = {c.name: balance for c, balance in zip(self._candidates, self._balances, strict=True)}
        self._balances = [kept.get(c.name, 0.0) for c in candidates]
        self._candidates, self._times = candidates, []


def _shares(weights: Sequence[int], times: Sequence[float | None]) -> list[float]:
    """Each candidate's share of all turns; they add up to 1."""
    known = [max(time, RESOLUTION) for time in times if time is not None]
    average = sum(known) / len(known) if known else 1.0
    speeds = [
        weight / (average if time is None else max(time, RESOLUTION))
        for weight, time in zip(weights, times, strict=True)
    ]
    total = sum(speeds)
    return [speed / total for speed in speeds]
