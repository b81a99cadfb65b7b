"""What keeping pins and flows on disk costs: per new flow, per checkpoint, per restart.

    python tests/bench/journal.py [--pins 1000000] [--flows 100000] [--directory DIR]

A new flow is two records, a ``Put`` and a ``FlowOpened``. Give a directory on the disk that counts.
"""

from __future__ import annotations

import argparse
import gc
import resource
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import closing
from itertools import count
from pathlib import Path
from time import perf_counter, process_time, thread_time

import trio

from sapin.core.affinity import Put
from sapin.core.dataplane.store import Restored, Store
from sapin.core.journal import Encoder, FlowOpened, Record

CHUNK = 500
TARGET_US = 2.0
"""Packing the two records of a new flow must stay below this."""
NEW_FLOWS = 30_000
"""Per second; what is measured below is the share of a second that they take."""


def pin(number: int) -> Put:
    return Put("ike", (b"addr:" + number.to_bytes(4, "big"),), f"gw{number % 3}", 1_700_000_000 + number)


def flow(number: int) -> FlowOpened:
    client = number.to_bytes(4, "big")
    port, upstream_port = 1024 + number % 60_000, 16_384 + number % 49_000
    return FlowOpened(
        "ike",
        client,
        port,
        b"",
        f"gw{number % 3}",
        b"\x0a\0\0\x01",
        upstream_port,
        b"addr:" + client,
        1_700_000_000,
    )


def new_flows(number: int) -> list[Record]:
    return [record for n in range(number) for record in (pin(n), flow(n))]


def packing(records: list[Record], batch: int) -> float:
    """Microseconds for the two records of one flow, in frames of so many flows."""
    encode = Encoder().encode
    began = process_time()
    for at in range(0, len(records), 2 * batch):
        encode(records[at : at + 2 * batch])
    return (process_time() - began) / (len(records) / 2) * 1e6


def writing(directory: Path, records: list[Record], batch: int) -> tuple[float, float]:
    """Microseconds of CPU for one flow from append to the kernel; microseconds of the slowest flush."""
    with closing(Store(directory)) as store:
        store.open()
        store.load()
        append, flush = store.append, store.flush
        began = process_time()
        for at in range(0, len(records), 2 * batch):
            for record in records[at : at + 2 * batch]:
                append(record)
            flush()
        seconds = process_time() - began
        assert store.failed is None
        return seconds / (len(records) / 2) * 1e6, store.statistics.slowest_flush * 1e6


class State:
    """A state of that size, which changes all the time."""

    def __init__(self, pins: int, flows: int) -> None:
        self.pins = pins
        self.flows = flows

    def live(self) -> Iterator[Sequence[Record]]:
        for at in range(0, self.pins, CHUNK):
            yield [pin(number) for number in range(at, min(at + CHUNK, self.pins))]
        for at in range(0, self.flows, CHUNK):
            yield [flow(number) for number in range(at, min(at + CHUNK, self.flows))]


class Steps(trio.abc.Instrument):
    """Seconds of CPU of each of the scheduler's steps: on the wall they hold the machine's other work too."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self._began: float | None = None

    def before_task_step(self, task: trio.lowlevel.Task) -> None:
        self._began = thread_time()

    def after_task_step(self, task: trio.lowlevel.Task) -> None:
        if self._began is not None:
            self.seconds.append(thread_time() - self._began)


async def checkpoint(directory: Path, state: State) -> tuple[float, list[float], float]:
    """Seconds of a checkpoint, seconds of CPU of its steps, and seconds of the slowest flush beside it."""
    with closing(Store(directory)) as store:
        store.open()
        store.load()
        steps = Steps()

        async def flush_all_the_time() -> None:
            for first in count(0, 30):
                for number in range(first, first + 30):
                    store.append(pin(number % state.pins))
                store.flush()
                await trio.sleep(0.001)

        gc.freeze()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(flush_all_the_time)
            trio.lowlevel.add_instrument(steps)
            began = perf_counter()
            await store.checkpoint(state.live, 1_700_000_000)
            seconds = perf_counter() - began
            trio.lowlevel.remove_instrument(steps)
            nursery.cancel_scope.cancel()
        assert store.failed is None
        return seconds, sorted(steps.seconds), store.statistics.slowest_flush


def restart(directory: Path) -> Restored:
    with closing(Store(directory)) as store:
        store.open()
        return store.load()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--pins", type=int, default=1_000_000)
    parser.add_argument("--flows", type=int, default=100_000)
    parser.add_argument(
        "--directory", type=Path, help="where to make a directory for it; default: the temporary one"
    )
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.directory) as directory:
        run(Path(directory), State(arguments.pins, arguments.flows))


def run(directory: Path, state: State) -> None:
    records = new_flows(60_000)
    print(
        f"{'flows per flush':>16} {'pack µs/flow':>13} {'all µs/flow':>12} {'slowest flush µs':>17} {'of a core':>10}"
    )
    for batch in (1, 4, 16, 64, 256):
        packed = min(packing(records, batch) for _ in range(3))
        written, slowest = writing(directory / f"journal-{batch}", records, batch)
        share = written * NEW_FLOWS / 1e6
        print(f"{batch:16} {packed:13.2f} {written:12.2f} {slowest:17.0f} {share:10.1%}")
    print(
        f"target: packing below {TARGET_US} µs a flow; the last column is for {NEW_FLOWS} new flows a second\n"
    )
    del records

    seconds, steps, slowest_flush = trio.run(checkpoint, directory / "state", state)
    size = sum(path.stat().st_size for path in (directory / "state").glob("checkpoint-*"))
    print(f"checkpoint of {state.pins} pins and {state.flows} flows: {seconds:.2f} s, {size / 1e6:.0f} MB")
    print(
        f"  CPU of a step: median {steps[len(steps) // 2] * 1e3:.2f} ms, 99 % {steps[len(steps) * 99 // 100] * 1e3:.2f} ms,"
    )
    print(
        f"  longest {steps[-1] * 1e3:.2f} ms; the slowest flush meanwhile took {slowest_flush * 1e3:.2f} ms\n"
    )

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    began = process_time()
    restored = restart(directory / "state")
    seconds = process_time() - began
    memory = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    print(f"restart: {restored.report}")
    print(f"  {seconds:.2f} s of CPU, {memory:.0f} MiB more at its peak")


if __name__ == "__main__":
    main()
