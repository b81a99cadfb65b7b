"""An affinity table that a peer's records are applied to, and that can be compared with the peer's.

* **Exact.** A :class:`~sapin.core.pins.Put` of the peer says all the keys of a pin, so the pin has just these
  afterwards, whatever it had before. (A put of this node adds to the keys of a pin.) So records may be
  applied to a table that holds anything, as a standby's does that was away for a while.
* **What the peer does not have goes.** :meth:`ReplicatedTable.begin` marks a moment, and
  :meth:`ReplicatedTable.finish` removes what was not put since. Between the two comes a snapshot, mixed with
  changes; a pin that the peer lost before the walk came to it is in neither, and goes too.
* **Digest.** Each key is mixed to a number, the numbers of a server's keys are summed, and the sums are
  weighted by the server's name. So the digest is kept as keys come and go, in no order, and to clear a server
  is still one step. It finds what went wrong by mistake, with an error of 1 in 2**32; it resists no forger.

Only a node that has a peer pays for any of this.
"""

from __future__ import annotations

from array import array
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from itertools import chain, groupby
from typing import Generic, cast
from zlib import crc32

from sapin.core.affinity import AffinityTable
from sapin.core.contracts import Key
from sapin.core.pins import MAX_KEY_LENGTH, Cause, Change, Cleared, Feed, Put, Removed, checked
from sapin.core.slots import Keys, M, pack
from sapin.core.wheel import column

LOOKS = 32
"""Slots that can be looked at while one pin is removed."""

_SPICE = 0x9E3779B97F4A7C15
_MASK = 2**64 - 1


def mix(data: bytes) -> int:
    """A number for the bytes, the same on every node; a sum of such numbers is a digest of a set."""
    checksum = crc32(data) + 1
    return checksum * (checksum ^ _SPICE)  # not linear, or changes could cancel out in a sum of checksums


def mixed(keys: Iterable[bytes]) -> int:
    """The sum of :func:`mix` of each."""
    return sum([(checksum := crc32(key) + 1) * (checksum ^ _SPICE) for key in keys])


class DigestedKeys(Keys):
    """Keys that are summed up for each owner of slots."""

    __slots__ = ("_owner", "sums")

    def __init__(self, capacity: int, owner: memoryview[int]) -> None:
        super().__init__(capacity)
        self._owner = owner
        self.sums: defaultdict[int, int] = defaultdict(int)
        """By the owner's ring; 0 for one that has no slot."""

    def add(self, slot: int, keys: tuple[Key, ...]) -> None:
        """As :meth:`Keys.add`; the slot has its owner already."""
        super().add(slot, keys)
        self.sums[self._owner[slot]] += mixed(keys)

    def remove(self, slot: int) -> tuple[Key, ...]:
        """As :meth:`Keys.remove`; the slot still has its owner."""
        keys = super().remove(slot)
        self.sums[self._owner[slot]] -= mixed(keys)
        return keys


