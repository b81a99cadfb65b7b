"""What a resync costs: a snapshot of all pins from one node's table into another's, and to its journal.

    python tests/bench/resync.py [--pins 1000000] [--directory DIR]

One thread does the work of both nodes, step by step as a daemon does, without a link between them. So the sum is what two CPUs share in a
pair, and a resync takes at least what the slower side does. The second resync finds a standby that has all but a few pins.
"""

from __future__ import annotations

import argparse
import gc
import sys
import tempfile
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter, thread_time

from sapin.cluster.replication import Sink, Source, Sync
from sapin.cluster.wire import (
    NEWEST,
    OLDEST,
    Ack,
    Begin,
    Delta,
    End,
    Hello,
    Join,
    Mark,
    Nak,
    Record,
    Resync,
    decode,
    encode,
)
from sapin.core.dataplane.store import Store
from sapin.core.pins import Put, Removed
from sapin.core.replicated import ReplicatedTable

CHUNK, LOOKS = 250, 2_000
"""As :mod:`sapin.core.dataplane.replica` has them."""
MAX_STEP_MS, MAX_SECONDS = 2.0, 2.0
"""The aims."""
SERVERS = 4


@dataclass(eq=False)
class Server:
    name: str
    pinned: int = 0


class TableReplica:
    """One affinity group's table, with the journal if there is one; fulfils :class:`~sapin.cluster.replication.Replica`."""

    def __init__(self, limit: int, store: Store | None = None) -> None:
        self.table: ReplicatedTable[Server] = ReplicatedTable("ike", limit, 28_800)
        self.servers = {name: Server(name) for name in (f"gw{n}" for n in range(SERVERS))}
        self._store = store

    def walk(self) -> Iterator[Sequence[Record]]:
        start: int | None = 0
        while start is not None:
            part = self.table.puts(start, CHUNK)
            yield part.puts
            start = part.next

    def states(self) -> Sequence[Record]:
        return []

    def apply(self, records: Sequence[Record]) -> None:
        changes = [record for record in records if isinstance(record, Put | Removed)]
        self._journal(self.table.apply(changes, self.servers, 100))

    def begin(self) -> None:
        self.table.begin()

    def finish(self) -> bool:
        gone, done = self.table.finish(LOOKS)
        self._journal(gone)
        return done

    def digest(self) -> int:
        return self.table.digest()

    def _journal(self, changes: Sequence[Put | Removed | object]) -> None:
        if self._store is not None:
            for change in changes:
                self._store.append(change)  # type: ignore[arg-type]
            self._store.flush()


def pin(number: int) -> Put:
    keys = (b"address:" + number.to_bytes(4, "big"),)
    return Put("ike", keys, f"gw{number * 2_654_435_761 % 2**32 * SERVERS >> 32}", 1_700_000_000)


@dataclass
class Cost:
    """CPU of one kind of step."""

    seconds: float = 0.0
    longest: float = 0.0

    def add(self, began: float) -> float:
        now = thread_time()
        self.seconds += now - began
        self.longest = max(self.longest, now - began)
        return now


@dataclass
class Result:
    make: Cost = field(default_factory=Cost)
    take: Cost = field(default_factory=Cost)
    finish: Cost = field(default_factory=Cost)
    wall: float = 0.0
    messages: int = 0
    size: int = 0


def resync(active: TableReplica, standby: TableReplica, version: int) -> Result:
    """Bring a standby that is not whole up to date, one message at a time."""
    source, sink, result = Source(1, active), Sink(standby), Result()
    sink.connect(1)
    hello = Hello(1, 2, "c", "lb-b", 2, 1, 1, "standby", 100, 0, 0, 0, False, standby.digest(), 0.0)
    began = perf_counter()
    source.connect(hello)
    outgoing: deque[bytes] = deque()
    while source.state is not Sync.SYNCED:
        at = thread_time()
        for message in source.messages():
            data = encode(message, version)
            result.messages += 1
            result.size += len(data)
            outgoing.append(data)
            at = result.make.add(at)
        while outgoing:
            at = thread_time()
            answer = take(sink, outgoing.popleft(), version)
            result.take.add(at)
            hear(source, answer)
        while sink.busy:
            at = thread_time()
            answer = sink.step()
            result.finish.add(at)
            hear(source, answer)
    result.wall = perf_counter() - began
    if standby.digest() != active.digest():
        raise AssertionError("the tables differ after a resync")
    return result


def take(sink: Sink, data: bytes, version: int) -> Ack | Nak | Resync | None:
    message = decode(data, version)
    assert isinstance(message, Delta | Begin | End | Mark | Join)
    return sink.received(message, True, 0.0)


def hear(source: Source, answer: Ack | Nak | Resync | None) -> None:
    if isinstance(answer, Ack):
        source.acknowledged(answer)


def show(name: str, result: Result) -> None:
    costs = (result.make, result.take, result.finish)
    print(
        f"{name:34} {result.wall:6.2f}  "
        + "  ".join(f"{cost.seconds:5.2f} ({cost.longest * 1e3:4.2f})" for cost in costs)
        + f"  {result.size / 1e6:6.1f} {result.messages:6}",
        flush=True,
    )


def run(pins: int, directory: Path) -> bool:
    """Every case once; whether the aims are met by this release's version."""
    active = TableReplica(pins)
    for at in range(0, pins, CHUNK):
        active.apply([pin(number) for number in range(at, min(at + CHUNK, pins))])
    print(f"{pins:,} pins: seconds, of CPU for each kind of step (its longest in ms), MB, messages")
    print(
        f"{'':34} {'wall':>6}  {'active':>12}  {'standby':>12}  {'finishing':>12}  {'MB':>6} {'messages':>6}"
    )
    met = True
    for version in range(OLDEST, NEWEST + 1):
        with closing(Store(directory / str(version))) as store:
            store.open()
            store.load()
            standby = TableReplica(pins, store)
            gc.collect()
            gc.freeze()
            result = resync(active, standby, version)
            show(f"version {version}, into an empty table", result)
            for number in range(0, pins, max(pins // 1_000, 1)):
                standby.apply([Removed("ike", pin(number).keys, pin(number).server, "deleted")])  # type: ignore[arg-type]
            again = resync(active, standby, version)
            show(f"version {version}, all but 1,000 are there", again)
        longest = max(
            cost.longest for each in (result, again) for cost in (each.make, each.take, each.finish)
        )
        met = longest * 1e3 <= MAX_STEP_MS and result.wall <= MAX_SECONDS
    print(
        f"aims ({MAX_SECONDS:g} s even on one CPU, steps of {MAX_STEP_MS:g} ms): {'met' if met else 'missed'}"
    )
    return met


def main() -> int:
    """Measures, shows, and says by the exit code whether the aims are met."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--pins", type=int, default=1_000_000)
    parser.add_argument("--directory", type=Path, help="where the journal goes; default: the temporary one")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.directory) as directory:
        return 0 if run(options.pins, Path(directory)) else 1


if __name__ == "__main__":
    sys.exit(main())
