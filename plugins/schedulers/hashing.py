"""A hash that is the same in every process, on every machine, in every version of Python.

Python's own ``hash()`` of bytes is salted per process, so two balancers would disagree, and one with itself
after a restart.
"""

from __future__ import annotations

from hashlib import blake2b


def stable_hash(value: bytes) -> int:
    """64 bits of ``value``, by BLAKE2b (RFC 7693)."""
    return int.from_bytes(blake2b(value, digest_size=8).digest())
