"""When an active node that cannot hear its networks hands over."""

from __future__ import annotations

import random
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sapin.cluster.carrier import (
    IFF_LOWER_UP,
    IFF_UP,
    LONGEST,
    RTM_DELLINK,
    RTM_NEWLINK,
    SETTLE,
    SHORTEST,
    Carriers,
    parse,
)

UP = IFF_UP | IFF_LOWER_UP


def message(name: str, flags: int, kind: int = RTM_NEWLINK) -> bytes:
    text = name.encode() + b"\0"
    attribute = struct.pack("=HH", 4 + len(text), 3) + text + bytes(-len(text) % 4)
    other = struct.pack("=HHI", 8, 4, 1500)
    body = struct.pack("=BBHiII", 0, 0, 1, 2, flags, 0) + other + attribute
    return struct.pack("=IHHII", 16 + len(body), kind, 0, 0, 0) + body


def test_what_the_kernel_says() -> None:
    said = message("front", UP) + message("back", IFF_UP) + message("lo", UP, RTM_DELLINK)
    assert list(parse(said)) == [("front", True), ("back", False), ("lo", False)]
    assert list(parse(message("front", IFF_LOWER_UP))) == [("front", False)]


@given(st.binary(max_size=120))
def test_nonsense_says_nothing_and_never_raises(data: bytes) -> None:
    list(parse(data))
    list(parse(message("front", UP)[: len(data)] + data))


def test_a_node_that_hears_all_its_networks_stays() -> None:
    carriers = Carriers(["front", "back"])
    assert not carriers.told("front", True, 0.0)
    assert not carriers.told("elsewhere", False, 1.0)
    assert carriers.deadline(9.0) is None
    assert not carriers.leave(9.0)


def test_a_cut_cable_is_waited_for_shortly() -> None:
    carriers = Carriers(["front", "back"])
    assert carriers.told("front", False, 1.0)
    assert carriers.down == {"front"}
    assert carriers.deadline(1.0) == pytest.approx(1.0 + SETTLE)
    assert not carriers.leave(1.0)
    assert carriers.leave(1.0 + SETTLE)


def test_a_bounce_is_no_cut() -> None:
    carriers = Carriers(["front"])
    carriers.told("front", False, 1.0)
    assert carriers.told("front", True, 1.0 + SETTLE / 2)
    assert not carriers.leave(2.0)


def test_attempts_become_rarer_until_the_carrier_is_back() -> None:
    carriers = Carriers(["front"])
    carriers.told("front", False, 0.0)
    at, waits = SETTLE, []
    assert carriers.leave(at)
    for _ in range(10):
        due = carriers.deadline(at)
        assert due is not None
        assert not carriers.leave(due - 0.001)
        assert carriers.leave(due)
        waits.append(due - at)
        at = due
    assert waits[0] == pytest.approx(SHORTEST)
    assert waits == sorted(waits)
    assert waits[-1] == pytest.approx(LONGEST)
    carriers.told("front", True, at)
    carriers.told("front", False, at + 1)
    assert carriers.leave(at + 1 + SETTLE)


@given(st.integers(0, 2**32))
def test_two_nodes_end_at_the_one_that_hears(seed: int) -> None:
    """Cables come and go; when they rest with one node hearing all, that node gets the role and keeps it."""
    chance = random.Random(seed)
    nodes = [Carriers(["front"]), Carriers(["front"])]
    active, now = 0, 0.0
    for _ in range(20):
        now += chance.uniform(0.0, 3.0)
        chance.choice(nodes).told("front", chance.random() < 0.5, now)
        active ^= nodes[active].leave(now)
    for carriers, heard in zip(nodes, (True, False), strict=True):
        carriers.told("front", heard, now)
    moves = 0
    for _ in range(5):
        now += LONGEST
        left = nodes[active].leave(now)
        moves += left
        active ^= left
    assert active == 0
    assert moves <= 1
