"""What a million pins cost: bytes per pin, time per operation, and the longest single step of each kind.

Each table is measured in a process of its own, with the garbage collector as the daemon has it: on, and
``gc.freeze()`` after the start. Keys are made anew for each operation, as datagrams make them, so that no
hash is cached; pins are visited in a scattered order. Each step is measured on the wall clock and on the
thread's CPU clock: what only the wall clock shows is other work of the machine. Even the CPU clock has outliers
(interrupts, a hypervisor), as the row "nothing" shows; so the least of several rounds counts, since a step that
is long by itself is long in each. Reading the clocks takes longer than a lookup: every fourth batch of a
thousand is measured as a whole, for the mean. Beside the affinity table stands the older way, a dictionary of
slotted objects.

    python tests/bench/affinity.py [--pins N] [--rounds N] [--json FILE]
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from itertools import islice
from multiprocessing import get_context
from pathlib import Path
from time import perf_counter_ns, thread_time_ns
from typing import TypeVar

from rich.console import Console
from rich.table import Table

from sapin.core.affinity import AffinityTable
from sapin.core.contracts import Key

T = TypeVar("T")
Keys = tuple[Key, ...]

TIMEOUT = 8 * 3600
SERVERS = 16
STEP = 128
"""Pins that one call of ``expire`` or ``sweep`` may look at."""
MAX_STEP_MS = 2.0
MAX_BYTES = 250
"""The aims, for pins of one key."""


@dataclass(eq=False)
class Server:
    """Stands for a real server."""

    name: str
    pinned: int = 0


class Plain:
    """The older way: a dictionary of slotted objects."""

    class Record:
        __slots__ = ("due", "key", "member", "since")

        def __init__(self, key: Key, member: Server, now: int) -> None:
            self.key, self.member, self.since, self.due = key, member, now, now + TIMEOUT

    def __init__(self) -> None:
        self._records: dict[Key, Plain.Record] = {}

    def put(self, keys: Sequence[Key], member: Server, now: int) -> None:
        record = self.Record(keys[0], member, now)
        for key in keys:
            self._records[key] = record
        member.pinned += 1

    def get(self, key: Key) -> Server | None:
        record = self._records.get(key)
        return None if record is None else record.member

    def touch(self, key: Key, now: int) -> Server | None:
        record = self._records.get(key)
        if record is None:
            return None
        record.due = now + TIMEOUT
        return record.member


@dataclass
class Row:
    """One kind of step."""

    step: str
    count: int
    mean_ns: float
    """Per pin, on the wall clock."""
    longest_ms: float
    longest_cpu_ms: float


@dataclass
class Report:
    """What was measured of one table."""

    name: str
    pins: int
    keys: int
    """Keys of each pin."""
    bytes_per_pin: float = 0
    """Resident, after each was inserted once."""
    bytes_when_reused: float = 0
    """Resident, after all expired and as many others were inserted in their slots."""
    rows: list[Row] = field(default_factory=list)
    collections: int = 0
    """Automatic garbage collections."""
    longest_collection_ms: float = 0


def scattered(pins: int) -> Iterator[int]:
    """Each number below ``pins`` once, in no order that memory would like."""
    stride = 611_953  # a prime: it has no common divisor with any number of pins that is used here
    return ((i * stride) % pins for i in range(pins))


def keys_of(number: int, keys: int) -> Keys:
    """New bytes, as the persistence plugins make them."""
    raw = number.to_bytes(4, "big")
    if keys == 1:
        return (b"addr:" + raw,)
    return (b"spi:" + raw + raw, b"tuple:" + raw + b"\x01\xf4", b"tuple:" + raw + b"\x11\x94")


def batches(numbers: Iterable[int], keys: int) -> Iterator[list[Keys]]:
    """Keys, made outside of what is timed."""
    numbers = iter(numbers)
    while batch := [keys_of(number, keys) for number in islice(numbers, 1000)]:
        yield batch


class Longest:
    """Measures steps and keeps the longest, in nanoseconds on each clock."""

    def __init__(self) -> None:
        self.wall = self.cpu = self.total = 0

    def __enter__(self) -> None:
        self._cpu, self._wall = thread_time_ns(), perf_counter_ns()

    def __exit__(self, *_: object) -> None:
        wall, cpu = perf_counter_ns() - self._wall, thread_time_ns() - self._cpu
        self.wall, self.cpu = max(self.wall, wall), max(self.cpu, cpu)
        self.total += cpu


class Meter:
    """Adds a row to the report for each kind of step."""

    def __init__(self, report: Report) -> None:
        self._report = report
        self._collection = Longest()
        gc.callbacks.append(self._collected)

    def calls(self, step: str, call: Callable[[T], object], batches: Iterable[Sequence[T]]) -> None:
        """One call for each item of each batch."""
        longest = Longest()
        count = whole = total = 0
        for number, batch in enumerate(batches):
            count += len(batch)
            if number % 4 != 3:
                for item in batch:
                    with longest:
                        call(item)
            else:
                start = thread_time_ns()
                for item in batch:
                    call(item)
                total += thread_time_ns() - start
                whole += len(batch)
        self._add(step, count, total / whole if whole else longest.total / count, longest)

    def steps(self, step: str, call: Callable[[], bool], pins: int) -> None:
        """Calls until there is nothing more to do; ``pins`` is how many that concerns."""
        longest = Longest()
        more = True
        while more:
            with longest:
                more = call()
        self._add(step, pins, longest.total / pins, longest)

    def _add(self, step: str, count: int, mean: float, longest: Longest) -> None:
        self._report.rows.append(Row(step, count, mean, longest.wall / 1e6, longest.cpu / 1e6))

    def _collected(self, phase: str, _: dict[str, int]) -> None:
        if phase == "start":
            self._collection.__enter__()
        else:
            self._collection.__exit__()
            self._report.collections += 1
            self._report.longest_collection_ms = self._collection.cpu / 1e6


def resident() -> int:
    """Bytes of memory in use."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def start(report: Report) -> tuple[Meter, int]:
    """The daemon's garbage collection policy, once the table is made; a meter, and the memory in use."""
    gc.collect()
    gc.freeze()
    return Meter(report), resident()


