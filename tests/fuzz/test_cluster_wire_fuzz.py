"""Whatever a peer sends, the decoder answers with a message or a refusal, and keeps its bounds."""

from __future__ import annotations

from typing import Any

import msgpack
from hypothesis import given
from hypothesis import strategies as st

from sapin.cluster import wire
from sapin.core.pins import Put

VERSIONS = st.sampled_from([1, 2])
PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats() | st.text() | st.binary(),
    lambda inner: st.lists(inner, max_size=6),
    max_leaves=30,
)
GOOD = wire.encode(
    wire.Delta(7, [Put("ike", (b"a:%d" % n, b"s:%d" % n), f"gw{n % 2}", n) for n in range(8)]), 2
)


def accepted(data: bytes, version: int) -> None:
    match wire.decode(data, version):
        case wire.Refused(reason):
            assert reason
            assert len(reason) < 100
        case message:
            assert wire.decode(wire.encode(message, version), version) == message or message != message


@given(st.binary(max_size=300), VERSIONS)
def test_any_bytes(data: bytes, version: int) -> None:
    accepted(data, version)


@given(PLAIN, st.integers(0, 20), VERSIONS)
def test_any_values(value: Any, kind: int, version: int) -> None:
    accepted(msgpack.packb([kind, *(value if isinstance(value, list) else [value])]), version)


@given(st.data(), VERSIONS)
def test_a_good_message_with_a_few_bytes_changed(data: st.DataObject, version: int) -> None:
    changed = bytearray(GOOD)
    for _ in range(data.draw(st.integers(1, 4))):
        changed[data.draw(st.integers(0, len(changed) - 1))] = data.draw(st.integers(0, 255))
    accepted(bytes(changed), version)


@given(st.integers(0, len(GOOD)), VERSIONS)
def test_a_good_message_cut_off(end: int, version: int) -> None:
    accepted(GOOD[:end], version)
