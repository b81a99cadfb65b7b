"""Does a UDP port answer as expected?

Without ``expect`` the check misses nothing but an ICMP error, and that proves little: a daemon that
hangs, a firewall that drops and a host that is off are all silent, and so healthy. It is for services
that answer no stranger; for IKE there is the ``ike`` check.

The expectation is a hex pattern and not a regular expression, since it is compared with bytes from the
network in the dataplane's loop, where backtracking must not be at their sender's choice.
"""

from __future__ import annotations

import re
import socket
from typing import Annotated

import trio
from pydantic import AfterValidator, BaseModel, Field

from sapin.core.contracts import CheckResult, Target
from sapin.core.units import Duration
from sapin.plugins.checks.common import connected

_MAX_DATAGRAM = 65_535
_MAX_HEX = 2 * 1_400
_SHOWN = 16


def _compact(text: str) -> str:
    return re.sub(r"\s", "", text).lower()


def _hex(text: str) -> str:
    digits = _compact(text)
    if not re.fullmatch(r"([0-9a-f]{2})*", digits):
        raise ValueError("must be pairs of hex digits")
    return digits


def _pattern(text: str) -> str:
    digits = _compact(text)
    if not re.fullmatch(r"([0-9a-f?]{2})+", digits):
        raise ValueError("must be pairs of hex digits or question marks")
    return digits


class UdpCheck:
    """Healthy: the first answer begins as expected; without an expectation, no ICMP error came."""

    class Config(BaseModel, extra="forbid"):
        """Options of the check."""

        send: Annotated[str, Field(max_length=_MAX_HEX), AfterValidator(_hex)] = ""
        """The datagram to send, in hex; blanks are ignored."""
        expect: Annotated[str, Field(max_length=_MAX_HEX), AfterValidator(_pattern)] | None = None
        """How the answer begins, in hex; a question mark stands for any digit."""
        wait: Duration = Field(default=0.5, gt=0, le=60)
        """Seconds to wait for an ICMP error where nothing is expected; below the check's time-out."""

    def __init__(self, config: Config) -> None:
        self._send = bytes.fromhex(config.send)
        self._expect = config.expect
        self._wait = config.wait

    async def check(self, target: Target) -> CheckResult:
        """Send the datagram, and judge what comes back.

        Raises:
            OSError: it cannot be sent, for example because there is no route.
        """
        try:
            async with connected(target.endpoint, socket.SOCK_DGRAM) as sock:
                started = trio.current_time()
                await sock.send(self._send)
                if self._expect is not None:
                    answer = await sock.recv(_MAX_DATAGRAM)
                    return _judge(answer, self._expect, trio.current_time() - started)
                with trio.move_on_after(self._wait):
                    await sock.recv(_MAX_DATAGRAM)
                    return CheckResult(True, "answered", trio.current_time() - started)
        except ConnectionRefusedError:
            return CheckResult(False, f"UDP port {target.endpoint.port} is closed (ICMP port unreachable)")
        return CheckResult(True, f"no ICMP error within {self._wait:g} s")


def _judge(answer: bytes, expect: str, round_trip: float) -> CheckResult:
    begin = answer[: len(expect) // 2].hex()
    if len(begin) == len(expect) and all(want in ("?", got) for want, got in zip(expect, begin, strict=True)):
        return CheckResult(True, "answered as expected", round_trip)
    shown = answer[:_SHOWN].hex() + ("…" if len(answer) > _SHOWN else "")
    return CheckResult(False, f"answered {shown or 'nothing'}, expected {expect[: 2 * _SHOWN]}")
