"""The state directory: what is restored after a crash at any moment, and what a bad disk does."""

from __future__ import annotations

import os
import resource
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path

import pytest
import trio

from sapin.core.affinity import Put
from sapin.core.dataplane.recovery import KEPT
from sapin.core.dataplane.store import COMPACT_AT, Restored, Store, StoreError
from sapin.core.journal import FlowOpened, Record, Tick, frames

SERVERS = ("gw1", "gw2", "gw3")
CLIENT, UPSTREAM = b"\x0a\0\0\x01", b"\x7f\0\0\x01"


def put(*keys: bytes, server: str = "gw1", since: int = 1) -> Put:
    return Put("ike", keys, server, since)


def flow(port: int, upstream_port: int = 30_000) -> FlowOpened:
    return FlowOpened("ike", CLIENT, port, b"", "gw1", UPSTREAM, upstream_port, b"", 7)


@contextmanager
def opened(directory: Path, clock: Callable[[], float] | None = None) -> Iterator[tuple[Store, Restored]]:
    with closing(Store(directory, clock) if clock else Store(directory)) as store:
        store.open()
        yield store, store.load()


def write(directory: Path, *batches: Sequence[Record]) -> None:
    """What a daemon with these flushes leaves."""
    with opened(directory) as (store, _):
        for batch in batches:
            for record in batch:
                store.append(record)
            store.flush()
        assert store.failed is None


def load(directory: Path) -> Restored:
    with opened(directory) as (_, restored):
        return restored


def keys_of(restored: Restored) -> set[bytes]:
    return {key for pins in restored.pins.values() for pin in pins for key in pin.keys}


def live(*records: Record) -> Callable[[], Iterator[Sequence[Record]]]:
    return lambda: iter([records])


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return tmp_path / "state"


class TestDirectory:
    def test_is_made_for_its_owner_alone(self, directory: Path) -> None:
        write(directory / "deeper", [put(b"a")])
        assert stat.S_IMODE((directory / "deeper").stat().st_mode) == 0o700
        assert names(directory / "deeper") == ["journal-1", "lock"]
        for path in (directory / "deeper").iterdir():
            assert stat.S_IMODE(path.stat().st_mode) == 0o600

    def test_has_one_daemon(self, directory: Path) -> None:
        held = rf"{directory} is in use by process {os.getpid()}: stop it"
        with opened(directory), pytest.raises(StoreError, match=held):
            Store(directory).open()
        load(directory)

    def test_says_why_it_cannot_be_used(self, tmp_path: Path) -> None:
        (tmp_path / "file").touch()
        for path in (tmp_path / "file", tmp_path / "file" / "state"):
            with pytest.raises(StoreError, match=f"{path}.* cannot be used: "):
                Store(path).open()


class TestRestart:
    def test_restores_what_was_flushed(self, directory: Path) -> None:
        write(directory, [put(b"a", b"b"), flow(1)], [Tick(99), put(b"c", server="gw2"), flow(2, 30_001)])
        restored = load(directory)
        assert restored.pins == {"ike": [put(b"a", b"b"), put(b"c", server="gw2")]}
        assert restored.flows == [flow(1), flow(2, 30_001)]
        assert restored.tick == 99
        report = restored.report
        assert (report.checkpoint, report.journals, report.records) == (0, 1, 5)
        assert (report.pins, report.flows, report.torn, report.damaged) == (2, 2, 0, ())

    def test_of_nothing(self, directory: Path) -> None:
        restored = load(directory)
        assert (restored.pins, restored.flows, restored.tick) == ({}, [], 0)
        assert restored.report.damaged == ()

    def test_goes_on_in_the_same_journal(self, directory: Path) -> None:
        for key in (b"a", b"b", b"c"):
            write(directory, [put(key)])
        assert keys_of(load(directory)) == {b"a", b"b", b"c"}
        assert names(directory) == ["journal-1", "lock"]

    def test_one_flush_is_one_frame(self, directory: Path) -> None:
        write(directory, [put(b"a"), put(b"b")], [], [put(b"c")])
        read = list(frames((directory / "journal-1").read_bytes(), "journal"))
        assert [len(frame.records) for frame in read] == [0, 2, 1]

    def test_a_flush_of_any_size(self, directory: Path) -> None:
        write(directory, [put(b"%d" % n) for n in range(70_000)])
        assert load(directory).report.pins == 70_000

    def test_of_a_closed_store_has_what_was_only_appended(self, directory: Path) -> None:
        with opened(directory) as (store, _):
            store.append(put(b"a"))
        assert keys_of(load(directory)) == {b"a"}


