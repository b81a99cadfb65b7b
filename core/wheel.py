"""A timer wheel for dense small integers, and the rings that it is made of.

A hashed timing wheel (Varghese and Lauck, *Hashed and hierarchical timing wheels*, 1987) of one-second
slots that are made as they are needed. It is filed lazily: an item that becomes due later is left where
it is, comes out at the earlier second, and is filed again by its owner. So putting off an item, by far the
most frequent thing that happens to it, touches nothing here.

Everything is in flat memory that is reserved for the capacity and occupied page by page as items use
it: nothing is ever copied to grow, no item is ever in it twice, and the garbage collector sees a
handful of objects whatever the number of items.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from heapq import heappop, heappush
from mmap import MAP_PRIVATE, mmap
from struct import calcsize
from typing import Literal


def column(code: Literal["B", "I", "q"], length: int) -> memoryview[int]:
    """Zeros of the :mod:`struct` type ``code``: takes memory only where it was written to."""
    return memoryview(mmap(-1, max(1, length) * calcsize(code), flags=MAP_PRIVATE)).cast(code)


class Rings:
    """Circular lists of items; an item is in one ring at most. Every operation takes the same time.

    A ring is named by an integer from 1 to 2**32 - 1.

    Args:
        capacity: items are the integers below it.
    """

    __slots__ = ("_after", "_before", "_first", "of")

    _NOTHING = 0xFFFFFFFF

    def __init__(self, capacity: int) -> None:
        self.of = column("I", capacity)
        """The ring that each item is in, 0 for none. To be read only."""
        self._after = column("I", capacity)
        self._before = column("I", capacity)
        self._first: dict[int, int] = {}

    def __contains__(self, ring: int) -> bool:
        return ring in self._first

    def first(self, ring: int) -> int | None:
        """The item that has been in the ring for longest; ``None`` if it is empty."""
        item = self._first.get(ring, self._NOTHING)
        return None if item == self._NOTHING else item

    def join(self, item: int, ring: int) -> None:
        """Puts the item, which must be in no ring, last in this one, which is made if need be."""
        self.of[item] = ring  # refuses what is no item or ring, before anything has changed
        first = self._first.get(ring, self._NOTHING)
        if first == self._NOTHING:
            self._first[ring] = self._after[item] = self._before[item] = item
        else:
            last = self._before[first]
            self._after[last] = self._before[first] = item
            self._before[item] = last
            self._after[item] = first

    def join_run(self, first: int, count: int, ring: int) -> None:
        """Puts ``count`` items from ``first`` on, which must be in no ring, last in this one, in their order."""
        last = first + count - 1
        self.of[first : last + 1] = array("I", [ring]) * count
        self._after[first:last] = array("I", range(first + 1, last + 1))
        self._before[first + 1 : last + 1] = array("I", range(first, last))
        head = self._first.get(ring, self._NOTHING)
        if head == self._NOTHING:
            head = self._first[ring] = first
        else:
            tail = self._before[head]
            self._after[tail], self._before[first] = first, tail
        self._after[last], self._before[head] = head, last

    def leave(self, item: int) -> None:
        """Takes the item out of its ring, which stays, even if it is empty now."""
        ring = self.of[item]
        after, before = self._after[item], self._before[item]
        if after == item:
            self._first[ring] = self._NOTHING
        else:
            self._after[before] = after
            self._before[after] = before
            if self._first[ring] == item:
                self._first[ring] = after
        self.of[item] = 0

    def drop(self, ring: int) -> None:
        """Forgets an empty ring."""
        del self._first[ring]


class TimerWheel:
    """Items, each filed under the second at which it is to be looked at.

    Seconds are whole numbers of any clock that does not go back, from 1 to 2**32 - 1.

    Args:
        capacity: items are the integers below it.
    """

    __slots__ = ("_rings", "_seconds")

    def __init__(self, capacity: int) -> None:
        self._rings = Rings(capacity)
        self._seconds: list[int] = []
        """A heap of the seconds that have a ring."""

    def file(self, item: int, second: int) -> None:
        """Sees to it that the item comes out no later than at ``second``.

        It may come out earlier, if it was filed for an earlier second before: then its owner, who
        knows when it is due, files it again.
        """
        filed = self._rings.of[item]
        if filed:
            if filed <= second:
                return
            self._rings.leave(item)
        new = second not in self._rings
        self._rings.join(item, second)
        if new:
            heappush(self._seconds, second)

    def file_run(self, first: int, count: int, second: int) -> None:
        """The same for ``count`` items from ``first`` on, none of which is filed."""
        new = second not in self._rings
        self._rings.join_run(first, count, second)
        if new:
            heappush(self._seconds, second)

    def discard(self, item: int) -> None:
        """Takes the item out, if it is filed."""
        if self._rings.of[item]:
            self._rings.leave(item)

    def due(self, now: int, limit: int) -> Iterator[tuple[int, int]]:
        """Takes out what is filed up to ``now``, the earliest first, each with the second it was filed under.

        At most ``limit`` steps are taken, and a step may find nothing: :meth:`earliest` tells whether more is
        due. Items may be filed while this goes on.
        """
        rings = self._rings
        for _ in range(limit):
            if not self._seconds or self._seconds[0] > now:
                return
            second = self._seconds[0]
            item = rings.first(second)
            if item is None:
                rings.drop(heappop(self._seconds))
            else:
                rings.leave(item)
                yield item, second

    def earliest(self) -> int | None:
        """No item is filed for an earlier second than this; ``None`` if nothing is filed."""
        return self._seconds[0] if self._seconds else None
