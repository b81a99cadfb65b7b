"""A node of the pair: from its configuration and its membership to a pair at work, and back again whatever happens.

The cluster never takes the forwarding down: a fault of it is logged, counted, and it is started again, later each time. A
node that is no member yet forwards what comes and says what to do; when it becomes one, or its peer comes or leaves, the pair
begins anew, and finds its role as after a restart, with the addresses where they are meanwhile.
"""

from __future__ import annotations

import secrets
import time
from collections import Counter, deque
from collections.abc import Callable, Mapping
from contextlib import AbstractAsyncContextManager, AsyncExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import structlog
import trio

from sapin.cluster import certificates
from sapin.cluster.alarms import Name
from sapin.cluster.cables import keep_cables
from sapin.cluster.certificates import CertificateError
from sapin.cluster.config import Cluster, Takeover
from sapin.cluster.enrolment import serve_enrolment
from sapin.cluster.guarding import Guard
from sapin.cluster.keeper import Keeper
from sapin.cluster.link import SILENCE, Link, LinkError
from sapin.cluster.membership import Credentials, Folder, Membership, MembershipError
from sapin.cluster.pair import Pair, Status
from sapin.cluster.session import Plane, Session
from sapin.cluster.settings import Event, Settings
from sapin.cluster.shared_state import Replica
from sapin.cluster.sharing import Sharing, Use
from sapin.cluster.survival import Survival
from sapin.cluster.wire import Revision
from sapin.core.dataplane.runtime import Dataplane

RESTART = (0.1, 30.0)
"""Seconds until the cluster's part is started again after a fault: at first, and at most."""
LOOK = 1.0
"""Seconds between two looks at the cluster's files."""
EXPIRING = 30 * certificates.DAY
"""Seconds before a certificate ends from which that is an alarm; it should have been renewed long before."""
WATCH_SURVIVAL = 600.0
"""Seconds after a takeover in which its survivors are counted."""
EVENTS = 1_000
LEAVE = 3.0
"""Seconds that the end of the daemon waits for the peer to take over."""

_DOUBTS = {"standby", "suspecting", "cut"}
"""States between which a standby goes to and fro on a busy machine: what comes of it is told by alarms and takeovers."""

log = structlog.get_logger("sapin.cluster")

GuardFactory = Callable[[Cluster, Membership, bytes, int, int], AbstractAsyncContextManager[Guard]]
"""Makes a guard that is there for as long as it is entered: of the table, the members, the shared secret, the boot, and
the epoch in which the addresses are here already, or 0."""


@dataclass(slots=True)
class _Noted:
    """An event, when it happened."""

    at: float
    name: str
    fields: Mapping[str, Any] = field(default_factory=dict)


