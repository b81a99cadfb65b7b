"""The demonstration."""

from __future__ import annotations


def run(*, keep: bool, fast: bool) -> int:
    """Run it."""
    return 0
