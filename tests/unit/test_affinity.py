from __future__ import annotations

import gc
import sys
import weakref
from dataclasses import dataclass

import pytest

from sapin.core.affinity import (
    MAX_KEYS,
    AffinityTable,
    Cause,
    Change,
    Cleared,
    Hit,
    Pin,
    Put,
    Removed,
)
from sapin.core.slots import Keys

TIMEOUT = 100


@dataclass(eq=False)
class Server:
    name: str
    pinned: int = 0


class Rig:
    """A table whose changes are kept, and two servers."""

    def __init__(self, limit: int = 100) -> None:
        self.changes: list[Change] = []
        self.table: AffinityTable[Server] = AffinityTable("ike", limit, TIMEOUT, self.changes.append)
        self.gw1, self.gw2 = Server("gw1"), Server("gw2")

    def told(self) -> list[Change]:
        """The changes since it was last asked."""
        changes, self.changes[:] = list(self.changes), []
        return changes

    def sweep(self) -> None:
        while self.table.sweep(1):
            pass


@pytest.fixture
def rig() -> Rig:
    return Rig()


@pytest.mark.parametrize(("limit", "timeout"), [(0, 1), (1, 0), (-1, 5)])
def test_refuses_a_table_that_holds_nothing(limit: int, timeout: int) -> None:
    with pytest.raises(ValueError, match="at least 1"):
        AffinityTable("ike", limit, timeout)


