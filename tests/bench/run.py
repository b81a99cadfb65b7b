"""``make bench``: the direct path, nginx, pen, older ways in Python and Sapin, interleaved in one run.

Every round takes each forwarder in turn, so that a slow minute of the machine falls on all of them. The table
gives the median over rounds and the range; ratios are against nginx of the same run.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import resource
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

from forwarders import FORWARDERS, Forwarder, ForwarderError, Running, started
from lab import Lab, LabError, open_lab
from load import Load
from report import Results, machine, plot, quote, show
from rich.console import Console
from scenarios import (
    GSO_SIZES,
    MIXES,
    Effort,
    Figures,
    gso,
    new_flows_answered,
    new_flows_first,
    paced,
    round_trip,
    saturated,
    saturated_down,
)

BUILD = Path(__file__).parents[2] / "build" / "bench"
WIDTH = 180
"""Columns of the table where there is no terminal."""

Scenario = Callable[[Load, Running, Effort], Figures]


def _sessions() -> Mapping[str, Sequence[tuple[str, Scenario]]]:
    """Scenarios by the start of the forwarder that they share: new flows want it fresh."""
    floods = [(name, partial(_saturated, name)) for name in MIXES]
    return {
        "answered": [("new flows with replies", new_flows_answered)],
        "first": [("new flows", new_flows_first)],
        "traffic": [
            ("50,000 packets/s", paced),
            ("round trip", round_trip),
            *floods,
            ("down", saturated_down),
            *((f"GSO {size}", partial(_gso, size)) for size in GSO_SIZES),
        ],
    }


def _saturated(name: str, load: Load, running: Running, effort: Effort) -> Figures:
    return saturated(load, running, effort, name)


def _gso(size: int, load: Load, running: Running, effort: Effort) -> Figures:
    return gso(load, running, effort, size)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark; the exit code is 1 when a forwarder failed."""
    options = _options(arguments)
    console = Console() if sys.stdout.isatty() else Console(width=WIDTH)
    privileged = os.geteuid() == 0 and not options.loopback and shutil.which("ip") is not None
    chosen = _chosen(options.only, privileged, console)
    effort = _effort(options)
    results = Results(machine(), remarks=[])
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    load_cpu, forwarder_cpu = _cpus(results)
    results.remarks.extend(f"{forwarder.name}: {forwarder.remark}" for forwarder in chosen)
    try:
        with open_lab(privileged) as lab, tempfile.TemporaryDirectory(prefix="sapin-bench-") as folder:
            if lab.remark:
                results.remarks.append(lab.remark)
            os.sched_setaffinity(0, {load_cpu})
            for number in range(options.rounds or (1 if options.quick else 3)):
                for forwarder in chosen:
                    console.print(f"[dim]round {number + 1}: {forwarder.name}[/dim]")
                    place = Path(folder) / f"{number}-{forwarder.name}"
                    _measure(forwarder, lab, place, forwarder_cpu, effort, results)
    except LabError as error:
        console.print(f"[red]{error}[/red]")
        return 2
    except KeyboardInterrupt:
        results.remarks.append("interrupted")
    show(results, console)
    _save(results, options.json, console)
    if options.quote:
        quote(results, options.quote)
    return 1 if results.failures else 0


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="one short round, about a minute")
    parser.add_argument("--rounds", type=int, help="rounds to take the median of (3; quick: 1)")
    parser.add_argument("--seconds", type=float, help="of each scenario (2; quick: 0.6)")
    parser.add_argument("--flows", type=int, default=10_000, help="new flows to set up (10000)")
    parser.add_argument("--only", default="", help="forwarders, separated by commas")
    parser.add_argument("--loopback", action="store_true", help="do without namespaces, as without root")
    parser.add_argument("--json", type=Path, default=BUILD / "bench.json", help="where the figures go")
    parser.add_argument("--quote", type=Path, help="a page whose quoted run is to be replaced by this one")
    return parser.parse_args(arguments)


def _effort(options: argparse.Namespace) -> Effort:
    """How much to measure; no more new flows than there are file descriptors for pen, which takes two for each."""
    seconds = options.seconds or (0.6 if options.quick else 2.0)
    possible = (resource.getrlimit(resource.RLIMIT_NOFILE)[1] - 200) // 2
    return Effort(
        seconds=seconds,
        warm_up=seconds / 5,
        round_trips=int(seconds * 1000),
        new_flows=min(options.flows, possible),
    )


def _chosen(only: str, privileged: bool, console: Console) -> Sequence[Forwarder]:
    names = [name for name in only.split(",") if name]
    known = {forwarder.name: forwarder for forwarder in FORWARDERS}
    if unknown := [name for name in names if name not in known]:
        raise SystemExit(f"no forwarder {', '.join(unknown)}; there are: {', '.join(known)}")
    if not names:
        names = list(known) if privileged else ["direct", "sapin"]
    chosen = []
    for forwarder in (known[name] for name in names):
        if reason := forwarder.missing():
            console.print(f"[yellow]without {forwarder.name}: {reason}[/yellow]")
        else:
            chosen.append(forwarder)
    return chosen


def _cpus(results: Results) -> tuple[int, int]:
    """A CPU for the load and one for the forwarder."""
    available = sorted(os.sched_getaffinity(0))
    if len(available) == 1:
        results.remarks.append("one CPU only: load and forwarder compete for it")
    load, forwarder = available[-1], available[0]
    results.remarks.append(f"CPU {forwarder}: the forwarder; CPU {load}: clients and servers")
    return load, forwarder


def _measure(
    forwarder: Forwarder, lab: Lab, folder: Path, cpu: int, effort: Effort, results: Results
) -> None:
    for session, scenarios in _sessions().items():
        load = Load(lab, forwarder.name == "direct", cpu)
        try:
            with started(forwarder, lab, folder / session, cpu) as running:
                for title, scenario in scenarios:
                    _run(scenario, load, running, effort, results, forwarder.name, title)
        except ForwarderError as error:
            results.failures.append(str(error))
        finally:
            load.close()


def _run(
    scenario: Scenario, load: Load, running: Running, effort: Effort, results: Results, name: str, title: str
) -> None:
    gc.collect()
    gc.disable()
    try:
        load.quiet()
        results.add(name, scenario(load, running, effort))
        running.check()
    except TimeoutError as error:
        results.failures.append(f"{name}, {title}: {error}")
    finally:
        gc.enable()


def _save(results: Results, path: Path, console: Console) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(results.as_json(), indent=2) + "\n")
    picture = path.with_suffix(".png")
    drawn = plot(results, picture)
    console.print(f"figures: {path}")
    console.print(f"plot: {picture}" if drawn else "no plot: it takes matplotlib, and figures")


if __name__ == "__main__":
    sys.exit(main())
