"""Upstream ports: which local port a new flow gets.

We choose the port ourselves, rather than let connect(2) do it: it is known without another system call, a
restart can bind it again, and each endpoint has the whole range to itself, since two connected sockets
may share a port when their peers differ.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable
from random import Random


class PortPool:
    """The free ports of one range, given out in random order, and again as late as possible.

    Args:
        low, high: the range, both ends included.
        used: ports that are in use already.
        random: for the first order.
    """

    def __init__(self, low: int, high: int, used: Iterable[int], random: Random) -> None:
        free = list(set(range(low, high + 1)).difference(used))
        random.shuffle(free)
        self._size = high - low + 1
        self._range = range(low, high + 1)
        self._ring = array("H", free)
        self._ring.extend([0] * (self._size - len(free)))
        self._head = 0
        self._free = len(free)

    def __len__(self) -> int:
        return self._free

    def take(self) -> int | None:
        """A free port, the longest unused one; ``None`` when there is none."""
        if not self._free:
            return None
        port = self._ring[self._head]
        self._head = (self._head + 1) % self._size
        self._free -= 1
        return port

    def give(self, port: int) -> None:
        """Take a port back; one of outside the range is not ours to keep."""
        if port in self._range and self._free < self._size:
            self._ring[(self._head + self._free) % self._size] = port
            self._free += 1
