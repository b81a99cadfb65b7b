"""Runs the health checks: one trio task for each (service, server, check).

The prober only runs and times them; what results add up to is :mod:`sapin.core.health`, and who is told is
the writer. A check that raises something else than ``OSError`` is at fault itself: that is counted and
says nothing about the server. Neither does a shortage of this node, of file descriptors for example. What was
found stands when a reload changes a check's options, and when the checks had to be started again.

On a standby no check runs: the active node tells what it finds. When the node becomes active, each check starts
from that, as if it had found it itself, so there is no moment in which a dead server is used.
"""

from __future__ import annotations

import errno
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field, replace
from math import inf
from random import Random
from typing import Any, NamedTuple

import structlog
import trio

from sapin.core.contracts import CheckResult, HealthCheck, Target
from sapin.core.health import CheckState, combine
from sapin.core.model import AdminState, CheckSpec, Health
from sapin.core.registry import Hosted, PluginError, Registry, told
from sapin.core.snapshot import Group, Member, Snapshot
from sapin.core.writer import Writer

SMOOTHING = 0.3
"""Weight of the newest round trip in the moving average."""
MIN_WAKE = 0.25
"""Seconds between two runs of a check, however often its server is suspect."""
SPREAD = 0.2
"""Seconds over which first runs are spread."""
_OUR_SHORTAGES = (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS)

log = structlog.get_logger("sapin.checks")


Id = tuple[str, str, int]
"""A probe's service, server, and number among the service's checks."""
Place = tuple[str, str]
"""A group and a server, which have one health."""


class Probe(NamedTuple):
    """A check to be run; while it stays the same, its task stays."""

    group: str
    target: Target
    service: str
    number: int
    """Its place among the service's checks."""
    spec: CheckSpec

    @property
    def id(self) -> Id:
        """What it is known by."""
        return self.service, self.target.server, self.number

    @property
    def place(self) -> Place:
        """Whose health it tells."""
        return self.group, self.target.server

    @property
    def subject(self) -> tuple[Target, str]:
        """What it looks at, and by which plugin."""
        return self.target, self.spec.ref.plugin


class Inherited(NamedTuple):
    """What the node that was active before has found of a server."""

    health: Health
    asked: AdminState
    share: int


@dataclass(slots=True)
class Finding:
    """What a probe has found so far."""

    probe: Probe
    hosted: Hosted[HealthCheck]
    state: CheckState
    last: CheckResult | None = None
    asked: AdminState = AdminState.ENABLED
    share: int = 100
    checked_at: float | None = None
    """Monotonic seconds."""


@dataclass(slots=True)
class _Task:
    finding: Finding
    scope: trio.CancelScope = field(default_factory=trio.CancelScope)
    wake: trio.Event = field(default_factory=trio.Event)


