"""The control socket: how the command line talks to the daemon, through a Unix socket that only its owner can open.

One request per connection, a line of JSON each way::

    {"call": "set-state", "arguments": {"server": "gw1", "state": "draining"}}
    {"result": …}  or  {"error": "one sentence", "kind": "refused"}
"""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import structlog
import trio
from pydantic import ValidationError, validate_call

from sapin.api.operations import Refused
from sapin.core.writer import UnknownObject

MAX_REQUEST = 64 * 1024
"""Bytes of a request."""
MAX_CONNECTIONS = 32
DEADLINE = 10.0
"""Seconds that one connection may take; a slow reader is cut off."""

log = structlog.get_logger("sapin.control")


class ControlError(Exception):
    """The daemon cannot be asked, or refuses; the text is one sentence. ``kind`` tells programs which."""

    def __init__(self, kind: str, text: str) -> None:
        super().__init__(text)
        self.kind = kind


def socket_path(state_dir: Path) -> Path:
    """Where the daemon with that state directory listens."""
    return state_dir / "control.sock"


async def serve(
    state_dir: Path,
    operations: Mapping[str, Callable[..., Any]],
    *,
    task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Answer requests until cancelled. Whoever can open the socket may do everything."""
    calls = {name: validate_call(config={"strict": True})(call) for name, call in operations.items()}
    path = socket_path(state_dir)
    path.unlink(missing_ok=True)
    before = os.umask(0o177)
    try:
        sock = trio.socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        await sock.bind(str(path))
    finally:
        os.umask(before)
    sock.listen(MAX_CONNECTIONS)
    room = trio.CapacityLimiter(MAX_CONNECTIONS)

    async def answer(stream: trio.SocketStream) -> None:
        try:
            async with room, stream:
                with trio.move_on_after(DEADLINE):
                    await stream.send_all(_answer(await _line(stream), calls))
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            pass  # the other side went away: nobody is left to be told

    try:
        task_status.started()
        await trio.serve_listeners(answer, [trio.SocketListener(sock)])
    finally:
        path.unlink(missing_ok=True)


async def _line(stream: trio.abc.ReceiveStream) -> bytes:
    received = bytearray()
    while not received.endswith(b"\n") and len(received) <= MAX_REQUEST:
        chunk = await stream.receive_some(MAX_REQUEST)
        if not chunk:
            break
        received += chunk
    return bytes(received)


def _answer(line: bytes, calls: Mapping[str, Callable[..., Any]]) -> bytes:
    answer: dict[str, Any]
    try:
        if len(line) > MAX_REQUEST:
            raise Refused(f"a request has at most {MAX_REQUEST} bytes")
        request = json.loads(line)
        name, arguments = request["call"], request.get("arguments", {})
        if name not in calls:
            raise Refused(f"there is no operation {name!r}: is this daemon older than this program?")
        answer = {"result": calls[name](**arguments)}
    except Refused as error:
        answer = {"error": str(error), "kind": "refused"}
    except UnknownObject as error:
        answer = {"error": str(error), "kind": "unknown"}
    except ValidationError as error:
        faults = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
        answer = {"error": f"the request makes no sense: {faults}", "kind": "malformed"}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        answer = {"error": f"the request makes no sense: {error!r:.200}", "kind": "malformed"}
    except Exception as error:
        log.exception("an operation failed", request=line[:200])
        answer = {"error": f"a fault in the daemon, see its log: {error!r:.200}", "kind": "fault"}
    return json.dumps(answer).encode() + b"\n"


def call(state_dir: Path, name: str, **arguments: Any) -> Any:
    """Ask the daemon for an operation and wait for its answer.

    Raises:
        ControlError: there is no daemon, it cannot be reached, or it refuses.
    """
    path = socket_path(state_dir)
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
            sock.settimeout(DEADLINE)
            sock.connect(str(path))
            sock.sendall(json.dumps({"call": name, "arguments": arguments}).encode() + b"\n")
            with sock.makefile("rb") as file:
                answer = json.loads(file.readline())
    except (FileNotFoundError, ConnectionRefusedError):
        raise ControlError(
            "down", f"no daemon is running with state_dir {state_dir}: start `sapin run`"
        ) from None
    except PermissionError:
        raise ControlError(
            "denied", f"{path} belongs to another user: run this as the daemon's user"
        ) from None
    except (OSError, ValueError) as error:
        raise ControlError("down", f"the daemon behind {path} does not answer: {error}") from None
    if "error" in answer:
        raise ControlError(answer["kind"], answer["error"])
    return answer["result"]
