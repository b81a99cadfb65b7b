"""Where an affinity table keeps its pins: which keys and which owner each slot has.

A slot is a small integer. Everything about slots is in flat columns and rings (:mod:`sapin.core.wheel`)
and in dictionaries of bytes and integers, so that it costs little memory and no time of the garbage
collector. CPython up to 3.13 does not look into such dictionaries; 3.14 does (python/cpython#127010), but for
those that were there at ``gc.freeze()``, and all of them are made at the start. They are many, so that one of
them grows at a time, with no long step.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Generic, Protocol, TypeVar

from sapin.core.contracts import Key
from sapin.core.wheel import Rings, column


class Member(Protocol):
    """What pins point to: a real server as the dataplane holds it. It is known by its name."""

    @property
    def name(self) -> str:
        """By which it is known."""

    pinned: int
    """Clients that hold it. The table adds and subtracts its own pins; others may do so with theirs."""


M = TypeVar("M", bound=Member)


class Keys:
    """Which slot a key belongs to, and which keys a slot has.

    The shards are chosen by high bits of the hash, because a dictionary places by the low ones. The keys of
    a slot are one bytes object: the key itself where there is one, else all of them, each behind its length.
    """

    __slots__ = ("counts", "packed", "shards")

    SHARDS = 256

    def __init__(self, capacity: int) -> None:
        self.shards: tuple[dict[Key, int], ...] = tuple({} for _ in range(self.SHARDS))
        self.packed: tuple[dict[int, bytes], ...] = tuple({} for _ in range((capacity >> 12) + 1))
        """By slot, in the dictionary that its high bits choose: slots in a row make one of them grow, not each."""
        self.counts = column("B", capacity)
        """How many keys each slot has."""

    def slot(self, key: Key) -> int:
        """The slot that has the key, or 0."""
        return self.shards[hash(key) >> 50 & 255].get(key, 0)

    def of(self, slot: int) -> tuple[Key, ...]:
        """The keys of a slot, the oldest first."""
        count = self.counts[slot]
        if count == 0:
            return ()
        packed = self.packed[slot >> 12][slot]
        return (packed,) if count == 1 else tuple(unpack(packed))

    def add(self, slot: int, keys: tuple[Key, ...]) -> None:
        """Gives these keys, which belong to no slot, to one that has none."""
        for key in keys:
            self.shards[hash(key) >> 50 & 255][key] = slot
        self.counts[slot] = len(keys)
        self.packed[slot >> 12][slot] = keys[0] if len(keys) == 1 else pack(keys)

    def remove(self, slot: int) -> tuple[Key, ...]:
        """Takes all its keys from a slot."""
        keys = self.of(slot)
        for key in keys:
            del self.shards[hash(key) >> 50 & 255][key]
        self.counts[slot] = 0
        self.packed[slot >> 12][slot] = b""
        return keys


class Owners(Generic[M]):
    """Which slots each member owns: a ring of slots for each, so that all of them can be let go at once."""

    __slots__ = ("_rings", "_sizes", "_spare", "live", "members", "names", "of", "retired")

    FREE = 1
    """The ring of the slots that were given back; ring 0 stands for those never used."""

    def __init__(self, capacity: int) -> None:
        self._rings = Rings(capacity)
        self.of = self._rings.of
        self.members: list[M | None] = [None, None]
        """The member of each ring, ``None`` when its pins do not count."""
        self.names: dict[str, int] = {}
        self._sizes = [0, 0]
        self._spare: list[int] = []
        self.retired: dict[int, None] = {}
        """Rings whose slots are to be given back."""
        self.live = 0

    def adopt(self, member: M) -> int:
        """The ring of the member of that name, or 0; from now on, this object stands for it."""
        ring = self.names.get(member.name, 0)
        old = self.members[ring]
        if old is not None and old is not member:
            old.pinned -= self._sizes[ring]
            member.pinned += self._sizes[ring]
            self.members[ring] = member
        return ring

    def give(self, slot: int, member: M) -> None:
        """Makes the member the owner of a slot that has none."""
        ring = self.adopt(member) or self._open(member)
        self._rings.join(slot, ring)
        self._sizes[ring] += 1
        member.pinned += 1
        self.live += 1

    def give_run(self, first: int, count: int, member: M) -> None:
        """The same for ``count`` slots from ``first`` on."""
        ring = self.adopt(member) or self._open(member)
        self._rings.join_run(first, count, ring)
        self._sizes[ring] += count
        member.pinned += count
        self.live += count

    def take(self, slot: int) -> None:
        """Takes a slot from its owner. A member without slots is forgotten."""
        ring = self.of[slot]
        self._rings.leave(slot)
        self._sizes[ring] -= 1
        member = self.members[ring]
        if member is not None:
            member.pinned -= 1
            self.live -= 1
        if not self._sizes[ring]:
            self._close(ring)

    def free(self, slot: int) -> None:
        """Takes a slot from its owner, to be used again."""
        self.take(slot)
        self._rings.join(slot, self.FREE)

    def reuse(self) -> int:
        """A slot that was free, or 0."""
        slot = self._rings.first(self.FREE)
        if slot is None:
            return 0
        self._rings.leave(slot)
        return slot

    def retire(self, name: str) -> int:
        """Lets go of all slots of the member of that name; how many they were."""
        ring = self.names.pop(name, 0)
        member, size = self.members[ring], self._sizes[ring]
        if member is None:
            return 0
        member.pinned -= size
        self.live -= size
        self.members[ring] = None
        self.retired[ring] = None
        return size

    def orphan(self) -> int:
        """A slot whose member was retired, or 0."""
        for ring in self.retired:
            return self._rings.first(ring) or 0
        return 0

    def orphans(self) -> int:
        """How many slots have a retired member."""
        return sum(self._sizes[ring] for ring in self.retired)

    def counts(self) -> dict[str, int]:
        """How many slots each member has."""
        return {name: self._sizes[ring] for name, ring in self.names.items()}

    def _open(self, member: M) -> int:
        if self._spare:
            ring = self._spare.pop()
            self.members[ring] = member
        else:
            ring = len(self.members)
            self.members.append(member)
            self._sizes.append(0)
        self.names[member.name] = ring
        return ring

    def _close(self, ring: int) -> None:
        member = self.members[ring]
        if member is None:
            del self.retired[ring]
        else:
            del self.names[member.name]
            self.members[ring] = None
        self._spare.append(ring)


def pack(keys: tuple[Key, ...]) -> bytes:
    """The keys as one object, each behind its length."""
    return b"".join(bytes((len(key),)) + key for key in keys)


def unpack(packed: bytes) -> Iterator[Key]:
    """What :func:`pack` put together."""
    at = 0
    while at < len(packed):
        end = at + 1 + packed[at]
        yield packed[at + 1 : end]
        at = end
