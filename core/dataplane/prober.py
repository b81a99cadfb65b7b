"""Runs the health checks: one trio task for each (service, server, check).

The prober only runs and times them; what results add up to is :mod:`sapin.core.health`, and who is told is
the writer. A check that raises something else than ``OSError`` is at fault itself: that is counted and
says nothing about the server.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from random import Random
from typing import NamedTuple

import structlog
import trio

from sapin.core.contracts import CheckResult, HealthCheck, Target
from sapin.core.health import CheckState, combine
from sapin.core.model import AdminState, CheckSpec, Health
from sapin.core.registry import Hosted, PluginError, Registry
from sapin.core.snapshot import Group, Member, Snapshot
from sapin.core.writer import Writer

SMOOTHING = 0.3
"""Weight of the newest round trip in the moving average."""
MIN_WAKE = 0.25
"""Seconds between two runs of a check, however often its server is suspect."""
SPREAD = 0.2
"""Seconds over which first runs are spread."""

log = structlog.get_logger("sapin.checks")


Id = tuple[str, str, int]
"""A probe's service, server, and number among the service's checks."""


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
        self._tasks: dict[Id, _Task] = {}
        self._changed = trio.Event()

    @property
    def findings(self) -> Sequence[Finding]:
        """What is known, per probe."""
        return [task.finding for task in self._tasks.values()]

    def apply(self, old: Snapshot, new: Snapshot) -> None:
        """Have the tasks follow the new snapshot."""
        if old.config is not new.config:
            self._changed.set()

    def suspect(self, group: str, server: str) -> None:
        """Something went wrong with a server: check it soon."""
        for task in self._of(group, server):
            task.wake.set()

    async def run(self) -> None:
        """Run the checks until cancelled."""
        self._tasks.clear()
        async with trio.open_nursery() as nursery:
            while True:
                self._changed = trio.Event()
                self._reconcile(nursery)
                await self._changed.wait()

    def _reconcile(self, nursery: trio.Nursery) -> None:
        wanted = {probe.id: probe for probe in probes(self._writer.snapshot)}
        for known, task in list(self._tasks.items()):
            if task.finding.probe != wanted.get(known):
                task.scope.cancel()
                del self._tasks[known]
        for probe in wanted.values():
            if probe.id not in self._tasks:
                self._start(probe, nursery)
        for group in self._writer.snapshot.groups.values():
            for server in group.members:
                self._tell(group.name, server)

    def _start(self, probe: Probe, nursery: trio.Nursery) -> None:
        try:
            hosted: Hosted[HealthCheck] = self._registry.make("check", probe.spec.ref)
        except PluginError as error:
            log.error(
                "check cannot be used", service=probe.service, server=probe.target.server, reason=str(error)
            )
            return
        task = _Task(Finding(probe, hosted, CheckState(probe.spec.rise, probe.spec.fall)))
        self._tasks[probe.id] = task
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
                result = await finding.hosted.plugin.check(probe.target)
            if not isinstance(result, CheckResult):
                raise TypeError(f"{result!r:.100} is not a CheckResult")
        except trio.TooSlowError:
            result = CheckResult(False, f"no answer within {spec.timeout:g} s")
        except OSError as error:
            result = CheckResult(False, error.strerror or str(error))
        except Exception as error:
            self._fault(finding, f"{type(error).__name__}: {error}", started)
            return
        finding.hosted.faults.in_a_row = 0
        finding.checked_at = trio.current_time()
        self._take(finding, result)

    def _take(self, finding: Finding, result: CheckResult) -> None:
        probe = finding.probe
        before = finding.state.health
        finding.last = result
        finding.state = finding.state.after(result.healthy)
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
        self._tell(probe.group, probe.target.server)

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
        findings = [task.finding for task in self._of(group, server)]
        asked = max((f.asked for f in findings), key=list(AdminState).index, default=AdminState.ENABLED)
        share = min((f.share for f in findings), default=100)
        health = combine(f.state.health for f in findings)
        self._writer.set_health(group, server, health, asked, share)

    def _of(self, group: str, server: str) -> list[_Task]:
        tasks = self._tasks.values()
        return [
            t for t in tasks if t.finding.probe.group == group and t.finding.probe.target.server == server
        ]

    def _is_timekeeper(self, finding: Finding) -> bool:
        """Whether it is the first check of its server that measures a round trip: different checks do not mix."""
        of_server = self._of(finding.probe.group, finding.probe.target.server)
        measuring = [t.finding for t in of_server if t.finding.last and t.finding.last.round_trip is not None]
        return measuring[:1] == [finding]

    def _member(self, probe: Probe) -> Member | None:
        group = self._writer.snapshot.groups.get(probe.group)
        return group.members.get(probe.target.server) if group else None


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
