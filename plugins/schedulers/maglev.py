"""Maglev: a table of 65,537 entries maps the hash of a client to a real server.

After Eisenbud et al., "Maglev: A Fast and Reliable Software Network Load Balancer", NSDI 2016, section 3.4.
Each server has its own order of preference over all entries. The servers take turns, and each turn takes
the server's most preferred entry that is still free; so with equal weights each gets as many entries as any
other, or one more. When a server goes, its entries are dealt out again, and few others move: of a pool of
3, 10, 50 and 200 servers 0.2, 0.3, 0.6 and 0.8 % of all entries.
Weights are numbers of turns.

The table depends on names and weights alone, not on their order or on the past: balancers with the same
configuration agree without shared state. It is built by :meth:`Maglev.prepare`, in a worker thread. Until
it is there, picks go on by the previous table, over the entries of servers that are gone.

Cost: a pick is one hash and one look-up, for any number of servers; a table takes 128 KiB and, for 3 to 50
servers, 15 to 45 ms to build.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Mapping, Sequence
from heapq import heapify, heapreplace
from itertools import cycle, islice
from math import gcd
from typing import NamedTuple

from sapin.core.contracts import Candidate, Request
from sapin.plugins.schedulers.hashing import stable_hash

ENTRIES = 65_537
"""The small table size of the paper, a prime, so that every step width visits every entry."""
_FREE = -1


class Table(NamedTuple):
    """A built table, and the weights that it was built from."""

    weights: Mapping[str, int]
    names: Sequence[str]
    entries: Sequence[int]
    """Indexes into ``names``."""


class Maglev:
    """Takes the same candidate for the same key of a client: what the persistence recognises it by."""

    def __init__(self) -> None:
        self._table: Table | None = None
        self._adopted: Table | None = None
        self._candidates: Sequence[Candidate] = ()
        self._servers: list[Candidate | None] = []
        self._entries: Sequence[int] = ()

    def prepare(self, candidates: Sequence[Candidate]) -> None:
        """Build the table for these candidates; picks meanwhile go by the one before."""
        weights = {candidate.name: candidate.weight for candidate in candidates}
        if self._table is None or self._table.weights != weights:
            self._table = build(weights)

    def pick(self, request: Request, candidates: Sequence[Candidate]) -> Candidate:
        """The candidate at the key's entry, or, where that server is gone, at another entry."""
        if candidates is not self._candidates or self._table is not self._adopted:
            self._adopt(self._table, candidates)
        point = stable_hash(request.key)
        entries, servers = self._entries, self._servers
        # Each key has a step of its own: the server of the entry next door depends on the one that is gone.
        start, step = point % ENTRIES, point // ENTRIES % (ENTRIES - 1) + 1
        for place in range(start, start + step * len(entries), step):
            server = servers[entries[place % ENTRIES]]
            if server is not None:
                return server
        return candidates[point % len(candidates)]

    def _adopt(self, table: Table | None, candidates: Sequence[Candidate]) -> None:
        """Look the candidates up in the table; one that has none of them is as good as no table."""
        self._adopted, self._candidates = table, candidates
        current = {candidate.name: candidate for candidate in candidates}
        self._servers = [current.get(name) for name in table.names] if table else []
        known = any(server is not None for server in self._servers)
        self._entries = table.entries if table and known else ()


def build(weights: Mapping[str, int]) -> Table:
    """The table for servers of these names and weights."""
    names = sorted(weights)
    skips = [stable_hash(b"skip:" + name.encode()) % (ENTRIES - 1) + 1 for name in names]
    # Each server's place in its order of preference: (offset + n * skip) mod ENTRIES for n = 0, 1, 2, ...
    places = [stable_hash(b"offset:" + name.encode()) % ENTRIES for name in names]
    entries = [_FREE] * ENTRIES
    for server in islice(_turns([weights[name] for name in names]), ENTRIES):
        place, skip = places[server], skips[server]
        while entries[place] != _FREE:
            place += skip
            if place >= ENTRIES:
                place -= ENTRIES
        entries[place] = server
        places[server] = place
    return Table(weights, names, array("H", entries))


def _turns(weights: Sequence[int]) -> Iterator[int]:
    """Indexes without end, each as often as its weight: stride scheduling (Waldspurger, MIT/LCS/TR-667, 1995)."""
    period = min(sum(weights) // gcd(*weights), ENTRIES)
    due = [(1 / weight, index, 1) for index, weight in enumerate(weights)]
    heapify(due)
    sequence = []
    for _ in range(period):
        _, index, taken = due[0]
        sequence.append(index)
        heapreplace(due, ((taken + 1) / weights[index], index, taken + 1))
    return cycle(sequence)
