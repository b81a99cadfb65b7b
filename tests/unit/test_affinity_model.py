"""The affinity table against a naive model of its rules, and its feed against three kinds of consumers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import hypothesis.strategies as st
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from sapin.core.affinity import (
    MAX_KEYS,
    AffinityTable,
    Cause,
    Change,
    Cleared,
    Pin,
    Put,
    Removed,
)
from sapin.core.replicated import ReplicatedTable, mix

LIMIT = 4
TIMEOUT = 6
NAMES = ("gw1", "gw2", "gw3")
KEYS = [b"spi:%d" % i for i in range(8)] + [b"tuple:%d" % i for i in range(6)]
OTHERS = 100
"""What somebody else has added to each server's counter."""


@dataclass(eq=False)
class Server:
    name: str
    pinned: int = OTHERS


def kind(key: bytes) -> bytes:
    return key.split(b":")[0]


class Model:
    """The rules, without regard to cost."""

    def __init__(self) -> None:
        self.pins: list[Pin] = []

    def of(self, key: bytes) -> Pin | None:
        return next((pin for pin in self.pins if key in pin.keys), None)

    def swap(self, old: Pin | None, new: Pin | None) -> None:
        self.pins = [pin for pin in self.pins if pin is not old] + ([new] if new else [])

    def put(self, keys: list[bytes], server: str, now: int) -> None:
        found = next((pin for pin in map(self.of, keys) if pin), None)
        kept = list(found.keys) if found else []
        for key in [key for key in dict.fromkeys(keys) if key not in kept]:
            if len(kept) == MAX_KEYS:
                old = [other for other in kept[1:] if other not in keys]
                kept.remove(([other for other in old if kind(other) == kind(key)] or old)[0])
            kept.append(key)
        since = found.since if found and found.server == server else now
        self.swap(found, None)
        for pin in list(self.pins):
            rest = tuple(key for key in pin.keys if key not in kept)
            if rest != pin.keys:
                self.swap(pin, replace(pin, keys=rest) if rest else None)
        self.swap(None, Pin(tuple(kept), server, since, now + TIMEOUT))


class Flat:
    """Knows single keys only, as a kernel's map does."""

    def __init__(self) -> None:
        self.servers: dict[bytes, str] = {}

    def apply(self, change: Change) -> None:
        if isinstance(change, Put):
            self.servers |= dict.fromkeys(change.keys, change.server)
        elif isinstance(change, Removed):
            for key in change.keys:
                assert self.servers.pop(key) == change.server
        else:
            self.servers = {key: server for key, server in self.servers.items() if server != change.server}


class Whole:
    """Knows whole pins: a pin that loses one key to another is gone, until it is put again."""

    def __init__(self) -> None:
        self.pins: list[tuple[tuple[bytes, ...], str, int]] = []

    def apply(self, change: Change) -> None:
        if isinstance(change, Cleared):
            self.pins = [pin for pin in self.pins if pin[1] != change.server]
            return
        self.pins = [pin for pin in self.pins if not set(pin[0]) & set(change.keys)]
        if isinstance(change, Put):
            self.pins.append((change.keys, change.server, change.since))


def listing(table: AffinityTable[Server], size: int = 3) -> Iterator[Pin]:
    start: int | None = 0
    while start is not None:
        page = table.pins(start, size)
        yield from page.pins
        start = page.next


def naive_digest(pins: list[Pin]) -> int:
    return sum(mix(key) * (2 * mix(pin.server.encode()) + 1) for pin in pins for key in pin.keys) % 2**64


