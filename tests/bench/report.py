"""The figures of a run as a table, as JSON and as a plot, and the aims that they are held against."""

from __future__ import annotations

import os
import platform
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from scenarios import GSO_SIZES, PACED_RATE, Figures, Metric, legend, metrics

BASE = "nginx"
QUOTE_FROM, QUOTE_TO = "<!-- run -->", "<!-- end of run -->"
"""Between these a page quotes a run."""


@dataclass
class Results:
    """Figures by metric and forwarder, one for each round."""

    machine: Mapping[str, str]
    remarks: list[str]
    failures: list[str] = field(default_factory=list)
    figures: dict[str, dict[str, list[float]]] = field(default_factory=dict)

    def add(self, forwarder: str, figures: Figures) -> None:
        """Note what a scenario gave for a forwarder."""
        for metric, value in figures.items():
            self.figures.setdefault(metric, {}).setdefault(forwarder, []).append(value)

    def median(self, metric: str, forwarder: str) -> float | None:
        """The median over rounds, ``None`` where there is no figure."""
        values = self.figures.get(metric, {}).get(forwarder)
        return statistics.median(values) if values else None

    def ratio(self, metric: str, forwarder: str, base: str = BASE) -> float | None:
        """The median against another forwarder's."""
        value, against = self.median(metric, forwarder), self.median(metric, base)
        return value / against if value is not None and against else None

    def measured(self) -> Sequence[Metric]:
        """The metrics that there are figures of."""
        return [metric for metric in _METRICS.values() if metric.name in self.figures]

    @property
    def forwarders(self) -> Sequence[str]:
        """In the order in which they ran."""
        return list(dict.fromkeys(name for each in self.figures.values() for name in each))

    def as_json(self) -> Mapping[str, Any]:
        """Everything, for other tools."""
        return {
            "machine": dict(self.machine),
            "remarks": self.remarks,
            "failures": self.failures,
            "aims": [{"aim": aim, "met": met, "value": value} for aim, met, value in aims(self)],
            "figures": self.figures,
        }