class Node:
    """This node's part of the pair.

    Args:
        cluster: the ``[cluster]`` table.
        dataplane: made with a floating source.
        path: the configuration file.
        text: what it said when the daemon started.
        use: brings another text into force.
        guards: makes a guard.
    """

    def __init__(
        self,
        cluster: Cluster,
        dataplane: Dataplane,
        path: Path,
        text: str,
        use: Use,
        guards: GuardFactory,
    ) -> None:
        assert dataplane.pairing is not None
        self.folder = Folder(dataplane.snapshot.config.node.state_dir)
        self.sharing = Sharing(path, self.folder, use)
        self.sharing.started(text)
        self.failures = 0
        """How often the cluster's part had to be started again."""
        self.session: Session | None = None
        self.link_refused: Counter[str] = Counter()
        self._cluster = cluster
        self._dataplane = dataplane
        self._pairing = dataplane.pairing
        self._guards = guards
        self._events: deque[_Noted] = deque(maxlen=EVENTS)
        self._survival: Survival | None = None
        self._survived_at = 0.0
        self._membership: Membership | None = None
        self._holding = 0
        """The epoch in which the addresses are here though no session runs, 0 if they are not."""
        self._addresses = _addresses(cluster)
        self._again = trio.Event()
        """Something has changed that the pair has to begin anew for."""

    # running

    async def run(self) -> None:
        """Take part in the pair until cancelled."""
        shortest, longest = RESTART
        pause = shortest
        while True:
            began = trio.current_time()
            try:
                await self._take_part()
                pause = shortest
                continue
            except (MembershipError, CertificateError, LinkError, OSError) as error:
                self.failures += 1
                log.error("the cluster cannot be used; tried again", reason=str(error), seconds=pause)
            except Exception:
                self.failures += 1
                log.exception("the cluster failed and is started again", seconds=pause)
            if trio.current_time() - began > longest:
                pause = shortest
            await trio.sleep(pause)
            pause = min(2 * pause, longest)

    async def _take_part(self) -> None:
        """One go, until the membership or the configuration changes."""
        self._again = trio.Event()
        self._addresses = _addresses(self._cluster)
        if not self.folder.is_member():
            await self._wait_for_membership()
            return
        certificates.repair(self.folder)
        self._membership = membership = self.folder.membership()
        certificates.renew(self.folder, time.time())
        boot = secrets.randbits(63) | 1
        holding, self._holding = self._holding, 0
        keeper = Keeper(self.folder)
        self._dataplane.deactivate()
        async with AsyncExitStack() as stack:
            guard = await stack.enter_async_context(
                self._guards(self._cluster, membership, self.folder.secret(), boot, holding)
            )
            session = self._make_session(membership, guard, keeper, boot)
            if holding:
                session.inherit()
            stack.callback(keeper.flush)
            nursery = await stack.enter_async_context(trio.open_nursery())
            nursery.start_soon(keeper.run)
            nursery.start_soon(self.sharing.run)
            nursery.start_soon(self._keep_looking, session)
            nursery.start_soon(self._keep_counting, session)
            nursery.start_soon(self._keep_enrolling)
            if self._cluster.takeover is Takeover.NETLINK:
                nursery.start_soon(self._keep_cables, session)
            await nursery.start(session.run)
            self.session = session
            stack.callback(self._forget_session)
            await self._again.wait()
            self._holding = guard.disown() if self._addresses == _addresses(self._cluster) else 0
            log.info("the pair begins anew: its members or its settings have changed")
            nursery.cancel_scope.cancel()

    def _forget_session(self) -> None:
        if self.session is not None and self.session.link is not None:
            self.link_refused.update(self.session.link.refused)
        self.session = None

    def _make_session(self, membership: Membership, guard: Guard, keeper: Keeper, boot: int) -> Session:
        own, peer = membership.own, membership.peer
        saved = keeper.load()
        now = time.monotonic()
        pair = Pair(
            self._settings(membership),
            Replica(self._pairing.replica, self._revision, self.sharing.said),
            saved,
            boot,
            now,
            time.time() - now,
        )
        silence = max(SILENCE, 2 * self._cluster.heartbeat * self._cluster.missed)
        link = Link(own, peer, self.folder.credentials(), silence) if peer is not None else None
        return Session(pair, link, guard, self._plane(), keeper, self._happened)

    def _settings(self, membership: Membership) -> Settings:
        cluster, peer = self._cluster, membership.peer
        return Settings(
            node=membership.node,
            peer=peer.name if peer is not None else "",
            cluster=membership.cluster,
            priority=cluster.priority,
            preempt=cluster.preempt,
            heartbeat=cluster.heartbeat,
            missed=cluster.missed,
            sync_timeout=cluster.sync_timeout,
            moves=cluster.takeover is Takeover.NETLINK,
        )

    def _plane(self) -> Plane:
        forwarder = self._dataplane.forwarder
        return Plane(
            self._pairing.outlet,
            self._activate,
            self._dataplane.deactivate,
            forwarder.watch,
            forwarder.unwatch,
            self._pins,
        )

    def _pins(self) -> int:
        return sum(len(group.table) for group in self._dataplane.snapshot.groups.values())

    def _activate(self) -> None:
        self._dataplane.activate()
        now = int(self._dataplane.clock())
        self._survival = Survival(self._pins(), self._dataplane.forwarder.flows, now)
        self._survived_at = trio.current_time()

    def _revision(self) -> Revision | None:
        session = self.session
        return (
            self.sharing.current(session.pair.epoch) if session is not None and session.pair.active else None
        )

    async def _wait_for_membership(self) -> None:
        """No member yet: forward what comes, as a node alone does, but leave the virtual addresses to the operator."""
        log.warning(
            "this node belongs to no cluster yet, and leaves the virtual addresses alone: make a cluster with "
            "`sapin cluster init`, or come to one with `sapin cluster join`"
        )
        self._membership = None
        self._dataplane.activate()
        while not self.folder.is_member():  # noqa: ASYNC110  # it is a file that another process writes
            await trio.sleep(LOOK)

    def _happened(self, event: Event) -> None:
        if event.name == "role" and {event.fields["before"], event.fields["state"]} <= _DOUBTS:
            log.debug(event.name, **event.fields)
            return
        self._events.append(_Noted(time.time(), event.name, event.fields))
        log.info(event.name, **event.fields)

    # what has to be looked at now and then

    async def _keep_enrolling(self) -> None:
        """Let the second node in, and members out; that this cannot be done ends nothing else."""
        while True:
            try:
                # The pair begins anew at the next look at the members: at once, it would cut off the answer to who joins.
                await serve_enrolment(self.folder, time.time, lambda _: None)
            except (MembershipError, OSError) as error:
                log.warning("nodes cannot join or leave at the moment; tried again", reason=str(error))
            await trio.sleep(10 * LOOK)

    async def _keep_cables(self, session: Session) -> None:
        while True:
            try:
                await keep_cables(session, {each.device for each in self._cluster.virtual_addresses})
            except OSError as error:
                log.warning("carriers are not watched at the moment; tried again", reason=str(error))
            await trio.sleep(10 * LOOK)

    async def _keep_looking(self, session: Session) -> None:
        """Once a second: members, certificates, and what the configuration has come to."""
        shown = self.folder.credentials()
        while True:
            await trio.sleep(LOOK)
            if not self.folder.is_member() or self.folder.membership() != self._membership:
                self._again.set()
                return
            try:
                renewed = certificates.renew(self.folder, time.time())
                found = renewed or self.folder.credentials()
            except (CertificateError, MembershipError) as error:
                log.error("the certificate cannot be renewed", reason=str(error))
                found = shown
            if found != shown:
                shown = found
                self._show(session, found)
            self._look_at_certificate(session, shown)
            self._look_at_configuration(session)

    def _show(self, session: Session, credentials: Credentials) -> None:
        if session.link is not None:
            try:
                session.link.renew(credentials)
            except LinkError as error:
                log.error("the new certificate cannot be used", reason=str(error))
            else:
                log.info(
                    "another certificate is in use", ends=_date(certificates.expires(credentials.certificate))
                )

    def _look_at_certificate(self, session: Session, credentials: Credentials) -> None:
        try:
            ends = min(certificates.expires(credentials.certificate), certificates.expires(credentials.ca))
            text = f"the certificate or its CA ends on {_date(ends)}: `sapin cluster rotate-certificates`"
            soon = ends - time.time() < EXPIRING
        except CertificateError as error:
            text, soon = str(error), True
        session.tell(lambda now: session.pair.notice(Name.CERTIFICATE_EXPIRING, soon, text, now))

    def _look_at_configuration(self, session: Session) -> None:
        sharing = self.sharing
        text, wrong = sharing.unusable or "", sharing.unusable is not None
        if not wrong and sharing.aside.exists():
            wrong = True
            text = (
                f"both nodes had changed the configuration; this node's is in {sharing.aside}: remove it when "
                "nothing of it is needed"
            )
        session.tell(lambda now: session.pair.notice(Name.CONFIG_CONFLICT, wrong, text, now))

    async def _keep_counting(self, session: Session) -> None:
        """Who has lived through the last takeover."""
        while True:
            await trio.sleep(LOOK)
            survival = self._survival
            if survival is None or trio.current_time() - self._survived_at > WATCH_SURVIVAL:
                continue
            for _ in survival.look():
                await trio.lowlevel.checkpoint()
            session.pair.survived(survival.answered)

    # what operators do

    async def leave(self) -> None:
        """The daemon is about to end: hand over to the peer, if it can take over."""
        if self.session is not None:
            with trio.move_on_after(LEAVE):
                await self.session.stop()

    def step_down(self, *, force: bool) -> str | None:
        """Hand over to the peer; why not, if that cannot be."""
        session = self.session
        if session is None:
            return "this node belongs to no cluster"
        refused: list[str | None] = []
        session.tell(lambda now: refused.append(session.pair.step_down(now, force=force)))
        return refused[0] if refused else "it failed: see the log"

    def notify(self, state: str) -> str | None:
        """Whoever moves the virtual addresses says whether they are here; why that is not heard, if so."""
        session = self.session
        if session is None:
            return "this node belongs to no cluster"
        if self._cluster.takeover is Takeover.NETLINK:
            return 'this node moves the addresses itself: takeover = "netlink"'
        if state not in ("active", "standby"):
            return f"{state!r} is not a state: it must be active or standby"
        session.found(here=state == "active")
        return None

    def refuses_changes(self) -> str | None:
        """Why what the nodes share is not to be changed on this node, if so."""
        session = self.session
        if session is None or session.pair.active:
            return None
        status = session.pair.status()
        if not status.connected:
            return None
        return f"this node is the standby, and what the nodes share is changed on the active one: do it on {status.peer}"

    def refuses_reload(self, text: str) -> str | None:
        """Why a text is not to be brought into force on this node, if so."""
        return self.refuses_changes() if self.sharing.changes_shared(text) else None

    def reloaded(self, text: str, cluster: Cluster) -> None:
        """A text was brought into force by this node's operator."""
        session = self.session
        if cluster != self._cluster:
            self._cluster = cluster
            self._again.set()
        if session is not None and session.pair.active:
            revision = self.sharing.reloaded(text, session.pair.epoch)
            if revision is not None:
                session.say(revision)
        else:
            self.sharing.started(text)

    # what operators see

    @property
    def status(self) -> Status | None:
        """The pair as this node sees it; ``None`` while it is no member."""
        return self.session.pair.status() if self.session is not None else None

    def describe(self) -> dict[str, Any]:
        """Everything of the pair as plain values."""
        session, membership = self.session, self._membership
        if session is None or membership is None:
            hint = "no cluster: `sapin cluster init` or `sapin cluster join`"
            return {
                "enabled": False,
                "why": hint if membership is None else "starting",
                "failures": self.failures,
            }
        status = session.pair.status()
        now = time.monotonic()
        wall = time.time() - now
        link = session.link
        return {
            "enabled": True,
            "cluster": membership.cluster,
            "node": membership.node,
            "role": status.role,
            "state": status.state,
            "epoch": status.epoch,
            "peer": {
                "name": status.peer or None,
                "connected": status.connected,
                "role": status.peer_role or None,
                "link": link.link if link is not None else None,
                "last_heard": max(now - status.last_heard, 0.0) if status.peer else None,
            },
            "replication": {
                "state": status.replication,
                "in_sync": status.synced,
                "sequence": status.sequence,
                "acked": status.acked,
                "lag": status.lag,
                "ack_p50": status.ack_p50,
                "digest": f"{status.digest:016x}",
                "resyncs": status.counts.get("snapshots", 0),
                "divergences": status.counts.get("divergences", 0),
                "desyncs": status.counts.get("desyncs", 0),
                "counts": dict(status.counts),
                "revision": self.sharing.number,
            },
            "last_failover": self._failover(status, wall),
            "virtual_addresses": [
                {
                    "address": str(each.interface),
                    "device": each.device,
                    "side": str(each.side),
                    "here": session.here,
                }
                for each in self._cluster.virtual_addresses
            ],
            "alarms": [
                {"name": str(alarm.name), "since": alarm.since + wall, "text": alarm.text}
                for alarm in status.alarms
            ],
            "refused": dict(
                self.link_refused + Counter(link.refused if link else {}) + Counter(status.refused)
            ),
            "failures": self.failures + session.failures,
            "slowest": {"turn": session.slowest, "late": session.longest_wait},
        }

    def _failover(self, status: Status, wall: float) -> dict[str, Any] | None:
        last = status.last_failover
        if last is None:
            return None
        return {
            "cause": last.cause,
            "epoch": last.epoch,
            "at": last.at + wall,
            "duration": last.duration,
            "in_sync": last.synced,
            "pins": last.pins,
            "answered": last.answered,
        }

    def events(self, limit: int) -> list[dict[str, Any]]:
        """What has happened lately, the newest last."""
        found = list(self._events)[-limit:]
        return [{"at": each.at, "name": each.name, "fields": dict(each.fields)} for each in found]


def _addresses(cluster: Cluster) -> tuple[object, ...]:
    """What a guard has to know to have the same addresses as the one before."""
    return cluster.takeover, cluster.virtual_addresses


def _date(seconds: float) -> str:
    return time.strftime("%Y-%m-%d", time.gmtime(seconds))
