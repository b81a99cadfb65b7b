"""Which real server a datagram goes to, and why. Pure but for plugin faults, which it counts.

The order is always the same (the first that answers decides):

1. a key of the datagram is pinned, and its server keeps its clients: that server;
2. the scheduler picks among the candidates of the client's address family;
3. the scheduler is suspended, raised, or answered a stranger: the fallback picks;
4. there are no candidates: nobody.

The caller carries a decision out: it pins ``keys`` to ``member``.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import StrEnum
from random import Random
from typing import NamedTuple

from sapin.core.contracts import Datagram, Key, Request, key
from sapin.core.registry import told
from sapin.core.snapshot import Group, Member, Pool

MAX_KEY_LENGTH = 64
"""Bytes; a longer key is a fault of the persistence plugin."""
MAX_KEYS = 4
"""Keys of one datagram; more are a fault of the persistence plugin."""


class Reason(StrEnum):
    """Why a datagram went where it went."""

    PINNED = "pinned"
    """One of its keys is pinned."""
    SCHEDULED = "scheduled"
    """A new client: the scheduler picked."""
    FALLBACK = "fallback"
    """A new client: the scheduler is at fault, the fallback picked."""
    NO_SERVER = "no-server"
    """Nobody may take it: it is dropped."""


class Decision(NamedTuple):
    """Where a datagram goes. The caller pins ``keys`` to ``member``."""

    member: Member | None
    reason: Reason
    keys: Sequence[Key]
    """The keys of the client, the strongest first; none if it is not to be pinned."""
    matched: Key | None = None
    """The key that was pinned already."""


def decide(group: Group, datagram: Datagram, random: Random, now: float) -> Decision:
    """Where the datagram goes; ``now`` in seconds, for the suspension of plugins."""
    keys = keys_of(group, datagram, now)
    version = 4 if len(datagram.client.address) == 4 else 6
    found = group.table.find(keys)
    if found is not None:
        member, matched = found
        if member.keeps and member.version == version:
            return Decision(member, Reason.PINNED, keys, matched)
    pool = group.pools.get(version)
    if pool is None or not pool.candidates:
        return Decision(None, Reason.NO_SERVER, keys)
    first = keys[0] if keys else key("client", datagram.client.address)
    member, reason = _pick(pool, Request(datagram.client, first, random), now)
    return Decision(member, reason, keys)


def keys_of(group: Group, datagram: Datagram, now: float) -> Sequence[Key]:
    """The keys by which the client of the datagram is recognised.

    While the persistence plugin is at fault it is the client's address: a farm that pins too coarsely still
    works, one that does not pin loses every client between its two ports.
    """
    hosted = group.persistence
    if not hosted.usable(now):
        return (key("client", datagram.client.address),)
    try:
        keys = hosted.plugin.keys(datagram)
        if not _are_keys(keys):
            raise ValueError(f"not a tuple or list of up to {MAX_KEYS} keys: {keys!r:.100}")
    except Exception as error:
        hosted.fault(told(error), now)
        return (key("client", datagram.client.address),)
    hosted.faults.in_a_row = 0
    return keys


def _are_keys(keys: object) -> bool:
    return (
        isinstance(keys, (tuple, list))
        and len(keys) <= MAX_KEYS
        and all(type(k) is bytes and 0 < len(k) <= MAX_KEY_LENGTH for k in keys)
    )


def _pick(pool: Pool, request: Request, now: float) -> tuple[Member, Reason]:
    hosted = pool.scheduler
    if hosted.usable(now):
        try:
            chosen = hosted.plugin.pick(request, pool.candidates)
            if isinstance(chosen, Member) and chosen in pool.candidates:
                hosted.faults.in_a_row = 0
                return chosen, Reason.SCHEDULED
            raise LookupError(f"{chosen!r:.100} is not a candidate")
        except Exception as error:
            hosted.fault(told(error), now)
    return fallback(pool), Reason.FALLBACK


def fallback(pool: Pool) -> Member:
    """The candidate with the fewest pinned clients: needs no state and cannot fail."""
    return min(pool.candidates, key=lambda member: member.pinned)
