"""Records, frames, and the state that records add up to."""

from __future__ import annotations

from collections.abc import Sequence
from struct import pack
from typing import Any
from zlib import crc32

import msgpack  # type: ignore[import-untyped]
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sapin.core.affinity import AffinityTable, Cause, Change, Cleared, Put, Removed
from sapin.core.journal import (
    KINDS,
    MAX_FRAME,
    MAX_RECORDS,
    Damage,
    Encoder,
    End,
    FlowClosed,
    FlowOpened,
    FormatError,
    Record,
    State,
    Tick,
    frames,
    header,
    replay,
)

HEADER = header("journal")
MARK = b"\xf5\xf6\xf7\x01"

names = st.sampled_from(["ike", "sstp", "gw1", "gw2", "Straße"])
keys = st.lists(st.binary(min_size=1, max_size=12), min_size=1, max_size=4, unique=True).map(tuple)
addresses = st.sampled_from([b"\x0a\0\0\x01", b"\x0a\0\0\x02", b"\xfe\x80" + bytes(14)])
ports = st.integers(0, 65535)
seconds = st.integers(0, 2**40)
flow_ids = st.tuples(names, addresses, ports, st.sampled_from([b"", b"\x7f\0\0\x01"]))
records = st.one_of(
    st.builds(Put, names, keys, names, seconds),
    st.builds(Removed, names, keys, names, st.sampled_from(list(Cause))),
    st.builds(Cleared, names, names),
    st.builds(
        lambda flow, rest: FlowOpened(*flow, *rest),
        flow_ids,
        st.tuples(names, addresses, ports, st.binary(max_size=9), seconds),
    ),
    flow_ids.map(lambda flow: FlowClosed(*flow)),
    st.builds(Tick, seconds),
    st.builds(End, seconds),
)
batches = st.lists(st.lists(records, max_size=6), max_size=6)


def put(*keys: bytes, server: str = "gw1", since: int = 1) -> Put:
    return Put("ike", keys, server, since)


def removed(*keys: bytes) -> Removed:
    return Removed("ike", keys, "gw1", Cause.EXPIRED)


def flow(port: int = 4500, upstream_port: int = 30_000) -> FlowOpened:
    client, upstream = b"\x0a\0\0\x01", b"\x7f\0\0\x01"
    return FlowOpened("ike", client, port, b"", "gw1", upstream, upstream_port, b"addr:\x0a\0\0\x01", 7)


def frame_of(payload: Any) -> bytes:
    """A frame whose checksum is right, whatever is in it."""
    data: bytes = msgpack.packb(payload)
    return MARK + pack(">II", len(data), crc32(data)) + data


def journal_of(batches: Sequence[Sequence[Record]]) -> bytes:
    encode = Encoder().encode
    return HEADER + b"".join(map(encode, batches))


def state_of(*records: Record) -> State:
    state = State()
    state.apply(records)
    return state


def pins_of(state: State) -> dict[bytes, tuple[str, int, tuple[bytes, ...]]]:
    return {key: (p.server, p.since, p.keys) for p in state.pins().get("ike", []) for key in p.keys}


def plain(state: State) -> tuple[Any, ...]:
    """A state as something to compare, without the order of its pins."""
    pins = {group: sorted(pins) for group, pins in state.pins().items() if pins}
    return pins, sorted(state.flows()), state.tick


@given(batches)
def test_what_is_written_is_read(batches: list[list[Record]]) -> None:
    read = list(frames(journal_of(batches), "journal"))
    assert [frame.records for frame in read] == [[], *batches]
    assert [list(map(type, frame.records)) for frame in read[1:]] == [list(map(type, b)) for b in batches]
    assert sum(frame.refused for frame in read) == 0


def test_every_kind_has_its_byte() -> None:
    assert {kind: record.__name__ for kind, record in KINDS.items()} == {
        0: "End",
        1: "Put",
        2: "Removed",
        3: "Cleared",
        4: "FlowOpened",
        5: "FlowClosed",
        6: "Tick",
    }


def test_the_format_is_what_it_was() -> None:
    """A journal of an earlier daemon must stay readable: change this only together with VERSION."""
    payload = bytes.fromhex("92 c4020106 92 94 a3696b65 91c40461646472 a3677731 05 91 07")
    data = b"sapin journal 1\n" + MARK + pack(">II", len(payload), crc32(payload)) + payload
    assert journal_of([[Put("ike", (b"addr",), "gw1", 5), Tick(7)]]) == data