def machine() -> Mapping[str, str]:
    """What the run ran on."""
    model = next(
        (line.split(":", 1)[1].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")),
        platform.machine(),
    )
    return {
        "date": time.strftime("%Y-%m-%d %H:%M"),
        "cpu": f"{os.cpu_count()} x {model}",
        "kernel": platform.release(),
        "python": platform.python_version(),
        "load": f"{os.getloadavg()[0]:.1f}",
    }


def _lines(path: str) -> Sequence[str]:
    try:
        return Path(path).read_text().splitlines()
    except OSError:
        return ()


def aims(results: Results) -> Sequence[tuple[str, bool, str]]:
    """Each aim, whether this run met it, and the figure; only those that the run can tell."""
    found: list[tuple[str, bool, str]] = []

    def ratio(metric: str, text: str, limit: float, base: str = BASE) -> None:
        value = results.ratio(metric, "sapin", base)
        if value is not None:
            lower = _METRICS[metric].lower_is_better
            found.append((text, value <= limit if lower else value >= limit, f"{value:.2f}"))

    for name in ("bulk", "interleaved", "scattered"):
        ratio(f"{name}_cpu", f"CPU per packet at most 0.70 of nginx ({name})", 0.70)
        ratio(f"{name}_cpu", f"CPU per packet below pen ({name})", 1.0, "pen")
    loss = results.figures.get("paced_loss", {}).get("sapin")
    offered = results.median("paced_rate", "sapin") or 0
    if loss and offered > 0.9 * PACED_RATE / 1e3:
        found.append((f"no loss at {PACED_RATE:,} packets/s", max(loss) == 0, f"{max(loss):.0f}"))
    ratio("reply_rate", "new flows with request and reply at least nginx's", 1.0)
    ratio("memory", "memory per flow at most a quarter of nginx's", 0.25)
    trip, direct = results.median("trip_p50", "sapin"), results.median("trip_p50", "direct")
    if trip is not None and direct is not None:
        found.append(("round trip within 20 µs of direct", trip - direct <= 20, f"{trip - direct:+.1f} µs"))
    for size in GSO_SIZES:
        ratio(f"gso{size}_rate", f"GSO traffic at least 12 times nginx's ({size:,} bytes)", 12.0)
    return found


def show(results: Results, console: Console) -> None:
    """Print the table, the aims, and what went wrong."""
    console.print(_table(results))
    for aim, met, value in aims(results):
        console.print(f"{'[green]met   ' if met else '[red]missed'}[/] {aim}: {value}")
    console.print(" · ".join(f"{key} {value}" for key, value in results.machine.items()))
    for remark in (*legend(), *results.remarks):
        console.print(f"[dim]{remark}[/dim]")
    for failure in results.failures:
        console.print(f"[red]failed: {failure}[/red]")


def _table(results: Results) -> Table:
    table = Table(
        title="median (lowest..highest) and ratio against nginx", title_justify="left", box=box.SIMPLE_HEAD
    )
    table.add_column("figure")
    for name in results.forwarders:
        table.add_column(name, justify="right")
    group = ""
    for metric in results.measured():
        if metric.group != group:
            group = metric.group
            table.add_section()
            table.add_row(f"[bold]{group}[/bold]")
        cells = [_cell(results, metric, name) for name in results.forwarders]
        table.add_row(f"  {metric.figure}, {metric.unit}", *cells)
    return table


def _cell(results: Results, metric: Metric, forwarder: str) -> str:
    values = results.figures[metric.name].get(forwarder)
    if not values or not _applies(metric, forwarder):
        return ""
    text = _number(statistics.median(values))
    if len(values) > 1 and min(values) != max(values):
        text += f" ({_number(min(values))}..{_number(max(values))})"
    ratio = results.ratio(metric.name, forwarder)
    if ratio is not None and forwarder != BASE and metric.figure not in UNCOMPARED:
        text += f" x{ratio:.2f}"
    return text


UNCOMPARED = ("lost", "busy", "offered", "out of order")


def _applies(metric: Metric, forwarder: str) -> bool:
    """The direct path has no process that could be measured."""
    return forwarder != "direct" or not (metric.figure.startswith(("CPU", "busy")) or "memory" in metric.name)


def quote(results: Results, page: Path) -> None:
    """Replace the run that a page quotes, between :data:`QUOTE_FROM` and :data:`QUOTE_TO`, by this one.

    Raises:
        ValueError: the page lacks the marks.
    """
    before, _, rest = page.read_text().partition(QUOTE_FROM)
    _, mark, after = rest.partition(QUOTE_TO)
    if not mark:
        raise ValueError(f"{page} has no place for a run: {QUOTE_FROM} ... {QUOTE_TO}")
    page.write_text(f"{before}{QUOTE_FROM}\n{_markdown(results)}\n{QUOTE_TO}{after}")


def _markdown(results: Results) -> str:
    names = results.forwarders
    rows = [["figure", *names], ["---", *("---:" for _ in names)]]
    for metric in results.measured():
        cells = [_cell(results, metric, name) for name in names]
        rows.append([f"{metric.group}: {metric.figure}, {metric.unit}", *cells])
    table = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    verdicts = "\n".join(
        f"- {'met' if met else '**missed**'}: {aim}: {value}" for aim, met, value in aims(results)
    )
    facts = " · ".join(f"{key} {value}" for key, value in results.machine.items())
    return f"{facts}\n\n{table}\n\n{verdicts}"


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 100 or value == int(value) else f"{value:.1f}"


def plot(results: Results, path: Path) -> bool:
    """Draw the main figures as bars; ``False`` without matplotlib, or figures."""
    try:
        from matplotlib.figure import Figure  # noqa: PLC0415 -- the figures do not need it
    except ImportError:
        return False
    drawn = [_METRICS[name] for name in PLOTTED if name in results.figures]
    if not drawn:
        return False
    columns = 3
    rows = -(-len(drawn) // columns)
    figure = Figure(figsize=(4.2 * columns, 2.6 * rows), layout="constrained")
    for position, metric in enumerate(drawn, 1):
        _bars(figure.add_subplot(rows, columns, position), results, metric)
    figure.suptitle(" · ".join(results.machine.values()), fontsize=8)
    figure.savefig(path, dpi=120)
    return True


PLOTTED = (
    "bulk_cpu",
    "interleaved_cpu",
    "scattered_cpu",
    "down_cpu",
    "paced_cpu",
    "trip_p50",
    "first_rate",
    "reply_rate",
    "memory",
    *(f"gso{size}_rate" for size in GSO_SIZES),
)


def _bars(axes: Any, results: Results, metric: Metric) -> None:
    names = [
        name
        for name in results.forwarders
        if results.median(metric.name, name) is not None and _applies(metric, name)
    ]
    values = [results.median(metric.name, name) or 0.0 for name in names]
    spread = [
        [value - min(results.figures[metric.name][name]) for name, value in zip(names, values, strict=True)],
        [max(results.figures[metric.name][name]) - value for name, value in zip(names, values, strict=True)],
    ]
    colours = ["tab:green" if name == "sapin" else "tab:gray" for name in names]
    axes.barh(names, values, xerr=spread, color=colours)
    axes.invert_yaxis()
    better = "lower" if metric.lower_is_better else "higher"
    axes.set_title(f"{metric.group}: {metric.figure}\n{metric.unit}, {better} is better", fontsize=8)
    axes.tick_params(labelsize=8)
    if metric.name.startswith("gso"):
        axes.set_xscale("log")


_METRICS = {metric.name: metric for metric in metrics()}
