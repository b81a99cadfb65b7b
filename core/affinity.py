"""The affinity table: which member (real server) each client of an affinity group is pinned to.

A *pin* binds one or more keys to one member: a client may be found by its IKE SPI and by the tuples of
its two ports alike. One table serves a whole affinity group, so that ports which follow each other agree.

Rules:

* A key belongs to one pin at most. A pin that has lost its last key is gone.
* A pin has at most :data:`MAX_KEYS` keys. One key more displaces the oldest of its kind (what precedes the
  colon), or else the oldest; but never the first, the *primary* key, nor one that is put with it.
* A pin expires ``timeout`` seconds after it was last put or touched. Touching writes one number; a lazy
  timer wheel finds what is due (:mod:`sapin.core.wheel`).
* A table never holds more than ``limit`` pins. A full one evicts the least recently due.
* Every operation is bounded in time, whatever the number of pins. To clear a member is to forget its
  ring of pins: from then on they are misses, and :meth:`AffinityTable.sweep` gives back their slots.
* Every change but a touch goes to the feed, as the state of a pin after it, never as a difference. Whoever
  applies the feed in its order to an empty table (:mod:`sapin.core.replicated`), or to a plain mapping of key
  to server, has the same pins.

How it is kept, and why so, is in :mod:`sapin.core.slots`.

Times are whole seconds of one monotonic clock that the caller reads.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Generic

from sapin.core.contracts import Key
from sapin.core.pins import (
    MAX_KEY_LENGTH,
    MAX_KEYS,
    AffinityStats,
    Cause,
    Change,
    Cleared,
    Feed,
    Hit,
    Page,
    Pin,
    Put,
    Puts,
    Removed,
    checked,
    merged,
)
from sapin.core.slots import Keys, M, Owners, unpack
from sapin.core.wheel import TimerWheel, column

__all__ = [
    "MAX_KEYS",
    "MAX_KEY_LENGTH",
    "AffinityStats",
    "AffinityTable",
    "Cause",
    "Change",
    "Cleared",
    "Feed",
    "Hit",
    "Page",
    "Pin",
    "Put",
    "Removed",
]

_EVICTION_LOOKS = 1000
"""Pins that one eviction may look at (about 1 ms): beyond that the least recently due of these has to go."""

POSTPONED = 60
"""Seconds until a pin is looked at again that is overdue and not ours to end."""

_FOREVER = 2**32 - 1


class AffinityTable(Generic[M]):
    """The pins of one affinity group.

    Args:
        group: the group's name, for the feed.
        limit: the most pins that it holds, for all its life: address space is reserved for them.
        timeout: seconds from a touch to expiry.
        feed: called with each change after it was made; it must not change the table itself.

    Raises:
        ValueError: ``limit`` or ``timeout`` is not positive.
    """

    __slots__ = (
        "_cleared",
        "_due",
        "_ended",
        "_feed",
        "_inserted",
        "_keys",
        "_limit",
        "_members",
        "_moved",
        "_owner",
        "_owners",
        "_shards",
        "_since",
        "_top",
        "_wheel",
        "group",
        "timeout",
    )

    def __init__(self, group: str, limit: int, timeout: int, feed: Feed | None = None) -> None:
        if limit < 1 or timeout < 1:
            raise ValueError(f"limit and timeout must be at least 1, not {limit} and {timeout}")
        self.group = group
        self._limit = limit
        self.timeout = timeout
        """Seconds from a touch to expiry. A change counts for pins that are put or touched after it; one that is
        only touched may live for as long as the timeout before had given it."""
        self._feed = feed
        slots = limit + 1
        self._owners: Owners[M] = Owners(slots)
        self._keys = self._make_keys(slots)
        self._wheel = TimerWheel(slots)
        self._due = column("I", slots)
        self._since = column("q", slots)
        self._top = 0
        """The highest slot that was ever used. Slot 0 never is: it stands for a miss."""
        self._shards = self._keys.shards
        self._owner = self._owners.of
        self._members = self._owners.members
        self._inserted = self._moved = self._cleared = 0
        self._ended: Counter[Cause] = Counter()

    def _make_keys(self, slots: int) -> Keys:
        return Keys(slots)

    def __len__(self) -> int:
        return self._owners.live

    @property
    def limit(self) -> int:
        """The most pins that it holds."""
        return self._limit

    def get(self, key: Key) -> M | None:
        """The member that the key is pinned to."""
        # As Keys.slot, which would take as long to call as all of this takes.
        return self._members[self._owner[self._shards[hash(key) >> 50 & 255].get(key, 0)]]

    def find(self, keys: Iterable[Key]) -> Hit[M] | None:
        """What the first of the keys that is pinned says."""
        for key in keys:
            member = self.get(key)
            if member is not None:
                return Hit(member, key)
        return None

    def touch(self, key: Key, now: int) -> M | None:
        """Puts off the expiry of the pin that has the key, and answers its member."""
        slot = self._shards[hash(key) >> 50 & 255].get(key, 0)
        self._due[slot] = now + self.timeout
        return self._members[self._owner[slot]]

    def describe(self, key: Key) -> Pin | None:
        """The pin that has the key."""
        return self._pin(self._keys.slot(key))

    def pins(self, start: int = 0, limit: int = 100, due_after: int = 0) -> Page:
        """A page of the pins: looks at ``limit`` slots from ``start``, which is 0 or a page's ``next``.

        The table may change between pages: a pin that is there all the time is listed exactly once.
        ``due_after`` leaves out those due up to then: with ``second + timeout`` there,
        the pins touched after that second are listed.
        """
        end = min(start + limit, self._top + 1)
        late = (slot for slot in range(max(start, 1), end) if self._due[slot] > due_after)
        pins = tuple(pin for slot in late if (pin := self._pin(slot)) is not None)
        return Page(pins, end if end <= self._top else None)

    def puts(self, start: int = 0, limit: int = 250) -> Puts:
        """The pins in ``limit`` slots from ``start``, which is 0 or a part's ``next``.

        The table may change between parts: a pin that is there all the time is in exactly one of them.
        """
        first, end = max(start, 1), min(start + limit, self._top + 1)
        members, packed, found = self._members, self._keys.packed, list[Put]()
        columns = zip(
            self._owner[first:end], self._keys.counts[first:end], self._since[first:end], strict=True
        )
        for slot, (ring, count, since) in enumerate(columns, first):
            member = members[ring]
            if member is not None:
                data = packed[slot >> 12][slot]
                keys = (data,) if count == 1 else tuple(unpack(data))
                found.append(Put(self.group, keys, member.name, since))
        return Puts(found, end if end <= self._top else None)

    def counts(self) -> Mapping[str, int]:
        """How many pins each server has; one without is left out."""
        return self._owners.counts()

    def stats(self) -> AffinityStats:
        """The figures of the table as of now."""
        return AffinityStats(
            size=len(self),
            limit=self._limit,
            unswept=self._owners.orphans(),
            inserted=self._inserted,
            moved=self._moved,
            deleted=self._ended[Cause.DELETED],
            cleared=self._cleared,
            expired=self._ended[Cause.EXPIRED],
            evicted=self._ended[Cause.EVICTED],
        )

    def put(self, keys: Sequence[Key], member: M, now: int) -> None:
        """Pins all the keys to the member, as one pin.

        The pin of the first key that is pinned is extended by the other keys, and moved if it was
        another member's; if none is pinned, there is a new pin.
        Other pins lose those keys.

        Raises:
            ValueError: no key, or one that is empty or longer than :data:`MAX_KEY_LENGTH`.
        """
        self._tell(self._place(keys, member, now, now + self.timeout))

    def adopt(self, member: M) -> None:
        """Makes this object stand for the member of the same name, whose pins it takes over."""
        self._owners.adopt(member)

    def remove(self, key: Key) -> bool:
        """Removes the whole pin that has the key; ``False`` if there is none."""
        slot = self._keys.slot(key)
        if self._members[self._owner[slot]] is None:
            return False
        self._end(slot, Cause.DELETED)
        return True

    def clear(self, member: M) -> int:
        """Removes all pins of the member at once, however many; answers how many. :meth:`sweep` is due then."""
        size = self._owners.retire(member.name)
        self._cleared += size
        if size:
            self._tell([Cleared(self.group, member.name)])
        return size

    def sweep(self, limit: int) -> bool:
        """Gives back up to ``limit`` slots of cleared pins; whether there are more."""
        for _ in range(limit):
            slot = self._owners.orphan()
            if not slot:
                return False
            self._release(slot)
        return self._owners.orphan() != 0

    def expire(self, now: int, limit: int) -> bool:
        """Looks at up to ``limit`` entries of the wheel and removes the pins that are due; whether there is more to do.

        Until it is called, an overdue pin is still found, and may be touched.
        """
        for slot, _ in self._wheel.due(now, limit):
            if self._members[self._owner[slot]] is None:
                continue
            if self._due[slot] > now:
                self._wheel.file(slot, self._due[slot])
            else:
                self._end(slot, Cause.EXPIRED)
        earliest = self._wheel.earliest()
        return earliest is not None and earliest <= now

    def postpone(self, now: int, limit: int) -> bool:
        """As :meth:`expire`, but leaves what is due, to be looked at later: somebody else says when a pin ends."""
        for slot, _ in self._wheel.due(now, limit):
            if self._members[self._owner[slot]] is not None:
                self._wheel.file(slot, max(self._due[slot], now + POSTPONED))
        earliest = self._wheel.earliest()
        return earliest is not None and earliest <= now

    def restore(self, pins: Iterable[Pin], members: Mapping[str, M], now: int) -> int:
        """Puts kept pins back, without telling the feed; how many.

        A pin that is due by now or whose server is not among the members is left out. None is due later
        than one that is touched now. What is evicted for want of room is told.

        Raises:
            ValueError: as :meth:`put`.
        """
        restored = 0
        latest = now + self.timeout
        for pin in pins:
            member = members.get(pin.server)
            if member is not None and pin.due > now:
                self._place(pin.keys, member, pin.since, min(pin.due, latest))
                restored += 1
        return restored

    def _place(self, keys: Sequence[Key], member: M, since: int, due: int) -> Sequence[Change]:
        """Puts a pin; what that changed, yet to be told."""
        wanted = checked(keys)
        slot = self._pinned(wanted)
        if slot:
            changes = self._change(slot, wanted, member, since)
        else:
            slot = self._allocate()
            changes = self._insert(slot, wanted, member, since)
        self._due[slot] = due
        self._wheel.file(slot, due)
        return changes

    def _tell(self, changes: Iterable[Change]) -> None:
        if self._feed is not None:
            for change in changes:
                self._feed(change)

    def _pinned(self, keys: tuple[Key, ...]) -> int:
        """The pin of the first key that is pinned, or 0."""
        for key in keys:
            slot = self._keys.slot(key)
            if self._members[self._owner[slot]] is not None:
                return slot
        return 0

    def _insert(self, slot: int, keys: tuple[Key, ...], member: M, since: int) -> Sequence[Change]:
        self._since[slot] = since
        if self._owners.retired:
            self._detach(keys)
        self._owners.give(slot, member)
        self._keys.add(slot, keys)
        self._inserted += 1
        return (Put(self.group, keys, member.name, since),)

    def _change(self, slot: int, keys: tuple[Key, ...], member: M, since: int) -> Sequence[Change]:
        held = self._keys.of(slot)
        kept = merged(held, keys)
        former = self._move(slot, member, since)
        if kept == held and not former:
            return ()
        robbed = self._detach(key for key in kept if key not in held)
        self._keys.remove(slot)
        self._keys.add(slot, kept)
        changes: list[Change] = []
        displaced = tuple(key for key in held if key not in kept)
        if displaced:
            changes.append(Removed(self.group, displaced, former or member.name, Cause.DISPLACED))
        pins = filter(None, map(self._pin, (slot, *robbed)))
        changes.extend(Put(self.group, pin.keys, pin.server, pin.since) for pin in pins)
        return changes

    def _move(self, slot: int, member: M, since: int) -> str | None:
        """Makes the member the owner of a pin; the name of the one before, if it was another."""
        former = self._members[self._owner[slot]]
        if former is None or self._owners.adopt(member) == self._owner[slot]:
            return None
        self._owners.take(slot)
        self._owners.give(slot, member)
        self._since[slot] = since
        self._moved += 1
        return former.name

    def _detach(self, keys: Iterable[Key]) -> Iterable[int]:
        """Takes keys from the pins that have them; which pins had others besides."""
        robbed: dict[int, None] = {}
        for key in keys:
            slot = self._keys.slot(key)
            if not slot:
                continue
            rest = tuple(other for other in self._keys.of(slot) if other != key)
            if rest:
                self._keys.remove(slot)
                self._keys.add(slot, rest)
                robbed[slot] = None
            else:
                self._release(slot)
        return robbed

    def _allocate(self) -> int:
        """A slot for a new pin."""
        slot = self._owners.reuse()
        if slot:
            return slot
        orphan = self._owners.orphan()
        if orphan:
            self._release(orphan)
        elif self._top < self._limit:
            self._top += 1
            return self._top
        else:
            self._end(self._least_due(), Cause.EVICTED)
        return self._owners.reuse()

    def _least_due(self) -> int:
        """The pin to evict from a full table, in which every slot is a pin's and is filed."""
        least = 0
        while not least:
            for slot, second in self._wheel.due(_FOREVER, _EVICTION_LOOKS):
                if self._due[slot] <= second:
                    return slot
                self._wheel.file(slot, self._due[slot])
                if not least or self._due[slot] < self._due[least]:
                    least = slot
        return least

    def _end(self, slot: int, cause: Cause) -> None:
        member = self._members[self._owner[slot]]
        keys = self._release(slot)
        self._ended[cause] += 1
        if member is not None:
            self._tell([Removed(self.group, keys, member.name, cause)])

    def _release(self, slot: int) -> tuple[Key, ...]:
        """Gives a slot back; the keys that it had."""
        keys = self._keys.remove(slot)
        self._owners.free(slot)
        return keys

    def _pin(self, slot: int) -> Pin | None:
        member = self._members[self._owner[slot]]
        if member is None:
            return None
        return Pin(self._keys.of(slot), member.name, self._since[slot], self._due[slot])
