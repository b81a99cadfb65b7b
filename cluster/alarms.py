"""What is wrong with the pair at the moment, and since when; and what has happened lately.

Pure. An alarm stands until its cause is gone; raising one that stands only changes its text.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import StrEnum


class Name(StrEnum):
    """Every alarm that there is."""

    PEER_LOST = "peer-lost"
    DESYNCHRONISED = "desynchronised"
    TWO_ACTIVES = "two-actives"
    STALE_TAKEOVER = "stale-takeover"
    CERTIFICATE_EXPIRING = "certificate-expiring"
    CONFIG_CONFLICT = "config-conflict"
    CLOCK_SKEW = "clock-skew"
    GUARD_LOST = "guard-lost"


@dataclass(frozen=True, slots=True)
class Alarm:
    """One that stands."""

    name: Name
    text: str
    """What is wrong, and what to do."""
    since: float
    """Seconds of the pair's clock."""


@dataclass(frozen=True, slots=True)
class Notice:
    """Something that has happened."""

    at: float
    what: str
    text: str


class Alarms:
    """The alarms that stand, and the last notices."""

    def __init__(self, kept: int = 1_000) -> None:
        self._standing: dict[Name, Alarm] = {}
        self._notices: deque[Notice] = deque(maxlen=kept)
        self._told = 0
        self.noted = 0
        """Notices so far."""

    @property
    def standing(self) -> Sequence[Alarm]:
        """The alarms that stand, the oldest first."""
        return sorted(self._standing.values(), key=lambda alarm: alarm.since)

    @property
    def notices(self) -> Sequence[Notice]:
        """What has happened lately, the oldest first."""
        return list(self._notices)

    def note(self, what: str, text: str, now: float) -> None:
        """Something has happened."""
        self._notices.append(Notice(now, what, text))
        self.noted += 1

    def new(self) -> Sequence[Notice]:
        """The notices since the last call, for a log."""
        count = min(self.noted - self._told, len(self._notices))
        self._told = self.noted
        return list(self._notices)[len(self._notices) - count :]

    def set(self, name: Name, text: str, now: float) -> None:
        """Something is wrong."""
        standing = self._standing.get(name)
        if standing is not None:
            self._standing[name] = replace(standing, text=text)
            return
        self._standing[name] = Alarm(name, text, now)
        self.note(f"alarm {name}", text, now)

    def clear(self, name: Name, now: float) -> None:
        """It is not wrong any more."""
        if self._standing.pop(name, None) is not None:
            self.note(f"alarm {name} is over", "", now)
