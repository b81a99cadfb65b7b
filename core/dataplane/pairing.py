"""What a dataplane has more on a node that has a peer: its replica, and which of the two is active.

The cluster's own affairs are not known here. Whoever knows them gives `Outlet.replicate` a function that takes
what is to go to the peer, calls `Outlet.release` when the peer has it, has the `Replica` apply what the peer
says, and calls `activate` and `deactivate`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import trio

from sapin.core.dataplane.outlet import Outlet
from sapin.core.dataplane.prober import Prober
from sapin.core.dataplane.reopening import Reopener
from sapin.core.dataplane.replica import Replica
from sapin.core.dataplane.store import Store
from sapin.core.dataplane.udp import Forwarder
from sapin.core.writer import Writer

TOUCHES = 60
"""Seconds between two reports to the peer of which pins were touched."""
TOUCH_PAUSE = 0.005
"""Seconds between two parts of such a report, of 250 pins at most: a million take 20 s."""


class Pairing:
    """Begins as a standby, for the node may be one: see :class:`~sapin.core.dataplane.runtime.Dataplane`.

    Args:
        saved: called after the peer has changed admin states, to keep them.
        clock: seconds, never going back.
    """

    def __init__(
        self,
        writer: Writer,
        forwarder: Forwarder,
        reopener: Reopener,
        prober: Prober,
        outlet: Outlet,
        store: Store,
        saved: Callable[[], None],
        clock: Callable[[], float],
    ) -> None:
        self.active = False
        self.outlet = outlet
        self.reopener = reopener
        self.replica = Replica(writer, forwarder, reopener, outlet, store, saved, clock)
        self._flows = forwarder.flows
        self._prober = prober
        self._clock = clock
        outlet.feed(forwarder.flows.resume)
        forwarder.admission.wake = reopener.wake
        prober.pause()

    def activate(self) -> None:
        """This node checks servers, lets things expire, and tells the peer its changes."""
        if self.active:
            return
        now = self._clock()
        self.active = self.outlet.open = True
        self._flows.resumed = int(now)
        self.reopener.activate(now)
        self._prober.resume()

    def deactivate(self) -> None:
        """The peer does so, and says what changes."""
        if not self.active:
            return
        self.active = False
        self.reopener.deactivate()
        self._prober.pause()
        self.outlet.close()

    def faults(self) -> Mapping[str, int]:
        """What went wrong since the start."""
        strange = {f"records of the peer: {reason}": n for reason, n in self.replica.strange.items()}
        return strange | {"answers that nobody released": self.outlet.overdue}

    async def keep_touching(self) -> None:
        """Tell the peer now and then which clients were heard of, in so small parts that nothing else waits."""
        second = int(self._clock())
        while True:
            await trio.sleep(TOUCHES)
            since, second = second, int(self._clock())
            for touched in self.replica.touches(since - 1):
                if touched.keys and self.outlet.open:
                    self.outlet.tell(touched)
                    self.outlet.flush()
                    await trio.sleep(TOUCH_PAUSE)
                await trio.lowlevel.checkpoint()