class Affinity(RuleBasedStateMachine):
    make = AffinityTable

    def __init__(self) -> None:
        super().__init__()
        self.now = 1
        self.changes: list[Change] = []
        self.servers = {name: Server(name) for name in NAMES}
        self.held = dict(self.servers)
        """The object that the table has for each name."""
        self.retired: list[Server] = []
        self.table: AffinityTable[Server] = self.make("ike", LIMIT, TIMEOUT, self.changes.append)
        self.model = Model()
        self.flat, self.whole = Flat(), Whole()
        self.peers = {name: Server(name) for name in NAMES}
        self.peer: ReplicatedTable[Server] = ReplicatedTable("ike", LIMIT, TIMEOUT)

    def told(self) -> list[Change]:
        """The changes since it was last asked, which all consumers get."""
        changes, self.changes[:] = list(self.changes), []
        for change in changes:
            self.flat.apply(change)
            self.whole.apply(change)
            assert self.peer.apply([change], self.peers, self.now) in ([], [change])
        return changes

    @rule(keys=st.lists(st.sampled_from(KEYS), min_size=1, max_size=6), name=st.sampled_from(NAMES))
    def put(self, keys: list[bytes], name: str) -> None:
        room = len(self.model.pins) < LIMIT or any(map(self.model.of, keys))
        self.table.put(keys, self.servers[name], self.now)
        self.held[name] = self.servers[name]
        changes = self.told()
        if not room:
            evicted = changes.pop(0)
            assert isinstance(evicted, Removed)
            assert evicted.cause is Cause.EVICTED
            pin = self.model.of(evicted.keys[0])
            assert pin is not None
            assert pin.keys == evicted.keys
            assert pin.due == min(each.due for each in self.model.pins)
            self.model.swap(pin, None)
        assert Cause.EVICTED not in {getattr(change, "cause", None) for change in changes}
        before = {(pin.keys, pin.server) for pin in self.model.pins}
        self.model.put(keys, name, self.now)
        after = {(pin.keys, pin.server) for pin in self.model.pins}
        assert {(c.keys, c.server) for c in changes if isinstance(c, Put)} == after - before

    @rule(key=st.sampled_from(KEYS))
    def touch(self, key: bytes) -> None:
        pin = self.model.of(key)
        member = self.table.touch(key, self.now)
        assert (member and member.name) == (pin and pin.server)
        if pin:
            self.model.swap(pin, replace(pin, due=self.now + TIMEOUT))
        assert self.told() == []

    @rule(key=st.sampled_from(KEYS))
    def remove(self, key: bytes) -> None:
        pin = self.model.of(key)
        assert self.table.remove(key) == (pin is not None)
        expected = [Removed("ike", pin.keys, pin.server, Cause.DELETED)] if pin else []
        assert self.told() == expected
        self.model.swap(pin, None)

    @rule(name=st.sampled_from(NAMES))
    def clear(self, name: str) -> None:
        pins = [pin for pin in self.model.pins if pin.server == name]
        assert self.table.clear(self.servers[name]) == len(pins)
        assert self.told() == ([Cleared("ike", name)] if pins else [])
        for pin in pins:
            self.model.swap(pin, None)

    @rule(limit=st.integers(1, 3))
    def sweep(self, limit: int) -> None:
        before = self.table.stats().unswept
        more = self.table.sweep(limit)
        assert self.table.stats().unswept == max(0, before - limit)
        assert more == (before > limit)
        assert self.told() == []

    @rule(seconds=st.integers(1, 4))
    def wait(self, seconds: int) -> None:
        self.now += seconds

    @rule(limit=st.integers(1, 3))
    def expire(self, limit: int) -> None:
        self.expired(limit)

    def expired(self, limit: int) -> bool:
        more = self.table.expire(self.now, limit)
        changes = self.told()
        assert len(changes) <= limit
        for change in changes:
            assert isinstance(change, Removed)
            pin = self.model.of(change.keys[0])
            assert pin is not None
            assert change == Removed("ike", pin.keys, pin.server, Cause.EXPIRED)
            assert pin.due <= self.now
            self.model.swap(pin, None)
        if not more:
            assert all(pin.due > self.now for pin in self.model.pins)
        return more

    @rule(name=st.sampled_from(NAMES), adopt=st.booleans())
    def replace_server(self, name: str, adopt: bool) -> None:
        self.retired.append(self.servers[name])
        self.servers[name] = Server(name)
        if adopt:
            self.table.adopt(self.servers[name])
            self.held[name] = self.servers[name]

    @rule()
    def restart(self) -> None:
        while self.expired(3):
            pass
        pins = list(listing(self.table))
        self.servers = {name: Server(name) for name in NAMES}
        self.held = dict(self.servers)
        self.retired = []
        self.table = self.make("ike", LIMIT, TIMEOUT, self.changes.append)
        assert self.table.restore(pins, self.servers, self.now) == len(pins)
        assert self.told() == []

    @invariant()
    def pins_are_those_of_the_model(self) -> None:
        expected = sorted(self.model.pins, key=lambda pin: pin.keys)
        assert sorted(listing(self.table), key=lambda pin: pin.keys) == expected
        for key in KEYS:
            pin = self.model.of(key)
            assert self.table.get(key) is (self.held[pin.server] if pin else None)
            assert self.table.describe(key) == pin

    @invariant()
    def counters_are_right(self) -> None:
        names = [pin.server for pin in self.model.pins]
        assert len(self.table) == self.table.stats().size == len(names) <= LIMIT
        assert self.table.counts() == {name: names.count(name) for name in set(names)}
        for server in (*self.servers.values(), *self.held.values(), *self.retired):
            own = names.count(server.name) if self.held[server.name] is server else 0
            assert server.pinned == OTHERS + own

    @invariant()
    def consumers_of_the_feed_have_the_same(self) -> None:
        pins = [(pin.keys, pin.server, pin.since) for pin in self.model.pins]
        assert self.flat.servers == {key: server for keys, server, _ in pins for key in keys}
        assert sorted(self.whole.pins) == sorted(pins)
        assert sorted((pin.keys, pin.server, pin.since) for pin in listing(self.peer)) == sorted(pins)
        assert self.peer.digest() == naive_digest(self.model.pins)


