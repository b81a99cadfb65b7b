"""Messages: what goes in comes out, and nothing else is accepted."""

from __future__ import annotations

from typing import Any

import msgpack
import pytest

from sapin.cluster import wire
from sapin.core.journal import FlowClosed, FlowOpened, ServerAdmin, ServerHealth, Touched
from sapin.core.pins import Cause, Cleared, Put, Removed

RECORDS: list[wire.Record] = [
    Put("ike", (b"address:1", b"spi:2"), "gw1", 12),
    Put("ike", (b"address:2",), "gw1", 13),
    Put("ike", (b"address:3",), "gw2", 13),
    Removed("ike", (b"address:9",), "gw1", Cause.EXPIRED),
    Cleared("ike", "gw2"),
    FlowOpened("ike", bytes(4), 500, b"", "gw1", b"", 20_000, b"address:1", 12),
    FlowClosed("ike", bytes(4), 500, b""),
    Touched("ike", (b"address:1",)),
    ServerHealth("ike", "gw1", "healthy", "enabled", 100),
    ServerAdmin("ike", "gw1", "draining"),
    wire.Revision(2, 7, "ab" * 32, "[[virtual_services]]\n" * 1_000),
    Put("ike", (b"address:4",), "gw2", 14),
]
HELLO = wire.Hello(1, 2, "c", "lb-a", 2**63, 1, 3, "active", 100, 14, 5, 6, True, 2**64 - 1, 1.5)
MESSAGES: list[wire.Message] = [
    HELLO,
    wire.Heartbeat(1, 3, "active", True, 5, 6, True, 1.5),
    wire.Handover(4),
    wire.Claimed(4),
    wire.Released(4),
    wire.Request(4),
    wire.Delta(9, RECORDS),
    wire.Begin(10),
    wire.End(11),
    wire.Mark(12, 2**64 - 1),
    wire.Join(13, 0),
    wire.Ack(14, True),
    wire.Nak(15),
    wire.Resync("why"),
]


def test_every_kind_is_tried_here() -> None:
    assert {type(message) for message in MESSAGES} == set(wire.MESSAGES.values())
    assert {type(record) for record in RECORDS} == set(wire.RECORDS.values())


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("message", MESSAGES, ids=lambda message: type(message).__name__)
def test_what_goes_in_comes_out(message: wire.Message, version: int) -> None:
    assert wire.decode(wire.encode(message, version), version) == message


def test_the_versions_differ_in_the_records_alone() -> None:
    assert wire.encode(HELLO, 1) == wire.encode(HELLO, 2)
    assert wire.encode(wire.Delta(1, RECORDS), 1) != wire.encode(wire.Delta(1, RECORDS), 2)
    assert isinstance(wire.decode(wire.encode(wire.Delta(1, RECORDS), 1), 2), wire.Refused)
    assert isinstance(wire.decode(wire.encode(wire.Delta(1, RECORDS), 2), 1), wire.Refused)


@pytest.mark.parametrize(
    ("ours", "theirs", "version"),
    [((1, 2), (1, 2), 2), ((1, 2), (1, 1), 1), ((1, 2), (2, 3), 2), ((1, 2), (3, 4), None), ((2, 3), (1, 1), None)],
)  # fmt: skip
def test_the_newest_version_that_both_speak(
    ours: tuple[int, int], theirs: tuple[int, int], version: int | None
) -> None:
    assert wire.agreed(ours, HELLO._replace(oldest=theirs[0], newest=theirs[1])) == version


@pytest.mark.parametrize(
    "strange",
    [
        None, 7, [], [99], ["x"], [2], [2, 1], [12, "a", True], [12, 1, 1], [12, -1, True], [12, 1, True, 1],
        [14, "x" * 300], [1, *HELLO[:-1], 1e300], [7], [7, 1], [7, "a", []], [7, 1, None], [7, -1, []],
    ],
)  # fmt: skip
@pytest.mark.parametrize("version", [1, 2])
def test_strange_messages_are_refused(strange: Any, version: int) -> None:
    assert isinstance(wire.decode(msgpack.packb(strange), version), wire.Refused)


@pytest.mark.parametrize(
    "row",
    [
        (b"\x01", [["ike", [], "gw1", 1]]),
        (b"\x01", [["ike", [b""], "gw1", 1]]),
        (b"\x01", [["ike", [b"k" * 256], "gw1", 1]]),
        (b"\x01", [["ike", [b"k"] * 9, "gw1", 1]]),
        (b"\x01", [["ike", ["k"], "gw1", 1]]),
        (b"\x01", [["i" * 300, [b"k"], "gw1", 1]]),
        (b"\x01", [["ike", [b"k"], "gw1", -1]]),
        (b"\x01", [["ike", [b"k"], "gw1", 2**63]]),
        (b"\x05", [["ike", b"a" * 256, 500, b""]]),
        (b"\x01", [["ike", [b"k"], "gw1"]]),
        (b"\x01\x01", [["ike", [b"k"], "gw1", 1]]),
        (b"\x63", [["ike"]]),
        (b"\x07", [["ike", [b"k"] * 1_001]]),
        (b"\x07", [["ike", [7]]]),
        (b"\x0a", [[1, 1, "d" * 300, "text"]]),
    ],
)
def test_strange_records_are_refused_in_both_versions(row: tuple[bytes, list[Any]]) -> None:
    assert isinstance(wire.decode(msgpack.packb([7, 1, row]), 1), wire.Refused)
    assert isinstance(wire.decode(msgpack.packb([7, 1, [[0, *row]]]), 2), wire.Refused)


@pytest.mark.parametrize(
    "run",
    [
        [1, "ike", "gw1", [[b"k"]], [1, 2]],
        [1, "ike", "gw1", [[b"k"]], ["x"]],
        [1, "ike", "gw1", [b"k"], [1]],
        [1, "ike", "gw1", [[b""]], [1]],
        [1, "ike", "gw1", [[b"k"]], [-1]],
        [1, "ike", "gw1", [[b"k"]], [2**63]],
        [2, "ike", "gw1", [[b"k"]], [1]],
        [1, 7, "gw1", [[b"k"]], [1]],
        7,
    ],
)
def test_strange_columns_are_refused(run: Any) -> None:
    assert isinstance(wire.decode(msgpack.packb([7, 1, [run]]), 2), wire.Refused)


def test_too_much_is_refused_on_both_sides() -> None:
    many = [Cleared("ike", "gw1")] * (wire.MAX_RECORDS + 1)
    with pytest.raises(ValueError, match="1001 records"):
        wire.encode(wire.Delta(1, many))
    runs = [[0, b"\x03" * 600, [["ike", "gw1"]] * 600]] * 2
    assert isinstance(wire.decode(msgpack.packb([7, 1, runs]), 2), wire.Refused)
    assert wire.decode(bytes(wire.MAX_MESSAGE + 1)) == wire.Refused("too long")


def test_a_message_of_the_largest_records_fits() -> None:
    keys = tuple(b"%07d" % n + b"k" * 248 for n in range(8))
    largest = [Put("g" * 63, keys, "s" * 63, 2**40)] * wire.MAX_RECORDS
    for version in (1, 2):
        assert len(wire.encode(wire.Delta(1, largest), version)) <= wire.MAX_MESSAGE


def test_deep_nesting_is_refused() -> None:
    assert isinstance(wire.decode(b"\x91" * 100_000), wire.Refused)
