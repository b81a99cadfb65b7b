"""Admin states set at run time, kept in the state directory: a drained server is drained after a restart too."""

from __future__ import annotations

import json
import os
from pathlib import Path

from sapin.core.model import AdminState
from sapin.core.writer import Overrides

_NAME = "admin-states.json"


def load_overrides(directory: Path) -> Overrides:
    """What was saved, by group and server; nothing where nothing was.

    Raises:
        ValueError: the file is not what :func:`save_overrides` writes; the text names it.
    """
    path = directory / _NAME
    try:
        saved = json.loads(path.read_text())
        return {
            group: {server: AdminState(state) for server, state in states.items()}
            for group, states in saved.items()
        }
    except FileNotFoundError:
        return {}
    except (ValueError, AttributeError, RecursionError, OSError) as error:
        raise ValueError(f"{path} cannot be read: {error}; remove it to go by the configuration") from error


def save_overrides(directory: Path, overrides: Overrides) -> None:
    """Replace the file as a whole: after a loss of power it is the old one or the new one.

    Raises:
        OSError: it cannot be written; the old one is as it was.
    """
    path = directory / _NAME
    temporary = path.with_suffix(".tmp")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    with os.fdopen(descriptor, "w") as file:
        json.dump(overrides, file)
        file.flush()
        os.fsync(file.fileno())
    temporary.rename(path)
    opened = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)
