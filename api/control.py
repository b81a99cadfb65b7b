"""The control socket: how the command line talks to the daemon, through a Unix socket that only its owner can open.

One request per connection, a line of JSON each way::

    {"call": "set-state", "arguments": {"server": "gw1", "state": "draining"}}
    {"result": …}  or  {"error": "one sentence", "kind": "refused"}

Nothing that comes through the socket ends the daemon, and nothing holds up its loop: a request is bounded in
size and time, connections are bounded in number, and long operations give way in between.
"""

from __future__ import annotations

import inspect
import json
import os
import socket
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import structlog
import trio
from pydantic import BaseModel, ValidationError, validate_call

from sapin.api.client import DEADLINE, ControlError, call, socket_path
from sapin.api.refused import Refused
from sapin.core.writer import UnknownObject

__all__ = ["ControlError", "call", "serve", "socket_path"]

MAX_REQUEST = 64 * 1024
"""Bytes of a request."""
MAX_CONNECTIONS = 32
"""Connections at one time; one more is told so and closed."""

log = structlog.get_logger("sapin.control")

Call = Callable[..., Any]


class _Request(BaseModel, extra="forbid", strict=True):
    call: str
    arguments: dict[str, Any] = {}


async def serve(
    state_dir: Path,
    operations: Mapping[str, Call],
    *,
    task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Answer requests until cancelled. Whoever can open the socket may do everything.

    Raises:
        OSError: the socket cannot be made.
    """
    calls = {name: validate_call(config={"strict": True})(function) for name, function in operations.items()}
    path = socket_path(state_dir)
    listener = trio.SocketListener(_listen(path))
    room = trio.CapacityLimiter(MAX_CONNECTIONS)

    async def converse(stream: trio.SocketStream) -> None:
        try:
            async with stream:
                with trio.move_on_after(DEADLINE):
                    await _converse(stream, calls, room)
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            pass  # the other side went away: nobody is left to be told

    try:
        task_status.started()
        await trio.serve_listeners(converse, [listener])
    finally:
        path.unlink(missing_ok=True)


def _listen(path: Path) -> trio.socket.SocketType:
    """A socket in the place of what a former process left there; its owner's alone from the first moment."""
    path.unlink(missing_ok=True)
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    before = os.umask(0o177)
    try:
        sock.bind(str(path))
        sock.listen(MAX_CONNECTIONS)
    except OSError:
        sock.close()
        raise
    finally:
        os.umask(before)
    return trio.socket.from_stdlib_socket(sock)


async def _converse(stream: trio.SocketStream, calls: Mapping[str, Call], room: trio.CapacityLimiter) -> None:
    try:
        room.acquire_nowait()
    except trio.WouldBlock:
        answer = _error("busy", f"the daemon serves {MAX_CONNECTIONS} requests already: try again")
    else:
        try:
            answer = await _answer(await _line(stream), calls)
        finally:
            room.release()
    await stream.send_all(json.dumps(answer).encode() + b"\n")


async def _line(stream: trio.abc.ReceiveStream) -> bytes:
    received = bytearray()
    while not received.endswith(b"\n") and len(received) <= MAX_REQUEST:
        chunk = await stream.receive_some(MAX_REQUEST)
        if not chunk:
            break
        received += chunk
    return bytes(received)


async def _answer(line: bytes, calls: Mapping[str, Call]) -> Mapping[str, Any]:
    if len(line) > MAX_REQUEST:
        return _error("malformed", f"a request has at most {MAX_REQUEST} bytes")
    try:
        request = _Request.model_validate_json(line)
        if request.call not in calls:
            return _error(
                "unknown",
                f"there is no operation {request.call!r:.100}: is the daemon older than this program?",
            )
        result = calls[request.call](**request.arguments)
        return {"result": await result if inspect.isawaitable(result) else result}
    except Refused as error:
        return _error("refused", str(error))
    except UnknownObject as error:
        return _error("unknown", str(error))
    except ValidationError as error:
        faults = "; ".join(": ".join((*map(str, e["loc"]), e["msg"])) for e in error.errors())
        return _error("malformed", f"the request makes no sense: {faults:.1000}")
    except Exception as error:
        log.exception("an operation failed", request=line[:200])
        return _error("fault", f"a fault in the daemon, see its log: {error!r:.200}")


def _error(kind: str, text: str) -> Mapping[str, Any]:
    return {"error": text, "kind": kind}
