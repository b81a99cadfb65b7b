"""What a node makes of time and silence: whether its peer is gone, and whether to take over.

Pure. The rules in words are in :mod:`sapin.cluster.pair`.
"""

from __future__ import annotations

from sapin.cluster import wire
from sapin.cluster.alarms import Name
from sapin.cluster.conduct import DRAIN, RIVALRY, Conduct
from sapin.cluster.detector import Verdict
from sapin.cluster.replication import Sync
from sapin.cluster.role import (
    FOLLOWING,
    HOLDING,
    Signal,
    State,
)
from sapin.cluster.settings import (
    Probe,
)

MAX_SKEW = 2.0
"""Seconds that the wall clocks of two nodes may differ."""
HUNG = 0.75
"""Seconds of silence after which a connection is made anew, at least."""
PATIENCE = 10
"""So many times longer waits a node that does not have everything."""


class Judgement(Conduct):
    """A node's judgement."""

    def _awake(self, now: float) -> None:
        """Every input begins here: was this node asleep since it was due?"""
        if now - self._due > 2 * self.settings.heartbeat:
            self.counts["pauses"] += 1
            self._detector.afresh(now)
            self._stream.extend(now)
        self._at = now

    def _beat(self, now: float) -> None:
        if self._connected:
            if not self._greeted and now - self._met > HUNG:
                self._close("the peer does not say who it is", now)
            elif now - self._detector.last_heard > max(HUNG, PATIENCE * self._silence):
                self._close("the peer is silent", now)
            elif self._stream.room > 0:
                self._send_heartbeat(now)
            self._stream.repeat(now)
        if self._greeted and self.role.state in FOLLOWING and self._peer_role == "active":
            self._stream.ask(now)
        self._preempt(now)
        self._elect_anew(now)
        self._alarm(now)

    def _expire(self, now: float) -> None:
        lasted = now - self._changed
        state = self.role.state
        if (state is State.GRACE and lasted >= self.settings.grace) or (
            state is State.HANDING and lasted >= self.settings.handover
        ):
            self._signal(Signal.TIMEOUT, now)
        elif self._draining is not None and (now >= self._draining or not self._stream.source.lag):
            self._drained(now)
        if self._handing and lasted >= self.settings.handover + DRAIN:
            self._handing = False

    @property
    def _silence(self) -> float:
        return self.settings.missed * self.settings.heartbeat

    # judgement

    def _look(self, now: float) -> None:
        """See what the silence of the peer means by now."""
        if self.role.state is State.STOPPED:
            return
        verdict = self._detector.look(now)
        if self._detector.probe(now):
            self._effects.append(Probe())
        if verdict is not Verdict.SPEAKS and self.role.knows(Signal.SILENT):
            self._signal(Signal.SILENT, now)
        self._judge(verdict, now)

    def _judge(self, verdict: Verdict, now: float) -> None:
        """Take over if that is due."""
        if self.role.state not in FOLLOWING or self._stopping:
            return
        if not self.settings.moves:
            if self._here and (self._freed or verdict is Verdict.GONE or self._peer_role == "standby"):
                self._adopt(now)
            return
        found = self._vacancy(verdict)
        if found is not None and now >= max(found[0], self._abstains_until):
            self._cause = found[1]
            self._signal(Signal.GONE, now)

    def _vacancy(self, verdict: Verdict) -> tuple[float, str] | None:
        """From when on this node may take over, and why."""
        patience = PATIENCE if not self.in_sync else 0
        if self._freed:
            # Nobody is active any more. To wait is of use only to a node that has half of a snapshot.
            patience = 0 if self._stream.sink.whole else patience
            if patience and self._connected and not self._greeted:
                return None  # it speaks again, and has yet to say what it is by now
            return self._free_since + patience * self._silence, self._free_cause
        if self._connected:
            return None if verdict is not Verdict.GONE else self._from_gone(patience)
        if verdict is Verdict.GONE:
            if self.role.state is State.STARTING:
                return self._began + self.settings.wait * max(1, patience), "start"
            return self._from_gone(patience)
        if verdict is Verdict.ALIVE and self._answer is not None and not self._answer[1]:
            better = (self._saved.epoch, self.settings.peer) > (self._answer[0], self.settings.node)
            waits = (1 if better else 3) * max(1, patience)
            return self._vacant + waits * self.settings.wait, "nobody was active"
        return None

    def _from_gone(self, patience: int) -> tuple[float, str] | None:
        since = self._detector.gone_since
        return None if since is None else (since + patience * self._silence, "silence")

    def _free(self, cause: str, now: float) -> None:
        """Certainly the peer is not active any more."""
        if self.role.state in HOLDING:
            return
        if not self._freed:
            self._freed, self._free_since, self._free_cause = True, now, cause
            self._free_epoch = self._peer_epoch
        self._judge(self._detector.look(now), now)

    def _ready(self) -> bool:
        """Whether the peer can be asked to take over."""
        return self._greeted and self._peer_role == "standby" and self._stream.source.state is Sync.SYNCED

    def _preempt(self, now: float) -> None:
        if not self.in_sync or self.role.state is not State.STANDBY:
            self._in_sync_since = None
            return
        if self._in_sync_since is None:
            self._in_sync_since = now
        wants = self.settings.preempt and self.settings.moves and self.settings.priority > self._peer_priority
        settled = now - max(self._in_sync_since, self._asked, self._abstains_until) >= self.settings.settled
        if wants and settled and self._greeted:
            self._asked = now
            self._send(wire.Request(self.epoch))

    def _elect_anew(self, now: float) -> None:
        """What a new connection, and new hellos, put right."""
        if not self._greeted or self._peer_role not in ("standby", "starting"):
            return
        if self.role.state in FOLLOWING and self.settings.moves:
            if now - max(self._vacant, self._met, self._changed) > self.settings.wait:
                self._close("neither node is active", now)
        elif self.role.state is State.ACTIVE and self._stream.source.state is Sync.ABSENT:
            self._close("the peer is to be brought up to date", now)

    def _alarm(self, now: float) -> None:
        silent = self._detector.since is not None and now - self._detector.last_heard >= self._silence
        grown = now - self._began >= self.settings.wait
        alive = self._detector.since is not None and self._answer is not None
        lost = "the peer is silent on the link" + (", but answers probes" if alive else "")
        rivals = self._rival_at is not None and now - self._rival_at < RIVALRY
        set_ = self.alarms.set
        set_(Name.PEER_LOST, silent and grown, lost, now)
        set_(
            Name.DESYNCHRONISED, self._greeted and not self.in_sync, "the standby lacks something still", now
        )
        set_(Name.TWO_ACTIVES, rivals, "both nodes were active", now)
        skewed = self._greeted and abs(self._skew) > MAX_SKEW
        set_(Name.CLOCK_SKEW, skewed, f"the peer's clock is {self._skew:+.1f} s off ours", now)
        if self.active and self.in_sync:
            set_(Name.UNSYNCED_TAKEOVER, False, "", now)
        for alarm, raised in self.alarms.changes(now):
            self._tell("alarm", alarm=alarm.name.value, raised=raised, text=alarm.text)
