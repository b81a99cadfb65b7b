"""The state directory: pins and flows on disk, so that a restart loses none of them.

Files, all of mode 0600::

    lock             held (flock) by the daemon, with its process id
    checkpoint-N     everything as it was when journal-N began, or a little later; N is 2 or more
    journal-N        what changed since, one frame per flush
    X.damaged        a file that could not be read to its end, kept for whoever wants to look

A restart reads the newest whole checkpoint N, then journal-N, journal-N+1, …, in that order.

**What can be lost.** `flush` hands its frame to the kernel before it returns, so the death of the
process, by ``kill -9`` too, costs nothing that was flushed; a flush that it interrupts is there as a
whole or not at all. A loss of power costs what the kernel had not written yet: at most what was flushed
after the last `sync`, which the runtime calls about once a second. Then a pin of that second is
unknown, or one that was removed in it is there again, until it expires. (Were a few milliseconds at the
beginning of a new journal to survive the end of the one before: a record says all of its pin, so it is
right by itself.)

**Why the writes are synchronous.** A frame is one small ``write`` into the page cache, 2 to 4 µs; a
hand-over to a thread and back costs ten times that, and replies would have to wait for it all the
same. The risk: the kernel may make a write wait, when the disk is so far behind that dirty pages are
limited, or when the file system is frozen for a backup; forwarding stands still as long. Checkpoints are
therefore synced piece by piece, and `Statistics.slowest_flush` shows what happens on a given machine. A state
directory on a network file system is asking for trouble.

**When the disk fails** (full, read-only, dying), nothing is raised into the dataplane: the store is
`failed`, says why, drops and counts records, and forwarding goes on. `maintain` tries again, with
back-off: a new journal, and a whole checkpoint, since the old files lack what was dropped. Until then a
restart would find the state of before, with what is new in the new journal.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass, replace
from errno import ENOENT
from itertools import chain
from math import inf
from pathlib import Path
from time import monotonic, perf_counter

import trio

from sapin.core.dataplane.recovery import Damaged, Report, Restored, StoreError, files, recover
from sapin.core.journal import MAX_RECORDS, Encoder, End, Record, Tick, header

__all__ = ["Damaged", "Live", "Report", "Restored", "Statistics", "Store", "StoreError"]

COMPACT_AT = 8 * 1024 * 1024
"""Bytes of journal that are always allowed before a new checkpoint."""
SYNC_EVERY = 4 * 1024 * 1024
"""Bytes of a checkpoint that may wait for the disk."""
RETRY_AT_LEAST, RETRY_AT_MOST = 1.0, 60.0
"""Seconds between attempts to get a failed store going."""
_UNWRITABLE = (OSError, ValueError, TypeError, OverflowError, KeyError)

Live = Callable[[], Iterator[Sequence[Record]]]
"""Begins a walk over the live state: ``Put`` and ``FlowOpened`` records in chunks of some hundred,
each as it is when it is asked for, and made in less than 1 ms. The state may change between two chunks, under one condition: what is
there during the whole walk is in it."""


@dataclass(slots=True)
class Statistics:
    """What a store did since it was made."""

    records: int = 0
    frames: int = 0
    bytes: int = 0
    lost: int = 0
    """Records that could not be written. The next checkpoint has what they said."""
    failures: int = 0
    checkpoints: int = 0
    slowest_flush: float = 0.0
    """Seconds that the dataplane stood still for one flush."""


class _File:
    """A file that is only appended to; ``size`` counts whole writes."""

    def __init__(self, path: Path, size: int) -> None:
        """Opens it and cuts it off at ``size``."""
        self.path = path
        self.size = size
        self._synced = 0
        self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        try:
            os.ftruncate(self._fd, size)
        except OSError:
            self.close()
            raise

    @classmethod
    def create(cls, path: Path, name: str) -> _File:
        """A new one with its header line."""
        file = cls(path, 0)
        try:
            file.write(header(name))
        except OSError:
            file.close()
            raise
        return file

    def write(self, data: bytes) -> None:
        """Appends all of the data, or raises OSError and leaves the file as it was, if it can."""
        try:
            written = os.write(self._fd, data)
            while written < len(data):
                written += os.write(self._fd, memoryview(data)[written:])
        except OSError:
            with suppress(OSError):
                os.ftruncate(self._fd, self.size)
            raise
        self.size += written

    def check(self) -> None:
        """Raises OSError if somebody deleted it: writing would go on, and nobody would ever read it."""
        if os.fstat(self._fd).st_nlink == 0:
            raise OSError(ENOENT, f"{self.path.name} was deleted")

    @property
    def unsynced(self) -> int:
        """Bytes that a loss of power could cost."""
        return self.size - self._synced

    async def sync(self) -> None:
        """Waits, in a thread, until the disk has what was written so far."""
        if self.unsynced:
            size = self.size
            # A descriptor of its own: the file may be closed in the meantime, and its number given away.
            await trio.to_thread.run_sync(_sync_and_close, os.dup(self._fd))
            self._synced = max(self._synced, size)

    def sync_and_close(self) -> None:
        """The same at once, at the end."""
        _sync_and_close(self._fd)

    def close(self) -> None:
        os.close(self._fd)


def _sync_and_close(fd: int) -> None:
    try:
        os.fdatasync(fd)
    finally:
        os.close(fd)


def _sync_directory(directory: Path) -> None:
    _sync_and_close(os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC))


class Store:
    """Writes the records of one daemon into one directory, and reads them back.

    ``open``, ``load``, then ``append`` and ``flush`` by the dataplane and ``maintain`` by its housekeeping.
    """

    def __init__(self, directory: Path, clock: Callable[[], float] = monotonic) -> None:
        self.directory = directory
        self.failed: str | None = None
        """Why not everything is on disk; ``None`` while all is well."""
        self._pending: list[Record] = []
        self.append: Callable[[Record], None] = self._pending.append
        """Adds a record to the next flush."""
        self._clock = clock
        self._encode = Encoder().encode
        self._lock: int | None = None
        self._journal: _File | None = None
        self._number = 0
        self._checkpoint = 0
        """The checkpoint that counts. Before the first one it is 1: the empty state that journal-1 began with."""
        self._checkpoint_at = COMPACT_AT
        self._incomplete = False
        self._retry_at, self._retry_after = -inf, RETRY_AT_LEAST
        self._statistics = Statistics()

    @property
    def statistics(self) -> Statistics:
        """As of now."""
        return replace(self._statistics)

    def open(self) -> None:
        """Makes the directory where it is not there yet, and locks it.

        Raises:
            StoreError: another daemon uses it, or it cannot be used.
        """
        path = self.directory / "lock"
        try:
            self.directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise StoreError(f"{error.filename} cannot be used: {error.strerror}") from error
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            holder = os.read(lock, 20).decode(errors="replace").strip() or "unknown"
            os.close(lock)
            raise StoreError(
                f"{self.directory} is in use by process {holder}: stop it, or give this node another state_dir"
            ) from error
        self._lock = lock
        with suppress(OSError):  # a full disk; the number is only for the message above
            os.ftruncate(lock, 0)
            os.write(lock, b"%d\n" % os.getpid())

    def load(self) -> Restored:
        """Reads what is there, cuts off a torn end, and gets ready to write; see ``failed`` for that.

        Raises:
            StoreError: a newer version wrote a file, or one cannot be read.
        """
        restored, position = recover(self.directory)
        self._checkpoint, self._number = position.checkpoint or 1, position.number
        self._incomplete = not position.whole
        path = self.directory / f"journal-{position.number}"
        try:
            self._journal = _File(path, position.size) if position.size else _File.create(path, "journal")
            _sync_directory(self.directory)
        except OSError as error:
            self._give_up_journal(error)
        return restored

    def close(self) -> None:
        """Flushes, waits for the disk, and gives the directory free. Never raises."""
        self.flush()
        if self._journal is not None:
            with suppress(OSError):
                self._journal.sync_and_close()
        if self._lock is not None:
            os.close(self._lock)
        self._journal = self._lock = None

    def flush(self) -> None:
        """Hands all appended records to the kernel as one frame. Never raises; see ``failed``."""
        pending, statistics = self._pending, self._statistics
        if not pending:
            return
        began = perf_counter()
        if self._write(pending):
            statistics.records += len(pending)
            statistics.frames += 1
        else:
            statistics.lost += len(pending)
        pending.clear()
        statistics.slowest_flush = max(statistics.slowest_flush, perf_counter() - began)

    def _write(self, records: Sequence[Record]) -> bool:
        if self._journal is None:
            return False
        try:
            for first in range(0, len(records), MAX_RECORDS):
                data = self._encode(records[first : first + MAX_RECORDS])
                self._journal.write(data)
                self._statistics.bytes += len(data)
        except _UNWRITABLE as error:
            self._give_up_journal(error)
        return self._journal is not None

    async def maintain(self, live: Live, now: int) -> None:
        """One round of housekeeping, about once a second: `sync`, and a new checkpoint where one is due.

        Args:
            live: the state, for the checkpoint.
            now: wall-clock seconds, for the checkpoint's tick.
        """
        await self.sync()
        if self.checkpoint_due and self._clock() >= self._retry_at:
            await self.checkpoint(live, now)

    @property
    def checkpoint_due(self) -> bool:
        """Whether the journals have grown long, or do not hold everything."""
        journal = self._journal
        return (
            journal is None
            or self._incomplete
            or self._checkpoint != self._number
            or journal.size > self._checkpoint_at
        )

    async def sync(self) -> None:
        """Waits until the disk has what was flushed before. Never raises; see ``failed``."""
        journal = self._journal
        try:
            if journal is not None:
                journal.check()
                await journal.sync()
        except OSError as error:
            if journal is self._journal:
                self._give_up_journal(error)

    async def checkpoint(self, live: Live, now: int) -> None:
        """Begins a new journal, writes a checkpoint for it, and removes what is older. Sets ``failed``.

        Changes may go on meanwhile, and are appended and flushed as ever.
        """
        try:
            if self._journal is None or self._checkpoint == self._number:
                await self._begin_journal()
            await self._write_checkpoint(live, now)
        except _UNWRITABLE as error:
            self._fail(error)

    async def _begin_journal(self) -> None:
        journal = _File.create(self.directory / f"journal-{self._number + 1}", "journal")
        old, self._journal = self._journal, journal
        self._number += 1
        if old is not None:
            try:
                await old.sync()
            finally:
                old.close()
        await trio.to_thread.run_sync(_sync_directory, self.directory)

    async def _write_checkpoint(self, live: Live, now: int) -> None:
        number, journal = self._number, self._journal
        path = self.directory / f"checkpoint-{number}"
        temporary = path.with_suffix(".tmp")
        with closing(_File.create(temporary, "checkpoint")) as file:
            await self._write_state(file, live, now)
            # Whatever the checkpoint shows must be in the journal on disk, or a crash would mix two moments.
            self.flush()
            await self.sync()
            await file.sync()
            if journal is None or self._journal is not journal:
                return  # given up meanwhile, and so `failed`
            temporary.rename(path)
        self._checkpoint, self._checkpoint_at = number, max(COMPACT_AT, 2 * file.size)
        self._incomplete, self.failed = False, None
        self._retry_after = RETRY_AT_LEAST
        self._statistics.checkpoints += 1
        await trio.to_thread.run_sync(_sync_directory, self.directory)
        await trio.to_thread.run_sync(_remove_older, self.directory, number)

    async def _write_state(self, file: _File, live: Live, now: int) -> None:
        """In pieces of less than 2 ms, each on its way to the disk soon, so that flushes need not wait for it."""
        encode = Encoder().encode
        count = 0
        next_sync = self._clock() + 1
        for records in chain([[Tick(now)]], live()):
            file.write(encode(records))
            count += len(records)
            await trio.lowlevel.checkpoint()
            if file.unsynced > SYNC_EVERY:
                await file.sync()
            if self._clock() > next_sync:
                next_sync += 1
                await self.sync()
        file.write(encode([End(count)]))

    def _give_up_journal(self, error: Exception) -> None:
        """Nothing is written to it any more: a gap in it would be worse than its end."""
        if self._journal is not None:
            self._journal.close()
            self._journal = None
        self._fail(error)

    def _fail(self, error: Exception) -> None:
        self.failed = f"{self.directory}: {getattr(error, 'strerror', None) or repr(error)}"
        self._incomplete = True
        self._statistics.failures += 1
        self._retry_at = self._clock() + self._retry_after
        self._retry_after = min(2 * self._retry_after, RETRY_AT_MOST)


def _remove_older(directory: Path, number: int) -> None:
    for name in ("journal", "checkpoint"):
        for each, path in files(directory, name).items():
            if each < number:
                path.unlink(missing_ok=True)
    for path in directory.glob("checkpoint-*.tmp"):
        path.unlink(missing_ok=True)
