"""Runs: what a flow's datagrams are sent as is what they were, and every run is one that the kernel takes."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sapin.core.dataplane.batch import MAX_GSO_BYTES, MAX_SEGMENTS
from sapin.core.dataplane.segments import Run, pieces, runs, send_run

LARGEST = 65_507
"""Bytes of payload in the largest UDP datagram over IPv4."""
MEMORY = memoryview(bytes(range(256)) * 300)

Batch = tuple[list[memoryview], list[int] | None]
"""Datagrams of one flow, and the segment size of each that the kernel merged from several, else 0."""


@st.composite
def batches(draw: st.DrawFn) -> Batch:
    """Datagrams of few different sizes, so that there are runs."""
    telling = st.sampled_from([0, 700, 1_200, 2_400, 3_000, 8_200, 21_700])
    common = draw(st.lists(st.integers(0, LARGEST) | telling, min_size=1, max_size=3))
    sizes = draw(st.lists(st.sampled_from(common), min_size=1, max_size=90))
    datagrams = [MEMORY[at : at + size] for at, size in enumerate(sizes)]
    if draw(st.booleans()):
        return datagrams, None
    merged = st.sampled_from([0, 0, 0, 0, 1_200, 1_200, 1_400])
    return datagrams, draw(st.lists(merged, min_size=len(sizes), max_size=len(sizes)))


def placed(batch: Batch) -> list[tuple[Run, list[int]]]:
    """The runs, and the segment sizes that the kernel gave for the datagrams of each."""
    datagrams, segments = batch
    rest = iter(segments or [0] * len(datagrams))
    return [(run, [next(rest) for _ in run.buffers]) for run in runs(*batch)]


@given(batches())
def test_runs_are_all_datagrams_in_their_order(batch: Batch) -> None:
    datagrams, _ = batch
    found = [buffer for run in runs(*batch) for buffer in run.buffers]
    assert list(map(id, found)) == list(map(id, datagrams))


@given(batches())
def test_every_run_is_one_that_the_kernel_takes(batch: Batch) -> None:
    """All of one size but the last, which is neither longer nor empty; within the bounds of UDP_SEGMENT."""
    for run in runs(*batch):
        lengths = list(map(len, pieces(run)))
        if len(run.buffers) > 1:
            assert all(len(buffer) % run.segment == 0 for buffer in run.buffers[:-1])
            assert set(lengths[:-1]) == {run.segment}
            assert 0 < lengths[-1] <= run.segment
            assert len(lengths) <= MAX_SEGMENTS
            assert sum(lengths) <= MAX_GSO_BYTES


@given(batches())
def test_a_datagram_alone_goes_as_it_came(batch: Batch) -> None:
    """What the kernel has merged is cut again as it was, what it has not is one datagram."""
    for run, merged in placed(batch):
        if len(run.buffers) == 1:
            assert run.segment == (merged[0] if merged[0] < len(run.buffers[0]) else 0)


@given(batches())
def test_no_run_is_cut_without_need(batch: Batch) -> None:
    for (run, _), (following, merged) in pairwise(placed(batch)):
        lengths = list(map(len, pieces(run)))
        more = len(following.buffers[0])
        own = merged[0] if 0 < merged[0] < more else more
        parts = -(-more // own) if own else 1
        assert (
            lengths[-1] < lengths[0]
            or own > lengths[0]
            or (own < lengths[0] and parts > 1)
            or more == 0
            or len(lengths) + parts > MAX_SEGMENTS
            or sum(lengths) + more > MAX_GSO_BYTES
        )


@given(batches())
def test_the_pieces_of_all_runs_are_the_datagrams(batch: Batch) -> None:
    datagrams, segments = batch
    expected: list[bytes] = []
    for datagram, segment in zip(datagrams, segments or [0] * len(datagrams), strict=True):
        left = bytes(datagram)
        while segment and len(left) > segment:
            expected.append(left[:segment])
            left = left[segment:]
        expected.append(left)
    assert [bytes(piece) for run in runs(*batch) for piece in pieces(run)] == expected


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        ([100], [([0], 0)]),
        ([0], [([0], 0)]),
        ([0, 0], [([0], 0), ([1], 0)]),
        ([100, 100, 100], [([0, 1, 2], 100)]),
        ([100, 100, 60], [([0, 1, 2], 100)]),
        ([100, 60, 60], [([0, 1], 100), ([2], 0)]),
        ([60, 100, 100], [([0], 0), ([1, 2], 100)]),
        ([100, 0, 100], [([0], 0), ([1], 0), ([2], 0)]),
        ([32_500, 32_500], [([0, 1], 32_500)]),
        ([32_501, 32_501], [([0], 0), ([1], 0)]),
        ([100] * 65, [(list(range(64)), 100), ([64], 0)]),
    ],
)
def test_runs_by_example(sizes: list[int], expected: list[tuple[list[int], int]]) -> None:
    datagrams = [MEMORY[at : at + size] for at, size in enumerate(sizes)]
    found = list(runs(datagrams, None))
    assert found == [Run([datagrams[slot] for slot in slots], segment) for slots, segment in expected]


@pytest.mark.parametrize(
    ("sizes", "segments", "expected"),
    [
        ([300, 300], [100, 100], [([0, 1], 100)]),
        ([300, 250, 300], [100, 100, 100], [([0, 1], 100), ([2], 100)]),
        ([300, 100, 40], [100, 0, 0], [([0, 1, 2], 100)]),
        ([300, 300], [100, 150], [([0], 100), ([1], 150)]),
        ([100, 300], [0, 100], [([0, 1], 100)]),
        ([4_000, 3_000], [100, 100], [([0], 100), ([1], 100)]),
    ],
)
def test_merged_datagrams_by_example(
    sizes: list[int], segments: list[int], expected: list[tuple[list[int], int]]
) -> None:
    datagrams = [MEMORY[at : at + size] for at, size in enumerate(sizes)]
    found = list(runs(datagrams, segments))
    assert found == [Run([datagrams[slot] for slot in slots], segment) for slots, segment in expected]


@pytest.mark.parametrize(
    ("sizes", "segments", "expected"),
    [
        ([2_400, 1_200, 700], [1_200, 0, 0], [([0, 1, 2], 1_200)]),
        ([1_200, 2_400], [0, 1_200], [([0, 1], 1_200)]),
        ([3_000, 1_200], [1_200, 0], [([0], 1_200), ([1], 0)]),
        ([3_000, 2_400], [0, 1_200], [([0], 0), ([1], 1_200)]),
        ([1_200, 1_200], [1_200, 0], [([0, 1], 1_200)]),
        ([32_600, 32_400], [0, 0], [([0, 1], 32_600)]),
        ([32_600, 32_401], [0, 0], [([0], 0), ([1], 0)]),
        ([36_000, 36_000], [1_200, 1_200], [([0], 1_200), ([1], 1_200)]),
    ],
)
def test_runs_of_what_was_merged_by_example(
    sizes: list[int], segments: list[int], expected: list[tuple[list[int], int]]
) -> None:
    datagrams = [MEMORY[at : at + size] for at, size in enumerate(sizes)]
    found = list(runs(datagrams, segments))
    assert found == [Run([datagrams[slot] for slot in slots], segment) for slots, segment in expected]


@contextmanager
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    """A connected socket and the one that it sends to."""
    with socket.socket(type=socket.SOCK_DGRAM) as receiver, socket.socket(type=socket.SOCK_DGRAM) as sender:
        receiver.bind(("127.0.0.1", 0))
        receiver.settimeout(5)
        sender.connect(receiver.getsockname())
        yield sender, receiver


@pytest.mark.parametrize(
    ("sizes", "segment"), [([300], 0), ([0], 0), ([300, 300, 300, 7], 300), ([1_000], 300)]
)
@pytest.mark.parametrize("connected", [True, False])
def test_the_receiver_gets_the_pieces(sizes: list[int], segment: int, connected: bool) -> None:
    run = Run([MEMORY[at : at + size] for at, size in enumerate(sizes)], segment)
    with pair() as (sender, receiver), socket.socket(type=socket.SOCK_DGRAM) as other:
        address = None if connected else receiver.getsockname()
        assert send_run(sender if connected else other, address, run)
        wanted = [bytes(piece) for piece in pieces(run)]
        assert [receiver.recv(2_000) for _ in wanted] == wanted


def test_what_cannot_be_segmented_is_told_and_not_sent() -> None:
    """More segments than any kernel takes stand for a device that takes none."""
    with pair() as (sender, receiver):
        assert not send_run(sender, None, Run([MEMORY[:200]], 1))
        sender.send(b"next")
        assert receiver.recv(10) == b"next"


def test_an_error_that_is_not_about_segments_is_raised() -> None:
    with pair() as (sender, _):
        sender.close()
        with pytest.raises(OSError, match="Bad file descriptor"):
            send_run(sender, None, Run([MEMORY[:10]] * 2, 10))


def test_a_datagram_that_is_too_long_is_no_matter_of_segments() -> None:
    with pair() as (sender, _), pytest.raises(OSError, match="Message too long"):
        send_run(sender, None, Run([MEMORY[: LARGEST + 1]], 0))
