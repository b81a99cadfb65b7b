"""What a peer's table is beyond an affinity table; the rules for anything that can happen are in test_affinity_model."""

from __future__ import annotations

from dataclasses import dataclass
from random import Random
from time import thread_time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sapin.core.pins import Cause, Change, Cleared, Pin, Put, Removed
from sapin.core.replicated import ReplicatedTable, mix

TIMEOUT = 100


@dataclass(eq=False)
class Server:
    name: str
    pinned: int = 0


class Rig:
    """A table whose feed is kept, and two servers."""

    def __init__(self, limit: int = 100) -> None:
        self.changes: list[Change] = []
        self.table: ReplicatedTable[Server] = ReplicatedTable("ike", limit, TIMEOUT, self.changes.append)
        self.servers = {name: Server(name) for name in ("gw1", "gw2")}

    def apply(self, *changes: Change, now: int = 9) -> list[Change]:
        return self.table.apply(changes, self.servers, now)

    def finish(self, limit: int = 10) -> list[Removed]:
        gone: list[Removed] = []
        done = False
        while not done:
            step, done = self.table.finish(limit)
            gone += step
        return gone


@pytest.fixture
def rig() -> Rig:
    return Rig()


def put(*keys: bytes, server: str = "gw1", since: int = 1) -> Put:
    return Put("ike", keys, server, since)


def test_apply_does_not_tell_and_leaves_out_servers_that_are_unknown(rig: Rig) -> None:
    rig.apply(
        put(b"a:1", b"b:1"),
        put(b"a:2"),
        put(b"a:3"),
        put(b"a:2", b"b:1", server="gw9", since=2),
        Removed("ike", (b"a:3", b"a:4"), "gw1", Cause.DELETED),
    )
    assert rig.table.pins().pins == (Pin((b"a:1",), "gw1", 1, 9 + TIMEOUT),)
    assert rig.apply(Cleared("ike", "gw1")) == [Cleared("ike", "gw1")]
    assert len(rig.table) == rig.servers["gw1"].pinned == 0
    assert rig.changes == []


def test_a_put_is_all_of_a_pin(rig: Rig) -> None:
    rig.table.put([b"a:1", b"b:1", b"c:1"], rig.servers["gw1"], 1)
    rig.apply(put(b"b:1", b"d:1", server="gw2", since=7))
    assert rig.table.pins().pins == (Pin((b"b:1", b"d:1"), "gw2", 7, 9 + TIMEOUT),)
    assert rig.table.get(b"a:1") is None


def test_what_is_so_already_is_no_change_and_is_put_off(rig: Rig) -> None:
    records = [put(b"a:1", b"b:1"), put(b"a:2"), put(b"a:3", server="gw2")]
    assert rig.apply(*records) == records
    assert rig.apply(*records, now=20) == []
    assert {pin.due for pin in rig.table.pins().pins} == {20 + TIMEOUT}
    assert rig.apply(Removed("ike", (b"a:9",), "gw1", Cause.EXPIRED), Cleared("ike", "gw9")) == []


def test_a_pin_that_a_server_lost_is_put_to_another(rig: Rig) -> None:
    """Also before the slots of the cleared server are given back."""
    rig.apply(put(b"a:1"), put(b"a:2", b"b:2"), Cleared("ike", "gw1"), put(b"a:1", server="gw2"), put(b"b:2"))
    assert [(pin.keys, pin.server) for pin in rig.table.pins().pins] == [
        ((b"a:1",), "gw2"),
        ((b"b:2",), "gw1"),
    ]
    while rig.table.sweep(1):
        pass
    assert rig.table.stats().unswept == 0
    assert rig.table.get(b"a:2") is None


def test_the_same_pin_twice_in_a_row_is_one(rig: Rig) -> None:
    rig.apply(put(b"a:1"), put(b"a:1", b"b:1"), put(b"a:1"), put(b"c:1", b"d:1"), put(b"d:1", b"c:1"))
    assert [pin.keys for pin in rig.table.pins().pins] == [(b"a:1",), (b"d:1", b"c:1")]
    assert rig.servers["gw1"].pinned == len(rig.table) == 2


@pytest.mark.parametrize("keys", [(), (b"",), (b"x" * 256,), (b"a:1", b"")])
def test_impossible_keys_are_refused_and_what_came_before_is_there(rig: Rig, keys: tuple[bytes, ...]) -> None:
    with pytest.raises(ValueError, match="key"):
        rig.apply(put(b"b:1"), put(b"b:2"), put(*keys), put(b"b:3"))
    assert [pin.keys for pin in rig.table.pins().pins] == [(b"b:1",), (b"b:2",)]
    assert rig.apply(put(b"b:3"), put(b"b:4")) != []
    assert rig.servers["gw1"].pinned == len(rig.table) == 4


def test_a_full_table_evicts_and_tells(rig: Rig) -> None:
    rig = Rig(limit=3)
    rig.apply(*(put(b"a:%d" % n) for n in range(3)))
    rig.apply(put(b"a:3"), now=12)
    assert rig.changes == [Removed("ike", (b"a:0",), "gw1", Cause.EVICTED)]
    assert len(rig.table) == 3