def measure_table(pins: int, keys: int) -> Report:
    """The affinity table with pins of so many keys."""
    report = Report("affinity table", pins, keys)
    servers = [Server(f"gw{i}") for i in range(SERVERS)]
    changes: deque[object] = deque(maxlen=1000)
    table: AffinityTable[Server] = AffinityTable("ike", pins, TIMEOUT, changes.append)

    def put(keys: Keys) -> None:
        table.put(keys, servers[keys[0][-1] % SERVERS], 10)

    meter, before = start(report)
    meter.calls("nothing", lambda _: None, batches(range(pins), keys))
    meter.calls("insert", put, batches(range(pins), keys))
    report.bytes_per_pin = (resident() - before) / pins
    meter.calls("get", lambda keys: table.get(keys[0]), batches(scattered(pins), keys))
    meter.calls("get, a miss", lambda keys: table.get(keys[0]), batches(range(pins, 2 * pins), keys))
    meter.calls("touch", lambda keys: table.touch(keys[-1], 20), batches(scattered(pins), keys))
    meter.calls("full collection", lambda _: gc.collect(), [range(10)])
    meter.calls("page of 100", table.pins, [range(0, pins, 1000)] * 2)
    meter.steps("file again", lambda: table.expire(10 + TIMEOUT, STEP), pins)
    meter.calls("insert when full", put, batches(range(pins, pins + pins // 10), keys))
    pinned = servers[0].pinned
    meter.steps("clear a server", lambda: table.clear(servers[0]) == 0, pinned)
    meter.steps("sweep", lambda: table.sweep(STEP), pinned)
    left = len(table)
    meter.steps("expire", lambda: table.expire(20 + TIMEOUT, STEP), left)
    assert len(table) == sum(server.pinned for server in servers) == 0
    meter.calls("insert, slots reused", put, batches(range(2 * pins, 3 * pins), keys))
    report.bytes_when_reused = (resident() - before) / pins
    return report


def measure_plain(pins: int, keys: int) -> Report:
    """The older way."""
    report = Report("dictionary of objects", pins, keys)
    server = Server("gw0")
    table = Plain()
    meter, before = start(report)
    meter.calls("insert", lambda keys: table.put(keys, server, 10), batches(range(pins), keys))
    report.bytes_per_pin = (resident() - before) / pins
    meter.calls("get", lambda keys: table.get(keys[0]), batches(scattered(pins), keys))
    meter.calls("touch", lambda keys: table.touch(keys[-1], 20), batches(scattered(pins), keys))
    meter.calls("full collection", lambda _: gc.collect(), [range(10)])
    return report


def show(console: Console, report: Report) -> None:
    """One table on the terminal."""
    each = f"{report.keys} key{'s' if report.keys > 1 else ''} each"
    reused = (
        f"{report.bytes_when_reused:.0f} bytes when slots are reused; " if report.bytes_when_reused else ""
    )
    table = Table(
        "step",
        title=f"{report.name}: {report.pins:,} pins, {each}, of {report.bytes_per_pin:.0f} bytes",
        caption=f"{reused}{report.collections} collections, the longest {report.longest_collection_ms:.2f} ms",
    )
    for column in ("times", "mean ns", "longest ms", "ms of CPU"):
        table.add_column(column, justify="right")
    for row in report.rows:
        figures = (
            f"{row.count:,}",
            f"{row.mean_ns:,.0f}",
            f"{row.longest_ms:.3f}",
            f"{row.longest_cpu_ms:.3f}",
        )
        table.add_row(row.step, *figures, style="red" if row.longest_cpu_ms > MAX_STEP_MS else "")
    console.print(table)


def alone(measure: Callable[[int, int], Report], pins: int, keys: int) -> Report:
    """Runs it in a process of its own."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(measure, pins, keys).result()


def least(rounds: Sequence[Report]) -> Report:
    """The least of each figure of time; the most of each figure of memory."""
    rows = []
    for same in zip(*(report.rows for report in rounds), strict=True):
        times = ((row.mean_ns, row.longest_ms, row.longest_cpu_ms) for row in same)
        rows.append(Row(same[0].step, same[0].count, *map(min, zip(*times, strict=True))))
    return replace(
        rounds[0],
        rows=rows,
        bytes_per_pin=max(report.bytes_per_pin for report in rounds),
        bytes_when_reused=max(report.bytes_when_reused for report in rounds),
        longest_collection_ms=min(report.longest_collection_ms for report in rounds),
    )


def main() -> int:
    """Measures, shows, and says by the exit code whether the aims are met."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--pins", type=int, default=1_000_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there too")
    options = parser.parse_args()
    console = Console()
    reports = []
    for measure, keys in ((measure_plain, 1), (measure_table, 1), (measure_table, 3)):
        reports.append(least([alone(measure, options.pins, keys) for _ in range(options.rounds)]))
        show(console, reports[-1])
    if options.json:
        machine = {
            "python": platform.python_version(),
            "machine": platform.platform(),
            "cpus": os.cpu_count(),
        }
        options.json.write_text(json.dumps({**machine, "tables": [asdict(r) for r in reports]}, indent=2))
    single = reports[1]
    longest = max(row.longest_cpu_ms for row in single.rows)
    met = max(single.bytes_per_pin, single.bytes_when_reused) <= MAX_BYTES and longest <= MAX_STEP_MS
    console.print(f"aims (at most {MAX_BYTES} bytes, {MAX_STEP_MS} ms): {'met' if met else 'missed'}")
    return 0 if met else 1


if __name__ == "__main__":
    sys.exit(main())
