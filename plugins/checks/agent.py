"""Asks an agent on the server how much work it wants, in the protocol of HAProxy's agent-check.

The agent answers a TCP connection with one line of words, in any order, apart by blanks or commas:

* ``75%``: the share of its weight that it wants;
* ``ready``, ``drain``, ``maint``: the admin state that it wants (enabled, draining, disabled);
* ``up``, or ``down``, ``fail``, ``stopped``: whether it can take clients;
* ``maxconn:30``: accepted, and ignored;
* ``#`` and a text: the reason.

Whether the agent lives and whether the VPN gateway lives are different questions. As in HAProxy, an agent that
is unreachable, slow or talks nonsense says nothing about the server, unless it is ``required``; so have another
check beside this one.
"""

from __future__ import annotations

import re
import socket
from dataclasses import dataclass
from typing import TypeVar

import trio
from pydantic import BaseModel, Field

from sapin.core.contracts import CheckResult, Target
from sapin.core.model import AdminState, Endpoint
from sapin.core.units import Duration
from sapin.plugins.checks.common import connected, first_line

T = TypeVar("T")

_MAX_LINE = 512
_STATES = {"ready": AdminState.ENABLED, "drain": AdminState.DRAINING, "maint": AdminState.DISABLED}
_HEALTH = {"up": True, "down": False, "fail": False, "failed": False, "stopped": False}


@dataclass(frozen=True, slots=True)
class Word:
    """What an agent's line says; ``None`` where it says nothing."""

    healthy: bool | None = None
    share: int | None = None
    state: AdminState | None = None
    reason: str = ""


class AgentCheck:
    """Healthy unless the agent says otherwise, or is required and says nothing that makes sense."""

    class Config(BaseModel, extra="forbid"):
        """Options of the check."""

        port: int = Field(ge=1, le=65_535)
        """The agent's TCP port on the real server."""
        send: str = Field(default="", max_length=_MAX_LINE)
        """Sent to the agent before its line is read; TOML's ``\\n`` ends it where the agent reads lines."""
        wait: Duration = Field(default=1.0, gt=0, le=60)
        """Seconds for the whole conversation; below the check's time-out."""
        required: bool = False
        """Whether a server without a sensible agent is unhealthy."""

    def __init__(self, config: Config) -> None:
        self._config = config

    async def check(self, target: Target) -> CheckResult:
        """Have the agent's word."""
        started = trio.current_time()
        try:
            with trio.fail_after(self._config.wait):
                line = await self._ask(Endpoint(target.endpoint.address, self._config.port))
        except trio.TooSlowError:
            return self._without(f"no word from the agent within {self._config.wait:g} s")
        except (OSError, trio.BrokenResourceError) as error:
            return self._without(f"no word from the agent: {error}")
        word = parse(line)
        if word is None:
            return self._without(f"the agent talks nonsense: {line!r}")
        return CheckResult(
            word.healthy is not False,
            word.reason or f"the agent says {line!r}",
            trio.current_time() - started,
            word.share,
            word.state,
        )

    async def _ask(self, endpoint: Endpoint) -> str:
        async with connected(endpoint, socket.SOCK_STREAM) as sock:
            stream = trio.SocketStream(sock)
            await stream.send_all(self._config.send.encode())
            return first_line(await _read_line(stream))

    def _without(self, reason: str) -> CheckResult:
        return CheckResult(not self._config.required, reason)


async def _read_line(stream: trio.SocketStream) -> bytes:
    received = bytearray()
    while len(received) < _MAX_LINE and not re.search(rb"[^\r\n][\r\n]", received):
        chunk = await stream.receive_some(_MAX_LINE - len(received))
        if not chunk:
            break
        received += chunk
    return bytes(received)


def parse(line: str) -> Word | None:
    """What the agent's line says, ``None`` if one of its words has no meaning, or it has none."""
    said, _, reason = line.partition("#")
    words = [word for word in re.split(r"[\s,]+", said.lower()) if word]
    shares = [int(word[:-1]) for word in words if re.fullmatch(r"[0-9]{1,3}%", word)]
    states = [_STATES[word] for word in words if word in _STATES]
    healths = [_HEALTH[word] for word in words if word in _HEALTH]
    ignored = [word for word in words if re.fullmatch(r"maxconn:[0-9]+", word)]
    understood = len(shares) + len(states) + len(healths) + len(ignored)
    if not words or understood < len(words):
        return None
    return Word(_last(healths), _last(shares), _last(states), reason.strip())


def _last(found: list[T]) -> T | None:
    return found[-1] if found else None
