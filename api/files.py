"""Reading what the operator wrote."""

from __future__ import annotations

from pathlib import Path

from sapin.core.config import MAX_SIZE


def read_config(path: Path) -> bytes:
    """The file, or so much of it that the parser sees it is too large.

    Raises:
        OSError: it cannot be read.
    """
    with path.open("rb") as file:
        return file.read(MAX_SIZE + 1)