class Replicated(Affinity):
    """The same of a table that has a peer; and a second peer, which is away and gets snapshots."""

    make = ReplicatedTable

    def __init__(self) -> None:
        super().__init__()
        self.away: ReplicatedTable[Server] = ReplicatedTable("ike", 3 * LIMIT, TIMEOUT)
        self.away_servers = {name: Server(name) for name in NAMES}
        self.walk: int | None = None
        """How far the walk for the snapshot is; ``None`` without one."""

    def told(self) -> list[Change]:
        changes = super().told()
        if self.walk is not None:
            self.away.apply(changes, self.away_servers, self.now)
        return changes

    @rule(keys=st.lists(st.sampled_from(KEYS), min_size=1, max_size=6), name=st.sampled_from(NAMES))
    def diverge(self, keys: list[bytes], name: str) -> None:
        if self.walk is None:
            self.away.put(keys, self.away_servers[name], self.now)

    @rule()
    def begin_snapshot(self) -> None:
        self.away.begin()
        self.walk = 0

    @rule(size=st.integers(1, 3))
    def go_on(self, size: int) -> None:
        if self.walk is None:
            return
        assert isinstance(self.table, ReplicatedTable)
        puts, self.walk = self.table.puts(self.walk, size)
        self.away.apply(puts, self.away_servers, self.now)
        if self.walk is None:
            while not self.away.finish(size)[1]:
                pass
            expected = sorted((pin.keys, pin.server, pin.since) for pin in self.model.pins)
            assert sorted((pin.keys, pin.server, pin.since) for pin in listing(self.away)) == expected
            assert self.away.digest() == naive_digest(self.model.pins)
            counts = self.away.counts()
            assert {n: s.pinned - OTHERS for n, s in self.away_servers.items() if s.pinned > OTHERS} == counts

    @rule()
    def restart(self) -> None:
        super().restart()
        self.walk = None

    @invariant()
    def digest_is_kept(self) -> None:
        assert isinstance(self.table, ReplicatedTable)
        assert self.table.digest() == naive_digest(self.model.pins)
        assert not any(self.table._sums[ring] for ring in (0, 1))


TestReplicated = Replicated.TestCase
TestReplicated.settings = settings(max_examples=60, stateful_step_count=50, deadline=None)
TestAffinity = Affinity.TestCase
TestAffinity.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
