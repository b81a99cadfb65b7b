"""What an operation raises that cannot be done."""

from __future__ import annotations


class Refused(Exception):
    """The operation was understood and cannot be done; the text is one sentence for the operator."""
