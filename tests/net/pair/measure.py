"""``make failover``: what happens to real tunnels when a pair of balancers loses a node, round after round.

Sapin's pair and, measured in the same way, keepalived with nftables. Table, figures and a plot go to build/failover/.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import signal
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import cycle
from pathlib import Path

import trio
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from tests.net.namespaces import LabError
from tests.net.pair.keepalived import Keepalived
from tests.net.pair.lab import PairLab, open_lab
from tests.net.pair.nodes import SapinPair
from tests.net.pair.probes import Speaker
from tests.net.pair.results import OURS, Results, plot, quote, show
from tests.net.pair.scenarios import SCENARIOS, Pair, Round, Scenario, play

BUILD = Path(__file__).parents[3] / "build" / "failover"
WIDTH = 180
"""Columns of the table where there is no terminal."""
STOOD_STILL = 0.02
"""A round in which the prober, which has priority, was so much too late says nothing: it is played again."""
TRIES = 4
"""So many times at most."""
SPEAKERS: Sequence[Speaker] = ("both", "gateway", "client")
"""Who speaks first, one round after the other."""
YARDSTICKS = {"keepalived 1 s": 1.0, "keepalived 0.1 s": 0.1, "keepalived 0.02 s": 0.02}
YARDSTICK_SCENARIOS = ("kill", "pause", "power", "cluster-link")


@dataclass(frozen=True)
class Plan:
    """The rounds of one set-up."""

    setup: str
    scenarios: Sequence[Scenario]
    rounds: int

    def pair(self, lab: PairLab) -> Pair:
        """The balancers."""
        return SapinPair(lab) if self.setup == OURS else Keepalived(lab, YARDSTICKS[self.setup])

    def watch(self, scenario: Scenario) -> float:
        """Seconds of traffic after something happened."""
        return max(scenario.watch, 5 * YARDSTICKS.get(self.setup, 0.0))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the measurement; the exit code is 1 when a round failed."""
    options = _options(arguments)
    console = Console() if sys.stdout.isatty() else Console(width=WIDTH)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    results = Results(machine())
    try:
        with tempfile.TemporaryDirectory(prefix="sapin-failover-") as folder, open_lab(Path(folder)) as lab:
            trio.run(_measure, lab, list(_plans(options)), results, console)
    except LabError as error:
        results.failures.append(str(error))
    except KeyboardInterrupt:
        results.failures.append("interrupted")
    show(results, console)
    _save(results, options.json, console)
    if options.quote:
        quote(results, options.quote)
    return 1 if results.failures else 0


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=20, help="of each scenario (20)")
    parser.add_argument("--yardstick-rounds", type=int, default=5, help="of keepalived's; 0 for none (5)")
    parser.add_argument("--scenarios", default=",".join(SCENARIOS), help="separated by commas")
    parser.add_argument("--yardstick-scenarios", default=",".join(YARDSTICK_SCENARIOS))
    parser.add_argument("--json", type=Path, default=BUILD / "failover.json", help="where the figures go")
    parser.add_argument("--quote", type=Path, help="a page whose quoted run is to be replaced by this one")
    return parser.parse_args(arguments)


def _plans(options: argparse.Namespace) -> Iterator[Plan]:
    if options.rounds:
        yield Plan(OURS, [SCENARIOS[name] for name in options.scenarios.split(",")], options.rounds)
    if options.yardstick_rounds:
        scenarios = [SCENARIOS[name] for name in options.yardstick_scenarios.split(",")]
        for setup in YARDSTICKS:
            yield Plan(setup, scenarios, options.yardstick_rounds)


async def _measure(lab: PairLab, plans: Sequence[Plan], results: Results, console: Console) -> None:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        for plan in plans:
            await lab.reset()
            pair = plan.pair(lab)
            try:
                await _play_all(pair, plan, results, progress)
            except LabError as error:
                results.failures.append(f"{plan.setup}: {error}")
            finally:
                await pair.stop()


async def _play_all(pair: Pair, plan: Plan, results: Results, progress: Progress) -> None:
    await pair.mend()
    await pair.settled()
    for scenario in plan.scenarios:
        task = progress.add_task(f"{plan.setup}: {scenario.title}", total=plan.rounds)
        for _, speaker in zip(range(plan.rounds), cycle(SPEAKERS), strict=False):
            await pair.lab.connect_all(pair.addresses)
            once = partial(play, pair, scenario, speaker=speaker, watch=plan.watch(scenario))
            results.add(plan.setup, await _undisturbed(once, results))
            progress.advance(task)


async def _undisturbed(once: Callable[[], Awaitable[Round]], results: Results) -> Round:
    for _ in range(TRIES - 1):
        result = await once()
        if result.late <= STOOD_STILL:
            return result
        results.repeated += 1
    return await once()


def machine() -> Mapping[str, str]:
    """What the run ran on."""
    return {
        "date": time.strftime("%Y-%m-%d %H:%M"),
        "cpus": str(os.cpu_count()),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "load": f"{os.getloadavg()[0]:.1f}",
    }


def _save(results: Results, path: Path, console: Console) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(results.as_json(), indent=2) + "\n")
    picture = path.with_suffix(".png")
    drawn = plot(results, picture)
    console.print(f"figures: {path}")
    console.print(f"plot: {picture}" if drawn else "no plot: it takes matplotlib, and rounds")


if __name__ == "__main__":
    sys.exit(main())
