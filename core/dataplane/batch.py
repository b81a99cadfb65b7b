"""Many datagrams per system call: recvmmsg(2) and sendmmsg(2), which the standard library lacks.

A :class:`Batch` is a row of slots, each a buffer with room for one datagram of any size, its address and
its control data. The buffers never move, so the structures that the kernel reads are laid out once; per
call only lengths and addresses are written, column by column through memoryviews, not slot by slot.

Linux on 64-bit machines only: ``struct mmsghdr`` is 64 bytes there (recvmmsg(2), socket(7)).
"""

from __future__ import annotations

import ctypes
import errno
import os
import socket
import struct
import sys
from array import array
from collections.abc import MutableSequence, Sequence

UDP_SEGMENT = 103
UDP_GRO = 104
"""From linux/udp.h; Python's socket module does not have them before 3.14."""
SOL_UDP = 17
MAX_SEGMENTS = 64
"""UDP_MAX_SEGMENTS of linux/udp.h, its value before Linux 6.9; later ones allow 128."""
MAX_GSO_BYTES = 65_000
"""A segmented send must fit one IP packet of 65,535 bytes with its headers."""

_BUFFER = 65_536
_STRIDE = _BUFFER + 576
"""Not a power of two: slots 64 KiB apart would all compete for the same cache sets."""
_NAME = 32
_CONTROL = 64
_HEADER = 64
_DATA_AT = 4
"""Where the data of the first control message begins, in words of 4 bytes (struct cmsghdr, cmsg(3))."""
_Q = struct.calcsize("Q")
_WORDS = _HEADER // _Q
# Columns of struct mmsghdr in 8-byte words: msg_name, msg_namelen, msg_iov, msg_iovlen, msg_control,
# msg_controllen, msg_flags, msg_len.
_NAME_AT, _NAMELEN_AT, _IOV_AT, _IOVLEN_AT, _CONTROL_AT, _CONTROLLEN_AT, _FLAGS_AT, _LEN_AT = range(8)
_MSG_DONTWAIT = int(socket.MSG_DONTWAIT)

if struct.calcsize("P") != _Q:
    raise ImportError("Sapin needs a 64-bit machine")

_libc = ctypes.CDLL(None, use_errno=True)
_recvmmsg = _libc.recvmmsg
_sendmmsg = _libc.sendmmsg
for _call in (_recvmmsg, _sendmmsg):
    _call.restype = ctypes.c_int


def _address(buffer: MutableSequence[int]) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(buffer))  # type: ignore[arg-type]


