"""Does a TCP port accept connections? For services beside IKE, such as SSTP, or an agent's port."""

from __future__ import annotations

import socket

import trio
from pydantic import BaseModel, Field

from sapin.core.contracts import CheckResult, Target
from sapin.core.model import Endpoint
from sapin.plugins.checks.common import connected


class TcpCheck:
    """Healthy: the connection was made. The round trip is that of the handshake."""

    class Config(BaseModel, extra="forbid"):
        """Options of the check."""

        port: int | None = Field(default=None, ge=1, le=65_535)
        """The port to connect to, the service's own if there is none."""

    def __init__(self, config: Config) -> None:
        self._port = config.port

    async def check(self, target: Target) -> CheckResult:
        """Connect, and close at once.

        Raises:
            OSError: neither accepted nor refused, for example because there is no route.
        """
        endpoint = Endpoint(target.endpoint.address, self._port or target.endpoint.port)
        started = trio.current_time()
        try:
            async with connected(endpoint, socket.SOCK_STREAM):
                round_trip = trio.current_time() - started
        except ConnectionRefusedError:
            return CheckResult(False, f"TCP port {endpoint.port} refuses connections")
        return CheckResult(True, f"TCP port {endpoint.port} accepts connections", round_trip)
