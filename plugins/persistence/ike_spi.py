"""IKE SPI: a client is an IKE SA, found by its initiator's SPI on any port and from any address.

Keys, the strongest first:

* ``spi``: the initiator's SPI. Both sides write it into every message of an SA, in the same place (RFC 7296
  section 3.1), and the retries after COOKIE and INVALID_KE_PAYLOAD keep it; so it is there from the first
  datagram on, links UDP 500 with UDP 4500, and stays when the client's address or the NAT's port changes.
* ``tuple``: the client's address and port and the service's port. ESP and keepalives have nothing better:
  the SPIs of ESP are negotiated encrypted, and chosen by the servers independently of each other.

An IKE datagram has both keys, and both are pinned to one server; everything else has the tuple alone. What
follows from the order of look-up:

* *Clients behind one NAT* have SPIs and outer ports of their own, so they spread. A NAT that lets all of
  them use its port 500 is right as well: a new SPI inherits the server of the shared tuple, and goes on
  from there by its SPI.
* *Re-keying an IKE SA* agrees on new SPIs inside encryption. Their first datagram comes on a tuple that is
  pinned, inherits its server, and pins the new SPI. The same holds for an SA that the gateway re-keyed (the
  gateway is then its initiator), and for a client that authenticates anew before it gives up its old SA.
* *Roaming, or a NAT that forgot the mapping*: the known SPI decides, and the new tuple is pinned to its
  server, also where the tuple was another client's before. ESP that comes from the new tuple before any IKE
  datagram is a stranger: it may reach a server that drops it, until the client's next IKE message (MOBIKE,
  dead peer detection) mends it.
* *An initiator's SPI of zero* is against RFC 7296 section 3.1. It would make one client of all that send
  it, so it is not a key.

Price: three pins per client in place of one. And a datagram that claims a known SPI decides for its tuple,
as roaming demands; who can send with a client's address and port, and has an SA of their own on another
server, can so cut off the client's ESP until its next IKE message.
"""

from __future__ import annotations

from collections.abc import Sequence
from struct import Struct

from sapin.core.contracts import Datagram, Key, key

_PORTS = Struct("!HH").pack
_NO_SPI = (b"", bytes(8))


class IkeSpi:
    """Recognises an IKE SA by its initiator's SPI, and whatever else its client sends by addresses and ports."""

    def keys(self, datagram: Datagram) -> Sequence[Key]:
        """The SPI, where there is one, and the tuple."""
        address, port = datagram.client
        outer = key("tuple", address + _PORTS(port, datagram.port))
        if datagram.spi_i in _NO_SPI:
            return (outer,)
        return (key("spi", datagram.spi_i), outer)
