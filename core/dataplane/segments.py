"""Runs of datagrams of one flow, sent in one call (UDP_SEGMENT, udp(7), Linux 4.18).

The kernel cuts a run into datagrams as they came: the receiver sees no difference. A run holds datagrams of
one size, in their order; only its last one may be shorter.
"""

from __future__ import annotations

import errno
import socket
import struct
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from sapin.core.dataplane.batch import MAX_GSO_BYTES, MAX_SEGMENTS, SOL_UDP, UDP_SEGMENT

_SEGMENT = struct.Struct("H")
_CANNOT_SEGMENT = (errno.EINVAL, errno.EMSGSIZE, errno.EIO, errno.EOPNOTSUPP)


class Run(NamedTuple):
    """Slots whose datagrams go out together; ``segment`` is their size, 0 for one datagram as it is."""

    slots: list[int]
    segment: int


def runs(slots: Sequence[int], sizes: Sequence[int], segments: Sequence[int] | None) -> Iterator[Run]:
    """Cut the slots of a flow into runs. ``segments`` as :meth:`~.batch.Batch.segments` gives it."""
    run: list[int] = []
    size = total = 0
    for slot in slots:
        length = sizes[slot]
        merged = segments is not None and segments[slot]
        if run and (
            merged
            or length > size
            or not length
            or len(run) >= MAX_SEGMENTS
            or total + length > MAX_GSO_BYTES
        ):
            yield Run(run, size if len(run) > 1 else 0)
            run = []
        if merged:
            yield Run([slot], merged if merged < length else 0)
            continue
        if not run:
            size, total = length, 0
        run.append(slot)
        total += length
        if length < size:
            yield Run(run, size)
            run = []
    if run:
        yield Run(run, size if len(run) > 1 else 0)


def pieces(run: Run, views: Sequence[memoryview], sizes: Sequence[int]) -> Iterator[memoryview]:
    """The single datagrams of a run, for when they must be sent one by one."""
    for slot in run.slots:
        size = sizes[slot]
        step = run.segment or size
        for at in range(0, size, step) if size else (0,):
            yield views[slot][at : min(at + step, size)]


def send_run(
    sock: socket.SocketType,
    address: tuple[str, int] | None,
    run: Run,
    views: Sequence[memoryview],
    sizes: Sequence[int],
) -> bool:
    """Send a run; false if the kernel or the path cannot segment it, and nothing was sent.

    Raises:
        OSError: the socket cannot send at all.
    """
    buffers = [views[slot][: sizes[slot]] for slot in run.slots]
    control = [(SOL_UDP, UDP_SEGMENT, _SEGMENT.pack(run.segment))] if run.segment else []
    try:
        sock.sendmsg(buffers, control, 0, address)
    except OSError as error:
        if run.segment and error.errno in _CANNOT_SEGMENT:
            return False
        raise
    return True
