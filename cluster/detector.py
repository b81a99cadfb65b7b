"""Whether the peer lives: silence on the link, and what probes say of it.

Pure. The rules, with *h* the heartbeat and *m* how many may be missed:

* The link is under *suspicion* when it has been silent for 1.5 h, or is closed. From then on the peer is probed.
* The peer is *gone* when it was silent for m h, and at least three probes over 30 ms were not answered. A closed
  pipe needs no silence: its end is news by itself.
* The peer is *alive* as soon as one probe is answered: only the link is lost. Then it is probed each 4 h, and is
  gone when m probes in a row were not answered.
* Who was asleep was deaf: after a pause of its own (:meth:`Detector.afresh`), a node begins to listen anew.
"""

from __future__ import annotations

from enum import Enum, auto

PROBE_EVERY = 0.01
"""Seconds between two probes under suspicion."""
PROBES = 3
"""Probes that must have had the time to be answered."""
SLOWER = 4
"""Heartbeats between two probes of a peer that answers them."""
MAX_PAUSES = 4
"""How often in a row a node may take the peer's silence for its own deafness."""


class Verdict(Enum):
    """What is known of the peer."""

    SPEAKS = auto()
    SILENT = auto()
    ALIVE = auto()
    GONE = auto()


class Detector:
    """Watches one peer; from its start on, until it is heard, as after a pipe that closed.

    Args:
        heartbeat: seconds.
        missed: heartbeats.
        now: seconds.
    """

    def __init__(self, heartbeat: float, missed: int, now: float) -> None:
        self.last_heard = now
        """When the peer was last heard on the link, or, before that, when listening began."""
        self.since: float | None = now
        """When the suspicion began."""
        self.gone_since: float | None = None
        self._heartbeat = heartbeat
        self._missed = missed
        self._closed = True
        self._answered: float | None = None
        self._probes = self._pauses = 0
        self._refused = False
        self._next_probe = now

    def heard(self, now: float) -> None:
        """Something came over the link."""
        self.last_heard = now
        self.since = self.gone_since = self._answered = None
        self._closed = False
        self._pauses = 0

    def closed(self, now: float) -> None:
        """The pipe closed."""
        if not self._closed:
            self._closed = True
            if self.since is None:
                self._suspect(now)

    def answered(self, now: float) -> None:
        """A probe was answered."""
        if self.since is not None:
            self._answered = now
            self._refused = False
            self.gone_since = None
            self._probes = 0
            self._next_probe = now + SLOWER * self._heartbeat

    def refused(self) -> None:
        """The peer's machine said that nobody listens for probes: with a closed pipe, that is answer enough."""
        if self._closed and self.since is not None and self._answered is None:
            self._refused = True

    def afresh(self, now: float) -> None:
        """This node was asleep until now."""
        if self._pauses >= MAX_PAUSES:
            return
        self._pauses += 1
        self.last_heard = now
        if self.since is not None:
            self._suspect(now)

    def look(self, now: float) -> Verdict:
        """What is known now."""
        if self.since is None:
            if now - self.last_heard < 1.5 * self._heartbeat:
                return Verdict.SPEAKS
            self._suspect(now)
        if self._unanswered(now):
            if self.gone_since is None:
                self.gone_since = now
            return Verdict.GONE
        return Verdict.SILENT if self._answered is None else Verdict.ALIVE

    def probe(self, now: float) -> bool:
        """Whether a probe is due now; it counts as sent."""
        if self.since is None or now < self._next_probe:
            return False
        fast = self._answered is None and self.gone_since is None
        self._next_probe = now + (PROBE_EVERY if fast else SLOWER * self._heartbeat)
        self._probes += 1
        return True

    @property
    def deadline(self) -> float:
        """When to look again."""
        if self.since is None:
            return self.last_heard + 1.5 * self._heartbeat
        due = self._next_probe
        if self.gone_since is None and self._answered is None and self._probes >= PROBES:
            due = min(due, max(self._silent_until, self.since + PROBES * PROBE_EVERY))
        return due

    @property
    def _silent_until(self) -> float:
        return self.last_heard if self._closed else self.last_heard + self._missed * self._heartbeat

    def _suspect(self, now: float) -> None:
        self.since, self._answered, self.gone_since = now, None, None
        self._refused = False
        self._probes, self._next_probe = 0, now

    def _unanswered(self, now: float) -> bool:
        assert self.since is not None
        if self._answered is not None:
            slow = SLOWER * self._heartbeat
            return self._probes >= self._missed and now - self._answered >= (self._missed + 1) * slow
        enough = self._probes >= PROBES and now - self.since >= PROBES * PROBE_EVERY
        return (enough or self._refused) and now >= self._silent_until
