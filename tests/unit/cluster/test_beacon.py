"""Beacons: only the peer's own are recognised."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from sapin.cluster.beacon import SIZE, Beacon, Codec, Kind

CLUSTER, SECRET = "ab" * 16, b"s" * 32
OURS = Codec(CLUSTER, SECRET, "lb-b")
PEERS = Codec(CLUSTER, SECRET, "lb-a")
PROBE = Beacon(Kind.PROBE, True, "lb-b", 7, 3, b"12345678")


def test_what_the_peer_says_is_understood() -> None:
    for kind in Kind:
        beacon = PROBE._replace(kind=kind)
        assert OURS.decode(PEERS.encode(beacon)) == beacon


def test_what_a_node_says_itself_is_not_its_peers() -> None:
    assert PEERS.decode(PEERS.encode(PROBE)) is None


def test_another_secret_or_cluster_is_not_understood() -> None:
    for other in (Codec(CLUSTER, b"t" * 32, "lb-a"), Codec("cd" * 16, SECRET, "lb-a")):
        assert OURS.decode(other.encode(PROBE)) is None


@given(st.binary(max_size=2 * SIZE))
def test_any_bytes(data: bytes) -> None:
    assert OURS.decode(data) is None


@given(st.integers(0, SIZE - 1), st.integers(1, 255))
def test_a_changed_byte_spoils_it(at: int, change: int) -> None:
    data = bytearray(PEERS.encode(PROBE))
    data[at] ^= change
    assert OURS.decode(bytes(data)) is None
