"""A pair under virtual time: two machines, two networks, clients, and fate; everything by one seed.

Events are a heap. A run: the nodes start; clients come and faults happen; the faults end; the pair has :data:`REST`
seconds to become one active node and one standby that has everything, and must stay so for a moment.
"""

from __future__ import annotations

import heapq
import random
from collections.abc import Callable
from dataclasses import dataclass
from itertools import count
from typing import Any

from sapin.cluster.pair import Pair
from tests.sim.pair.checker import Checker, Violation
from tests.sim.pair.link import Link, Network
from tests.sim.pair.machine import Machine
from tests.sim.pair.workload import Fate, Workload

REST = 12.0
"""Seconds within which a pair has to converge when the faults are over."""
SETTLED = 0.1
"""Seconds for which it has to stay so."""
LOOK_EVERY = 0.1
"""Seconds between two comparisons of the nodes."""
MAX_EVENTS = 400_000


@dataclass(frozen=True)
class Result:
    """What came of one seed."""

    seed: int
    failure: str | None
    story: tuple[str, ...]
    seconds: float
    """Of virtual time."""
    acknowledged: int
    takeovers: int
    rest: float
    """Seconds from the end of the faults to convergence."""


class World:
    """Everything there is.

    Args:
        seed: decides everything.
        pair_of: makes a node's pair; a mutant's, perhaps.
        told: gets a line for everything that happens.
    """

    def __init__(
        self, seed: int, pair_of: Callable[..., Pair] = Pair, told: Callable[[str], object] | None = None
    ) -> None:
        self.seed = seed
        self.error: Exception | None = None
        """What went wrong that is no violation: a fault of the program."""
        self.told = told
        self.random = random.Random(seed)
        self.pair_of = pair_of
        self.now = 100.0
        self._heap: list[tuple[float, int, Callable[[], object]]] = []
        self._numbers = count()
        self.lateness = self.random.choice((0.0001, 0.001, 0.003))
        self._slow_disk = self.random.random() < 0.2
        self.heal_at = self.now + self.random.uniform(1.0, 3.5)
        self.quiet_from = self.heal_at + self.random.choice((-0.2, 0.3))
        self.settings = tuple(self._settings() for _ in range(2))
        self.service, self.link = Network(self), Link(self)
        self.networks = (self.service, self.link)
        self.machines = (Machine(self, 0), Machine(self, 1))
        self.checker = Checker(self)
        self.workload, self.fate = Workload(self), Fate(self)

    def _settings(self) -> dict[str, Any]:
        chance = self.random.random()
        found: dict[str, Any] = {"priority": self.random.choice((50, 100))}
        if chance < 0.2:
            found["preempt"] = True
        if chance > 0.7:
            found["versions"] = (1, 1)
        return found

    def at(self, time: float, event: Callable[[], object]) -> None:
        heapq.heappush(self._heap, (max(time, self.now), next(self._numbers), event))

    def after(self, seconds: float, event: Callable[[], object]) -> None:
        self.at(self.now + seconds, event)

    def disk_delay(self) -> float:
        """Seconds until something is on the disk."""
        chance = self.random.random()
        return 0.0002 + (0.05 * chance if self._slow_disk else 0.003 * chance)

    def run(self) -> Result:
        failure: str | None = None
        converged = self.heal_at
        try:
            converged = self._run()
        except Violation as violation:
            failure = str(violation)
        except Exception as error:
            failure = f"at {self.now:.3f}: {type(error).__name__}: {error}"
            self.error = error
        checker = self.checker
        return Result(
            self.seed, failure, tuple(self.fate.story), self.now - 100.0, checker.acknowledged,
            checker.takeovers, converged - self.heal_at,
        )  # fmt: skip

    def _run(self) -> float:
        for machine in self.machines:
            self.after(self.random.choice((0.0, 0.3 * self.random.random())), machine.start)
        self.after(0.0, self.link.connect)
        self.after(0.0, self.workload.go_on)
        self.after(LOOK_EVERY, self._look)
        self.checker.health()
        self._until(self.heal_at)
        self.fate.heal()
        self._until(max(self.now, self.quiet_from))
        return self._converge()

    def _look(self) -> None:
        self.after(LOOK_EVERY, self._look)
        self.checker.difference()

    def _until(self, time: float) -> None:
        heap = self._heap
        while heap and heap[0][0] <= time:
            self.now, number, event = heapq.heappop(heap)
            if number > MAX_EVENTS:
                self.checker.fail("events without end")
            event()
        self.now = max(self.now, time)
        self.checker.check_times()

    def _converge(self) -> float:
        since: float | None = None
        end = self.now + REST
        while True:
            self._until(self.now + 0.02)
            lacks = self.checker.difference()
            if lacks is not None:
                if self.now > end:
                    self.checker.fail(f"has not converged: {lacks}")
                since = None
            elif since is None:
                since = self.now
            elif self.now - since >= SETTLED:
                self.checker.converged()
                return since


def run(seed: int, pair_of: Callable[..., Pair] = Pair) -> Result:
    """Runs one seed."""
    return World(seed, pair_of).run()
