"""placeholder, being written"""
from __future__ import annotations
from enum import IntEnum


class Kind(IntEnum):
    """What a datagram carries."""

    IKE = 1
    ESP = 2
    KEEPALIVE = 3
    OTHER = 4
