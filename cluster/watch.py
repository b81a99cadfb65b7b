"""Is the peer gone? What was heard, over the link and through the service network, and what follows from it.

Pure. Silence alone proves nothing: the link may be cut, the peer busy, or this node itself have been away. So
suspicion begins early, and while it lasts the peer is *probed*, at its link addresses and at the virtual ones. The peer is gone
when it has missed its heartbeats *and* answered no probe, or when its guard says so (*farewell*).
"""

from __future__ import annotations

from enum import StrEnum

PROBE_EVERY = 0.01
"""Seconds between two probes of a peer under suspicion."""
CLOSED_WAIT = 0.03
"""Seconds without an answer after which a peer that closed the link is gone."""
SLOWLY = 4
"""A peer that answers probes but not over the link is probed, and may be silent, so many heartbeats."""
MAX_PAUSES = 4
"""How often in a row a node may excuse the peer's silence by its own absence."""


class Verdict(StrEnum):
    """What is to be thought of the peer."""

    FINE = "fine"
    SUSPECT = "suspect"
    REACHABLE = "reachable"
    """It says nothing over the link, but answers on the service network."""
    GONE = "gone"


class Watch:
    """Watches the peer.

    Args:
        heartbeat: seconds between two heartbeats.
        missed: so many missed in a row are silence.
        now: seconds.
    """

    def __init__(self, heartbeat: float, missed: int, now: float) -> None:
        self.connected = False
        self.last_heard = now
        self._heartbeat = heartbeat
        self._missed = missed
        self._suspect: float | None = None
        self._answered: float | None = None
        self._refused = self._certain = False
        self._probed = -1.0
        self._unanswered = 0
        self._pauses = 0

    @property
    def since(self) -> float:
        """Since when something is wrong with the peer: when it was last heard of over the link."""
        return self.last_heard

    def heard(self, now: float) -> None:
        """Something came over the link."""
        self.last_heard = now
        self._pauses = 0
        self._trust()

    def connect(self, now: float) -> None:
        """The link is there."""
        self.connected = True
        self.heard(now)

    def disconnect(self, now: float) -> None:
        """The link is closed."""
        self.connected = False
        self._suspect = now if self._suspect is None else self._suspect

    def answered(self, now: float) -> None:
        """The peer has answered a probe."""
        self._answered = now
        self._unanswered = 0
        self._refused = False

    def refused(self) -> None:
        """The peer's machine says that nobody is there."""
        self._refused = True

    def gone(self) -> None:
        """The peer's guard has said farewell."""
        self._certain = True

    def paused(self, now: float) -> None:
        """This node was away: it was deaf, rather than the peer silent. It may say so some times in a row."""
        if self._pauses < MAX_PAUSES and not self._certain:
            self._pauses += 1
            self.last_heard = max(self.last_heard, now - self._heartbeat)
            self._suspect = None if self.connected else now
            self._unanswered = 0

    def verdict(self, now: float, patience: float = 1.0) -> Verdict:
        """What is to be thought of the peer now.

        Args:
            now: seconds.
            patience: a factor to how long it may be silent.
        """
        if self._certain:
            return Verdict.GONE
        silent = now - self.last_heard
        if self.connected and silent < 1.5 * self._heartbeat:
            return Verdict.FINE
        if self._suspect is None:
            self._suspect = now
        if self._answered is not None and self._answered >= self._suspect:
            longest = self._missed * SLOWLY * self._heartbeat * patience
            over = now - self._answered > longest and self._unanswered >= self._missed
            return Verdict.GONE if over else Verdict.REACHABLE
        return Verdict.GONE if self._silent(now, silent, patience) else Verdict.SUSPECT

    def _silent(self, now: float, silent: float, patience: float) -> bool:
        """Whether the peer, of whom nothing was heard since the suspicion began, has been silent for long enough."""
        if self._unanswered < 2 or self._suspect is None:
            return False
        if self.connected:
            return silent >= self._missed * self._heartbeat * patience
        return self._refused or now - self._suspect >= CLOSED_WAIT * patience

    def probe_due(self, now: float) -> bool:
        """Whether to probe now; asked only while the peer is not fine."""
        answering = (
            self._answered is not None and self._suspect is not None and self._answered >= self._suspect
        )
        every = SLOWLY * self._heartbeat if answering else PROBE_EVERY
        if now - self._probed < every * 0.999:
            return False
        self._probed = now
        self._unanswered += 1
        return True

    def _trust(self) -> None:
        self._suspect = self._answered = None
        self._refused = self._certain = False
        self._unanswered = 0
