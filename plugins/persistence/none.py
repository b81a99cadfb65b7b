"""No persistence: every new flow is a new client.

For services whose datagrams stand alone. An IKE client's two ports may end on different servers.
"""

from __future__ import annotations

from collections.abc import Sequence

from sapin.core.contracts import Datagram, Key


class NoPersistence:
    """Recognises nobody."""

    def keys(self, datagram: Datagram) -> Sequence[Key]:
        """No keys."""
        return ()