class TestDamage:
    """The middle of a file is wrong: what is before it is used, and the file is kept."""

    @pytest.fixture
    def damaged(self, directory: Path) -> Path:
        write(directory, [put(b"a")], [put(b"b")], [put(b"c")])
        path = directory / "journal-1"
        data = bytearray(path.read_bytes())
        data[[frame.end for frame in frames(bytes(data), "journal")][1] + 14] ^= 1
        path.write_bytes(data)
        return path

    def test_is_reported_and_kept(self, damaged: Path, directory: Path) -> None:
        before = damaged.read_bytes()
        restored = load(directory)
        assert keys_of(restored) == {b"a"}
        (damage,) = restored.report.damaged
        assert (damage.file, damage.kept) == ("journal-1", "journal-1.damaged")
        assert damage.offset + damage.ignored == len(before)
        assert "checksum" in str(damage)
        assert "kept as journal-1.damaged" in str(damage)
        assert (directory / "journal-1.damaged").read_bytes() == before

    def test_costs_no_later_record(self, damaged: Path, directory: Path) -> None:
        write(directory, [put(b"d")])
        restored = load(directory)
        assert keys_of(restored) == {b"a", b"d"}
        assert len(restored.report.damaged) == 1
        assert names(directory) == ["journal-1", "journal-1.damaged", "journal-2", "lock"]

    async def test_is_over_after_a_checkpoint(self, damaged: Path, directory: Path) -> None:
        with opened(directory) as (store, _):
            assert store.checkpoint_due
            await store.maintain(live(put(b"a")), 5)
            assert store.failed is None
            assert not store.checkpoint_due
        restored = load(directory)
        assert (keys_of(restored), restored.report.damaged) == ({b"a"}, ())
        assert names(directory) == ["checkpoint-2", "journal-1.damaged", "journal-2", "lock"]

    def test_keeps_so_many_files_and_no_more(self, damaged: Path, directory: Path) -> None:
        for number in range(KEPT):
            (directory / f"journal-{100 + number}.damaged").touch()
        (damage,) = load(directory).report.damaged
        assert damage.kept is None
        assert "not kept" in str(damage)

    async def test_of_a_checkpoint_costs_the_rest_of_it(self, directory: Path) -> None:
        with opened(directory) as (store, _):
            chunks = [[put(b"a")], [put(b"b")], [put(b"c")]]
            await store.checkpoint(lambda: iter(chunks), 5)
            store.append(put(b"d"))
        path = directory / "checkpoint-2"
        data = bytearray(path.read_bytes())
        data[[frame.end for frame in frames(bytes(data), "checkpoint")][2] + 14] ^= 1
        path.write_bytes(data)
        restored = load(directory)
        assert keys_of(restored) == {b"a", b"d"}
        assert [damage.file for damage in restored.report.damaged] == ["checkpoint-2"]

    @pytest.mark.parametrize("first", [1, 2])
    async def test_of_a_checkpoint_costs_nothing_while_the_older_files_are_there(
        self, directory: Path, first: int
    ) -> None:
        older = {}
        with opened(directory) as (store, _):
            for key in (b"a", b"b")[:first]:
                older = {path: path.read_bytes() for path in directory.iterdir()}
                store.append(put(key))
                store.flush()
                older |= {path: path.read_bytes() for path in directory.iterdir()}
                await store.checkpoint(live(put(b"a"), put(b"b")), 5)
            store.append(put(b"c"))
        for path, data in older.items():
            path.write_bytes(data)
        newest = directory / f"checkpoint-{first + 1}"
        os.truncate(newest, newest.stat().st_size - 1)
        restored = load(directory)
        assert restored.report.checkpoint == (0 if first == 1 else 2)
        assert [damage.file for damage in restored.report.damaged] == [newest.name]
        assert keys_of(restored) == ({b"a", b"c"} if first == 1 else {b"a", b"b", b"c"})

    async def test_missing_journals_are_reported(self, directory: Path) -> None:
        with opened(directory) as (store, _):
            await store.checkpoint(live(put(b"a")), 5)
        (directory / "journal-2").unlink()
        assert [str(d) for d in load(directory).report.damaged] == [
            "journal-2 at byte 0: missing; 0 bytes ignored; not kept"
        ]
        (directory / "journal-2").rename(directory / "journal-999999999")
        restored = load(directory)
        assert keys_of(restored) == {b"a"}
        assert [d.file for d in restored.report.damaged] == ["journal-2 to journal-999999998"]


