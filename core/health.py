"""Rise and fall counting: from single check results to the health of a real server.

Health is kept per (service, server, check), never per address: two services may share an address and
differ in health. Pure: results come in, states come out.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from sapin.core.model import Health


@dataclass(frozen=True, slots=True)
class CheckState:
    """What one check has found of one server so far."""

    rise: int
    fall: int
    health: Health = Health.UNKNOWN
    streak: int = 0
    """Results in a row that contradict ``health``."""

    def after(self, healthy: bool) -> CheckState:
        """The state after one more result.

        The first success makes an unknown server healthy, so that a start is quick; a first failure
        does not make it unhealthy, so that a start is calm.
        """
        if self.health is Health.UNKNOWN and healthy:
            return replace(self, health=Health.HEALTHY, streak=0)
        found = Health.HEALTHY if healthy else Health.UNHEALTHY
        if found is self.health:
            return self if self.streak == 0 else replace(self, streak=0)
        streak = self.streak + 1
        if streak >= (self.rise if healthy else self.fall):
            return replace(self, health=found, streak=0)
        return replace(self, streak=streak)


def combine(states: Iterable[Health]) -> Health:
    """The health of a server from those of its checks: the worst one; without checks it is unknown."""
    seen = set(states)
    for verdict in (Health.UNHEALTHY, Health.UNKNOWN, Health.HEALTHY):
        if verdict in seen:
            return verdict
    return Health.UNKNOWN
