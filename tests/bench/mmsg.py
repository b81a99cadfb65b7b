"""Many datagrams a system call: ``sendmmsg`` and ``recvmmsg`` of the C library, for load that outruns a forwarder.

Messages are laid out once and sent again and again; a strided view rewrites one 32-bit word of each
(a sequence number) without touching the rest, so a datagram costs the load about what the kernel takes for it.
"""

from __future__ import annotations

import ctypes
import os
from array import array
from collections.abc import Iterable, Sequence
from ctypes import c_int, c_size_t, c_uint, c_void_p
from errno import EAGAIN, ECONNREFUSED, ENOBUFS
from typing import NamedTuple

MSG_DONTWAIT = 0x40
PASSING = frozenset({EAGAIN, ENOBUFS, ECONNREFUSED})
"""What a full queue, or a server that is not up yet, makes of a call: nothing was moved this time."""


class _Iovec(ctypes.Structure):
    _fields_ = (("base", c_void_p), ("len", c_size_t))


class _Msghdr(ctypes.Structure):
    _fields_ = (
        ("name", c_void_p),
        ("namelen", c_uint),
        ("iov", c_void_p),
        ("iovlen", c_size_t),
        ("control", c_void_p),
        ("controllen", c_size_t),
        ("flags", c_int),
    )


class _Mmsghdr(ctypes.Structure):
    _anonymous_ = ("header",)
    _fields_ = (("header", _Msghdr), ("len", c_uint))


HEADER = ctypes.sizeof(_Mmsghdr)
WORDS_PER_HEADER = HEADER // 4
LENGTH_WORD = _Mmsghdr.len.offset // 4

_libc = ctypes.CDLL(None, use_errno=True)
_libc.sendmmsg.argtypes = (c_int, c_void_p, c_uint, c_int)
_libc.recvmmsg.argtypes = (c_int, c_void_p, c_uint, c_int, c_void_p)


class Message(NamedTuple):
    """What one ``msghdr`` says: the bytes, the packed socket address to send to, and control data."""

    data: bytes
    name: bytes = b""
    control: bytes = b""


def _address(buffer: bytearray) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(buffer))


def _align(size: int, to: int) -> int:
    return -(-size // to) * to


def _moved(result: int) -> int:
    if result >= 0:
        return result
    if (error := ctypes.get_errno()) in PASSING:
        return 0
    raise OSError(error, os.strerror(error))


class _Slots:
    """``count`` headers, each with its own room for data, name and control."""

    def __init__(self, count: int, data: int, name: int, control: int, lead: int = 0) -> None:
        self.count = count
        self.lead = lead
        self.stride = _align(lead + data, 64)
        self.name_stride = _align(name, 8)
        self.control_stride = _align(control, 8)
        self.data = bytearray(count * self.stride)
        self.names = bytearray(max(1, count * self.name_stride))
        self.controls = bytearray(max(1, count * self.control_stride))
        self.headers = (_Mmsghdr * count)()
        self._iovecs = (_Iovec * count)()
        self.address = ctypes.addressof(self.headers)
        self.words = memoryview(self.data).cast("I")
        self._lengths = memoryview(self.headers).cast("B").cast("I")[LENGTH_WORD::WORDS_PER_HEADER]
        self._lay_out(data, name, control)

    def _lay_out(self, data: int, name: int, control: int) -> None:
        base, names, controls = _address(self.data), _address(self.names), _address(self.controls)
        iovecs = ctypes.addressof(self._iovecs)
        for i, (header, iovec) in enumerate(zip(self.headers, self._iovecs, strict=True)):
            iovec.base, iovec.len = base + i * self.stride + self.lead, data
            header.iov, header.iovlen = iovecs + i * ctypes.sizeof(_Iovec), 1
            if name:
                header.name, header.namelen = names + i * self.name_stride, name
            if control:
                header.control, header.controllen = controls + i * self.control_stride, control

    def column(self, offset: int) -> memoryview:
        """A view of the 32-bit word at that offset of each slot's data.

        Raises:
            ValueError: the word is not aligned in memory.
        """
        if (self.lead + offset) % 4:
            raise ValueError(f"the word at offset {offset} is not aligned")
        return self.words[(self.lead + offset) // 4 :: self.stride // 4]


class Outgoing(_Slots):
    """Messages of one size that are sent in their order, over and over."""

    def __init__(self, messages: Sequence[Message], lead: int = 0) -> None:
        """``lead`` bytes of padding before each message align the words that :meth:`number` writes."""
        first = messages[0]
        super().__init__(len(messages), len(first.data), len(first.name), len(first.control), lead)
        for i, message in enumerate(messages):
            at = i * self.stride + lead
            self.data[at : at + len(first.data)] = message.data
            self._write(self.names, i * self.name_stride, message.name)
            self._write(self.controls, i * self.control_stride, message.control)

    @staticmethod
    def _write(into: bytearray, at: int, value: bytes) -> None:
        into[at : at + len(value)] = value

    def number(self, offset: int, values: Iterable[int]) -> None:
        """Write one big-endian 32-bit number into each message, at that offset."""
        words = array("I", values)
        words.byteswap()
        self.column(offset)[:] = memoryview(words)

    def send(self, descriptor: int, start: int, count: int) -> int:
        """Send messages ``start`` to ``start + count``; the number that the kernel took.

        Raises:
            OSError: the kernel refused for another reason than a full queue.
        """
        return _moved(_libc.sendmmsg(descriptor, self.address + start * HEADER, count, MSG_DONTWAIT))


class Incoming(_Slots):
    """Room for datagrams, and what the last call read into it."""

    NAME = 16

    def __init__(self, count: int = 64, size: int = 2048) -> None:
        super().__init__(count, size, self.NAME, 0)

    def receive(self, descriptor: int) -> int:
        """Read what waits, up to all slots; the number of datagrams.

        Raises:
            OSError: the kernel refused for another reason than an empty queue.
        """
        return _moved(_libc.recvmmsg(descriptor, self.address, self.count, MSG_DONTWAIT, None))

    def lengths(self, count: int) -> list[int]:
        """Lengths in bytes of the first ``count`` datagrams."""
        return self._lengths[:count].tolist()

    def numbers(self, offset: int, count: int) -> array[int]:
        """The big-endian 32-bit number at that offset of the first ``count`` datagrams."""
        values = array("I", self.column(offset)[:count].tolist())
        values.byteswap()
        return values

    def source(self, slot: int) -> bytes:
        """The packed socket address that a datagram came from."""
        return bytes(self.names[slot * self.NAME : (slot + 1) * self.NAME])

    def echo(self, descriptor: int, count: int) -> int:
        """Send the first ``count`` datagrams, just read, back to where they came from."""
        for i in range(count):
            self._iovecs[i].len = self.headers[i].len
        sent = _moved(_libc.sendmmsg(descriptor, self.address, count, MSG_DONTWAIT))
        for i in range(count):
            self._iovecs[i].len = self.stride
        return sent
