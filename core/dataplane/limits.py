"""What the machine sets bounds to: file descriptors, of which each flow needs one, and ports."""

from __future__ import annotations

import resource
from pathlib import Path

RESERVED = 64
"""Descriptors for everything that is not a flow: listeners, checks, files, control connections."""
CEILING = 1_048_576
"""Never more than the kernel's default fs.nr_open, even where the limit says infinite."""


def raise_descriptor_limit() -> int:
    """Raise the soft limit as far as the hard one allows; the limit in force."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    current, wanted = _bounded(soft), _bounded(hard)
    if current >= wanted:
        return current
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    except (ValueError, OSError):  # a hard limit above fs.nr_open: the kernel refuses any change
        return current
    return wanted


def _bounded(limit: int) -> int:
    return CEILING if limit == resource.RLIM_INFINITY else min(limit, CEILING)


def flows_that_fit(descriptors: int, listeners: int) -> int:
    """How many flows the descriptors are enough for."""
    return max(0, descriptors - RESERVED - listeners)


def ephemeral_ports() -> range:
    """The ports that the kernel gives to whoever does not ask for one (ip(7), ip_local_port_range)."""
    try:
        low, high = Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()
        return range(int(low), int(high) + 1)
    except (OSError, ValueError):
        return range(32_768, 61_000)  # the kernel's default
