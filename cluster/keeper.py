"""What a node keeps on disk of the pair: its role and epoch, and which revision of the configuration was agreed on.

Writing takes a disk, so it is done in a thread, and what was asked for meanwhile is written next, once. A node whose disk
fails goes on forwarding and says so: what it would lose is which data were the better ones, at the next start.
"""

from __future__ import annotations

import json
from typing import Any, TypeVar

import structlog
import trio

from sapin.cluster.membership import Folder, MembershipError
from sapin.cluster.revision import Agreed
from sapin.cluster.settings import Saved

ROLE, REVISION = "role.json", "revision.json"
RETRY = 1.0
"""Seconds until what could not be written is tried again."""

log = structlog.get_logger("sapin.cluster")
_T = TypeVar("_T", Saved, Agreed)


class Keeper:
    """Writes a node's state of the pair, the newest only, in order.

    Args:
        folder: where to.
    """

    def __init__(self, folder: Folder) -> None:
        self._folder = folder
        self._wanted = Saved()
        self._asked = self._done = 0
        self._something = trio.Event()
        self._written = trio.Event()
        self.failed: str | None = None
        """Why the last attempt to write failed, if it did."""

    def load(self) -> Saved:
        """What was kept; nothing if it is not there or makes no sense, which is said."""
        return _load(self._folder, ROLE, Saved)

    def put(self, saved: Saved) -> int:
        """Keep this; a number for :meth:`durable`."""
        self._wanted = saved
        self._asked += 1
        self._something.set()
        return self._asked

    def is_durable(self, number: int) -> bool:
        """Whether that is on disk, or the disk has refused it."""
        return self._done >= number

    async def durable(self, number: int) -> None:
        """Wait until that is on disk, or the disk has refused it."""
        while self._done < number:
            await self._written.wait()

    async def run(self) -> None:
        """Write what is put, until cancelled."""
        while True:
            await self._something.wait()
            self._something = trio.Event()
            number, saved = self._asked, self._wanted
            self.failed = await trio.to_thread.run_sync(self._write, saved)
            self._done = number
            self._written.set()
            self._written = trio.Event()
            if self.failed:
                log.error("the role is not on disk; tried again each second", reason=self.failed)
                await trio.sleep(RETRY)
                self._something.set()

    def flush(self) -> None:
        """Write now what was not written yet."""
        if self._done < self._asked or self.failed:
            self.failed = self._write(self._wanted)
            self._done = self._asked

    def _write(self, saved: Saved) -> str | None:
        return _save(self._folder, ROLE, saved._asdict())


def load_agreed(folder: Folder) -> Agreed:
    """Which revision was agreed on last; none if it is not known."""
    return _load(folder, REVISION, Agreed)


def save_agreed(folder: Folder, agreed: Agreed) -> str | None:
    """Keep which revision was agreed on; why it could not be, if so."""
    return _save(folder, REVISION, agreed._asdict())


def _save(folder: Folder, name: str, fields: dict[str, Any]) -> str | None:
    try:
        folder.write(name, json.dumps(fields).encode() + b"\n")
    except MembershipError as error:
        return str(error)
    return None


def _load(folder: Folder, name: str, kind: type[_T]) -> _T:
    if not (folder.path / name).exists():
        return kind()
    try:
        found = json.loads(folder.read(name))
        wanted = kind()._asdict()
        if not isinstance(found, dict) or found.keys() != wanted.keys():
            raise ValueError("it has other fields")
        if any(type(found[field]) is not type(wanted[field]) for field in wanted):
            raise ValueError("its fields are of other types")
        return kind(**found)
    except (MembershipError, ValueError, RecursionError) as error:
        log.error("a file of the cluster makes no sense and is passed over", file=name, reason=str(error))
        return kind()
