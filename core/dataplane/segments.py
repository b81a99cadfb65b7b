"""Runs of datagrams of one flow, sent in one call (UDP_SEGMENT, udp(7), Linux 4.18).

The kernel cuts a run into datagrams as they came: the receiver sees no difference. A run holds datagrams of
one size, in their order; only its last one may be shorter. What the kernel has merged on receiving (UDP_GRO) is several
datagrams, and may be joined with others of their size.
"""

from __future__ import annotations

import errno
import socket
import struct
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import NamedTuple

from sapin.core.dataplane.batch import MAX_GSO_BYTES, MAX_SEGMENTS, SOL_UDP, UDP_SEGMENT

_CANNOT_SEGMENT = (errno.EINVAL, errno.EMSGSIZE, errno.EIO, errno.EOPNOTSUPP)


class Run(NamedTuple):
    """Buffers that go out together; ``segment`` is the size of a datagram, 0 for one datagram as it is."""

    buffers: Sequence[memoryview]
    segment: int


def runs(datagrams: Sequence[memoryview], segments: Sequence[int] | None) -> Iterator[Run]:
    """Cut the datagrams of a flow into runs.

    ``segments`` has the segment size of each that the kernel merged from several, else 0; ``None``: it merged none.
    """
    if segments is None:
        sizes = set(map(len, datagrams))
        size = len(datagrams[0])
        if len(sizes) == 1 and 0 < size * len(datagrams) <= MAX_GSO_BYTES and len(datagrams) <= MAX_SEGMENTS:
            yield Run(datagrams, size if len(datagrams) > 1 else 0)
            return
    yield from _cut(datagrams, segments or [0] * len(datagrams))


def _cut(datagrams: Sequence[memoryview], segments: Sequence[int]) -> Iterator[Run]:
    run: list[memoryview] = []
    size = parts = total = 0
    for datagram, merged in zip(datagrams, segments, strict=True):
        length = len(datagram)
        part = merged if 0 < merged < length else length
        added = count(length, part)
        fits = parts + added <= MAX_SEGMENTS and total + length <= MAX_GSO_BYTES
        if run and not (fits and length and (part == size or (added == 1 and length < size))):
            yield _run(run, size, parts)
            run = []
        if not run:
            size, parts, total = part, 0, 0
        run.append(datagram)
        parts += added
        total += length
        if total < parts * size:  # the last one is shorter, and nothing may follow it
            yield _run(run, size, parts)
            run = []
    if run:
        yield _run(run, size, parts)


def _run(run: Sequence[memoryview], size: int, parts: int) -> Run:
    return Run(run, size if parts > 1 else 0)


def count(length: int, segment: int) -> int:
    """How many datagrams there are in one that the kernel merged; ``segment`` is 0 if it did not."""
    return -(-length // segment) if segment else 1


def pieces(run: Run) -> Iterator[memoryview]:
    """The single datagrams of a run, for when they must be sent one by one."""
    for buffer in run.buffers:
        step = run.segment or max(1, len(buffer))
        for at in range(0, max(1, len(buffer)), step):
            yield buffer[at : at + step]


def send_run(sock: socket.SocketType, address: tuple[str, int] | None, run: Run) -> bool:
    """Send a run; false if the kernel or the path cannot segment it, and nothing was sent.

    Raises:
        OSError: the socket cannot send at all.
    """
    try:
        sock.sendmsg(run.buffers, _control(run.segment), 0, address)
    except OSError as error:
        if run.segment and error.errno in _CANNOT_SEGMENT:
            return False
        raise
    return True


@lru_cache(maxsize=4096)
def _control(segment: int) -> Sequence[tuple[int, int, bytes]]:
    return [(SOL_UDP, UDP_SEGMENT, struct.pack("H", segment))] if segment else []
