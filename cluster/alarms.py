"""What an operator has to know: which alarms stand, and what the last failover did.

Pure. An alarm is raised when its condition has held for a while and cleared when it has not held for a while, so that
what comes and goes is one alarm, not a hundred.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple


class Name(StrEnum):
    """What can be wrong."""

    PEER_LOST = "peer-lost"
    DESYNCHRONISED = "desynchronised"
    TWO_ACTIVES = "two-actives"
    CERTIFICATE_EXPIRING = "certificate-expiring"
    CONFIG_CONFLICT = "config-conflict"
    CLOCK_SKEW = "clock-skew"
    UNSYNCED_TAKEOVER = "took-over-without-sync"


HOLD: Mapping[Name, tuple[float, float]] = {
    Name.PEER_LOST: (0.0, 1.0),
    Name.DESYNCHRONISED: (1.0, 1.0),
    Name.TWO_ACTIVES: (0.0, 10.0),
    Name.CERTIFICATE_EXPIRING: (0.0, 0.0),
    Name.CONFIG_CONFLICT: (0.0, 0.0),
    Name.CLOCK_SKEW: (2.0, 10.0),
    Name.UNSYNCED_TAKEOVER: (0.0, 0.0),
}
"""Seconds that the condition must have held to raise, and not have held to clear."""


class Alarm(NamedTuple):
    """One that stands."""

    name: Name
    since: float
    """When its condition began to hold, in the seconds of the pair's clock."""
    text: str


class Change(NamedTuple):
    """An alarm that was raised, or cleared."""

    alarm: Alarm
    raised: bool


@dataclass(slots=True)
class _Condition:
    holds: bool = False
    since: float = 0.0
    """When it came to hold or not to hold as it does."""
    text: str = ""
    alarm: Alarm | None = None


class Alarms:
    """The conditions, and the alarms that come of them."""

    def __init__(self) -> None:
        self.raised = dict.fromkeys(Name, 0)
        """How often each was raised."""
        self._conditions = {name: _Condition() for name in Name}

    def set(self, name: Name, holds: bool, text: str, now: float) -> None:
        """Say whether a condition holds; the text is for the operator."""
        condition = self._conditions[name]
        if condition.holds != holds:
            condition.holds, condition.since = holds, now
        if holds:
            condition.text = text
            if condition.alarm is not None:
                condition.alarm = condition.alarm._replace(text=text)

    def changes(self, now: float) -> Iterator[Change]:
        """What is raised or cleared by now."""
        for name, condition in self._conditions.items():
            lasted = now - condition.since
            raise_after, clear_after = HOLD[name]
            if condition.holds and condition.alarm is None and lasted >= raise_after:
                condition.alarm = Alarm(name, condition.since, condition.text)
                self.raised[name] += 1
                yield Change(condition.alarm, raised=True)
            elif not condition.holds and condition.alarm is not None and lasted >= clear_after:
                gone, condition.alarm = condition.alarm, None
                yield Change(gone, raised=False)

    @property
    def standing(self) -> tuple[Alarm, ...]:
        """The alarms that stand, the oldest first."""
        alarms = [each.alarm for each in self._conditions.values() if each.alarm is not None]
        return tuple(sorted(alarms, key=lambda alarm: alarm.since))


@dataclass(frozen=True, slots=True)
class Failover:
    """A takeover that this node made."""

    cause: str
    epoch: int
    at: float
    """When the addresses were here, in the seconds of the pair's clock."""
    duration: float
    """Seconds from when the peer was last known to be there to when the addresses were here."""
    synced: bool
    """Whether the node had everything."""
    pins: int = 0
    """Pins that it took over."""
    answered: int = 0
    """How many of them have had an answer of their server since."""

    @property
    def survival(self) -> float:
        """The part of the pins that answered again; 1 where there were none."""
        return self.answered / self.pins if self.pins else 1.0
