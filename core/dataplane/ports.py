"""Upstream ports: which local port a new flow gets.

We choose the port ourselves, rather than let connect(2) do it: it is known without another system call, a
restart can bind it again, and each endpoint has the whole range to itself, since two connected sockets
may share a port when their peers differ.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection
from itertools import chain
from random import Random


class PortPool:
    """The free ports of one range: those never used yet, from a random one on, then the longest unused.

    Args:
        low: the first port of the range.
        high: the last one.
        used: ports that are in use already.
        random: for where to begin.
    """

    def __init__(self, low: int, high: int, used: Collection[int], random: Random) -> None:
        start = random.randint(low, high)
        used = set(used)
        self._range = range(low, high + 1)
        self._fresh = (port for port in chain(range(start, high + 1), range(low, start)) if port not in used)
        self._returned: deque[int] = deque()

    def take(self) -> int | None:
        """A free port; ``None`` when there is none."""
        port = next(self._fresh, None)
        if port is None and self._returned:
            return self._returned.popleft()
        return port

    def give(self, port: int) -> None:
        """Take a port back that :meth:`take` gave, or that was in use at first; others are not ours to keep."""
        if port in self._range:
            self._returned.append(port)