class Prober:
    """Keeps one task per probe of the current snapshot, and tells the writer what they find."""

    def __init__(self, writer: Writer, registry: Registry, random: Random) -> None:
        self._writer = writer
        self._registry = registry
        self._random = random
        self._tasks: dict[Place, dict[Id, _Task]] = {}
        self._known: dict[Id, Finding] = {}
        """What tasks that are no more have found."""
        self._paused = False
        self._inherited: dict[Place, Inherited] = {}
        """What was known of each server when this node took the checks over."""
        self._changed = trio.Event()

    @property
    def findings(self) -> Sequence[Finding]:
        """What is known, per probe."""
        return [task.finding for tasks in self._tasks.values() for task in tasks.values()]

    def apply(self, old: Snapshot, new: Snapshot) -> None:
        """Have the tasks follow the new snapshot."""
        if old.config is not new.config:
            self._inherited.clear()
            self._changed.set()

    def pause(self) -> None:
        """Run no check from now on, nor tell anything of a server: the peer does."""
        self._paused = True
        self._changed.set()

    def resume(self) -> None:
        """Run the checks, starting from what is known of each server now."""
        self._paused = False
        self._known.clear()
        self._inherited = {
            (group.name, name): Inherited(member.health, member.asked, member.share)
            for group in self._writer.snapshot.groups.values()
            for name, member in group.members.items()
        }
        self._changed.set()

    def suspect(self, group: str, server: str) -> None:
        """Something went wrong with a server: check it soon."""
        for task in self._of(group, server):
            task.wake.set()

    async def run(self) -> None:
        """Run the checks until cancelled."""
        self._known |= {finding.probe.id: finding for finding in self.findings}
        self._tasks.clear()
        async with trio.open_nursery() as nursery:
            while True:
                self._changed = trio.Event()
                self._reconcile(nursery)
                await self._changed.wait()

    def _reconcile(self, nursery: trio.Nursery) -> None:
        snapshot = self._writer.snapshot
        wanted = {} if self._paused else {probe.id: probe for probe in probes(snapshot)}
        for finding in self.findings:
            probe = finding.probe
            if probe != wanted.get(probe.id):
                self._known[probe.id] = finding
                self._tasks[probe.place].pop(probe.id).scope.cancel()
        for probe in wanted.values():
            if probe.id not in self._tasks.get(probe.place, ()):
                self._start(probe, nursery)
        self._known.clear()
        for group in snapshot.groups.values():
            for server in group.members:
                self._tell(group.name, server)
        self._tasks = {place: tasks for place, tasks in self._tasks.items() if tasks}

    def _start(self, probe: Probe, nursery: trio.Nursery) -> None:
        try:
            hosted: Hosted[HealthCheck] = self._registry.make("check", probe.spec.ref)
        except PluginError as error:
            log.error(
                "check cannot be used", service=probe.service, server=probe.target.server, reason=str(error)
            )
            return
        finding = Finding(probe, hosted, CheckState(probe.spec.rise, probe.spec.fall))
        before = self._known.get(probe.id)
        if before is not None and before.probe.subject == probe.subject:
            finding.state = replace(finding.state, health=before.state.health)
            finding.last, finding.checked_at = before.last, before.checked_at
            finding.asked, finding.share = before.asked, before.share
        elif (inherited := self._inherited.get(probe.place)) is not None:
            finding.state = replace(finding.state, health=inherited.health)
        task = _Task(finding)
        self._tasks.setdefault(probe.place, {})[probe.id] = task
        nursery.start_soon(self._keep_checking, task)

    async def _keep_checking(self, task: _Task) -> None:
        try:
            with task.scope:
                await trio.sleep(self._random.uniform(0, min(SPREAD, task.finding.probe.spec.interval)))
                while True:
                    await self._check(task.finding)
                    await self._pause(task)
        finally:
            task.finding.hosted.close()

    async def _pause(self, task: _Task) -> None:
        """Until the next run: an interval with its jitter, less if the server becomes suspect."""
        spec = task.finding.probe.spec
        interval = spec.interval * self._random.uniform(1 - spec.jitter, 1 + spec.jitter)
        least = min(MIN_WAKE, interval)
        await trio.sleep(least)
        with trio.move_on_after(interval - least):
            await task.wake.wait()
        task.wake = trio.Event()

    async def _check(self, finding: Finding) -> None:
        probe, spec = finding.probe, finding.probe.spec
        started = trio.current_time()
        if not finding.hosted.usable(started):
            return
        try:
            with trio.fail_after(spec.timeout):
                result = _checked(await finding.hosted.plugin.check(probe.target))
        except trio.TooSlowError:
            result = CheckResult(False, f"no answer within {spec.timeout:g} s")
        except OSError as error:
            if error.errno in _OUR_SHORTAGES:
                standing = finding.state.health is not Health.UNHEALTHY
                finding.last = CheckResult(standing, f"could not be checked: {error.strerror}")
                return
            result = CheckResult(False, error.strerror or str(error))
        except Exception as error:
            self._fault(finding, told(error), started)
            return
        finding.hosted.faults.in_a_row = 0
        finding.checked_at = trio.current_time()
        self._take(finding, result)

    def _take(self, finding: Finding, result: CheckResult) -> None:
        probe = finding.probe
        before = finding.state.health
        finding.last = result
        finding.state = finding.state.after(result.healthy)
        if result.state is not None or result.share is not None:
            self._drop_inherited_wishes(probe.place)
        finding.asked = result.state or finding.asked
        finding.share = finding.share if result.share is None else result.share
        member = self._member(probe)
        if member is not None and result.round_trip is not None and self._is_timekeeper(finding):
            known = member.response_time
            member.response_time = (
                result.round_trip if known is None else known + SMOOTHING * (result.round_trip - known)
            )
        if finding.state.health is not before:
            log.log(
                30 if finding.state.health is Health.UNHEALTHY else 20,
                "check changed",
                service=probe.service,
                server=probe.target.server,
                check=probe.spec.ref.plugin,
                health=str(finding.state.health),
                reason=result.reason,
            )
        self._tell(*probe.place)

    def _drop_inherited_wishes(self, place: Place) -> None:
        """The server's agent has spoken: what it asked for before counts no longer."""
        inherited = self._inherited.get(place)
        if inherited is not None:
            self._inherited[place] = Inherited(inherited.health, AdminState.ENABLED, 100)

    def _fault(self, finding: Finding, error: str, now: float) -> None:
        suspended = finding.hosted.fault(error, now)
        if suspended or finding.hosted.faults.total == 1:
            log.error(
                "check plugin at fault",
                plugin=finding.hosted.name,
                server=finding.probe.target.server,
                error=error,
                suspended=suspended,
            )

    def _tell(self, group: str, server: str) -> None:
        """Tell the writer what the findings of all checks of a server add up to."""
        if self._paused:
            return
        findings = [task.finding for task in self._of(group, server)]
        asked = max((f.asked for f in findings), key=list(AdminState).index, default=AdminState.ENABLED)
        share = min((f.share for f in findings), default=100)
        inherited = self._inherited.get((group, server))
        if inherited is not None:
            asked = max(asked, inherited.asked, key=list(AdminState).index)
            share = min(share, inherited.share)
        health = combine(f.state.health for f in findings)
        self._writer.set_health(group, server, health, asked, share)

    def _of(self, group: str, server: str) -> Collection[_Task]:
        return self._tasks.get((group, server), {}).values()

    def _is_timekeeper(self, finding: Finding) -> bool:
        """Whether it is the first check of its server that measures a round trip: different checks do not mix."""
        of_server = self._of(*finding.probe.place)
        measuring = [t.finding for t in of_server if t.finding.last and t.finding.last.round_trip is not None]
        return measuring[:1] == [finding]

    def _member(self, probe: Probe) -> Member | None:
        group = self._writer.snapshot.groups.get(probe.group)
        return group.members.get(probe.target.server) if group else None


