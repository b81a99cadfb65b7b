"""Whether this node can hear the networks of the virtual addresses, and when it had better hand over.

Pure. A node whose cable to the clients is cut is well, and says so to its peer on the cluster's link: nothing else would ever
move the addresses. So an active node without a *carrier* on a device that has a virtual address steps down. It is a planned
step-down, of which the peer must be in sync; nobody is lost by it.

A peer may have no carrier either, when it is the switch that died. Then the role would go to and fro for as long: each attempt
waits for twice as long as the one before, and the first node that has a carrier keeps the role.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator

RTM_NEWLINK, RTM_DELLINK, RTM_GETLINK = 16, 17, 18
"""linux/rtnetlink.h."""
IFLA_IFNAME = 3
"""linux/if_link.h."""
IFF_UP, IFF_LOWER_UP = 0x1, 0x10000
"""linux/if.h; the second is what ``ip link`` shows as LOWER_UP, and its lack as NO-CARRIER."""
SHORTEST, LONGEST = 5.0, 300.0
"""Seconds between two attempts to step down."""
SETTLE = 0.02
"""Seconds that a carrier has to be away: a cable that is plugged over bounces."""

_HEADER = struct.Struct("=IHHII")
_INTERFACE = struct.Struct("=BBHiII")
_ATTRIBUTE = struct.Struct("=HH")


class Carriers:
    """What is known of the devices, and when to step down.

    Args:
        devices: those that have a virtual address.
    """

    def __init__(self, devices: Iterable[str]) -> None:
        self._devices = frozenset(devices)
        self._down: dict[str, float] = {}
        self._wait = SHORTEST
        self._earliest = 0.0

    @property
    def down(self) -> frozenset[str]:
        """The devices that have no carrier."""
        return frozenset(self._down)

    def told(self, device: str, carrier: bool, now: float) -> bool:
        """The kernel says whether a device has a carrier; whether that is new. ``now`` is in seconds."""
        if device not in self._devices or (device not in self._down) == carrier:
            return False
        if carrier:
            del self._down[device]
        else:
            self._down[device] = now
        if not self._down:
            self._wait, self._earliest = SHORTEST, 0.0
        return True

    def deadline(self, now: float) -> float | None:
        """When :meth:`leave` is to be asked, were the node active; ``None`` while all is well."""
        if not self._down:
            return None
        return max(self._earliest, min(self._down.values()) + SETTLE, now)

    def leave(self, now: float) -> bool:
        """Whether the node, active and with a peer that is in sync, is to step down now."""
        deadline = self.deadline(now)
        if deadline is None or now < deadline:
            return False
        self._earliest = now + self._wait
        self._wait = min(2 * self._wait, LONGEST)
        return True


def ask() -> bytes:
    """The question for the state of all devices."""
    dump = 0x301  # NLM_F_REQUEST | NLM_F_DUMP
    return _HEADER.pack(32, RTM_GETLINK, dump, 1, 0) + _INTERFACE.pack(0, 0, 0, 0, 0, 0)


def parse(data: bytes) -> Iterator[tuple[str, bool]]:
    """Devices, and whether they have a carrier, in what the kernel says. What is cut short or senseless is left out."""
    while len(data) >= _HEADER.size:
        length, kind, *_ = _HEADER.unpack_from(data)
        if not _HEADER.size <= length <= len(data):
            return
        body = data[_HEADER.size : length]
        if kind in (RTM_NEWLINK, RTM_DELLINK) and len(body) >= _INTERFACE.size:
            *_, flags, _ = _INTERFACE.unpack_from(body)
            carrier = kind == RTM_NEWLINK and flags & IFF_UP and flags & IFF_LOWER_UP
            for name in _names(body[_INTERFACE.size :]):
                yield name, bool(carrier)
        data = data[(length + 3) & ~3 :]


def _names(data: bytes) -> Iterator[str]:
    while len(data) >= _ATTRIBUTE.size:
        length, kind = _ATTRIBUTE.unpack_from(data)
        if not _ATTRIBUTE.size <= length <= len(data):
            return
        if kind == IFLA_IFNAME:
            yield data[_ATTRIBUTE.size : length].rstrip(b"\0").decode(errors="replace")
        data = data[(length + 3) & ~3 :]