class TestPins:
    def test_a_put_is_the_whole_pin(self) -> None:
        state = state_of(put(b"a", b"b", since=1), put(b"a", b"b", b"c", server="gw2", since=9))
        assert state.pins() == {"ike": [put(b"a", b"b", b"c", server="gw2", since=9)]}

    def test_a_pin_loses_the_keys_that_another_takes(self) -> None:
        state = state_of(put(b"a", b"b", b"c"), put(b"b", b"d", server="gw2"))
        assert state.pins() == {"ike": [put(b"a", b"c"), put(b"b", b"d", server="gw2")]}

    def test_a_pin_that_has_lost_all_its_keys_is_gone(self) -> None:
        assert state_of(put(b"a", b"b"), put(b"a"), put(b"b")).pins() == {"ike": [put(b"a"), put(b"b")]}

    def test_removed_takes_keys_and_leaves_the_others(self) -> None:
        assert state_of(put(b"a", b"b"), removed(b"a")).pins() == {"ike": [put(b"b")]}
        assert state_of(put(b"a", b"b"), removed(b"a", b"b", b"never")).pins() == {"ike": []}

    def test_cleared_ends_the_pins_of_one_server_in_one_group(self) -> None:
        other = Put("sstp", (b"a",), "gw1", 1)
        state = state_of(put(b"a", b"b"), put(b"c", server="gw2"), other, Cleared("ike", "gw1"))
        assert state.pins() == {"ike": [put(b"c", server="gw2")], "sstp": [other]}

    def test_pins_after_a_clearing_count(self) -> None:
        state = state_of(put(b"a"), put(b"b"), Cleared("ike", "gw1"), put(b"b"), put(b"c"))
        assert state.pins() == {"ike": [put(b"b"), put(b"c")]}

    def test_a_cleared_pin_gives_its_keys_to_another(self) -> None:
        state = state_of(put(b"a", b"b"), Cleared("ike", "gw1"), put(b"a", server="gw2"))
        assert pins_of(state) == {b"a": ("gw2", 1, (b"a",))}

    @given(st.lists(st.tuples(st.sampled_from("prcxe"), st.integers(0, 9), st.integers(0, 2)), max_size=60))
    def test_the_feed_of_an_affinity_table_restores_it(self, steps: list[tuple[str, int, int]]) -> None:
        class Member:
            def __init__(self, name: str) -> None:
                self.name = name
                self.pinned = 0

        feed: list[Change] = []
        members = [Member(f"gw{n}") for n in range(3)]
        table: AffinityTable[Member] = AffinityTable("ike", limit=5, timeout=10, feed=feed.append)
        for now, (action, number, server) in enumerate(steps):
            key = b"addr:%d" % number
            match action:
                case "p":
                    table.put([key], members[server], now)
                case "x":
                    table.put([key, b"spi:%d" % server], members[server], now)
                case "r":
                    table.remove(key)
                case "c":
                    table.clear(members[server])
                case "e":
                    table.expire(now, 100)
        live = {(pin.keys, pin.server, pin.since) for pin in table.pins(limit=100).pins}
        state = State()
        replay(journal_of([feed]), "journal", state)
        assert {(p.keys, p.server, p.since) for p in state.pins().get("ike", [])} == live


class TestFlows:
    def test_opened_is_the_whole_flow(self) -> None:
        state = state_of(flow(1, 30_000), flow(2, 30_001), flow(1, 30_002))
        assert sorted(state.flows()) == [flow(1, 30_002), flow(2, 30_001)]

    def test_closed_takes_that_flow_alone(self) -> None:
        state = state_of(flow(1), flow(2), FlowClosed(*flow(1)[:4]), FlowClosed(*flow(3)[:4]))
        assert state.flows() == [flow(2)]

    def test_the_local_address_tells_flows_apart(self) -> None:
        other = flow()._replace(local=b"\x7f\0\0\x02")
        assert sorted(state_of(flow(), other).flows()) == [flow(), other]


def test_the_last_tick_counts() -> None:
    assert state_of(Tick(5), Tick(9)).tick == 9


@given(batches.filter(any), st.data())
def test_cut_anywhere_the_last_whole_frame_counts(batches: list[list[Record]], data: st.DataObject) -> None:
    whole = journal_of(batches)
    ends = [frame.end for frame in frames(whole, "journal")]
    cut = data.draw(st.integers(0, len(whole)))
    state = State()
    read = replay(whole[:cut], "journal", state)
    count = sum(end <= cut for end in ends)
    assert plain(state) == plain(state_of(*(r for batch in batches[: max(count - 1, 0)] for r in batch)))
    assert read.end == max((end for end in ends if end <= cut), default=0)
    assert (read.damage is None) == (cut in ends)
    assert read.damage is None or (read.damage.torn and read.damage.offset == read.end)


@given(batches.filter(any), st.data())
def test_a_damaged_byte_ends_the_good_part_before_it(
    batches: list[list[Record]], data: st.DataObject
) -> None:
    whole = bytearray(journal_of(batches))
    ends = [frame.end for frame in frames(bytes(whole), "journal")]
    at = data.draw(st.integers(len(HEADER), len(whole) - 1))
    whole[at] ^= data.draw(st.integers(1, 255))
    state = State()
    read = replay(bytes(whole), "journal", state)
    good = sum(end <= at for end in ends) - 1
    assert read.damage is not None
    assert read.damage.offset == ends[good]
    assert plain(state) == plain(state_of(*(r for batch in batches[:good] for r in batch)))