def test_what_the_peer_does_not_have_goes(rig: Rig) -> None:
    rig.table.put([b"a:1", b"b:1"], rig.servers["gw1"], 1)
    rig.apply(put(b"a:2"), put(b"a:3", server="gw2"))
    rig.changes.clear()
    rig.table.begin()
    rig.apply(put(b"a:3", server="gw2"), put(b"a:4"))
    assert rig.finish() == [
        Removed("ike", (b"a:1", b"b:1"), "gw1", Cause.RESYNCED),
        Removed("ike", (b"a:2",), "gw1", Cause.RESYNCED),
    ]
    assert [pin.keys for pin in rig.table.pins().pins] == [(b"a:3",), (b"a:4",)]
    assert rig.changes == []
    assert rig.table.finish(10) == ([], True)


def test_a_pin_of_this_node_outlives_a_snapshot_that_it_was_put_in(rig: Rig) -> None:
    rig.table.put([b"a:1"], rig.servers["gw1"], 1)
    rig.table.begin()
    rig.table.put([b"a:2"], rig.servers["gw1"], 2)
    assert [removed.keys for removed in rig.finish()] == [(b"a:1",)]


def test_a_snapshot_that_begins_anew_counts_anew(rig: Rig) -> None:
    rig.apply(put(b"a:1"), put(b"a:2"))
    rig.table.begin()
    rig.apply(put(b"a:1"))
    rig.table.finish(1)
    rig.table.begin()
    rig.apply(put(b"a:2"))
    assert [removed.keys for removed in rig.finish()] == [(b"a:1",)]


def test_nothing_goes_where_no_snapshot_began(rig: Rig) -> None:
    rig.apply(put(b"a:1"))
    assert rig.table.finish(10) == ([], True)
    assert len(rig.table) == 1


def test_a_step_is_bounded_by_what_it_removes_too() -> None:
    rig = Rig(limit=5_000)
    rig.apply(*(put(b"a:%d" % n) for n in range(5_000)))
    rig.table.begin()
    gone, done = rig.table.finish(2_000)
    assert (0 < len(gone) <= 70, done) == (True, False)
    assert len(rig.finish(2_000)) == 5_000 - len(gone)


def test_the_digest_is_of_keys_and_servers_alone(rig: Rig) -> None:
    other = Rig()
    rig.apply(put(b"a:1", b"b:1"), put(b"a:2", server="gw2"))
    for change in (put(b"a:2", server="gw2", since=50), put(b"a:9"), put(b"b:1", b"a:1")):
        other.apply(change, now=70)
    assert rig.table.digest() != other.table.digest()
    other.apply(Removed("ike", (b"a:9",), "gw1", Cause.EXPIRED))
    assert rig.table.digest() == other.table.digest() != 0
    other.apply(put(b"a:2"))
    assert rig.table.digest() != other.table.digest()
    rig.table.clear(rig.servers["gw1"])
    other.apply(Cleared("ike", "gw1"))
    assert (rig.table.digest() == 0, other.table.digest()) == (False, 0)


@given(st.sets(st.binary(min_size=1, max_size=40), min_size=2, max_size=200))
def test_numbers_of_different_keys_differ_and_have_no_pattern(keys: set[bytes]) -> None:
    assert len({mix(key) for key in keys}) == len(keys)
    total = sum(map(mix, keys))
    assert all(total - mix(key) != total for key in keys)


def test_a_number_is_the_same_on_every_node() -> None:
    checksum = 0xCBF43926 + 1  # the check value of CRC-32/ISO-HDLC
    assert mix(b"123456789") == checksum * (checksum ^ 0x9E3779B97F4A7C15)


def test_a_walk_shows_each_pin_once(rig: Rig) -> None:
    records = [
        put(b"a:%d" % n, *([b"b:%d" % n] if n % 3 else []), server=f"gw{n % 2 + 1}") for n in range(50)
    ]
    rig.apply(*records)
    rig.table.remove(b"a:7")
    found: list[Put] = []
    start: int | None = 0
    while start is not None:
        part = rig.table.puts(start, 7)
        found += part.puts
        start = part.next
    assert found == [record for record in records if record.keys[0] != b"a:7"]
    assert ReplicatedTable("ike", 5, TIMEOUT).puts() == ([], None)


def test_touched_since(rig: Rig) -> None:
    rig.apply(*(put(b"a:%d" % n) for n in range(10)), now=1)
    rig.table.touch(b"a:3", 20)
    rig.table.touch(b"a:7", 21)
    assert rig.table.touched(0, 5, 19 + TIMEOUT) == ([b"a:3"], 5)
    assert rig.table.touched(5, 50, 20 + TIMEOUT) == ([b"a:7"], None)


def test_a_million_would_take_seconds_not_minutes() -> None:
    """In comparison, so that the machine does not matter: applied in bulk, pins cost less than put one by one."""
    keys = [b"src:%08d" % n for n in range(40_000)]
    Random(1).shuffle(keys)
    records = [put(key) for key in keys]

    def measured(bulk: bool) -> float:
        rig = Rig(limit=len(keys))
        began = thread_time()
        if bulk:
            for at in range(0, len(keys), 250):
                rig.apply(*records[at : at + 250])
        else:
            for key in keys:
                rig.table.put((key,), rig.servers["gw1"], 1)
        taken = thread_time() - began
        assert len(rig.table) == len(keys)
        return taken

    assert min(measured(True) for _ in range(3)) < 0.75 * min(measured(False) for _ in range(3))