class TestNewerVersion:
    def test_is_refused_with_the_remedy(self, directory: Path) -> None:
        write(directory, [put(b"a")])
        path = directory / "journal-1"
        path.write_bytes(path.read_bytes().replace(b"journal 1", b"journal 2"))
        before = path.read_bytes()
        with pytest.raises(
            StoreError, match=rf"{path} at byte 0: .*version 2.*run that version, or move {directory}"
        ):
            load(directory)
        assert path.read_bytes() == before

    def test_gives_the_lock_back(self, directory: Path) -> None:
        write(directory)
        (directory / "checkpoint-1").write_bytes(b"sapin checkpoint 9\n")
        for _ in range(2):
            with pytest.raises(StoreError, match="version 9"):
                load(directory)


@contextmanager
def full_disk(size: int) -> Iterator[None]:
    """Lets no file grow over ``size`` bytes: the kernel writes what fits, and then fails with EFBIG."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class TestBadDisk:
    async def test_costs_no_exception_and_heals(self, directory: Path) -> None:
        clock = Clock()
        with opened(directory, clock) as (store, _):
            store.append(put(b"a"))
            store.flush()
            whole = (directory / "journal-1").read_bytes()
            with full_disk(len(whole) + 10):
                store.append(put(b"b"))
                store.append(put(b"c"))
                store.flush()
            assert (directory / "journal-1").read_bytes() == whole
            assert store.failed == f"{directory}: File too large"
            store.append(put(b"d"))
            store.flush()
            assert (store.statistics.records, store.statistics.lost, store.statistics.failures) == (1, 3, 1)

            state = live(put(b"a"), put(b"b"), put(b"c"), put(b"d"))
            await store.maintain(state, 5)
            assert store.failed is not None
            clock.now = 1.0
            await store.maintain(state, 5)
            assert store.failed is None
            assert not store.checkpoint_due
            store.append(put(b"e"))
        restored = load(directory)
        assert keys_of(restored) == {b"a", b"b", b"c", b"d", b"e"}
        assert restored.report.damaged == ()

    async def test_is_tried_again_less_and_less_often(self, directory: Path) -> None:
        clock = Clock()
        attempts = []
        with opened(directory, clock) as (store, _), full_disk(10):
            store.append(put(b"a"))
            store.flush()
            for second in range(200):
                clock.now = float(second)
                failures = store.statistics.failures
                await store.maintain(live(put(b"a")), 5)
                if store.statistics.failures > failures:
                    attempts.append(second)
            assert attempts == [1, 3, 7, 15, 31, 63, 123, 183]
            assert names(directory) == ["journal-1", "journal-2", "lock"]

    async def test_that_takes_the_journal_but_no_checkpoint(self, directory: Path) -> None:
        clock = Clock()
        big = [put(b"%d" % n) for n in range(1000)]
        with opened(directory, clock) as (store, _):
            store.append(put(b"a"))
            with full_disk(1000):
                await store.checkpoint(live(*big), 5)
                assert store.failed == f"{directory}: File too large"
                store.append(put(b"b"))
                store.flush()
                clock.now = 9.0
                await store.maintain(live(*big), 5)
            assert store.statistics.lost == 0
            assert names(directory) == ["checkpoint-2.tmp", "journal-1", "journal-2", "lock"]
            assert keys_of(load_copy(directory)) == {b"a", b"b"}
            clock.now = 99.0
            await store.maintain(live(*big), 5)
            assert store.failed is None
            assert names(directory) == ["checkpoint-2", "journal-2", "lock"]
        assert load(directory).report.pins == 1002

    async def test_that_takes_no_more_while_a_checkpoint_is_written(self, directory: Path) -> None:
        clock = Clock()
        with opened(directory, clock) as (store, _):

            def disk_full_meanwhile() -> Iterator[Sequence[Record]]:
                yield [put(b"a")]
                with full_disk(1):
                    store.append(put(b"b"))
                    store.flush()
                yield [put(b"b")]

            await store.checkpoint(disk_full_meanwhile, 5)
            assert store.failed == f"{directory}: File too large"
            assert store.statistics.failures == 1
            assert "checkpoint-2" not in names(directory)
            clock.now = 1.0
            await store.maintain(live(put(b"a"), put(b"b")), 5)
            assert store.failed is None
        assert keys_of(load(directory)) == {b"a", b"b"}

    async def test_leaves_the_files_of_others_alone(self, directory: Path) -> None:
        with opened(directory) as (store, _):
            for name in ("overrides.json", "overrides.tmp"):
                (directory / name).touch()
            await store.checkpoint(live(), 5)
        assert names(directory) == ["checkpoint-2", "journal-2", "lock", "overrides.json", "overrides.tmp"]

    async def test_at_a_start_costs_nothing_that_was_there(self, directory: Path) -> None:
        clock = Clock()
        write(directory, [put(b"a")], [put(b"b")])
        os.truncate(directory / "journal-1", 0)
        with full_disk(1), opened(directory, clock) as (store, restored):
            assert (keys_of(restored), store.failed) == (set(), f"{directory}: File too large")
        with opened(directory) as (store, restored):
            assert (keys_of(restored), store.failed) == (set(), None)

    async def test_whose_directory_somebody_deleted(self, directory: Path) -> None:
        clock = Clock()
        with opened(directory, clock) as (store, _):
            shutil.rmtree(directory)
            await store.maintain(live(), 5)
            assert store.failed == f"{directory}: journal-1 was deleted"
            directory.mkdir()
            clock.now = 1.0
            await store.maintain(live(put(b"a")), 5)
            assert store.failed is None
            assert keys_of(load_copy(directory)) == {b"a"}

    async def test_what_cannot_be_encoded_fails_the_store_and_nothing_else(self, directory: Path) -> None:
        with opened(directory) as (store, _):
            store.append(put(b"a"))
            store.append(Tick(2**64))
            store.flush()
            assert store.failed is not None
            assert "OverflowError" in store.failed
            await store.checkpoint(lambda: iter([[Tick(2**64)]]), 5)
            assert "OverflowError" in store.failed
            await store.checkpoint(live(put(b"a")), 5)
            assert store.failed is None
        assert keys_of(load(directory)) == {b"a"}


def load_copy(directory: Path) -> Restored:
    """What a restart would find while the daemon is running."""
    with tempfile.TemporaryDirectory() as path:
        shutil.copytree(directory, Path(path) / "copy")
        return load(Path(path) / "copy")


class TestCheckpoint:
    async def test_is_due_when_the_journal_has_grown(self, directory: Path) -> None:
        with opened(directory) as (store, _):
            assert not store.checkpoint_due
            store.append(put(b"x" * COMPACT_AT))
            store.flush()
            assert store.checkpoint_due
            await store.maintain(live(put(b"a")), 77)
            assert not store.checkpoint_due
            assert store.statistics.checkpoints == 1
        restored = load(directory)
        assert (keys_of(restored), restored.tick, restored.report.checkpoint) == ({b"a"}, 77, 2)

    async def test_of_a_large_state_lets_the_journal_grow_as_much(self, directory: Path) -> None:
        with opened(directory) as (store, _):
            await store.checkpoint(live(put(b"x" * COMPACT_AT)), 5)
            for due in (False, False, True):
                assert not store.checkpoint_due
                store.append(put(b"y" * COMPACT_AT))
                store.flush()
                assert store.checkpoint_due == due

    async def test_that_is_cancelled_is_begun_again(self, directory: Path) -> None:
        with opened(directory) as (store, _):
            store.append(put(b"a"))
            with trio.CancelScope() as scope:

                def cancelled() -> Iterator[Sequence[Record]]:
                    yield [put(b"a")]
                    scope.cancel()
                    yield []

                await store.checkpoint(cancelled, 5)
            assert scope.cancelled_caught
            assert store.checkpoint_due
            await store.maintain(live(put(b"a")), 5)
            assert names(directory) == ["checkpoint-2", "journal-2", "lock"]
        assert keys_of(load(directory)) == {b"a"}
