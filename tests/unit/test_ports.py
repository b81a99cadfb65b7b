"""Upstream ports: none is given twice, and one that was given back rests as long as can be."""

from __future__ import annotations

from collections import deque
from random import Random

from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from sapin.core.dataplane.ports import PortPool, upstream_ranges

LOW, HIGH = 20_000, 20_007
PORTS = set(range(LOW, HIGH + 1))


def drained(pool: PortPool) -> list[int]:
    return list(iter(pool.take, None))


@given(st.integers(1, 65_535), st.integers(0, 300), st.integers())
def test_every_port_is_given_once_from_a_random_one_on(low: int, more: int, seed: int) -> None:
    high = min(65_535, low + more)
    given = drained(PortPool([range(low, high + 1)], (), Random(seed)))
    start = given[0]
    assert given == [*range(start, high + 1), *range(low, start)]


def test_the_first_port_depends_on_the_random_source() -> None:
    first = {PortPool([range(16_384, 65_536)], (), Random(seed)).take() for seed in range(20)}
    assert len(first) > 15


@given(st.sets(st.integers(LOW - 2, HIGH + 2)))
def test_ports_in_use_are_not_given(used: set[int]) -> None:
    assert set(drained(PortPool([range(LOW, HIGH + 1)], used, Random(1)))) == PORTS - used


def test_a_port_in_use_at_first_is_given_once_it_is_free() -> None:
    pool = PortPool([range(LOW, HIGH + 1)], PORTS, Random(1))
    assert pool.take() is None
    pool.give(LOW + 3)
    assert [pool.take(), pool.take()] == [LOW + 3, None]


def test_a_port_outside_of_the_range_is_not_kept() -> None:
    """A restored flow may have one, if a former version had another range."""
    pool = PortPool([range(LOW, HIGH + 1)], {HIGH + 1}, Random(1))
    pool.give(HIGH + 1)
    assert set(drained(pool)) == PORTS


def test_a_pool_that_was_empty_goes_on() -> None:
    pool = PortPool([range(LOW, LOW + 1)], (), Random(1))
    for _ in range(3):
        assert [pool.take(), pool.take()] == [LOW, None]
        pool.give(LOW)


@given(st.lists(st.tuples(st.sampled_from(["take", "reserve", "give"]), st.integers(0, 7)), max_size=60))
def test_a_reserved_port_is_not_given_before_it_was_given_back(steps: list[tuple[str, int]]) -> None:
    pool, held = PortPool([range(LOW, HIGH + 1)], (), Random(1)), set[int]()
    for step, number in steps:
        if step == "take":
            port = pool.take()
            assert (port is None) == (held == PORTS)
            assert port not in held
            held |= {port} if port is not None else set()
        elif step == "reserve" and LOW + number not in held:
            pool.reserve(LOW + number)
            held.add(LOW + number)
        elif step == "give" and LOW + number in held:
            pool.give(LOW + number)
            held.remove(LOW + number)
    free = drained(pool)
    assert len(free) == len(set(free))
    assert set(free) == PORTS - held


class PoolMachine(RuleBasedStateMachine):
    """The pool against its rule: never used yet, from the first on; then the longest unused."""

    @initialize(used=st.sets(st.integers(LOW, HIGH)), seed=st.integers())
    def begin(self, used: set[int], seed: int) -> None:
        self.pool = PortPool([range(LOW, HIGH + 1)], used, Random(seed))
        start = Random(seed).choice(range(LOW, HIGH + 1))
        self.free = deque(p for p in [*range(start, HIGH + 1), *range(LOW, start)] if p not in used)
        self.taken = list(used)

    @rule()
    def take(self) -> None:
        port = self.pool.take()
        assert port == (self.free.popleft() if self.free else None)
        if port is not None:
            assert port not in self.taken
            self.taken.append(port)

    @precondition(lambda self: self.taken)
    @rule(which=st.integers(0, 7))
    def give(self, which: int) -> None:
        port = self.taken.pop(which % len(self.taken))
        self.pool.give(port)
        self.free.append(port)

    @invariant()
    def no_port_is_lost(self) -> None:
        if hasattr(self, "free"):
            assert {*self.free, *self.taken} == PORTS


TestPool = PoolMachine.TestCase
TestPool.settings = settings(max_examples=60, stateful_step_count=30)


@given(st.integers(1, 65_535), st.integers(0, 70_000), st.integers(1, 65_535), st.integers(0, 70_000))
def test_the_ephemeral_ports_come_last(low: int, more: int, start: int, size: int) -> None:
    high, ephemeral = min(65_535, low + more), range(start, start + size)
    ports = [port for part in upstream_ranges(low, high, ephemeral) for port in part]
    assert sorted(ports) == list(range(low, high + 1))
    are = [port in ephemeral for port in ports]
    assert are == sorted(are)
