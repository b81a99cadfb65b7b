"""Source address: a client is who sends from the same address, or from the same network.

It needs nothing but the address, holds across ports and re-keying, and costs one pin per client. Its price: all
clients behind one NAT share a server (``ike-spi`` spreads them), and a client whose address changes is a new
one. A shorter prefix keeps clients together whose provider changes their address within a network.
"""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import BaseModel, Field

from sapin.core.contracts import Datagram, Key, key


class SourceAddress:
    """Recognises a client by the first bits of its address."""

    class Config(BaseModel, extra="forbid"):
        """Options of the persistence."""

        prefix4: int = Field(default=32, ge=1, le=32)
        """So many leading bits of an IPv4 address make a client."""
        prefix6: int = Field(default=128, ge=1, le=128)
        """So many leading bits of an IPv6 address make a client."""

    def __init__(self, config: Config) -> None:
        self._mask4 = _mask(32, config.prefix4)
        self._mask6 = _mask(128, config.prefix6)

    def keys(self, datagram: Datagram) -> Sequence[Key]:
        """One key, whatever the datagram carries."""
        address = datagram.client.address
        size = len(address)
        mask = self._mask4 if size == 4 else self._mask6
        return (key("src", (int.from_bytes(address) & mask).to_bytes(size)),)


def _mask(width: int, prefix: int) -> int:
    return (1 << width) - (1 << width - prefix)