class ReplicatedTable(AffinityTable[M]):
    """The pins of one affinity group, on a node that has a peer. Arguments as for :class:`AffinityTable`."""

    __slots__ = ("_cursor", "_epoch", "_seen", "_sums")

    def __init__(self, group: str, limit: int, timeout: int, feed: Feed | None = None) -> None:
        super().__init__(group, limit, timeout, feed)
        self._seen = column("I", limit + 1)
        """The mark that was in force when each slot was last put."""
        self._epoch = 0
        """The mark; 0 before the first."""
        self._cursor = 0
        """The next slot that :meth:`finish` looks at; 0 when it is not needed."""

    def _make_keys(self, slots: int) -> Keys:
        keys = DigestedKeys(slots, self._owners.of)
        self._sums = keys.sums
        return keys

    def put(self, keys: Sequence[Key], member: M, now: int) -> None:
        """As :meth:`AffinityTable.put`; such a pin outlives a snapshot that does not have it yet."""
        super().put(keys, member, now)
        if self._cursor:
            self._seen[self._keys.slot(keys[0])] = self._epoch

    def digest(self) -> int:
        """64 bits of which keys are pinned to which server."""
        owners = self._owners.names.items()
        return sum(self._sums[ring] * (2 * mix(name.encode()) + 1) for name, ring in owners) & _MASK

    def touched(self, start: int, limit: int, due_after: int) -> tuple[list[Key], int | None]:
        """The primary keys of those of ``limit`` slots whose pins are due after that, and where to go on.

        With ``second + timeout`` there, these are the pins that were put or touched after that second.
        """
        first, end = max(start, 1), min(start + limit, self._top + 1)
        late = [slot for slot, due in enumerate(self._due[first:end], first) if due > due_after]
        keys = [self._keys.of(slot)[0] for slot in late if self._members[self._owner[slot]] is not None]
        return keys, end if end <= self._top else None

    # what the peer says

    def begin(self) -> None:
        """From now on, what is put is marked."""
        self._epoch += 1
        self._cursor = 1

    def finish(self, limit: int) -> tuple[list[Removed], bool]:
        """Removes what was not put since :meth:`begin`; a step that looks at ``limit`` slots, or does as much work.

        What went, which the feed is not told of; and whether that was all.
        """
        if not self._cursor:
            return [], True
        first, end = self._cursor, min(self._cursor + limit, self._top + 1)
        stale = [slot for slot, mark in enumerate(self._seen[first:end], first) if mark != self._epoch]
        gone: list[Removed] = []
        for slot in stale:
            member = self._members[self._owner[slot]]
            if member is None:
                continue
            if len(gone) > limit // LOOKS:
                end = slot
                break
            gone.append(Removed(self.group, self._release(slot), member.name, Cause.RESYNCED))
        self._cursor = end if end <= self._top else 0
        return gone, not self._cursor

    def apply(self, changes: Sequence[Change], members: Mapping[str, M], now: int) -> list[Change]:
        """Makes the peer's changes, without telling the feed; those that changed anything.

        Keys that are put to a server which is not among the members are not pinned.
        What is evicted for want of room is told.

        Raises:
            ValueError: as :meth:`put`; what came before it is applied.
        """
        made: list[Change] = []
        for (kind, server), run in groupby(changes, _kind_and_server):
            member = members.get(server)
            if kind is Put and member is not None:
                self._put_all(cast("Iterable[Put]", run), member, now, made)
            else:
                made.extend(change for change in run if self._undo(change))
        return made

    def _undo(self, change: Change) -> bool:
        """Removes what a change says is gone, or is where we cannot put it; whether anything was."""
        if isinstance(change, Cleared):
            size = self._owners.retire(change.server)
            self._cleared += size
            return size > 0
        held = any(map(self._keys.slot, change.keys))
        self._detach(change.keys)
        return held

    def _put_all(self, puts: Iterable[Put], member: M, now: int, made: list[Change]) -> None:
        """Puts to one server. Pins that are new get slots in a row, which are filed in one step."""
        run = _Run(self._top + 1, self._limit, member, now + self.timeout)
        shards, room = self._keys.shards, run.room
        try:
            for put in puts:
                _, keys, _, since = put
                if len(keys) == 1 and 0 < len(keys[0]) <= MAX_KEY_LENGTH and len(run.packed) < room:
                    # What happens a million times in a row, so without a call for each step.
                    (key,) = keys
                    slot = run.first + len(run.packed)
                    if shards[hash(key) >> 50 & 255].setdefault(key, slot) == slot:
                        run.packed.append(key)
                        run.since.append(since)
                        made.append(put)
                        continue
                if self._stands(keys, since, run):
                    continue
                made.append(put)
                if not self._lengthen(run, keys, since):
                    self._file(run)
                    self._replace(checked(keys), member, since, run.due)
                    run = _Run(self._top + 1, self._limit, member, run.due)
                    room = run.room
        finally:
            self._file(run)

    def _stands(self, keys: tuple[Key, ...], since: int, run: _Run[M]) -> bool:
        """Whether there is just that pin already; then it is seen, and put off."""
        slot = self._keys.slot(keys[0]) if keys else 0
        if self._members[self._owner[slot]] is not run.member or self._keys.of(slot) != keys:
            return False
        self._since[slot], self._due[slot], self._seen[slot] = since, run.due, self._epoch
        return True

    def _lengthen(self, run: _Run[M], keys: tuple[Key, ...], since: int) -> bool:
        """Adds a pin to the run, if it is new and there is a slot for it."""
        position = len(run.packed)
        if position >= run.room or any(map(self._keys.slot, keys)):
            return False
        keys = checked(keys)
        for key in keys:
            self._keys.shards[hash(key) >> 50 & 255][key] = run.first + position
        run.since.append(since)
        if len(keys) == 1:
            run.packed.append(keys[0])
        else:
            run.packed.append(pack(keys))
            run.several[position] = keys
        return True

    def _file(self, run: _Run[M]) -> None:
        """Makes the pins of a run, whose keys have their slots already."""
        first, count = run.first, len(run.packed)
        if not count:
            return
        end = first + count
        self._owners.give_run(first, count, run.member)
        self._wheel.file_run(first, count, run.due)
        self._due[first:end] = array("I", [run.due]) * count
        self._seen[first:end] = array("I", [self._epoch]) * count
        self._since[first:end] = run.since
        self._keys.counts[first:end] = run.counts()
        for low in range(first & ~4095, end, 4096):
            part = range(max(first, low), min(end, low + 4096))
            self._keys.packed[low >> 12].update(zip(part, run.packed[part.start - first :], strict=False))
        self._sums[self._owner[first]] += mixed(run.keys())
        self._inserted += count
        self._top = end - 1

    def _replace(self, keys: tuple[Key, ...], member: M, since: int, due: int) -> None:
        """Makes a pin with just these keys, which no other has any more."""
        slot = self._keys.slot(keys[0])
        if self._members[self._owner[slot]] is None:
            self._detach(keys)
            slot = self._allocate()
            self._insert(slot, keys, member, since)
        else:
            self._move(slot, member, since)
            held = self._keys.of(slot)
            self._detach(key for key in keys if key not in held)
            self._keys.remove(slot)
            self._keys.add(slot, keys)
        self._since[slot], self._due[slot], self._seen[slot] = since, due, self._epoch
        self._wheel.file(slot, due)

    def _move(self, slot: int, member: M, since: int) -> str | None:
        ring = self._owner[slot]
        former = super()._move(slot, member, since)
        if former is not None:
            total = mixed(self._keys.of(slot))
            self._sums[ring] -= total
            self._sums[self._owner[slot]] += total
        return former


class _Run(Generic[M]):
    """New pins of one server whose slots follow each other; their keys have these slots already, and no more."""

    __slots__ = ("due", "first", "member", "packed", "room", "several", "since")

    def __init__(self, first: int, limit: int, member: M, due: int) -> None:
        self.first = first
        """The first slot."""
        self.room = limit + 1 - first
        """How many pins it may have."""
        self.member = member
        self.due = due
        self.since = array("q")
        self.packed: list[bytes] = []
        """The keys of each pin, as :class:`~sapin.core.slots.Keys` has them."""
        self.several: dict[int, tuple[Key, ...]] = {}
        """The keys of those that have more than one, by their place in the run."""

    def counts(self) -> memoryview[int]:
        """How many keys each has."""
        found = array("B", [1]) * len(self.packed)
        for place, keys in self.several.items():
            found[place] = len(keys)
        return memoryview(found)

    def keys(self) -> list[Key]:
        """All keys of all."""
        if not self.several:
            return self.packed
        single = [key for place, key in enumerate(self.packed) if place not in self.several]
        return [*single, *chain.from_iterable(self.several.values())]


def _kind_and_server(change: Change) -> tuple[type, str]:
    return type(change), change.server
