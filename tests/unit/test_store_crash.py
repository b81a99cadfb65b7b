"""A crash at any moment restores what was flushed, and nothing else."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, suppress
from pathlib import Path
from random import Random

import pytest
import trio

from sapin.core.affinity import AffinityTable, Put
from sapin.core.dataplane.store import Restored, Store
from sapin.core.journal import FlowClosed, FlowOpened, Record, frames

SERVERS = ("gw1", "gw2", "gw3")


def put(key: bytes) -> Put:
    return Put("ike", (key,), "gw1", 1)


def flow(port: int, upstream_port: int) -> FlowOpened:
    return FlowOpened("ike", b"\x0a\0\0\x01", port, b"", "gw1", b"\x7f\0\0\x01", upstream_port, b"", 7)


def load(directory: Path) -> Restored:
    with closing(Store(directory)) as store:
        store.open()
        return store.load()


def write(directory: Path, *batches: Sequence[Record]) -> None:
    """What a daemon with these flushes leaves."""
    with closing(Store(directory)) as store:
        store.open()
        store.load()
        for batch in batches:
            for record in batch:
                store.append(record)
            store.flush()


def keys_of(restored: Restored) -> set[bytes]:
    return {key for pins in restored.pins.values() for pin in pins for key in pin.keys}


@pytest.fixture
def memory() -> Iterator[Path]:
    """A directory in memory where there is one: thousands of loads."""
    with tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as path:
        yield Path(path)


class TestTornEnd:
    def test_at_every_byte(self, memory: Path) -> None:
        directory = memory / "state"
        write(directory, [put(b"a")], [put(b"b"), flow(1, 2)], [put(b"c")])
        path = directory / "journal-1"
        whole = path.read_bytes()
        ends = [frame.end for frame in frames(whole, "journal")]
        for cut in range(len(whole) + 1):
            path.write_bytes(whole[:cut])
            restored = load(directory)
            count = sum(end <= cut for end in ends)
            good = ends[count - 1] if count else 0
            assert keys_of(restored) == set([b"a", b"b", b"c"][: max(count - 1, 0)])
            assert (restored.report.torn, restored.report.damaged) == (cut - good, ())
            assert path.stat().st_size == max(good, ends[0])

    def test_what_is_written_after_it_counts(self, tmp_path: Path) -> None:
        directory = tmp_path / "state"
        write(directory, [put(b"a")], [put(b"b")])
        path = directory / "journal-1"
        os.truncate(path, path.stat().st_size - 1)
        write(directory, [put(b"c")])
        assert keys_of(load(directory)) == {b"a", b"c"}


SEEDS = int(os.environ.get("SAPIN_CRASH_SEEDS", "3"))
"""Lives of a daemon; a hundred take two minutes."""

Image = dict[str, bytes]
"""The files of a directory."""
Pins = frozenset[tuple[tuple[bytes, ...], str, int]]
Truth = tuple[Pins, frozenset[FlowOpened]]


def image_of(directory: Path) -> Image:
    """What is there now; a file may vanish while it is looked at, as it may when power goes."""
    image = {}
    for path in directory.iterdir():
        with suppress(FileNotFoundError):
            image[path.name] = path.read_bytes()
    return image


def truth_of(restored: Restored) -> Truth:
    pins = frozenset((p.keys, p.server, p.since) for pins in restored.pins.values() for p in pins)
    return pins, frozenset(restored.flows)


class Member:
    def __init__(self, name: str) -> None:
        self.name = name
        self.pinned = 0


class WatchedStore(Store):
    """Lets somebody look before and after each flush, those of checkpoints too."""

    def watch(self, around: Callable[[Callable[[], None]], None]) -> None:
        self._around = around

    def flush(self) -> None:
        self._around(super().flush)


class Daemon(trio.abc.Instrument):
    """Changes a real affinity table and flows at random, and notes what a crash would leave at every moment.

    ``moments`` has the files after each step of the scheduler, and what the last flush had said by then.
    """

    def __init__(self, store: WatchedStore, random: Random) -> None:
        self.store = store
        store.watch(self.flush)
        self.random = random
        self.moments: list[tuple[Image, Truth]] = []
        self._members = [Member(name) for name in SERVERS]
        self._table: AffinityTable[Member] = AffinityTable("ike", limit=7, timeout=20, feed=store.append)
        self._flows: dict[int, FlowOpened] = {}
        self._now = 0
        self._diligence = random.choice([0.05, 0.2, 0.8])
        self._flushed: Truth = (frozenset(), frozenset())

    def after_task_step(self, task: trio.lowlevel.Task) -> None:
        self.note()

    def note(self) -> None:
        moment = image_of(self.store.directory), self._flushed
        if not self.moments or self.moments[-1] != moment:
            self.moments.append(moment)

    def truth(self) -> Truth:
        pins = self._table.pins(limit=1000).pins
        return frozenset((p.keys, p.server, p.since) for p in pins), frozenset(self._flows.values())

    def live(self) -> Iterator[Sequence[Record]]:
        """The state in small chunks, and changes between them."""
        start: int | None = 0
        while start is not None:
            page = self._table.pins(start, 2)
            yield [Put("ike", p.keys, p.server, p.since) for p in page.pins]
            start = page.next
            self.change(self.random.randrange(3))
        for port in list(self._flows):
            yield [self._flows[port]] if port in self._flows else []
            self.change(self.random.randrange(2))
        for _ in range(3):
            self._change()
        # The checkpoint ends with changes that no flush has told yet.
        yield [Put("ike", p.keys, p.server, p.since) for p in self._table.pins(limit=1000).pins]

    def change(self, times: int) -> None:
        for _ in range(times):
            self._now += 1
            self._change()
        if self.random.random() < self._diligence:
            self.store.flush()

    def flush(self, flush: Callable[[], None]) -> None:
        """Also notes the moments in the middle of the write: what it says is not there yet."""
        before = image_of(self.store.directory)
        flush()
        for name, data in image_of(self.store.directory).items():
            for cut in range(len(before[name]) + 1, len(data), 5):
                self.moments.append((before | {name: data[:cut]}, self._flushed))
        self._flushed = self.truth()
        self.note()

    def _change(self) -> None:
        random, member = self.random, self.random.choice(self._members)
        keys = [b"k:%d" % random.randrange(12) for _ in range(random.randint(1, 3))]
        port = random.randrange(5)
        match random.randrange(8):
            case 0 | 1 | 2:
                self._table.put(keys, member, self._now)
            case 3:
                self._table.remove(keys[0])
            case 4:
                self._table.clear(member)
            case 5:
                self._table.expire(self._now, 5)
            case 6:
                self._flows[port] = flow(port, random.randrange(2**16))
                self.store.append(self._flows[port])
            case 7 if port in self._flows:
                self.store.append(FlowClosed(*self._flows.pop(port)[:4]))


async def life_of(directory: Path, seed: int) -> Daemon:
    """A daemon that changes its state all the time, and writes a checkpoint three times meanwhile."""
    with closing(WatchedStore(directory)) as store:
        store.open()
        store.load()
        daemon = Daemon(store, Random(seed))
        daemon.change(20)
        store.flush()
        trio.lowlevel.add_instrument(daemon)
        async with trio.open_nursery() as nursery:

            async def go_on_changing() -> None:
                for _ in range(1000):
                    daemon.change(1)
                    await trio.lowlevel.checkpoint()

            nursery.start_soon(go_on_changing)
            for _ in range(3):
                daemon.change(5)
                await store.checkpoint(daemon.live, 5)
                assert store.failed is None
            nursery.cancel_scope.cancel()
        trio.lowlevel.remove_instrument(daemon)
    return daemon


@pytest.mark.parametrize("seed", range(SEEDS))
async def test_a_crash_at_any_moment_restores_what_was_flushed(memory: Path, seed: int) -> None:
    """Above all while a checkpoint is being written, and the state that goes into it is changing."""
    daemon = await life_of(memory / "state", seed)
    stages = set()
    for number, (image, flushed) in enumerate(daemon.moments):
        crashed = memory / str(number)
        crashed.mkdir()
        for name, data in image.items():
            (crashed / name).write_bytes(data)
        restored = load(crashed)
        assert truth_of(restored) == flushed, sorted(image)
        assert restored.report.damaged == ()
        stages.add(tuple(name for name in sorted(image) if name != "lock"))
    assert {
        ("journal-1",),
        ("journal-1", "journal-2"),
        ("checkpoint-2.tmp", "journal-1", "journal-2"),
        ("checkpoint-2", "journal-1", "journal-2"),
        ("checkpoint-2", "journal-2"),
        ("checkpoint-2", "checkpoint-3.tmp", "journal-2", "journal-3"),
        ("checkpoint-2", "checkpoint-3", "journal-2", "journal-3"),
    } <= stages


LIFE = """
import sys, trio
from pathlib import Path
from sapin.core.affinity import Put
from sapin.core.dataplane.store import Store