def _checked(result: object) -> CheckResult:
    """The result itself.

    Raises:
        TypeError: it is not what the contract allows.
    """
    if isinstance(result, CheckResult) and _is_sound(result):
        return result
    raise TypeError(f"{result!r:.100} is not a CheckResult")


def _is_sound(result: Any) -> bool:
    """Whether the fields are what they are declared to be: who reads them relies on it."""
    return (
        isinstance(result.healthy, bool)
        and isinstance(result.reason, str)
        and (result.round_trip is None or 0 <= result.round_trip < inf)
        and (result.share is None or (type(result.share) is int and result.share >= 0))
        and (result.state is None or isinstance(result.state, AdminState))
    )


def probes(snapshot: Snapshot) -> Iterator[Probe]:
    """Every check of every server that the snapshot asks for."""
    for group in snapshot.groups.values():
        for service in group.services:
            specs = list(service.checks)
            if service is group.leader:
                specs += _of_schedulers(group)
            for server, endpoint in group.endpoints[service.name].items():
                target = Target(server, endpoint, service.framing)
                for number, spec in enumerate(specs):
                    yield Probe(group.name, target, service.name, number, spec)


def _of_schedulers(group: Group) -> list[CheckSpec]:
    """The checks that the group's scheduler needs on every server."""
    for pool in group.pools.values():
        return list(getattr(pool.scheduler.plugin, "checks", ()))
    return []
