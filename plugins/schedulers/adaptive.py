"""Adaptive: the real servers themselves say how much they want, through an agent.

An agent on each server (:mod:`sapin.plugins.checks.agent`) answers a percentage, by its load, its licences,
its free addresses or what else the operator thinks right. It scales the server's weight, and a new client
goes where the fewest are pinned for that weight. A server that asks for less is not emptied: it gets new
clients again when the others have caught up.
"""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import BaseModel, Field

from sapin.core.contracts import Candidate, Request
from sapin.core.model import CheckSpec, PluginRef
from sapin.core.units import Duration
from sapin.plugins.schedulers.least_connections import least


class Adaptive:
    """Takes the lowest ``pinned / (weight * share)``; a share of 0 gets nothing, unless all shares are 0."""

    class Config(BaseModel, extra="forbid"):
        """Options of the scheduler."""

        port: int = Field(ge=1, le=65_535)
        """The agent's TCP port on every real server."""
        interval: Duration = Field(default=5.0, ge=0.1, le=3_600)
        """Time between two questions to an agent."""

    def __init__(self, config: Config) -> None:
        self.checks = (CheckSpec(PluginRef("agent", {"port": config.port}), interval=config.interval),)
        """The agents, to be asked beside the checks of the service."""
        self._start = 0

    def pick(self, request: Request, candidates: Sequence[Candidate]) -> Candidate:
        """The candidate with the fewest clients for what it asks; among equals, the next after the last pick."""
        asked = [candidate.weight * candidate.share for candidate in candidates]
        if not any(asked):
            asked = [candidate.weight for candidate in candidates]
        best = least(candidates, asked, self._start)
        self._start = best + 1
        return candidates[best]