async def main():
    store = Store(Path(sys.argv[1]))
    store.open()
    pins = [p for pins in store.load().pins.values() for p in pins]
    number = len(pins)

    def live():
        for at in range(0, len(pins), 100):
            yield pins[at : at + 100]

    async def checkpoints():
        while True:
            await store.checkpoint(live, 5)
            assert store.failed is None, store.failed

    async with trio.open_nursery() as nursery:
        nursery.start_soon(checkpoints)
        while True:
            for _ in range(1 + number % 7):
                pins.append(Put("ike", (b"%d" % number,), "gw1", number))
                store.append(pins[-1])
                number += 1
            store.flush()
            print(number, flush=True)
            await trio.lowlevel.checkpoint()

trio.run(main)
"""


def test_kill_minus_nine_costs_nothing_that_was_flushed(tmp_path: Path) -> None:
    """A daemon that flushes and writes checkpoints all the time is killed again and again."""
    random = Random(1)
    directory, said = tmp_path / "state", tmp_path / "said"
    acknowledged = 0
    for _ in range(4):
        with said.open("wb") as stdout:
            daemon = subprocess.Popen([sys.executable, "-c", LIFE, str(directory)], stdout=stdout)
        try:
            while daemon.poll() is None and not said.stat().st_size:
                time.sleep(0.01)
            time.sleep(random.uniform(0, 0.2))
        finally:
            daemon.kill()
            daemon.wait(timeout=10)
        lines = said.read_bytes().splitlines(keepends=True)
        last = max(int(line) for line in lines if line.endswith(b"\n"))
        assert last >= acknowledged
        acknowledged = last
        restored = load(directory)
        found = {int(key) for key in keys_of(restored)}
        assert found == set(range(len(found)))
        assert len(found) >= acknowledged
        assert restored.report.damaged == ()
    assert acknowledged > 100
