"""The configuration's shared part on this node: its file, its revision, and what the peer makes of both.

Rules are in :mod:`sapin.cluster.revision`. Here is where they touch the disk. The file is replaced as a whole, and what loses a
conflict is kept beside it, ``sapin.toml.conflict``: the alarm stands as long as that is there, for the operator to
look at and to remove.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import structlog
import trio

from sapin.cluster.keeper import load_agreed, save_agreed
from sapin.cluster.membership import Folder
from sapin.cluster.revision import Agreed, SplitError, Verdict, digest, join, judge, next_revision, split
from sapin.cluster.wire import Revision
from sapin.core.config import MAX_SIZE

log = structlog.get_logger("sapin.cluster")

Use = Callable[[str], None]
"""Makes the text of a file the running configuration, or raises ValueError with why not and changes nothing."""


class Sharing:
    """The shared part of one node's configuration.

    Args:
        path: the configuration file.
        folder: where the agreed revision is kept.
        use: brings a text into force.
    """

    def __init__(self, path: Path, folder: Folder, use: Use) -> None:
        self.path = path
        self.unusable: str | None = None
        """Why the peer's revision is not in force here, if it is not."""
        self._folder = folder
        self._use = use
        self._agreed = load_agreed(folder)
        self._shared: str | None = None
        """The part that is in force."""
        self._revision: Revision | None = None
        self._theirs: Revision | None = None
        self._news = trio.Event()

    @property
    def aside(self) -> Path:
        """Where the loser of a conflict is."""
        return self.path.with_name(self.path.name + ".conflict")

    @property
    def number(self) -> int:
        """Of the revision in force."""
        return self._agreed.number

    def started(self, text: str) -> None:
        """That text is in force, from the start on."""
        try:
            self._shared = split(text).shared
        except SplitError as error:
            self._shared = None
            self.unusable = str(error)
            log.warning("the configuration is not shared with the peer", reason=str(error))

    def changes_shared(self, text: str) -> bool:
        """Whether the text of a file has another shared part than the one in force."""
        try:
            return self._shared is not None and split(text).shared != self._shared
        except SplitError:
            return True

    def reloaded(self, text: str, epoch: int) -> Revision | None:
        """An active node has brought a text into force; the revision for the peer, if there is a new one."""
        before = self._agreed
        self.started(text)
        revision = self.current(epoch)
        return revision if self._agreed != before else None

    def current(self, epoch: int) -> Revision | None:
        """The revision in force, on an active node; made anew if the file was edited meanwhile."""
        if self._shared is None:
            return None
        if self._revision is None or self._revision.digest != digest(self._shared):
            self._revision = next_revision(self._agreed, epoch, self._shared)
            self._agree(self._revision)
        return self._revision

    def said(self, revision: Revision) -> None:
        """The active peer has said which revision is in force there; :meth:`run` sees to it."""
        self._theirs = revision
        self._news.set()

    async def run(self) -> None:
        """Bring the peer's revisions into force, until cancelled."""
        while True:
            await self._news.wait()
            self._news = trio.Event()
            theirs, self._theirs = self._theirs, None
            if theirs is not None:
                await self._take(theirs)

    async def _take(self, theirs: Revision) -> None:
        if theirs.digest != digest(theirs.text):
            self.unusable = "the revision of the peer is damaged"
            return
        verdict = judge(self._agreed, self._shared or "", theirs)
        if verdict is Verdict.KEEP:
            return
        if verdict is Verdict.SAME:
            self.unusable = None
            self._revision = theirs
            self._agree(theirs)
            return
        try:
            old = self.path.read_bytes()
            text = join(old.decode(), theirs.text)
            self._use(text)
        except (OSError, ValueError) as error:
            self.unusable = f"the configuration of the active node cannot be used here: {error}"
            log.error("the configuration of the active node cannot be used here", reason=str(error))
            return
        if verdict is Verdict.TAKE and self._shared is not None and self._edited(old):
            verdict = Verdict.CONFLICT
        self.unusable = None
        self._shared, self._revision = theirs.text, theirs
        aside = old if verdict is Verdict.CONFLICT else None
        error_text = await trio.to_thread.run_sync(self._write, text.encode(), aside)
        if error_text:
            log.error("the active node's configuration is in force, but not on disk", reason=error_text)
            return
        self._agree(theirs)
        log.info("configuration taken from the active node", revision=theirs.number, epoch=theirs.epoch)
        if aside is not None:
            log.warning(
                "both nodes had changed the configuration; this node's is aside", file=str(self.aside)
            )

    def _edited(self, old: bytes) -> bool:
        """Whether the file on disk has another shared part than the one in force: somebody has not reloaded it yet."""
        try:
            return len(old) <= MAX_SIZE and split(old.decode()).shared != self._shared
        except ValueError:
            return True

    def _write(self, text: bytes, aside: bytes | None) -> str | None:
        try:
            if aside is not None:
                _replace(self.aside, aside, self.path)
            _replace(self.path, text, self.path)
        except OSError as error:
            return f"{error.filename or self.path}: {error.strerror}"
        return None

    def _agree(self, revision: Revision) -> None:
        agreed = Agreed(revision.epoch, revision.number, revision.digest)
        if agreed != self._agreed:
            self._agreed = agreed
            if reason := save_agreed(self._folder, agreed):
                log.error("the agreed revision is not on disk", reason=reason)


def _replace(place: Path, data: bytes, like: Path) -> None:
    """Replace a file durably; owner and mode are those of another one.

    Raises:
        OSError: it cannot be written; what was there is there still.
    """
    place = place.resolve()
    beside = place.with_name(f".{place.name}.new")
    status = like.stat()
    with suppress(FileNotFoundError):
        beside.unlink()
    descriptor = os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            with suppress(PermissionError):
                os.fchown(file.fileno(), status.st_uid, status.st_gid)
            os.fchmod(file.fileno(), status.st_mode & 0o7777)
            os.fsync(file.fileno())
        beside.replace(place)
    except OSError:
        with suppress(OSError):
            beside.unlink()
        raise
    folder = os.open(place.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
