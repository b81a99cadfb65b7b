"""The near end of the control socket: asks a running daemon for an operation.

Plain blocking sockets and nothing to import, because every command of the command line starts here. What goes over
the socket is described in :mod:`sapin.api.control`.
"""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

DEADLINE = 10.0
"""Seconds that one request and its answer may take, on both ends."""
MAX_ANSWER = 64 * 1024 * 1024
"""Bytes of an answer."""


class ControlError(Exception):
    """The daemon cannot be asked, or refuses; the text is one sentence.

    ``kind`` tells programs which: ``down``, ``denied`` and ``silent`` when there was no answer; ``refused``,
    ``unknown``, ``malformed``, ``busy`` and ``fault`` are answers.
    """

    def __init__(self, kind: str, text: str) -> None:
        super().__init__(text)
        self.kind = kind


def socket_path(state_dir: Path) -> Path:
    """Where the daemon with that state directory listens."""
    return state_dir / "control.sock"


def call(state_dir: Path, name: str, **arguments: Any) -> Any:
    """Ask the daemon for an operation and wait for its answer.

    Raises:
        ControlError: there is no daemon, it cannot be reached, or it refuses.
    """
    path = socket_path(state_dir)
    request = json.dumps({"call": name, "arguments": arguments}).encode() + b"\n"
    try:
        answer = json.loads(_exchange(path, request))
    except (FileNotFoundError, NotADirectoryError, ConnectionRefusedError):
        raise ControlError(
            "down",
            f"no daemon is running with state directory {state_dir}: start `sapin run`, "
            "or name another with --state-dir or --config",
        ) from None
    except PermissionError:
        raise ControlError(
            "denied", f"{path} belongs to another user: run this as the daemon's user, or as root"
        ) from None
    except TimeoutError:
        raise ControlError(
            "silent", f"the daemon behind {path} did not answer within {DEADLINE:g} s: see its log"
        ) from None
    except (OSError, ValueError) as error:
        raise ControlError("silent", f"the daemon behind {path} does not answer: {error}") from None
    if "error" in answer:
        raise ControlError(answer["kind"], answer["error"])
    return answer["result"]


def pages(state_dir: Path, name: str, **arguments: Any) -> Iterator[Any]:
    """The answers of a paged operation, one after the other.

    Raises:
        ControlError: as :func:`call`.
    """
    cursor: str | None = None
    while True:
        answer = call(state_dir, name, cursor=cursor, **arguments)
        yield answer
        cursor = answer["next"]
        if cursor is None:
            return


def _exchange(path: Path, request: bytes) -> bytes:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        sock.settimeout(DEADLINE)
        sock.connect(str(path))
        sock.sendall(request)
        with sock.makefile("rb") as file:
            answer = file.readline(MAX_ANSWER)
    if not answer.endswith(b"\n"):
        raise ValueError("the connection ended before the answer did")
    return answer
