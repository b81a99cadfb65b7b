"""What several checks need: a connected socket, and text from the network made fit for a reason."""

from __future__ import annotations

import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import trio

from sapin.core.model import Endpoint, IPAddress

MAX_REASON = 120
"""Characters of foreign text that a reason quotes."""


def family(address: IPAddress) -> socket.AddressFamily:
    """The address family of sockets that reach ``address``."""
    return socket.AF_INET6 if address.version == 6 else socket.AF_INET


@asynccontextmanager
async def connected(endpoint: Endpoint, kind: socket.SocketKind) -> AsyncIterator[trio.socket.SocketType]:
    """A TCP or UDP socket that is connected to ``endpoint`` and closed at the end.

    A connected UDP socket hears of the peer's ICMP errors, and of no other sender.

    Raises:
        OSError: it cannot be made or connected.
    """
    with trio.socket.socket(family(endpoint.address), kind) as sock:
        await sock.connect((str(endpoint.address), endpoint.port))
        yield sock


def first_line(raw: bytes) -> str:
    """The first line that is not blank, bounded and without control characters."""
    lines = raw.decode("utf-8", "replace").splitlines()
    line = next((line.strip() for line in lines if line.strip()), "")
    # What a server sends must not be able to move the cursor of the operator's terminal.
    return "".join(char if char.isprintable() else "?" for char in line[:MAX_REASON])
