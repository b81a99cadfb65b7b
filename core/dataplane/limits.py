"""File descriptors: one per flow, so their limit is the limit of flows."""

from __future__ import annotations

import resource

RESERVED = 64
"""Descriptors for everything that is not a flow: listeners, checks, files, control connections."""
CEILING = 1_048_576
"""Never more than the kernel's default fs.nr_open, even where the limit says infinite."""


def raise_descriptor_limit() -> int:
    """Raise the soft limit as far as the hard one allows; the limit in force."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = CEILING if hard == resource.RLIM_INFINITY else min(hard, CEILING)
    if soft == resource.RLIM_INFINITY or soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
        return wanted
    return min(soft, CEILING)


def flows_that_fit(descriptors: int, listeners: int) -> int:
    """How many flows the descriptors are enough for."""
    return max(0, descriptors - RESERVED - listeners)
