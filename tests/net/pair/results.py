"""The rounds of a run as a table, as JSON and as a plot, and the aims that they are held against."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from tests.net.pair.scenarios import SCENARIOS, Round

QUOTE_FROM, QUOTE_TO = "<!-- run -->", "<!-- end of run -->"
"""Between these a page quotes a run."""
TWO_HOLDERS = 0.5
"""Seconds that an address may be on both nodes."""
OURS = "sapin"
HEADINGS = (
    "set-up",
    "what happens",
    "rounds",
    "outage p50",
    "p99",
    "max",
    "tunnels kept",
    "pins lost",
    "address on nobody",
    "on both",
)


@dataclass
class Results:
    """All rounds, by set-up and scenario.

    Args:
        repeated: rounds that were played again, because the machine itself stood still.
    """

    machine: Mapping[str, str]
    rounds: dict[tuple[str, str], list[Round]] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)
    repeated: int = 0

    def add(self, setup: str, result: Round) -> None:
        """Note a round."""
        self.rounds.setdefault((setup, result.scenario), []).append(result)

    def as_json(self) -> Mapping[str, Any]:
        """Everything, for other tools."""
        return {
            "machine": dict(self.machine),
            "failures": self.failures,
            "repeated": self.repeated,
            "aims": [{"aim": aim, "met": met, "value": value} for aim, met, value in aims(self)],
            "rounds": [
                {"setup": setup, **asdict(each)}
                for (setup, _), rounds in self.rounds.items()
                for each in rounds
            ],
        }


def outages(rounds: Sequence[Round]) -> list[float]:
    """The outage of every tunnel in every round, in order of length."""
    return sorted(chain.from_iterable(each.outages.values() for each in rounds))


def quantile(ordered: Sequence[float], share: float) -> float:
    """The value that at least this share of the others does not exceed."""
    return ordered[min(len(ordered) - 1, max(0, -(-len(ordered) * round(share * 1000) // 1000) - 1))]


def aims(results: Results) -> Iterator[tuple[str, bool, str]]:
    """Each aim, whether this run met it, and the figure; only those that the run can tell."""
    ours = {name: rounds for (setup, name), rounds in results.rounds.items() if setup == OURS}
    for name, rounds in ours.items():
        scenario = SCENARIOS[name]
        if scenario.bound is not None:
            p99 = quantile(outages(rounds), 0.99)
            yield f"{scenario.title}: p99 at most {_ms(scenario.bound)}", p99 <= scenario.bound, _ms(p99)
    every = list(chain.from_iterable(ours.values()))
    if every:
        lost = sum(len(each.lost) for each in every)
        yield "no pin is lost", not lost, str(lost)
        gone = sum(len(each.outages) - len(each.kept) for each in every)
        yield "every tunnel goes on with its IKE_SA", not gone, f"{gone} did not"
        both = max(each.both for each in every)
        yield f"an address is on both nodes for at most {_ms(TWO_HOLDERS)}", both <= TWO_HOLDERS, _ms(both)


def rows(results: Results) -> Iterator[tuple[str, ...]]:
    """The cells of the table, under :data:`HEADINGS`."""
    for (setup, name), rounds in results.rounds.items():
        found = outages(rounds)
        tunnels, kept = len(found), sum(len(each.kept) for each in rounds)
        yield (
            setup,
            SCENARIOS[name].title,
            str(len(rounds)),
            *(_ms(quantile(found, share)) for share in (0.5, 0.99, 1.0)),
            f"{kept}/{tunnels}",
            str(sum(len(each.lost) for each in rounds)) if setup == OURS else "",
            _ms(max(each.nobody for each in rounds)),
            _ms(max(each.both for each in rounds)),
        )


def show(results: Results, console: Console) -> None:
    """Print the table, the aims, and what went wrong."""
    table = Table(*HEADINGS, box=box.SIMPLE_HEAD)
    for row in rows(results):
        table.add_row(*row)
    console.print(table)
    for aim, met, value in aims(results):
        console.print(f"{'[green]met   ' if met else '[red]missed'}[/] {aim}: {value}")
    console.print(" · ".join(f"{key} {value}" for key, value in results.machine.items()))
    console.print(f"[dim]{remark(results)}[/dim]")
    for failure in results.failures:
        console.print(f"[red]failed: {failure}[/red]")


def remark(results: Results) -> str:
    """How to read the table."""
    every = [each for rounds in results.rounds.values() for each in rounds]
    noise = quantile(sorted(each.before for each in every), 0.5) if every else 0.0
    return (
        "Outage: the longest time without a datagram in a tunnel, in either direction; a datagram is sent every 10 ms, "
        f"and without any failure the longest of all tunnels is {_ms(noise)} (median of rounds). "
        "On nobody, on both: the worst round. "
        f"Rounds played again because the machine itself stood still: {results.repeated}."
    )


def quote(results: Results, page: Path) -> None:
    """Replace the run that a page quotes, between :data:`QUOTE_FROM` and :data:`QUOTE_TO`, by this one.

    Raises:
        ValueError: the page lacks the marks.
    """
    before, _, rest = page.read_text().partition(QUOTE_FROM)
    _, mark, after = rest.partition(QUOTE_TO)
    if not mark:
        raise ValueError(f"{page} has no place for a run: {QUOTE_FROM} ... {QUOTE_TO}")
    page.write_text(f"{before}{QUOTE_FROM}\n{markdown(results)}\n{QUOTE_TO}{after}")


def markdown(results: Results) -> str:
    """The table and the aims, for a page."""
    alignment = [":--", ":--", *("--:" for _ in HEADINGS[2:])]
    table = "\n".join(f"| {' | '.join(row)} |" for row in (HEADINGS, alignment, *rows(results)))
    verdicts = "\n".join(
        f"- {'met' if met else '**missed**'}: {aim}: {value}" for aim, met, value in aims(results)
    )
    facts = " · ".join(f"{key} {value}" for key, value in results.machine.items())
    return f"{facts}\n\n{table}\n\n{remark(results)}\n\n{verdicts}"


def plot(results: Results, path: Path) -> bool:
    """Draw how the outages are spread; ``False`` without matplotlib, or rounds."""
    try:
        from matplotlib.figure import Figure  # noqa: PLC0415 -- the figures do not need it
    except ImportError:
        return False
    if not results.rounds:
        return False
    figure = Figure(figsize=(9, 1.5 + 0.35 * len(results.rounds)), layout="constrained")
    axes = figure.add_subplot()
    labels = [f"{setup}: {SCENARIOS[name].title}" for setup, name in results.rounds]
    axes.boxplot(
        [[value * 1000 for value in outages(rounds)] for rounds in results.rounds.values()],
        vert=False,
        whis=(0, 99),
        tick_labels=labels,
    )
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.set_xlabel(
        "outage of a tunnel in ms (box: quartiles; whisker: 99 of 100; dots: the rest)", fontsize=8
    )
    axes.tick_params(labelsize=8)
    axes.grid(axis="x", which="both", alpha=0.3)
    figure.suptitle(" · ".join(results.machine.values()), fontsize=8)
    figure.savefig(path, dpi=120)
    return True


def _ms(seconds: float) -> str:
    return f"{seconds * 1000:,.0f} ms"
