"""Beacons: what guards say to one another by UDP, on the links and on the service network.

Pure. A beacon has a fixed layout and ends with a code that only members can make (HMAC-SHA256, RFC 2104, cut to
128 bits). An answer repeats the nonce of its probe, so an old one is worth nothing; a farewell names the run and the epoch that it
ends, so an old one ends nothing::

    mark (4) · kind (1) · active (1) · cluster (16) · sender (8) · boot (8) · epoch (8) · nonce (8) · code (16)
"""

from __future__ import annotations

import hmac
from enum import IntEnum
from hashlib import sha256
from struct import Struct
from typing import NamedTuple

_LAYOUT = Struct(">4sBB16s8sQQ8s")
_MARK = b"SPN1"
_CODE = 16
SIZE = _LAYOUT.size + _CODE
"""Bytes of a beacon."""
NONCE = 8
"""Bytes of a nonce."""


class Kind(IntEnum):
    """What a beacon means."""

    PROBE = 1
    """Are you alive?"""
    ANSWER = 2
    FAREWELL = 3
    """The daemon is gone, and the addresses are removed."""


class Beacon(NamedTuple):
    """What a beacon says."""

    kind: Kind
    active: bool
    """The sender has the virtual addresses."""
    sender: str
    boot: int
    epoch: int
    nonce: bytes


class Codec:
    """Makes beacons of one cluster, and recognises them.

    Args:
        cluster: its identity, 32 hexadecimal digits.
        secret: what only members know.
        peer: from whom beacons are accepted.
    """

    def __init__(self, cluster: str, secret: bytes, peer: str) -> None:
        self._cluster = bytes.fromhex(cluster)
        self._secret = secret
        self._peer = peer
        self._sender = _digest(peer)

    def encode(self, beacon: Beacon) -> bytes:
        """The bytes of a beacon."""
        kind, active, sender, boot, epoch, nonce = beacon
        data = _LAYOUT.pack(_MARK, kind, active, self._cluster, _digest(sender), boot, epoch, nonce)
        return data + self._code(data)

    def decode(self, data: bytes) -> Beacon | None:
        """The beacon of the peer that the bytes are; ``None`` for anything else."""
        if len(data) != SIZE:
            return None
        body, code = data[:-_CODE], data[-_CODE:]
        if not hmac.compare_digest(code, self._code(body)):
            return None
        mark, kind, active, cluster, sender, boot, epoch, nonce = _LAYOUT.unpack(body)
        if (mark, cluster, sender) != (_MARK, self._cluster, self._sender) or kind not in list(Kind):
            return None
        return Beacon(Kind(kind), bool(active), self._peer, boot, epoch, nonce)

    def _code(self, data: bytes) -> bytes:
        return hmac.digest(self._secret, data, "sha256")[:_CODE]


def _digest(name: str) -> bytes:
    return sha256(name.encode()).digest()[:8]