@pytest.mark.parametrize(
    ("keys", "reason"), [([], "needs a key"), ([b""], "0"), ([b"a:1", b"x" * 256], "256")]
)
def test_refuses_keys_that_it_cannot_keep(rig: Rig, keys: list[bytes], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        rig.table.put(keys, rig.gw1, 1)
    assert len(rig.table) == 0
    assert rig.told() == []


def test_a_pin_is_found_by_each_of_its_keys(rig: Rig) -> None:
    rig.table.put([b"spi:1", b"tuple:1"], rig.gw1, 5)
    assert rig.table.get(b"spi:1") is rig.table.get(b"tuple:1") is rig.gw1
    assert rig.table.get(b"spi:2") is None
    assert rig.table.find([b"spi:2", b"tuple:1", b"spi:1"]) == Hit(rig.gw1, b"tuple:1")
    assert rig.table.find([b"spi:2"]) is None
    assert rig.table.describe(b"tuple:1") == Pin((b"spi:1", b"tuple:1"), "gw1", 5, 5 + TIMEOUT)
    assert rig.table.describe(b"spi:2") is None
    assert len(rig.table) == rig.gw1.pinned == 1
    assert rig.told() == [Put("ike", (b"spi:1", b"tuple:1"), "gw1", 5)]


def test_the_longest_key_is_kept_whole(rig: Rig) -> None:
    keys = (b"a:" + b"\xff" * 253, b"b:" + b"\0" * 253)
    rig.table.put(keys, rig.gw1, 1)
    pin = rig.table.describe(keys[1])
    assert pin is not None
    assert pin.keys == keys


def test_putting_the_same_again_is_a_touch(rig: Rig) -> None:
    rig.table.put([b"a:1", b"b:1"], rig.gw1, 5)
    rig.told()
    rig.table.put([b"b:1", b"b:1", b"a:1"], rig.gw1, 50)
    assert rig.told() == []
    assert rig.table.describe(b"a:1") == Pin((b"a:1", b"b:1"), "gw1", 5, 50 + TIMEOUT)


def test_a_known_key_extends_its_pin(rig: Rig) -> None:
    rig.table.put([b"spi:1", b"tuple:500"], rig.gw1, 5)
    rig.told()
    rig.table.put([b"spi:2", b"tuple:500"], rig.gw1, 9)
    assert rig.told() == [Put("ike", (b"spi:1", b"tuple:500", b"spi:2"), "gw1", 5)]
    assert rig.gw1.pinned == 1


def test_another_server_moves_the_pin(rig: Rig) -> None:
    rig.table.put([b"spi:1", b"tuple:500"], rig.gw1, 5)
    rig.told()
    rig.table.put([b"tuple:500"], rig.gw2, 9)
    assert rig.told() == [Put("ike", (b"spi:1", b"tuple:500"), "gw2", 9)]
    assert rig.table.get(b"spi:1") is rig.gw2
    assert (rig.gw1.pinned, rig.gw2.pinned) == (0, 1)
    assert rig.table.counts() == {"gw2": 1}
    assert rig.table.stats().moved == 1


@pytest.mark.parametrize("cleared", [True, False])
def test_a_member_without_pins_is_forgotten(rig: Rig, cleared: bool) -> None:
    for _ in range(100):
        server = Server("gw3")
        rig.table.put([b"a:1"], server, 1)
        if cleared:
            rig.table.clear(server)
            rig.sweep()
        else:
            rig.table.remove(b"a:1")
    forgotten = weakref.ref(server)
    del server
    assert forgotten() is None
    assert len(rig.table._members) < 5


def test_the_first_pinned_key_decides_and_takes_the_others_over(rig: Rig) -> None:
    rig.table.put([b"a:1"], rig.gw1, 1)
    rig.table.put([b"b:1", b"b:2"], rig.gw2, 2)
    rig.table.put([b"c:1"], rig.gw2, 3)
    rig.told()
    rig.table.put([b"a:1", b"b:1", b"c:1"], rig.gw1, 9)
    assert rig.told() == [
        Put("ike", (b"a:1", b"b:1", b"c:1"), "gw1", 1),
        Put("ike", (b"b:2",), "gw2", 2),
    ]
    assert rig.table.counts() == {"gw1": 1, "gw2": 1}
    assert rig.gw2.pinned == 1


def test_one_key_too_many_displaces_the_oldest_of_its_kind_but_never_the_primary(rig: Rig) -> None:
    first = (b"spi:0", b"tuple:0", b"spi:1", b"spi:2", b"tuple:1", b"tuple:2", b"tuple:3", b"tuple:4")
    assert len(first) == MAX_KEYS
    rig.table.put(first, rig.gw1, 1)
    rig.told()
    for keys, displaced in [
        ([b"spi:0", b"spi:3"], b"spi:1"),
        ([b"spi:0", b"tuple:5"], b"tuple:0"),
        ([b"spi:0", b"addr:1"], b"spi:2"),
    ]:
        rig.table.put(keys, rig.gw1, 2)
        removed, put = rig.told()
        assert removed == Removed("ike", (displaced,), "gw1", Cause.DISPLACED)
        assert isinstance(put, Put)
        assert put.keys[0] == b"spi:0"
        assert put.keys[-1] == keys[-1]
        assert rig.table.get(displaced) is None
    assert (rig.table.stats().deleted, rig.table.stats().moved) == (0, 0)


def test_of_too_many_keys_at_once_the_strongest_count(rig: Rig) -> None:
    keys = [b"k:%d" % i for i in range(MAX_KEYS + 3)]
    rig.table.put(keys, rig.gw1, 1)
    assert rig.told() == [Put("ike", tuple(keys[:MAX_KEYS]), "gw1", 1)]


def test_keys_that_are_put_together_do_not_displace_each_other(rig: Rig) -> None:
    held = tuple(b"k:%d" % i for i in range(MAX_KEYS))
    rig.table.put(held, rig.gw1, 1)
    rig.table.put([*held[1:], b"k:9"], rig.gw1, 1)
    pin = rig.table.describe(held[1])
    assert pin is not None
    assert pin.keys == held
    assert rig.table.get(b"k:9") is None


def test_the_feed_finds_the_table_as_it_is_told() -> None:
    seen = []
    table: AffinityTable[Server] = AffinityTable(
        "ike", 2, TIMEOUT, lambda c: seen.append((c, *table.pins().pins))
    )
    server = Server("gw1")
    table.put([b"a:1"], server, 5)
    table.remove(b"a:1")
    assert seen == [
        (Put("ike", (b"a:1",), "gw1", 5), Pin((b"a:1",), "gw1", 5, 5 + TIMEOUT)),
        (Removed("ike", (b"a:1",), "gw1", Cause.DELETED),),
    ]


def test_a_slot_has_the_keys_that_it_was_given_until_they_are_removed() -> None:
    keys = Keys(3)
    for given in [(b"a:1",), (b"a:1", b"", b"b:" + bytes(253))]:
        assert keys.of(2) == ()
        keys.add(2, given)
        assert keys.of(2) == given
        assert [keys.slot(key) for key in given] == [2] * len(given)
        assert keys.remove(2) == given
        assert [keys.slot(key) for key in given] == [0] * len(given)
    assert keys.remove(2) == ()


def test_a_key_that_was_removed_takes_no_memory() -> None:
    keys = Keys(3)
    key = b"a:" + bytes(20)
    before = sys.getrefcount(key)
    keys.add(2, (key,))
    assert sys.getrefcount(key) > before
    keys.remove(2)
    assert sys.getrefcount(key) == before


def test_a_pin_expires_after_its_last_touch(rig: Rig) -> None:
    rig.table.put([b"a:1"], rig.gw1, 1)
    rig.table.put([b"a:2", b"b:2"], rig.gw1, 1)
    rig.told()
    assert rig.table.touch(b"b:2", 60) is rig.gw1
    assert rig.table.touch(b"b:3", 60) is None
    assert not rig.table.expire(TIMEOUT, 10)
    assert rig.told() == []
    assert not rig.table.expire(1 + TIMEOUT, 10)
    assert rig.told() == [Removed("ike", (b"a:1",), "gw1", Cause.EXPIRED)]
    assert not rig.table.expire(59 + TIMEOUT, 10)
    assert rig.told() == []
    assert not rig.table.expire(60 + TIMEOUT, 10)
    assert rig.told() == [Removed("ike", (b"a:2", b"b:2"), "gw1", Cause.EXPIRED)]
    assert rig.gw1.pinned == len(rig.table) == 0
    assert rig.table.stats().expired == 2


def test_expiry_is_done_in_bounded_calls(rig: Rig) -> None:
    for i in range(50):
        rig.table.put([b"a:%d" % i], rig.gw1, 1)
    assert rig.table.expire(1 + TIMEOUT, 20)
    assert len(rig.table) == 30
    assert rig.table.expire(1 + TIMEOUT, 20)
    while rig.table.expire(1 + TIMEOUT, 20):
        pass
    assert len(rig.table) == 0


def test_a_shorter_timeout_counts_from_the_next_put(rig: Rig) -> None:
    rig.table.put([b"a:1"], rig.gw1, 1)
    rig.table.timeout = 10
    rig.table.put([b"a:1"], rig.gw1, 2)
    assert not rig.table.expire(11, 10)
    assert len(rig.table) == 1
    assert not rig.table.expire(12, 10)
    assert len(rig.table) == 0


def test_remove_takes_the_whole_pin(rig: Rig) -> None:
    rig.table.put([b"a:1", b"b:1"], rig.gw1, 1)
    rig.told()
    assert rig.table.remove(b"b:1")
    assert rig.told() == [Removed("ike", (b"a:1", b"b:1"), "gw1", Cause.DELETED)]
    assert not rig.table.remove(b"a:1")
    assert rig.told() == []
    assert rig.gw1.pinned == 0


def test_a_reused_slot_does_not_expire_with_the_pin_that_had_it_before(rig: Rig) -> None:
    rig.table.put([b"a:1"], rig.gw1, 1)
    rig.table.remove(b"a:1")
    rig.table.put([b"a:2"], rig.gw1, 50)
    assert not rig.table.expire(49 + TIMEOUT, 10)
    assert rig.table.get(b"a:2") is rig.gw1
    assert not rig.table.expire(50 + TIMEOUT, 10)
    assert rig.table.get(b"a:2") is None


def test_a_full_table_evicts_the_least_recently_due() -> None:
    rig = Rig(limit=3)
    for i in range(3):
        rig.table.put([b"a:%d" % i], rig.gw1, 1 + i)
    rig.table.touch(b"a:0", 10)
    rig.told()
    rig.table.put([b"a:3"], rig.gw2, 11)
    assert rig.told() == [
        Removed("ike", (b"a:1",), "gw1", Cause.EVICTED),
        Put("ike", (b"a:3",), "gw2", 11),
    ]
    rig.table.put([b"a:4"], rig.gw2, 11)
    assert rig.table.get(b"a:2") is None
    assert rig.table.get(b"a:0") is rig.gw1
    stats = rig.table.stats()
    assert (stats.size, stats.limit, stats.evicted, stats.inserted) == (3, 3, 2, 5)


def test_a_pin_that_an_eviction_spared_expires_all_the_same() -> None:
    rig = Rig(limit=2)
    rig.table.put([b"a:1"], rig.gw1, 1)
    rig.table.put([b"a:2"], rig.gw1, 2)
    rig.table.touch(b"a:1", 10)
    rig.table.put([b"a:3"], rig.gw1, 10)
    assert rig.table.get(b"a:2") is None
    assert not rig.table.expire(10 + TIMEOUT, 10)
    assert len(rig.table) == 0


def test_the_smallest_table_holds_one_pin_for_one_second() -> None:
    table: AffinityTable[Server] = AffinityTable("ike", 1, 1)
    server = Server("gw1")
    table.put([b"a:1"], server, 0)
    table.put([b"a:2"], server, 0)
    assert (table.get(b"a:1"), table.get(b"a:2")) == (None, server)
    assert not table.expire(0, 10)
    assert len(table) == 1
    assert not table.expire(1, 10)
    assert len(table) == 0


def test_one_eviction_looks_at_a_bounded_number_of_pins() -> None:
    rig = Rig(limit=3000)
    for i in range(3000):
        rig.table.put([b"a:%d" % i], rig.gw1, 1)
    for i in range(3000):  # the first to come up in the wheel are due last
        rig.table.touch(b"a:%d" % i, 4000 - i)
    rig.told()
    rig.table.put([b"b:1"], rig.gw1, 4000)
    assert rig.told()[0] == Removed("ike", (b"a:999",), "gw1", Cause.EVICTED)
    assert len(rig.table) == 3000


def test_clear_is_at_once_and_touches_no_other_server(rig: Rig) -> None:
    rig.gw1.pinned = 7  # flows without a pin
    for i in range(10):
        rig.table.put([b"a:%d" % i, b"b:%d" % i], (rig.gw1, rig.gw2)[i % 2], 1)
    rig.told()
    assert rig.table.clear(rig.gw1) == 5
    assert rig.told() == [Cleared("ike", "gw1")]
    assert rig.table.clear(rig.gw1) == 0
    assert rig.told() == []
    assert (rig.gw1.pinned, rig.gw2.pinned) == (7, 5)
    assert rig.table.get(b"a:0") is rig.table.touch(b"b:2", 9) is rig.table.describe(b"a:4") is None
    assert not rig.table.remove(b"a:0")
    assert rig.table.get(b"b:1") is rig.gw2
    assert rig.table.counts() == {"gw2": 5}
    assert rig.table.stats().cleared == rig.table.stats().unswept == 5
    assert rig.table.sweep(3)
    assert rig.table.stats().unswept == 2
    assert not rig.table.sweep(3)
    assert rig.table.stats().unswept == 0
    assert rig.told() == []
    assert (rig.gw1.pinned, rig.gw2.pinned) == (7, 5)


def test_a_cleared_key_can_be_pinned_before_the_sweep(rig: Rig) -> None:
    rig.table.put([b"a:1", b"b:1"], rig.gw1, 1)
    rig.table.put([b"a:2"], rig.gw1, 1)
    rig.table.clear(rig.gw1)
    rig.told()
    rig.table.put([b"b:1"], rig.gw1, 2)
    assert rig.told() == [Put("ike", (b"b:1",), "gw1", 2)]
    rig.sweep()
    assert rig.table.get(b"b:1") is rig.gw1
    assert rig.table.get(b"a:1") is rig.table.get(b"a:2") is None
    assert rig.gw1.pinned == len(rig.table) == 1


def test_a_full_table_takes_cleared_slots_before_it_evicts() -> None:
    rig = Rig(limit=3)
    rig.table.put([b"a:1"], rig.gw1, 1)
    rig.table.put([b"a:2"], rig.gw2, 2)
    rig.table.put([b"a:3"], rig.gw2, 3)
    rig.table.clear(rig.gw2)
    rig.table.put([b"a:4"], rig.gw2, 4)
    rig.table.put([b"a:5"], rig.gw2, 5)
    assert rig.table.stats().evicted == 0
    rig.table.put([b"a:6"], rig.gw2, 6)
    assert rig.table.get(b"a:1") is None


def test_a_new_object_of_the_same_name_takes_the_pins_over(rig: Rig) -> None:
    rig.table.put([b"a:1"], rig.gw1, 1)
    rig.table.put([b"a:2"], rig.gw1, 1)
    rig.told()
    first, second = Server("gw1", pinned=3), Server("gw1")
    rig.table.adopt(first)
    assert rig.table.get(b"a:1") is first
    assert (rig.gw1.pinned, first.pinned) == (0, 5)
    rig.table.put([b"a:1"], second, 5)
    assert rig.table.get(b"a:2") is second
    assert (first.pinned, second.pinned) == (3, 2)
    assert rig.told() == []
    rig.table.adopt(Server("gw9"))
    assert rig.table.counts() == {"gw1": 2}


def test_pages_list_each_pin_once_whatever_changes_in_between(rig: Rig) -> None:
    for i in range(50):
        rig.table.put([b"a:%d" % i], rig.gw1, 1)
    found: list[Pin] = []
    start: int | None = 0
    for step in range(100):
        page = rig.table.pins(start or 0, 7)
        assert len(page.pins) <= 7
        found += page.pins
        if page.next is None:
            break
        start = page.next
        if step < 5:
            rig.table.remove(b"a:%d" % step)
            rig.table.remove(b"a:%d" % (49 - step))
            rig.table.put([b"b:%d" % step], rig.gw2, 2)
    listed = [key for pin in found for key in pin.keys]
    assert len(listed) == len(set(listed))
    assert {b"a:%d" % i for i in range(5, 45)} <= set(listed)
    assert rig.table.pins(10**6, 7).next is None


def test_pages_of_an_empty_table(rig: Rig) -> None:
    assert rig.table.pins() == ((), None)


def test_pages_of_what_was_touched_since(rig: Rig) -> None:
    for i in range(10):
        rig.table.put([b"a:%d" % i], rig.gw1, 1)
    rig.table.touch(b"a:3", 20)
    rig.table.touch(b"a:7", 21)
    assert [pin.keys for pin in rig.table.pins(due_after=20 + TIMEOUT).pins] == [(b"a:7",)]
    assert len(rig.table.pins(due_after=19 + TIMEOUT).pins) == 2


def test_restore_brings_back_what_is_not_due_and_has_a_server(rig: Rig) -> None:
    pins = [
        Pin((b"a:1", b"b:1"), "gw1", -500, 40),
        Pin((b"a:2",), "gw1", 3, 20),
        Pin((b"a:3",), "gone", 3, 40),
        Pin((b"a:4",), "gw2", 3, 10_000),
    ]
    assert rig.table.restore(pins, {"gw1": rig.gw1, "gw2": rig.gw2}, 20) == 2
    assert rig.table.pins().pins == (pins[0], Pin((b"a:4",), "gw2", 3, 20 + TIMEOUT))
    assert (rig.gw1.pinned, rig.gw2.pinned) == (1, 1)
    assert rig.told() == []


def test_the_garbage_collector_does_not_see_pins() -> None:
    table: AffinityTable[Server] = AffinityTable("ike", 20_000, TIMEOUT)
    server = Server("gw1")
    gc.collect()
    before = len(gc.get_objects())
    for i in range(20_000):
        table.put([b"a:%d" % i, b"b:%d" % i], server, 1)
    gc.collect()
    assert len(gc.get_objects()) - before < 10
    if sys.version_info < (3, 14):
        assert not any(map(gc.is_tracked, table._shards))