def test_damage_before_other_frames_is_not_a_torn_end() -> None:
    first, second, third = ([put(b"a")], [put(b"b")], [put(b"c")])
    whole = bytearray(journal_of([first, second, third]))
    whole[len(journal_of([first])) + 14] ^= 1
    read = replay(bytes(whole), "journal", State())
    assert read.damage is not None
    assert not read.damage.torn


@pytest.mark.parametrize("tail", [bytes(1), bytes(4096), MARK, MARK + bytes(7), b"garbage" * 99])
def test_a_tail_without_another_frame_is_torn(tail: bytes) -> None:
    """Zeros are what a file system leaves where power went before the data came."""
    good = journal_of([[put(b"a")]])
    read = replay(good + tail, "journal", State())
    assert (read.end, read.damage is not None and read.damage.torn) == (len(good), True)


@pytest.mark.parametrize("data", [b"", HEADER[:5], bytes(300)])
def test_a_header_that_was_not_finished_is_torn(data: bytes) -> None:
    read = replay(data, "journal", State())
    assert (read.end, read.damage is not None and read.damage.torn) == (0, True)


@pytest.mark.parametrize("data", [b"hello, world", header("checkpoint"), b"\1" + HEADER[1:]])
def test_another_header_is_damage(data: bytes) -> None:
    with pytest.raises(Damage, match="not the beginning of a journal"):
        list(frames(data, "journal"))
    assert not replay(data, "journal", State()).damage.torn  # type: ignore[union-attr]


def test_a_newer_version_is_refused() -> None:
    with pytest.raises(FormatError, match="at byte 0: format version 2"):
        list(frames(b"sapin journal 2\n", "journal"))


def test_an_unknown_kind_is_refused_where_it_is() -> None:
    good = journal_of([[put(b"a")]])
    with pytest.raises(FormatError, match=f"at byte {len(good)}: .*unknown kind 99") as caught:
        replay(good + frame_of([bytes([6, 99]), [[1], ["new", "fields"]]]), "journal", State())
    assert caught.value.offset == len(good)


@pytest.mark.parametrize(
    ("kind", "fields"),
    [
        (1, ["ike", [b"a"], "gw1"]),
        (1, ["ike", [b"a"], "gw1", 1.5]),
        (1, ["ike", ["a"], "gw1", 1]),
        (1, ["ike", [[b"a"]], "gw1", 1]),
        (2, ["ike", [1], "gw1", "expired"]),
        (3, [b"ike", "gw1"]),
        (6, [True]),
        (6, []),
    ],
)
def test_records_that_make_no_sense_are_skipped_and_counted(kind: int, fields: list[Any]) -> None:
    state = State()
    read = replay(HEADER + frame_of([bytes([6, kind, 1]), [[3], fields, put(b"z")]]), "journal", state)
    assert (read.records, read.refused, read.damage) == (2, 1, None)
    assert (state.tick, state.pins()) == (3, {"ike": [put(b"z")]})


@pytest.mark.parametrize(
    "payload", [7, [], [b"\6", []], [b"", [[1]]], [b"\6", [3]], ["6", [[3]]], [b"\6", 3]]
)
def test_a_frame_that_was_never_written_so_is_damage(payload: Any) -> None:
    read = replay(HEADER + frame_of(payload) + frame_of([b"\6", [[3]]]), "journal", State())
    assert read.damage is not None
    assert (read.damage.offset, read.damage.torn) == (len(HEADER), False)


def test_a_damaged_length_costs_no_memory() -> None:
    read = replay(HEADER + MARK + pack(">II", 2**32 - 1, 0) + b"x", "journal", State())
    assert read.damage is not None


def test_limits_of_a_frame() -> None:
    encode = Encoder().encode
    with pytest.raises(ValueError, match="records in one frame"):
        encode([Tick(1)] * (MAX_RECORDS + 1))
    with pytest.raises(ValueError, match="bytes, of at most"):
        encode([put(b"x" * (MAX_FRAME + 1))])
    assert len(list(frames(HEADER + encode([Tick(1)] * MAX_RECORDS), "journal"))[1].records) == MAX_RECORDS


def test_after_what_cannot_be_encoded_the_encoder_still_works() -> None:
    encode = Encoder().encode
    for wrong in (Tick(2**64), "no record", put("\ud800")):  # type: ignore[arg-type]
        with pytest.raises((ValueError, TypeError, OverflowError, KeyError)):
            encode([put(b"a"), wrong])  # type: ignore[list-item]
    assert encode([Tick(1)]) == Encoder().encode([Tick(1)])


class TestWholeCheckpoint:
    def read(self, *batches: Sequence[Record]) -> bool:
        data = header("checkpoint") + b"".join(Encoder().encode(batch) for batch in batches)
        return replay(data, "checkpoint", State()).whole_checkpoint

    def test_with_its_end(self) -> None:
        assert self.read([put(b"a"), put(b"b")], [End(2)])
        assert self.read([End(0)])

    def test_without_it(self) -> None:
        assert not self.read([put(b"a")])
        assert not self.read()

    def test_with_the_end_of_another(self) -> None:
        assert not self.read([put(b"a"), put(b"b")], [End(3)])
        assert not self.read([End(0)], [Tick(1)])
