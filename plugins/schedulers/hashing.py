"""Hashes that are the same in every process, on every machine, in every version of Python.

Python's own ``hash()`` of bytes is salted per process, so two balancers would disagree, and one with itself
after a restart.
"""

from __future__ import annotations

from hashlib import blake2b

BITS = 64
"""Width of a hash."""
_MASK = (1 << BITS) - 1
_MULTIPLIER = 0x9E3779B97F4A7C15
"""2**64 divided by the golden ratio, made odd: its multiples are spread as evenly as can be (Knuth,
The Art of Computer Programming, volume 3, section 6.4)."""


def stable_hash(value: bytes, purpose: bytes = b"") -> int:
    """64 bits of ``value``; hashes for different purposes are independent.

    Args:
        value: of any length.
        purpose: at most 16 bytes.
    """
    return int.from_bytes(blake2b(value, digest_size=BITS // 8, person=purpose).digest())


def mix(a: int, b: int) -> int:
    """64 bits of two hashes: the halves of a 128-bit product folded into each other.

    A quarter of the cost of :func:`stable_hash`, for many pairs of values that are hashes already.
    """
    product = (a ^ b) * _MULTIPLIER
    return (product ^ product >> BITS) & _MASK
