"""Whatever the files of a state directory hold, reading them ends, and raises nothing but a refusal."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import closing, suppress
from pathlib import Path
from struct import pack
from zlib import crc32

import msgpack  # type: ignore[import-untyped]
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sapin.core.affinity import Cause, Cleared, Put, Removed
from sapin.core.dataplane.store import Restored, Store, StoreError
from sapin.core.journal import (
    Encoder,
    FlowClosed,
    FlowOpened,
    FormatError,
    Record,
    State,
    Tick,
    header,
    replay,
)

MARK = b"\xf5\xf6\xf7\x01"

scalars = st.one_of(
    st.none(), st.booleans(), st.integers(-(2**63), 2**64 - 1), st.floats(), st.binary(), st.text()
)
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=12,
)
kinds = st.lists(st.integers(0, 7), max_size=5).map(bytes)
payloads = st.one_of(
    st.binary(max_size=80),
    values.map(msgpack.packb),
    st.tuples(kinds, st.lists(st.lists(values, max_size=9), max_size=5)).map(msgpack.packb),
)

RECORDS: list[list[Record]] = [
    [
        Put("ike", (b"addr:a", b"spi:b"), "gw1", 1),
        FlowOpened("ike", b"a", 1, b"", "gw1", b"u", 2, b"addr:a", 3),
    ],
    [Removed("ike", (b"spi:b",), "gw1", Cause.DISPLACED), Tick(9)],
    [Cleared("ike", "gw1"), FlowClosed("ike", b"a", 1, b""), Put("ike", (b"addr:c",), "gw2", 4)],
]
GOOD = header("journal") + b"".join(map(Encoder().encode, RECORDS))


def framed(payload: bytes) -> bytes:
    return MARK + pack(">II", len(payload), crc32(payload)) + payload


def read(data: bytes) -> None:
    state = State()
    with suppress(FormatError):
        read = replay(data, "journal", state)
        assert read.end <= len(data)
        assert (read.end == len(data) > 0) == (read.damage is None)
    state.pins()
    state.flows()


@given(st.binary(max_size=300))
def test_any_bytes(data: bytes) -> None:
    read(data)
    read(header("journal") + data)
    read(header("journal") + MARK + data)


@settings(max_examples=60)
@given(st.lists(payloads, max_size=4))
def test_any_payload_whose_checksum_is_right(payloads: list[bytes]) -> None:
    read(header("journal") + b"".join(map(framed, payloads)))


@given(st.lists(st.tuples(st.integers(0, len(GOOD)), st.integers(0, 9), st.binary(max_size=9)), max_size=5))
def test_a_journal_with_pieces_replaced(edits: list[tuple[int, int, bytes]]) -> None:
    data = GOOD
    for at, length, piece in edits:
        data = data[:at] + piece + data[at + length :]
    read(data)


@pytest.mark.parametrize("depth", [10, 600, 100_000])
def test_nesting_without_end(depth: int) -> None:
    read(header("journal") + framed(b"\x91" * depth))
    read(header("journal") + framed(b"\x92\xc4\x01\x01\x91" + b"\x91" * depth))


def test_lengths_that_lie() -> None:
    for lie in (
        b"\xdd\xff\xff\xff\xff",
        b"\xc6\xff\xff\xff\xff",
        b"\xdb\xff\xff\xff\xff",
        b"\xdf\xff\xff\xff\xff",
    ):
        read(header("journal") + framed(b"\x92\xc4\x01\x01" + lie))
        read(header("journal") + framed(lie * 1000))


@pytest.fixture(scope="module")
def directory() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as path:
        yield Path(path)


contents = st.one_of(
    st.binary(max_size=40),
    st.integers(0, len(GOOD)).map(lambda cut: GOOD[:cut]),
    st.integers(0, len(GOOD) - 1).map(lambda at: GOOD[:at] + bytes([GOOD[at] ^ 1]) + GOOD[at + 1 :]),
    st.lists(payloads, max_size=2).map(lambda them: GOOD + b"".join(map(framed, them))),
    st.lists(payloads, max_size=2).map(lambda them: header("checkpoint") + b"".join(map(framed, them))),
)
names = st.builds(
    "{}-{}{}".format, st.sampled_from(["journal", "checkpoint"]), st.integers(0, 4), st.just("")
)
others = st.sampled_from(
    ["journal-", "journal-x", "checkpoint-1.tmp", "journal-1.damaged", "journal-99999999999"]
)


@settings(max_examples=60)
@given(st.dictionaries(names, contents, max_size=5))
def test_any_directory_is_refused_or_read_and_read_the_same_again(
    directory: Path, files: dict[str, bytes]
) -> None:
    for path in directory.iterdir():
        path.unlink()
    for name, data in files.items():
        (directory / name).write_bytes(data)

    def load() -> Restored:
        with closing(Store(directory)) as store:
            store.open()
            return store.load()

    try:
        first = load()
    except StoreError:
        return
    again = load()
    assert (again.pins, again.flows, again.tick) == (first.pins, first.flows, first.tick)
    assert again.report.torn == 0
