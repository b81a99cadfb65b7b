"""The words of the affinity table as values: pins, what changes them, and which keys a pin keeps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Generic, NamedTuple

from sapin.core.contracts import Key
from sapin.core.slots import M

MAX_KEYS = 8
"""Keys of one pin: an SPI and the tuples of two ports, with room for a few address changes and rekeys."""

MAX_KEY_LENGTH = 255
"""Bytes of one key; its length is kept in one byte."""


class Cause(StrEnum):
    """Why keys are no longer pinned."""

    EXPIRED = "expired"
    EVICTED = "evicted"
    """The table was full."""
    DELETED = "deleted"
    """Somebody asked for it."""
    DISPLACED = "displaced"
    """The pin had too many keys; it goes on without these."""
    RESYNCED = "resynced"
    """The peer, whose word counts, does not have them."""


class Put(NamedTuple):
    """A pin as it is now: it is new, has another server, or other keys. No other pin has its keys any more."""

    group: str
    keys: tuple[Key, ...]
    """All of its keys, the primary first."""
    server: str
    since: int
    """When it was pinned to this server."""


class Removed(NamedTuple):
    """Keys are no longer pinned."""

    group: str
    keys: tuple[Key, ...]
    server: str
    """The one that they were pinned to."""
    cause: Cause


class Cleared(NamedTuple):
    """A server has lost all its pins."""

    group: str
    server: str


Change = Put | Removed | Cleared
Feed = Callable[[Change], None]


@dataclass(frozen=True, slots=True)
class Pin:
    """A pin, for showing and for keeping."""

    keys: tuple[Key, ...]
    server: str
    since: int
    """When it was pinned to this server."""
    due: int
    """When it expires unless it is touched."""


class Hit(NamedTuple, Generic[M]):
    """What a lookup found."""

    member: M
    key: Key
    """The key that decided."""


class Page(NamedTuple):
    """A part of a listing."""

    pins: tuple[Pin, ...]
    """Possibly none, although more pages follow."""
    next: int | None
    """Where the next page starts; ``None`` after the last."""


class Puts(NamedTuple):
    """A part of a walk over a table."""

    puts: list[Put]
    next: int | None
    """Where the next part starts; ``None`` after the last."""


@dataclass(frozen=True, slots=True)
class AffinityStats:
    """Figures of a table; all but the first three only ever grow."""

    size: int
    limit: int
    unswept: int
    """Slots of cleared pins that :meth:`AffinityTable.sweep` has yet to give back."""
    inserted: int
    moved: int
    deleted: int
    cleared: int
    expired: int
    evicted: int


def checked(keys: Sequence[Key]) -> tuple[Key, ...]:
    """The keys without repetition; of too many, the strongest."""
    if not keys:
        raise ValueError("a pin needs a key")
    for key in keys:
        if not 0 < len(key) <= MAX_KEY_LENGTH:
            raise ValueError(f"a key has 1 to {MAX_KEY_LENGTH} bytes, not {len(key)}")
    return tuple(keys) if len(keys) == 1 else tuple(dict.fromkeys(keys))[:MAX_KEYS]


def merged(held: tuple[Key, ...], wanted: tuple[Key, ...]) -> tuple[Key, ...]:
    """The keys of a pin that has some and gets others, within the bound; the wanted ones stay."""
    kept = list(held)
    for key in wanted:
        if key in kept:
            continue
        if len(kept) == MAX_KEYS:
            old = [other for other in kept[1:] if other not in wanted]
            if not old:
                break
            kept.remove(next((other for other in old if _kind(other) == _kind(key)), old[0]))
        kept.append(key)
    return tuple(kept)


def _kind(key: Key) -> bytes:
    return key.partition(b":")[0]
