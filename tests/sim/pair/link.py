"""What is between the nodes: a connection on the link, which behaves as TCP does, and datagrams on both networks.

A direction that is *down* loses datagrams, and holds up the bytes of a connection until it is up again. A *harsh* link
besides loses, doubles and reorders messages: no TCP does, but a pair has to survive even that.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tests.sim.pair.machine import Machine
    from tests.sim.pair.world import World


class Network:
    """Two directions; ``a`` to ``b`` is 0."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.down = [0, 0]
        """How many faults hold each direction down."""
        self.loss = 0.0
        self.slow = 0.0
        """Seconds more that everything takes, at most."""

    def delay(self) -> float:
        random = self.world.random.random
        return 0.0001 + 0.0004 * random() + self.slow * random()

    def datagram(self, sender: int, arrive: Callable[[], None]) -> None:
        """Has something arrive, or not."""
        if self.down[sender] or (self.loss and self.world.random.random() < self.loss):
            return
        self.world.after(self.delay(), arrive)

    @property
    def split(self) -> bool:
        return bool(self.down[0] or self.down[1])

    @property
    def whole(self) -> bool:
        return not (self.down[0] or self.down[1] or self.loss or self.slow)


class Connection:
    """A connection between two daemons; each end may be open or not."""

    def __init__(self, link: Link, ends: tuple[Machine, Machine]) -> None:
        self.open = [True, True]
        self._link = link
        self._daemons = [machine.daemon for machine in ends]
        self._held: tuple[list[bytes | None], list[bytes | None]] = ([], [])
        self._last = [0.0, 0.0]

    def send(self, sender: int, data: bytes | None) -> None:
        """``None`` is the end of the connection."""
        if self._link.down[sender] or self._held[sender]:
            self._held[sender].append(data)
            return
        harsh, random = self._link.harsh, self._link.world.random.random
        if data is None or not harsh:
            self._pass_on(sender, data, ordered=True)
            return
        if random() < harsh:
            return
        self._pass_on(sender, data, ordered=random() > harsh)
        if random() < harsh:
            self._pass_on(sender, data, ordered=False)

    def _pass_on(self, sender: int, data: bytes | None, *, ordered: bool) -> None:
        world = self._link.world
        at = world.now + self._link.delay() + (0.0 if ordered else 0.02 * world.random.random())
        if ordered:
            at = self._last[sender] = max(at, self._last[sender])
        world.at(at, lambda: self._arrive(1 - sender, data))

    def _arrive(self, receiver: int, data: bytes | None) -> None:
        daemon = self._daemons[receiver]
        if not self.open[receiver] or daemon is None:
            return
        if data is None:
            self.open[receiver] = False
            daemon.hung_up(self)
        else:
            daemon.heard(self, data)

    def holds(self, sender: int) -> bool:
        """Whether something is held up."""
        return bool(self._held[sender])

    def flow(self, sender: int) -> None:
        """The direction is up again: what was held up comes."""
        held = list(self._held[sender])
        self._held[sender].clear()
        for data in held:
            self._pass_on(sender, data, ordered=True)

    def close(self, end: int, *, tell: bool = True) -> None:
        """One end closes it; the other one hears of that when the network lets it."""
        if self.open[end]:
            self.open[end] = False
            if tell:
                self.send(end, None)


class Link(Network):
    """The cluster link."""

    def __init__(self, world: World) -> None:
        super().__init__(world)
        self.harsh = 0.0
        self.connection: Connection | None = None

    def raise_direction(self, sender: int) -> None:
        if not self.down[sender] and self.connection:
            self.connection.flow(sender)

    def reset(self) -> None:
        """Both ends are told that the connection is gone."""
        connection = self.connection
        if connection:
            for end in (0, 1):
                connection._pass_on(end, None, ordered=True)

    def connect(self) -> None:
        """What the nodes try again and again."""
        world = self.world
        world.after(0.01 + 0.04 * world.random.random(), self.connect)
        machines, old = world.machines, self.connection
        if any(self.down) or (old and all(old.open)) or not all(machine.responds for machine in machines):
            return
        self.connection = new = Connection(self, machines)
        for end, machine in enumerate(machines):
            assert machine.daemon is not None
            if old and old.open[end]:
                old.open[end] = False
                machine.daemon.hung_up(old)
            world.after(self.delay(), lambda daemon=machine.daemon: daemon.met(new))  # type: ignore[misc]
