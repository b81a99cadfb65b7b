"""What a node wants of whoever moves its virtual addresses and watches the service network for it."""

from __future__ import annotations

from typing import NamedTuple, Protocol


class Claimed(NamedTuple):
    """The addresses are here and announced."""


class Released(NamedTuple):
    """The addresses are not here any more."""


class Answered(NamedTuple):
    """The peer has answered a probe, and says what it is."""

    epoch: int
    active: bool


class Refused(NamedTuple):
    """The peer's machine has answered a probe by "nobody is there"."""


class Farewell(NamedTuple):
    """The peer's guard says that its daemon is gone, and the addresses with it."""

    boot: int
    epoch: int


class Gained(NamedTuple):
    """Somebody has put the addresses here."""


class Lost(NamedTuple):
    """Somebody has taken the addresses from here."""


Told = Claimed | Released | Answered | Refused | Farewell | Gained | Lost


class Guard(Protocol):
    """Moves the addresses, and keeps them only as long as it is fed."""

    def feed(self, epoch: int) -> None:
        """The daemon is well, at each heartbeat."""
        ...

    def claim(self, epoch: int) -> None:
        """Add and announce the addresses; answered by :class:`Claimed`."""
        ...

    def release(self) -> None:
        """Remove the addresses; answered by :class:`Released`."""
        ...

    def disown(self) -> int:
        """End without a word and leave the addresses to another guard; the epoch they are held in, 0 if they are not here."""
        ...

    def probe(self) -> None:
        """Ask the peer, at all of its addresses and at the virtual ones, whether it is alive."""
        ...

    async def told(self) -> Told:
        """What comes next."""
        ...
