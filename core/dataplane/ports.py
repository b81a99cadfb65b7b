"""Upstream ports: which local port a new flow gets.

We choose the port ourselves, rather than let connect(2) do it: it is known without another system call, a
restart can bind it again, and each endpoint has the whole range to itself, since two connected sockets
may share a port when their peers differ. Ports of the kernel's ephemeral range come last: while the daemon is down,
another program may get one of those, and then a restart cannot have it back.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Iterator, Sequence
from itertools import chain
from random import Random


def upstream_ranges(low: int, high: int, ephemeral: range) -> Sequence[range]:
    """The ports from ``low`` to ``high``, those outside the ephemeral range first."""
    before = range(low, min(high + 1, max(low, ephemeral.start)))
    after = range(max(low, min(ephemeral.stop, high + 1), before.stop), high + 1)
    return [part for part in (before, after, range(before.stop, after.start)) if part]


class PortPool:
    """The free ports of some ranges: those never used yet, range after range, then the longest unused.

    Args:
        ranges: the ports, in the order of preference; within a range a random one comes first.
        used: ports that are in use already.
        random: for where to begin.
    """

    def __init__(self, ranges: Sequence[range], used: Collection[int], random: Random) -> None:
        self._ranges = ranges
        self._fresh = self._draw(set(used), random)
        self._returned: deque[int] = deque()
        self._reserved: set[int] = set()
        self._passed: set[int] = set()
        """Reserved ports whose turn has come meanwhile."""

    def _draw(self, used: Collection[int], random: Random) -> Iterator[int]:
        for ports in self._ranges:
            start = random.choice(ports)
            for port in chain(range(start, ports.stop), range(ports.start, start)):
                if port not in used:
                    yield port

    def take(self) -> int | None:
        """A free port; ``None`` when there is none."""
        while True:
            port = next(self._fresh, None)
            if port is None and self._returned:
                port = self._returned.popleft()
            if port not in self._reserved:
                return port
            self._passed.add(port)

    def reserve(self, port: int) -> None:
        """Keep a port from being taken that is in use now, though it was not taken here."""
        self._reserved.add(port)

    def give(self, port: int) -> None:
        """Take a port back that was taken, reserved, or in use at first; others are not ours to keep."""
        if port in self._reserved:
            self._reserved.discard(port)
            if port not in self._passed:
                return  # it is free already, and its turn will come
            self._passed.discard(port)
        if any(port in ports for ports in self._ranges):
            self._returned.append(port)
