"""Health checks through random days: servers that fail, hang and recover, plugins at fault, suspicion, reloads.

All the while the health of every server is what a naive model makes of what its checks have answered.
"""

from __future__ import annotations

from bisect import bisect_right
from itertools import pairwise
from random import Random
from typing import NamedTuple

import pytest
import trio
from structlog.testing import capture_logs
from trio.testing import MockClock

from sapin.core.contracts import CheckResult, Target
from sapin.core.dataplane.prober import MIN_WAKE, SPREAD, Finding, Id, Probe, probes
from sapin.core.health import combine
from sapin.core.model import AdminState, Health, VirtualService
from sapin.core.registry import FAULT_LIMIT
from sapin.core.snapshot import Member, Snapshot
from tests import fakes
from tests.sim.probing import DOWN, UP, Lab, Run, Scripted, Step, spec

DAY = 150
"""Seconds of a day here."""
SERVERS = fakes.servers("gw1", "gw2", "gw3")
MOODS = (
    [Step(UP)] * 8 + [Step(DOWN), Step(UP, 60.0)],
    [Step(DOWN)] * 5 + [Step(OSError("refused"))] * 3 + [Step(UP, 60.0), Step(UP)],
    [Step(ValueError("no"))] * 9 + [Step(None)],
    [
        Step(CheckResult(True, "", 0.01, share, state))
        for share in (None, 30, 100)
        for state in (None, *AdminState)
    ],
)
"""What a server's checks do: it is mostly well, mostly not, its plugin is at fault, or an agent has its say."""


class Known(NamedTuple):
    """A probe's task, as the model follows it."""

    probe: Probe
    check: Scripted
    began_as: Health


class Day:
    """A lab on a random day, and the model of it."""

    def __init__(self, seed: int) -> None:
        self.random = Random(seed)
        self.moods = {server.name: MOODS[0] for server in SERVERS}
        self.suspected: dict[str, list[float]] = {server.name: [] for server in SERVERS}
        self.known: dict[Id, Known] = {}
        self.probe_of: dict[Scripted, Probe] = {}
        self.lab = Lab(fakes.config(*self.services()), self.script, seed)
        self.lab.writer.subscribe(self.look)

    def script(self, name: str, target: Target, now: float) -> Step:
        if self.random.random() < 0.1:
            self.moods[target.server] = self.random.choice(MOODS)
        step = self.random.choice(self.moods[target.server])
        return Step(step.outcome, step.takes or self.random.choice([0.0, 0.05, 0.7]))

    def services(self) -> list[VirtualService]:
        random = self.random
        checks = tuple(
            spec(
                name,
                interval=random.choice([0.2, 1.0, 5.0]),
                timeout=random.choice([0.5, 1.0]),
                jitter=random.choice([0.0, 0.1, 0.5]),
                rise=random.randint(1, 3),
                fall=random.randint(1, 3),
            )
            for name in ("a", "b")[: random.randint(0, 2)]
        )
        leader = fakes.leader(*random.sample(SERVERS, random.randint(1, 3)), checks=checks)
        return [leader, fakes.follower(leader, checks=checks[:1])][: random.randint(1, 2)]

    async def live(self, nursery: trio.Nursery) -> None:
        while trio.current_time() < DAY:
            await trio.sleep(self.random.uniform(0, 4))
            self.random.choice([self.suspect, self.suspect, self.set_admin, self.pin, self.reload])()
            for _ in range(3):
                await trio.lowlevel.checkpoint()
            self.look_at_tasks(self.lab.tasks(nursery))
            self.look(self.lab.writer.snapshot, self.lab.writer.snapshot)

    # what happens

    def suspect(self) -> None:
        server = self.random.choice(SERVERS).name
        self.suspected[server].append(trio.current_time())
        self.lab.prober.suspect("ike", server)

    def set_admin(self) -> None:
        server = self.random.choice(list(self.lab.writer.snapshot.groups["ike"].members))
        self.lab.writer.set_admin("ike", server, self.random.choice(list(AdminState)))

    def pin(self) -> None:
        group = self.lab.writer.snapshot.groups["ike"]
        for member in group.members.values():
            if member.keeps:
                group.table.put((self.random.randbytes(2),), member, int(trio.current_time()))

    def reload(self) -> None:
        self.lab.load(*self.services())

    # what must hold

    def look_at_tasks(self, tasks: int) -> None:
        """Just the probes of the configuration run; those that stayed the same are the same."""
        findings = {f.probe.id: f for f in self.lab.prober.findings}
        wanted = {probe.id: probe for probe in probes(self.lab.writer.snapshot)}
        assert {f.probe.id: f.probe for f in findings.values()} == wanted
        assert tasks == len(findings) == len(self.lab.open)
        for known in self.known.values():
            now = findings.get(known.probe.id)
            if now is not None and now.probe == known.probe:
                assert now.hosted.plugin is known.check
        self.known = {probe_id: self.follow(finding) for probe_id, finding in findings.items()}
        self.probe_of |= {known.check: known.probe for known in self.known.values()}

    def follow(self, finding: Finding) -> Known:
        before, check = self.known.get(finding.probe.id), finding.hosted.plugin
        assert isinstance(check, Scripted)
        if before is not None and before.check is check:
            return before
        stands = before is not None and before.probe.subject == finding.probe.subject
        return Known(finding.probe, check, self.health(before) if before and stands else Health.UNKNOWN)

    def health(self, known: Known) -> Health:
        """What a probe's answers make of the server: the last ones that are alike, if they are enough, decide."""
        health, streak = known.began_as, ""
        for answer in filter(None, (answer_of(run, known.probe) for run in known.check.runs)):
            streak = streak + answer if streak.endswith(answer) else answer
            if answer == "+" and (health is Health.UNKNOWN or len(streak) >= known.probe.spec.rise):
                health = Health.HEALTHY
            elif answer == "-" and len(streak) >= known.probe.spec.fall:
                health = Health.UNHEALTHY
        return health

    def look(self, old: Snapshot, new: Snapshot) -> None:
        """States, pins and candidates agree with each other, and health with the model."""
        group = new.groups["ike"]
        for member in group.members.values():
            self.look_at_health(member)
            wanted = {member.admin, member.asked}
            assert member.keeps == (
                member.health is not Health.UNHEALTHY and AdminState.DISABLED not in wanted
            )
        assert list(group.pools[4].candidates) == [m for m in group.members.values() if m.takes]
        if old.config is new.config:
            assert set(group.table.counts()) <= {m.name for m in group.members.values() if m.keeps}

    def look_at_health(self, member: Member) -> None:
        """Not while a reload is on its way to the prober."""
        known = [k for k in self.known.values() if k.probe.target.server == member.name]
        running = [f for f in self.lab.prober.findings if f.probe.target.server == member.name]
        if {k.check for k in known} == {f.hosted.plugin for f in running}:
            assert member.health is combine(map(self.health, known)), member

    def look_at_times(self) -> None:
        """No run before its time, and none much after it."""
        for check, probe in self.probe_of.items():
            suspended = sum(answer_of(run, probe) is None for run in check.runs) >= FAULT_LIMIT
            times = self.suspected[probe.target.server]
            for before, after in pairwise(check.runs):
                earliest, latest = window(probe, before, times, is_first=before is check.runs[0])
                assert after.started >= earliest - 1e-9
                assert after.started <= latest + 1e-9 or suspended


