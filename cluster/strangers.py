"""Ends connections to the link's port whose TLS handshake does not come to an end.

The link's library keeps a connection that says nothing for ever. It does not take the peer's place, but it costs a
descriptor, of which the flows need many. So the kernel's table of connections is looked at once a second, and what stands
there for too long and is not the peer is shut down; the library then closes it. Reads ``/proc`` in a thread of its own.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterator
from ipaddress import IPv4Address, IPv6Address, ip_address
from pathlib import Path
from struct import pack
from typing import NamedTuple

import trio

LOOK_EVERY = 1.0
"""Seconds between two looks."""
PATIENCE = 5.0
"""Seconds that a handshake may take."""
MAX_STRANGERS = 32
"""Connections that may be in their handshake; of more, the oldest are ended at once."""
_HELD = ("01", "08")  # ESTABLISHED and CLOSE_WAIT, include/net/tcp_states.h
_TABLES = Path("/proc/thread-self/net/tcp"), Path("/proc/thread-self/net/tcp6")
_DESCRIPTORS = Path("/proc/self/fd")


class Connection(NamedTuple):
    """One accepted connection."""

    remote: str
    """``192.0.2.1:40000`` or ``[2001:db8::1]:40000``."""
    inode: str


class Strangers:
    """Those who came to a port and have not shown yet who they are.

    Args:
        port: the local TCP port.
    """

    def __init__(self, port: int) -> None:
        self._port = port
        self._since: dict[Connection, float] = {}
        self.ended = 0
        """Connections that were ended."""

    async def watch(self, known: Callable[[], str | None]) -> None:
        """Look once a second, until cancelled; ``known`` tells the remote end that is the peer's."""
        while True:
            await trio.sleep(LOOK_EVERY)
            there = await trio.to_thread.run_sync(connections, self._port)
            overdue = self.overdue(there, known(), trio.current_time())
            if overdue:
                self.ended += await trio.to_thread.run_sync(end, overdue)

    def overdue(self, there: list[Connection], known: str | None, now: float) -> list[Connection]:
        """Those of the connections that are to be ended."""
        self._since = {each: self._since.get(each, now) for each in there if each.remote != known}
        oldest = sorted(self._since, key=self._since.__getitem__)
        excess = len(oldest) - MAX_STRANGERS
        return [
            each for place, each in enumerate(oldest) if place < excess or now - self._since[each] >= PATIENCE
        ]


def connections(port: int) -> list[Connection]:
    """The accepted connections to a local port."""
    found: list[Connection] = []
    for path in _TABLES:
        try:
            lines = path.read_text().splitlines()[1:]
        except OSError:
            continue  # a machine without IPv6
        found += _accepted(lines, f":{port:04X}")
    return found


def _accepted(lines: list[str], port: str) -> Iterator[Connection]:
    for line in lines:
        fields = line.split()
        if len(fields) > 9 and fields[1].endswith(port) and fields[3] in _HELD and fields[9] != "0":
            yield Connection(_remote(fields[2]), fields[9])


def _remote(field: str) -> str:
    """An end as the kernel prints it: words in the machine's byte order."""
    host, _, port = field.partition(":")
    words = [int(host[at : at + 8], 16) for at in range(0, len(host), 8)]
    address: IPv4Address | IPv6Address = ip_address(pack(f"={len(words)}I", *words))
    if isinstance(address, IPv6Address) and address.ipv4_mapped is not None:
        address = address.ipv4_mapped
    shown = f"[{address}]" if address.version == 6 else str(address)
    return f"{shown}:{int(port, 16)}"


def end(strangers: list[Connection]) -> int:
    """Shut these connections of this process down, and count those that were there still."""
    wanted = {f"socket:[{each.inode}]" for each in strangers}
    count = 0
    for name in os.listdir(_DESCRIPTORS):  # noqa: PTH208  # names only: there may be thousands
        try:
            link = os.readlink(_DESCRIPTORS / name)  # noqa: PTH115
            if link in wanted:
                count += _shut(int(name), int(link[8:-1]))
        except OSError:
            continue  # closed meanwhile
    return count


def _shut(descriptor: int, inode: int) -> bool:
    """Shut a socket down if the descriptor is that socket's still; it may have been closed and given to another."""
    with socket.socket(fileno=os.dup(descriptor)) as sock:
        if os.fstat(sock.fileno()).st_ino != inode:
            return False
        sock.shutdown(socket.SHUT_RDWR)
        return True
