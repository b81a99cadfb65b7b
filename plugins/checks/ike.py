"""Does an IKEv2 daemon answer? A real IKE_SA_INIT request, and a look at what comes back.

Gateways limit the half-open SAs of one source address: RRAS refuses more than 10, strongSwan asks for cookies
above 3 and is silent above 5 (``cookie_threshold_ip``, ``block_threshold``). Each SA answer leaves one behind
for half a minute, and where sources are translated, the balancer's clients share its address. So by default the check asks for what no
gateway gives: its public value is of a group that must not be used (MODP768, RFC 8247 section 2.4),
offered beside those that gateways do accept. A daemon that reads the request, finds its configuration
and chooses a proposal answers INVALID_KE_PAYLOAD with the group that it wants (RFC 7296 section 1.3),
and keeps nothing. With the option ``group`` an SA is asked for, which proves the key exchange too;
then let the intervals of all checks of a server add up to few requests: one in 15 s at most.
"""

from __future__ import annotations

import secrets
import socket
from typing import Literal

import trio
from pydantic import BaseModel, Field

from sapin.core import ike
from sapin.core.contracts import CheckResult, Target
from sapin.core.ike import Answer, Group, Notify
from sapin.core.model import Framing
from sapin.core.units import Duration
from sapin.plugins.checks.common import connected

_MAX_DATAGRAM = 65_535


class IkeCheck:
    """Healthy: any IKEv2 response to our own request, be it an SA, a cookie or a refusal.

    What is not an answer to it is ignored. Without an answer the check waits until its time-out.
    """

    class Config(BaseModel, extra="forbid"):
        """Options of the check."""

        group: Literal["MODP1024", "MODP2048", "CURVE25519"] | None = None
        """Ask for an SA with this key exchange group alone, and leave it half-open on the gateway."""
        retransmit: Duration = Field(default=0.5, gt=0, le=60)
        """Seconds until the request is sent once more; below the check's time-out to have an effect."""

    def __init__(self, config: Config) -> None:
        self._group = Group[config.group] if config.group else Group.MODP768
        self._groups = (self._group,) if config.group else ike.COMMON_GROUPS
        self._retransmit = config.retransmit

    async def check(self, target: Target) -> CheckResult:
        """Ask the target's IKE daemon, behind a non-ESP marker where the service is framed so.

        The round trip counts from the first request, as a client would wait.
        """
        spi_i = secrets.token_bytes(8)
        marker = ike.NON_ESP_MARKER if target.framing is Framing.NATT else b""
        request = marker + self._request(spi_i)
        started = trio.current_time()
        try:
            async with connected(target.endpoint, socket.SOCK_DGRAM) as sock:
                answer, message = await self._ask(sock, request, spi_i, marker)
        except ConnectionRefusedError:
            return CheckResult(False, f"UDP port {target.endpoint.port} is closed (ICMP port unreachable)")
        return CheckResult(True, _describe(answer, message), trio.current_time() - started)

    def _request(self, spi_i: bytes) -> bytes:
        ke = secrets.token_bytes(ike.KE_LENGTH[self._group])
        return ike.ike_sa_init(spi_i, secrets.token_bytes(32), ke, group=self._group, groups=self._groups)

    async def _ask(
        self, sock: trio.socket.SocketType, request: bytes, spi_i: bytes, marker: bytes
    ) -> tuple[Answer, bytes]:
        await sock.send(request)
        with trio.move_on_after(self._retransmit):
            return await _answer(sock, spi_i, marker)
        await sock.send(request)
        return await _answer(sock, spi_i, marker)


async def _answer(sock: trio.socket.SocketType, spi_i: bytes, marker: bytes) -> tuple[Answer, bytes]:
    while True:
        datagram = await sock.recv(_MAX_DATAGRAM)
        if datagram.startswith(marker):
            message = datagram[len(marker) :]
            answer = ike.classify_answer(spi_i, message)
            if answer.alive:
                return answer, message


def _describe(answer: Answer, message: bytes) -> str:
    for kind, data in ike.notifies(message):
        if answer is Answer.INVALID_KE_PAYLOAD and kind == Notify.INVALID_KE_PAYLOAD:
            return f"{answer}, it wants {ike.group_name(int.from_bytes(data[:2], 'big'))}"
        if answer is Answer.OTHER_NOTIFY:
            return ike.notify_name(kind)
    return str(answer)
