from __future__ import annotations

import gc
from collections import defaultdict

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sapin.core.wheel import Rings, TimerWheel

FAR = 2**32 - 1


def contents(rings: Rings, ring: int) -> list[int]:
    """Empties a ring, first come first."""
    found = []
    while (item := rings.first(ring)) is not None:
        rings.leave(item)
        found.append(item)
    return found


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 3)), max_size=60))
def test_rings_are_queues_of_which_an_item_is_in_one(moves: list[tuple[int, int]]) -> None:
    rings = Rings(6)
    model: dict[int, list[int]] = defaultdict(list)
    for item, ring in moves:  # ring 0: out of any
        for queue in model.values():
            if item in queue:
                queue.remove(item)
                rings.leave(item)
        if ring:
            rings.join(item, ring)
            model[ring].append(item)
        assert rings.of[item] == ring
        for each in (1, 2, 3):
            assert rings.first(each) == (model[each][0] if model[each] else None)
    assert {ring: contents(rings, ring) for ring in (1, 2, 3)} == {ring: model[ring] for ring in (1, 2, 3)}


def test_a_ring_stays_when_it_is_empty_until_it_is_dropped() -> None:
    rings = Rings(2)
    rings.join(1, 7)
    rings.leave(1)
    assert 7 in rings
    rings.drop(7)
    assert 7 not in rings
    assert rings.first(7) is None


def test_items_come_out_by_second_and_then_in_the_order_of_filing() -> None:
    wheel = TimerWheel(10)
    for item, second in [(3, 20), (9, 10), (0, 20), (4, 10), (1, 30)]:
        wheel.file(item, second)
    assert wheel.earliest() == 10
    assert list(wheel.due(9, 100)) == []
    assert list(wheel.due(20, 100)) == [(9, 10), (4, 10), (3, 20), (0, 20)]
    assert wheel.earliest() == 30
    assert list(wheel.due(FAR, 100)) == [(1, 30)]
    assert wheel.earliest() is None


def test_filing_for_later_changes_nothing_and_for_earlier_moves() -> None:
    wheel = TimerWheel(10)
    wheel.file(1, 20)
    wheel.file(1, 25)
    assert list(wheel.due(FAR, 100)) == [(1, 20)]
    wheel.file(1, 20)
    wheel.file(1, 15)
    assert list(wheel.due(FAR, 100)) == [(1, 15)]
    wheel.file(1, 20)
    wheel.file(2, 20)
    wheel.file(1, 20)
    assert list(wheel.due(FAR, 100)) == [(1, 20), (2, 20)]


def test_work_is_bounded_and_the_rest_is_still_there() -> None:
    wheel = TimerWheel(1000)
    for item in range(1000):
        wheel.file(item, 1 + item % 7)
    assert len(list(wheel.due(FAR, 300))) <= 300
    left = wheel.earliest()
    assert left is not None
    assert left <= 3
    total = 300
    while wheel.earliest() is not None:
        total += len(list(wheel.due(FAR, 300)))
    assert total >= 1000


def test_items_may_be_filed_again_while_others_come_out() -> None:
    wheel = TimerWheel(3)
    for item in range(3):
        wheel.file(item, 5)
    seen = []
    for item, second in wheel.due(10, 100):
        seen.append((item, second))
        if second == 5:
            wheel.file(item, 10 + item)
    assert seen == [(0, 5), (1, 5), (2, 5), (0, 10)]
    assert list(wheel.due(FAR, 100)) == [(1, 11), (2, 12)]


@given(
    st.lists(
        st.one_of(
            st.tuples(st.just("file"), st.integers(0, 5), st.integers(1, 12)),
            st.tuples(st.just("discard"), st.integers(0, 5), st.just(0)),
            st.tuples(st.just("due"), st.integers(1, 4), st.integers(0, 3)),
        ),
        max_size=60,
    )
)
def test_against_a_mapping_of_item_to_second(steps: list[tuple[str, int, int]]) -> None:
    wheel = TimerWheel(6)
    filed: dict[int, int] = {}
    now = 0
    for step, a, b in steps:
        if step == "file":
            wheel.file(a, b)
            filed[a] = min(b, filed.get(a, b))
        elif step == "discard":
            wheel.discard(a)
            filed.pop(a, None)
        else:
            now += b
            out = list(wheel.due(now, a))
            assert len(out) <= a
            for item, second in out:
                assert filed.pop(item) == second <= now
                assert second <= min(filed.values(), default=FAR)
            earliest = wheel.earliest()
            if earliest is None or earliest > now:
                assert all(second > now for second in filed.values())
    rest: list[tuple[int, int]] = []
    while wheel.earliest() is not None:
        rest += wheel.due(FAR, 1)
    assert sorted(rest) == sorted(filed.items())


@pytest.mark.parametrize(("item", "second"), [(1, -1), (1, 2**32), (3, 5)])
def test_what_is_no_item_or_second_is_refused_without_a_trace(item: int, second: int) -> None:
    wheel = TimerWheel(3)
    with pytest.raises((ValueError, IndexError)):
        wheel.file(item, second)
    assert wheel.earliest() is None


def test_filing_and_discarding_leaves_one_second_behind() -> None:
    wheel = TimerWheel(2)
    for _ in range(1000):
        wheel.file(1, 50)
        wheel.discard(1)
    assert list(wheel.due(FAR, 1)) == []
    assert wheel.earliest() is None


def test_the_garbage_collector_does_not_see_items() -> None:
    wheel = TimerWheel(10_000)
    gc.collect()
    before = len(gc.get_objects())
    for item in range(10_000):
        wheel.file(item, 1 + item)
    gc.collect()
    assert len(gc.get_objects()) - before < 10
