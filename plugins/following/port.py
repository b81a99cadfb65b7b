"""Port: a real server serves the follower at its own address, on the follower's port.

A real server's ``port`` in the configuration is where it serves the leader; it says nothing about the follower.
Where the servers listen on another port than the virtual service, the option ``port`` names it.
"""

from __future__ import annotations

from pydantic import BaseModel, Field

from sapin.core.model import Endpoint, RealServer, VirtualService


class Port:
    """The server's address, and the option ``port`` or else the follower's port."""

    class Config(BaseModel, extra="forbid"):
        """Options of the following."""

        port: int | None = Field(default=None, ge=1, le=65_535)
        """UDP port of the real servers, the follower's own if there is none."""

    def __init__(self, config: Config) -> None:
        self._port = config.port

    def endpoint(self, server: RealServer, leader: VirtualService, follower: VirtualService) -> Endpoint:
        """The server's endpoint for the follower."""
        return Endpoint(server.address, self._port or follower.port)
