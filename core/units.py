"""Durations and sizes as people write them, for the configuration and for the ``Config`` of plugins."""

from __future__ import annotations

import re
from math import isfinite
from typing import Annotated

from pydantic import BeforeValidator

MAX_DURATION = 30 * 86_400
"""Seconds in the longest duration that a configuration may ask for."""

_DURATION = re.compile(r"(\d{1,12}(?:\.\d{1,9})?)(ms|s|m|h|d)", re.ASCII)
_SECONDS = {"ms": 0.001, "s": 1, "m": 60, "h": 3_600, "d": 86_400}
_SIZE = re.compile(r"(\d{1,12})(KiB|MiB|GiB)", re.ASCII)
_BYTES = {"KiB": 2**10, "MiB": 2**20, "GiB": 2**30}


def parse_duration(value: object) -> float:
    """Seconds from ``"500ms"``, ``"5s"``, ``"2m"``, ``"8h"``, ``"1d"`` or a plain number of seconds.

    Raises:
        ValueError: it is none of these, or not above 0 and at most 30 days.
    """
    if isinstance(value, str) and (match := _DURATION.fullmatch(value)):
        seconds = float(match[1]) * _SECONDS[match[2]]
    elif isinstance(value, int | float) and not isinstance(value, bool):
        seconds = float(min(value, MAX_DURATION + 1))
    else:
        raise ValueError('must be a duration like "500ms", "5s", "2m", "8h" or "1d", or a number of seconds')
    if not (isfinite(seconds) and 0 < seconds <= MAX_DURATION):
        raise ValueError("must be more than 0 and at most 30 days")
    return seconds


def parse_size(value: object) -> int:
    """Bytes from ``"64KiB"``, ``"8MiB"``, ``"1GiB"`` or a plain whole number.

    Raises:
        ValueError: it is none of these.
    """
    if isinstance(value, str) and (match := _SIZE.fullmatch(value)):
        return int(match[1]) * _BYTES[match[2]]
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    raise ValueError('must be a size like "64KiB", "8MiB" or "1GiB", or a number of bytes')


Duration = Annotated[float, BeforeValidator(parse_duration)]
"""Seconds, written as :func:`parse_duration` takes them."""
Size = Annotated[int, BeforeValidator(parse_size)]
"""Bytes, written as :func:`parse_size` takes them."""
