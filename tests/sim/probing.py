"""A prober and its writer under virtual time, with checks that execute a script and note when they ran."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from random import Random
from typing import Any, ClassVar, NamedTuple

import trio
from pydantic import BaseModel

from sapin.core.affinity import Change
from sapin.core.contracts import CheckResult, Target
from sapin.core.dataplane.prober import Finding, Prober
from sapin.core.model import CheckSpec, Config, PluginRef, VirtualService
from sapin.core.snapshot import Member, Snapshot
from sapin.core.writer import Writer
from tests import fakes

UP = CheckResult(True, "fine")
DOWN = CheckResult(False, "down")


class Step(NamedTuple):
    """What one run of a check does: take that long, then answer or raise."""

    outcome: Any
    takes: float = 0.0


Script = Callable[[str, Target, float], Step]
"""What the check of that name does with the target at that time."""


@dataclass(eq=False)
class Run:
    """One run of a check."""

    check: Scripted
    target: Target
    started: float
    step: Step
    ended: float | None = None
    finished: bool = False
    """It came to its outcome; else it was cancelled, by its time-out or because it was stopped."""


class Scripted:
    """A health check that does what the script of its lab says."""

    lab: ClassVar[Lab]

    class Config(BaseModel, extra="forbid"):
        name: str = ""

    def __init__(self, config: Config) -> None:
        self.name = config.name
        self.runs: list[Run] = []

    def open(self) -> None:
        self.lab.open.append(self)

    def close(self) -> None:
        self.lab.open.remove(self)

    async def check(self, target: Target) -> CheckResult:
        now = trio.current_time()
        run = Run(self, target, now, self.lab.script(self.name, target, now))
        self.runs.append(run)
        self.lab.runs.append(run)
        try:
            await trio.sleep(run.step.takes)
            run.finished = True
        finally:
            run.ended = trio.current_time()
        if isinstance(run.step.outcome, BaseException):
            raise run.step.outcome
        outcome: CheckResult = run.step.outcome
        return outcome


def spec(name: str = "", **changes: Any) -> CheckSpec:
    """A scripted check without jitter, every ten seconds."""
    settings: dict[str, Any] = {"interval": 10.0, "timeout": 2.0, "jitter": 0.0}
    return CheckSpec(PluginRef("scripted", {"name": name}), **(settings | changes))


@dataclass(eq=False)
class Lab:
    """A writer, its prober, and what happened."""

    config: Config
    script: Script = lambda name, target, now: Step(UP)
    seed: int = 0
    runs: list[Run] = field(default_factory=list)
    open: list[Scripted] = field(default_factory=list)
    fed: list[Change] = field(default_factory=list)
    told: list[Snapshot] = field(default_factory=list)
    plugins: dict[str, dict[str, object]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        cls = type("Scripted", (Scripted,), {"lab": self})
        registry = fakes.registry(check={"scripted": cls}, **self.plugins)
        self.writer = Writer(registry, self.fed.append, self.config)
        self.prober = Prober(self.writer, registry, Random(self.seed))
        self.writer.subscribe(self.prober.apply)
        self.writer.subscribe(lambda old, new: self.told.append(new))

    def load(self, *services: VirtualService) -> None:
        self.writer.load(fakes.config(*services))

    def member(self, server: str, group: str = "ike") -> Member:
        return self.writer.snapshot.groups[group].members[server]

    def of(self, server: str, name: str | None = None) -> list[Run]:
        """The runs of a server's checks, or of the one of that name."""
        return [r for r in self.runs if r.target.server == server and name in (None, r.check.name)]

    def finding(self, server: str, number: int = 0) -> Finding:
        (found,) = (
            f for f in self.prober.findings if (f.probe.target.server, f.probe.number) == (server, number)
        )
        return found

    @asynccontextmanager
    async def probing(self) -> AsyncIterator[trio.Nursery]:
        """The prober at work; after it nothing may be left open."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self.prober.run)
            yield nursery
            nursery.cancel_scope.cancel()
        assert self.open == []

    def tasks(self, nursery: trio.Nursery) -> int:
        """How many tasks the prober has."""
        (prober,) = nursery.child_tasks
        return sum(len(own.child_tasks) for own in prober.child_nurseries)


def service(*servers: str, checks: tuple[CheckSpec, ...] = (spec(),), **changes: Any) -> VirtualService:
    """A virtual service of these servers, gw1 and gw2 by default, with these checks."""
    return fakes.leader(*fakes.servers(*(servers or ("gw1", "gw2"))), checks=checks, **changes)


def always(step: Step) -> Script:
    """The same from every server."""
    return lambda name, target, now: step


def in_turn(*outcomes: Any) -> Script:
    """Of gw1 these outcomes, the last one for ever; the others are fine."""
    rest = list(outcomes)

    def script(name: str, target: Target, now: float) -> Step:
        if target.server != "gw1":
            return Step(UP)
        return Step(rest.pop(0) if len(rest) > 1 else rest[0])

    return script


def pauses(runs: Sequence[Run]) -> list[float]:
    """Seconds from the end of each run to the start of the next."""
    return [after.started - (before.ended or 0) for before, after in pairwise(runs)]
