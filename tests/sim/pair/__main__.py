"""``make sim``: any number of seeds, or one of them told step by step.

python -m tests.sim.pair [--seed SEED] [--count N] [--jobs J]
"""

from __future__ import annotations

import argparse
import os
import random
import sys
from collections import Counter
from collections.abc import Iterator
from multiprocessing import get_context

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from tests.sim.pair.world import Result, World, run

REPORTED = 10
"""Failures that are shown."""
_CHUNK = 20


def main() -> int:
    """Runs what is asked for; 1 if an invariant was violated."""
    parser = argparse.ArgumentParser(prog="make sim", description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, help="the first seed; with --count 1 it is told what happens")
    parser.add_argument("--count", type=int, default=2_000, help="how many seeds")
    parser.add_argument("--jobs", type=int, default=max((os.cpu_count() or 2) - 1, 1), help="processes")
    asked = parser.parse_args()
    seed = random.randrange(1_000_000_000) if asked.seed is None else asked.seed
    console = Console(highlight=False)
    if asked.count == 1:
        return _tell(seed, console)
    return _many(seed, asked.count, asked.jobs, console)


def _tell(seed: int, console: Console) -> int:
    world = World(seed, told=lambda line: console.print(line, markup=False, soft_wrap=True))
    result = world.run()
    if world.error is not None:
        raise world.error
    console.print(result.failure or "every invariant holds", style="bold red" if result.failure else "green")
    return 1 if result.failure else 0


def _many(first: int, total: int, jobs: int, console: Console) -> int:
    sums: Counter[str] = Counter()
    failures: list[Result] = []
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console) as progress:
        task = progress.add_task(f"seeds from {first}", total=total)
        for result in _results(first, total, jobs):
            sums.update(acknowledged=result.acknowledged, takeovers=result.takeovers, hours=result.seconds)
            if result.failure:
                failures.append(result)
                if len(failures) <= REPORTED:
                    progress.console.print(
                        f"[red]seed {result.seed}[/] {result.failure:.200}", soft_wrap=True
                    )
            said = f"{sums['takeovers']:,} takeovers, {sums['acknowledged']:,} acknowledged, "
            progress.update(task, advance=1, description=said + f"[red]{len(failures)} failed[/]")
    console.print(
        f"{total:,} seeds from {first}: {sums['hours'] / 3600:.1f} hours of two nodes, {sums['takeovers']:,} takeovers, "
        f"{sums['acknowledged']:,} acknowledged changes, {len(failures)} seeds failed"
    )
    if failures:
        seed = min(failures, key=lambda each: each.seconds).seed
        console.print(f"the shortest, step by step: make sim SEED={seed} N=1")
    return 1 if failures else 0


def _results(first: int, total: int, jobs: int) -> Iterator[Result]:
    seeds = range(first, first + total)
    if jobs == 1:
        yield from map(run, seeds)
        return
    with get_context("fork").Pool(jobs) as pool:
        yield from pool.imap_unordered(run, seeds, _CHUNK)


if __name__ == "__main__":
    sys.exit(main())