class Batch:
    """A row of datagram slots for sockets of one address family.

    Args:
        family: ``AF_INET`` or ``AF_INET6``.
        slots: how many datagrams there is room for.
        control: whether received control data is wanted (segment sizes, local addresses).
    """

    def __init__(self, family: socket.AddressFamily, slots: int, *, control: bool = True) -> None:
        self.family = family
        self.slots = slots
        self._namelen = 16 if family == socket.AF_INET else 28
        self._memory = bytearray(self.slots * _STRIDE)
        self._names = bytearray(self.slots * _NAME)
        self._control = bytearray(self.slots * _CONTROL)
        self._iov = array("Q", bytes(self.slots * 2 * _Q))
        self._headers = array("Q", bytes(self.slots * _HEADER))
        self._wanted_control = _CONTROL if control else 0
        self.views = [
            memoryview(self._memory)[i * _STRIDE : i * _STRIDE + _BUFFER] for i in range(self.slots)
        ]
        """The slots' buffers."""
        self._used = slots
        """Slots whose lengths are not those that receiving wants."""
        self._for_sending = False
        self._cut_at: list[int] = []
        self._cuts: list[memoryview] = []
        self._lay_out()

    def _lay_out(self) -> None:
        memory, names, control, iov = map(_address, (self._memory, self._names, self._control, self._iov))
        for i in range(self.slots):
            self._iov[2 * i] = memory + i * _STRIDE
            self._iov[2 * i + 1] = _BUFFER
            base = i * _WORDS
            self._headers[base + _NAME_AT] = names + i * _NAME
            self._headers[base + _IOV_AT] = iov + i * 2 * _Q
            self._headers[base + _IOVLEN_AT] = 1
            self._headers[base + _CONTROL_AT] = control + i * _CONTROL
        self._vector = _address(self._headers)
        words = memoryview(self._headers)
        self._namelens = words[_NAMELEN_AT::_WORDS]
        self._controllens = words[_CONTROLLEN_AT::_WORDS]
        self._lens = words.cast("B").cast("I")[2 * _LEN_AT :: 2 * _WORDS]
        self._flags = words.cast("B").cast("I")[2 * _FLAGS_AT :: 2 * _WORDS]
        self._iovlens = memoryview(self._iov)[1::2]
        self._name_words = memoryview(self._names).cast("Q")[:: _NAME // _Q]
        self._first_words = memoryview(self._memory).cast("I")[:: _STRIDE // 4]
        self._segments = memoryview(self._control).cast("I")[_DATA_AT :: _CONTROL // 4]
        self._full_name = array("Q", [self._namelen] * self.slots)
        self._full_control = array("Q", [self._wanted_control] * self.slots)
        self._full_buffer = array("Q", [_BUFFER] * self.slots)
        self._no_control = array("Q", bytes(self.slots * _Q))

    # receiving

    def receive(self, fd: int) -> int:
        """Fill slots from the socket without waiting; how many were filled.

        Raises:
            OSError: a pending error of the socket, such as ``ECONNREFUSED``; not ``EAGAIN``.
        """
        used = self.slots if self._for_sending else self._used
        self._for_sending = False
        if used == 1:  # the usual case when there is little traffic, and then latency is what counts
            self._namelens[0], self._controllens[0] = self._namelen, self._wanted_control
            self._iovlens[0] = _BUFFER
        elif used:
            self._namelens[:used] = self._full_name[:used]
            self._controllens[:used] = self._full_control[:used]
            self._iovlens[:used] = self._full_buffer[:used]
        count: int = _recvmmsg(fd, ctypes.c_void_p(self._vector), self.slots, _MSG_DONTWAIT, None)
        if count >= 0:
            self._used = count
            return count
        self._used = 0
        code = ctypes.get_errno()
        if code in (errno.EAGAIN, errno.EINTR):
            return 0
        raise OSError(code, os.strerror(code))

    def sizes(self, count: int) -> list[int]:
        """The lengths of the first ``count`` datagrams, in bytes."""
        return [self._lens[0]] if count == 1 else self._lens[:count].tolist()

    def datagrams(self, sizes: list[int]) -> list[memoryview]:
        """The received datagrams. A batch that has the lengths of the one before costs nothing here."""
        if sizes != self._cut_at:
            self._cut_at = sizes
            self._cuts = [view[:size] for view, size in zip(self.views, sizes, strict=False)]
        return self._cuts

    def first_words(self, count: int) -> list[int]:
        """The first four bytes of each datagram as a number; what is zero may be IKE on UDP 4500."""
        return [self._first_words[0]] if count == 1 else self._first_words[:count].tolist()

    def peers(self, count: int) -> Sequence[int | bytes]:
        """Who sent each datagram, as something to look up: see :func:`peer_name`."""
        if self.family == socket.AF_INET:
            return [self._name_words[0]] if count == 1 else self._name_words[:count].tolist()
        names = self._names
        return [bytes(names[at : at + 28]) for at in range(0, count * _NAME, _NAME)]

    def segments(self, count: int) -> list[int] | None:
        """The segment size of each datagram that the kernel put together from several (UDP_GRO), else 0.

        ``None``: there is no control data at all, as is usual. Only for sockets that have no other control data on.
        """
        if count == 1 and not self._controllens[0]:
            return None
        lengths = self._controllens[:count].tolist()
        if not any(lengths):
            return None
        segments = self._segments[:count].tolist()
        return [segment if length else 0 for segment, length in zip(segments, lengths, strict=True)]

    def controls(self, count: int) -> list[bytes]:
        """The control data of each datagram."""
        return [self.control(i, n) for i, n in enumerate(self._controllens[:count].tolist())]

    def control(self, slot: int, length: int) -> bytes:
        """The first ``length`` bytes of a slot's control data."""
        at = slot * _CONTROL
        return bytes(self._control[at : at + length])

    # sending

    def send(self, fd: int, names: Sequence[bytes], sizes: Sequence[int]) -> int:
        """Send the first slots to those addresses (:func:`peer_name`); how many the kernel took.

        A datagram that cannot be sent is left out, and those behind it are still tried; when the
        socket's buffer is full, the rest is left out.
        """
        count = len(sizes)
        if not self._for_sending:
            self._namelens[:] = self._full_name
            self._controllens[:] = self._no_control
            self._for_sending = True
        if count == 1:
            self._names[:_NAME], self._iovlens[0] = names[0], sizes[0]
        else:
            self._names[: count * _NAME] = b"".join(names)
            self._iovlens[:count] = array("Q", sizes)
        done = taken = 0
        while done < count:
            sent = _sendmmsg(fd, ctypes.c_void_p(self._vector + done * _HEADER), count - done, _MSG_DONTWAIT)
            if sent > 0:
                done += sent
                taken += sent
            elif ctypes.get_errno() == errno.EAGAIN:
                break
            else:
                done += 1
        return taken


def ancillary(control: bytes) -> list[tuple[int, int, bytes]]:
    """Control data as (level, type, data), as ``socket.recvmsg`` gives it (cmsg(3))."""
    found, at = [], 0
    while at + 16 <= len(control):
        length, level, kind = struct.unpack_from("Qii", control, at)
        if length < 16:
            break
        found.append((level, kind, control[at + 16 : at + length]))
        at += -(-length // _Q) * _Q
    return found


def peer_name(peer: int | bytes) -> bytes:
    """The socket address behind what :meth:`Batch.peers` gave, padded to a slot's length for :meth:`Batch.send`."""
    name = peer if isinstance(peer, bytes) else peer.to_bytes(8, sys.byteorder)
    return name.ljust(_NAME, b"\0")


def peer_address(peer: int | bytes) -> tuple[bytes, int]:
    """The packed address and the port behind what :meth:`Batch.peers` gave."""
    if isinstance(peer, bytes):
        return peer[8:24], int.from_bytes(peer[2:4], "big")
    name = peer.to_bytes(8, sys.byteorder)
    return name[4:8], int.from_bytes(name[2:4], "big")


def peer_of(address: bytes, port: int) -> int | bytes:
    """The inverse of :func:`peer_address`."""
    family = socket.AF_INET if len(address) == 4 else socket.AF_INET6
    head = struct.pack("=H", family) + port.to_bytes(2, "big")
    if len(address) == 4:
        return int.from_bytes(head + address, sys.byteorder)
    return head + bytes(4) + address + bytes(4)