def answer_of(run: Run, probe: Probe) -> str | None:
    """+ for a success, - for a failure; ``None`` for a fault of the plugin, and for a run that was stopped."""
    if run.ended is None or not run.finished:
        timed_out = run.ended is not None and run.ended - run.started >= probe.spec.timeout - 1e-9
        return "-" if timed_out else None
    if isinstance(run.step.outcome, OSError):
        return "-"
    if isinstance(run.step.outcome, CheckResult):
        return "+" if run.step.outcome.healthy else "-"
    return None


def window(probe: Probe, before: Run, suspected: list[float], is_first: bool) -> tuple[float, float]:
    """When the run after this one may start. Suspicion before a first run asks for a second one."""
    assert before.ended is not None
    interval, jitter = probe.spec.interval, probe.spec.jitter
    shortest, longest = interval * (1 - jitter), interval * (1 + jitter)
    soonest = before.ended + min(MIN_WAKE, shortest)
    place = bisect_right(suspected, before.started)
    if place < len(suspected) and suspected[place] <= before.ended + longest:
        return soonest, max(suspected[place], before.ended + min(MIN_WAKE, longest))
    return soonest if is_first else before.ended + shortest, before.ended + longest


async def spend(day: Day) -> None:
    async with day.lab.probing() as nursery:
        await trio.sleep(SPREAD / 2)
        day.look_at_tasks(day.lab.tasks(nursery))
        await day.live(nursery)
    day.look_at_times()


@pytest.mark.parametrize("seed", range(24))
def test_a_day(seed: int) -> None:
    day = Day(seed)
    with capture_logs():
        trio.run(spend, day, clock=MockClock(autojump_threshold=0))
    assert len(day.lab.runs) > DAY / 10
