"""Reading a state directory after a restart: which files count, and what of them is good.

The files, and what a crash or a disk can do to them, are described in :mod:`sapin.core.dataplane.store`.
Nothing is changed here, except that a damaged file gets a second name, under which it is kept.
"""

from __future__ import annotations

import gc
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter

from sapin.core.affinity import Put
from sapin.core.journal import FlowOpened, FormatError, Replayed, State, replay

KEPT = 8
"""Damaged files that are kept; a further one is reported, and goes with the next checkpoint."""

_NAME = re.compile(r"(journal|checkpoint)-([1-9]\d{0,8})")


class StoreError(Exception):
    """The state directory cannot be used; the message says which file, why, and what to do."""


@dataclass(frozen=True, slots=True)
class Damaged:
    """A file that could not be read to its end."""

    file: str
    offset: int
    reason: str
    ignored: int
    """Bytes from the offset on, none of which was used."""
    kept: str | None
    """The name under which the file is kept; ``None``: it is not."""

    def __str__(self) -> str:
        kept = f"kept as {self.kept}" if self.kept else "not kept"
        return f"{self.file} at byte {self.offset}: {self.reason}; {self.ignored} bytes ignored; {kept}"


@dataclass(frozen=True, slots=True)
class Report:
    """What a load found."""

    checkpoint: int
    """The number of the checkpoint it began with; 0: there was none."""
    journals: int
    records: int
    pins: int
    flows: int
    seconds: float
    torn: int
    """Bytes of a last, unfinished frame that were cut off: the trace of a kill or of a loss of power."""
    refused: int
    """Records that were skipped because their fields make no sense: a fault of the program."""
    damaged: tuple[Damaged, ...]

    def __str__(self) -> str:
        return (
            f"{self.pins} pins and {self.flows} flows from checkpoint {self.checkpoint} and"
            f" {self.journals} journals ({self.records} records in {self.seconds:.2f} s);"
            f" {self.torn} torn bytes, {self.refused} records refused, {len(self.damaged)} files damaged"
        )


@dataclass(frozen=True, slots=True)
class Restored:
    """What was on disk."""

    pins: dict[str, list[Put]]
    """By affinity group."""
    flows: list[FlowOpened]
    tick: int
    """Wall-clock seconds at which the last daemon was still alive, to about 10 s; 0: never."""
    report: Report


@dataclass(frozen=True, slots=True)
class Position:
    """Where to go on writing."""

    checkpoint: int
    """The checkpoint that was read; 0: none."""
    number: int
    """The journal to append to."""
    size: int
    """The good bytes of it; 0: it is to be made."""
    whole: bool
    """Whether the files said all that they ever said. If not, a new checkpoint is due."""


def numbered(path: Path) -> tuple[str, int]:
    """``checkpoint`` or ``journal``, and the number; ``("", 0)`` for any other file."""
    found = _NAME.fullmatch(path.name)
    return (found[1], int(found[2])) if found else ("", 0)


def files(directory: Path, name: str) -> dict[int, Path]:
    """The journals or the checkpoints in a directory, by number, in order."""
    found = sorted((numbered(path), path) for path in directory.iterdir())
    return {number: path for (kind, number), path in found if kind == name}


def recover(directory: Path) -> tuple[Restored, Position]:
    """Reads the newest whole checkpoint and the journals after it.

    Raises:
        StoreError: a newer version wrote one of the files, or one cannot be read at all.
    """
    with _without_garbage_collection():
        return _Recovery(directory).run()


class _Recovery:
    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._state = State()
        self._records = 0
        self._refused = 0
        self._torn = 0
        self._damaged: list[Damaged] = []

    def run(self) -> tuple[Restored, Position]:
        began = perf_counter()
        checkpoint = self._read_checkpoint()
        journals = {n: path for n, path in files(self._directory, "journal").items() if n >= checkpoint}
        number, size = self._read_journals(checkpoint, journals)
        pins, flows = self._state.pins(), self._state.flows()
        report = Report(
            checkpoint=checkpoint,
            journals=len(journals),
            records=self._records,
            pins=sum(map(len, pins.values())),
            flows=len(flows),
            seconds=perf_counter() - began,
            torn=self._torn,
            refused=self._refused,
            damaged=tuple(self._damaged),
        )
        restored = Restored(pins, flows, self._state.tick, report)
        return restored, Position(checkpoint, number, size, whole=not self._damaged)

    def _read_checkpoint(self) -> int:
        """The newest whole one. Else nothing, with which journal-1 began; else what is good of the newest."""
        salvaged: tuple[int, State] | None = None
        for number, path in reversed(files(self._directory, "checkpoint").items()):
            state = State()
            read, size = self._replay(path, state)
            if read.whole_checkpoint:
                self._state = state
                return number
            self._damage(path, read.end, read.damage.reason if read.damage else "it has no end", size)
            salvaged = salvaged or (number, state)
        if salvaged is None or (self._directory / "journal-1").exists():
            return 0
        number, self._state = salvaged
        return number

    def _read_journals(self, checkpoint: int, journals: dict[int, Path]) -> tuple[int, int]:
        """The number and the good bytes of the journal to go on with."""
        expected = checkpoint or 1
        size: int | None = None
        if checkpoint and not journals:
            self._missing(checkpoint, checkpoint)
        for number, path in journals.items():
            if number > expected:
                self._missing(expected, number - 1)
            size = self._read_journal(path, is_last=number == max(journals))
            expected = number + 1
        return (expected, 0) if size is None else (expected - 1, size)

    def _read_journal(self, path: Path, is_last: bool) -> int | None:
        """Its good bytes, ``None`` if it is not to be gone on with."""
        read, size = self._replay(path, self._state)
        if read.damage is None:
            return read.end
        if is_last and read.damage.torn:
            self._torn = size - read.end
            return read.end
        self._damage(path, read.end, read.damage.reason, size)
        return None

    def _replay(self, path: Path, state: State) -> tuple[Replayed, int]:
        """What was read, and the size of the file."""
        try:
            data = path.read_bytes()
            read = replay(data, numbered(path)[0], state)
        except OSError as error:
            raise StoreError(f"{path} cannot be read: {error.strerror}") from error
        except FormatError as error:
            raise StoreError(
                f"{path} {error}. A newer version of Sapin wrote this: run that version, or move"
                f" {self._directory} aside and start without the pins and flows in it"
            ) from error
        self._records += read.records
        self._refused += read.refused
        return read, len(data)

    def _damage(self, path: Path, offset: int, reason: str, size: int) -> None:
        """Reports the file, and gives it a second name.

        Its first name stays in use, for what is good of it, until a new checkpoint replaces it.
        """
        kept = path.with_name(path.name + ".damaged")
        try:
            if not kept.exists():
                if len(list(self._directory.glob("*.damaged"))) >= KEPT:
                    raise FileExistsError("too many damaged files")
                kept.hardlink_to(path)
            name = kept.name if kept.samefile(path) else None
        except OSError:  # a file system without links, or too many kept files: the report says so
            name = None
        self._damaged.append(Damaged(path.name, offset, reason, size - offset, name))

    def _missing(self, first: int, last: int) -> None:
        name = f"journal-{first}" if first == last else f"journal-{first} to journal-{last}"
        self._damaged.append(Damaged(name, 0, "missing", 0, None))


@contextmanager
def _without_garbage_collection() -> Iterator[None]:
    """Millions of objects are about to be made and none dropped: looking for garbage would be most of the work."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
