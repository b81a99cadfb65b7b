"""Figures for people: durations, times, rates."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

_UNITS = ((86_400, "d"), (3_600, "h"), (60, "min"), (1, "s"))
_BITS = ((1e9, "Gbit/s"), (1e6, "Mbit/s"), (1e3, "kbit/s"))
COUNTED = ("packets_in", "bytes_in", "packets_out", "bytes_out")
"""The counters of a status that rates are made of."""

Row = dict[str, Any]


def duration(seconds: float) -> str:
    """About how long: ``12 s``, ``12 min``, ``3 h 5 min``, ``8 h``, ``2 d 4 h``."""
    left = max(0, int(seconds))
    parts: list[tuple[int, str]] = []
    for size, unit in _UNITS:
        count, left = divmod(left, size)
        if count or parts:
            parts.append((count, unit))
    if not parts:
        return "0 s"
    shown = parts[:2] if parts[0][1] in ("d", "h") else parts[:1]
    return " ".join(f"{count} {unit}" for count, unit in shown if count)


def clock_time(moment: float, now: float) -> str:
    """Local time of day, with the date if that was another day."""
    then, today = time.localtime(moment), time.localtime(now)
    return time.strftime("%H:%M:%S" if then[:3] == today[:3] else "%Y-%m-%d %H:%M:%S", then)


def milliseconds(seconds: float | None) -> str:
    """A round trip: ``0.21 ms``, ``12 ms``; a dash where there is none."""
    if seconds is None:
        return "-"
    return f"{seconds * 1000:.2g} ms" if seconds < 0.1 else f"{seconds * 1000:.0f} ms"


def bits(per_second: float) -> str:
    """Bytes in a second as bits: ``1.3 Mbit/s``."""
    value = per_second * 8
    for size, unit in _BITS:
        if value >= size:
            scaled = value / size
            return f"{scaled:.1f} {unit}" if scaled < 9.95 else f"{scaled:.0f} {unit}"
    return f"{value:.0f} bit/s"


def with_rates(before: Mapping[str, Any], after: Row) -> Row:
    """The later status, and in each service and server of it ``rates``: the counters per second since the earlier."""
    elapsed = after["time"] - before["time"]
    earlier = dict(_counted(before))
    for name, row in _counted(after):
        known = earlier.get(name, row)
        # A service that was taken away and added again between the two counts from 0.
        row["rates"] = {k: max(0, row[k] - known[k]) / elapsed if elapsed > 0 else 0.0 for k in COUNTED}
    after["rates_over"] = elapsed
    return after


def _counted(status: Mapping[str, Any]) -> list[tuple[tuple[str, str, str], Row]]:
    return [
        ((group["name"], kind, row["name"]), row)
        for group in status["groups"]
        for kind in ("services", "servers")
        for row in group[kind]
    ]
