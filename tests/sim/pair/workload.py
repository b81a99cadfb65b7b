"""What clients, operators and fate do to a pair, by chance."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from sapin.cluster.wire import Record, Revision
from sapin.core.journal import FlowClosed, FlowOpened, ServerAdmin, ServerHealth
from tests.sim.pair.disk import GROUP, SERVERS, State

if TYPE_CHECKING:
    from tests.sim.pair.machine import Machine
    from tests.sim.pair.world import World

CLIENTS = 60
LATE = 0.003
"""Seconds for which packets still come to who had the addresses before."""


class Workload:
    """Clients that come to whoever has the addresses."""

    def __init__(self, world: World) -> None:
        self.done = 0
        self._world = world
        self._every = world.random.choice((0.005, 0.02, 0.04))
        self._burst = world.random.random() < 0.1
        self._number = 0

    def go_on(self) -> None:
        """One flush of one dataplane, and then the next."""
        world = self._world
        if world.now > world.quiet_from:
            return
        world.after(world.random.expovariate(1 / self._every), self.go_on)
        client = world.random.randrange(CLIENTS)
        machine = self._reached_by(client)
        daemon = machine.daemon if machine and machine.responds else None
        if daemon is None or not daemon.active:
            return
        records: list[Record] = []
        for _ in range(world.random.choice((1, 1, 1, 2, 40 if self._burst else 2))):
            records += self._one(daemon.state, client)
            if not world.service.split:
                client = world.random.randrange(CLIENTS)
        self.done += 1
        daemon.act(lambda: daemon.changed(records))

    def _reached_by(self, client: int) -> Machine | None:
        """Who gets a client's packets: who announced the addresses last, or, of a network that is split, the one on its side."""
        world = self._world
        holders = sorted((each for each in world.machines if each.address), key=lambda each: each.since)
        if len(holders) < 2:
            return holders[0] if holders else None
        if world.service.split:
            return world.machines[client % 2]
        return holders[1 if world.now - holders[1].since > LATE else 0]

    def _one(self, state: State, client: int) -> list[Record]:
        random = self._world.random
        key, port = b"ip:%d" % client, b"port:%d" % client
        kind = random.random()
        if kind < 0.45:
            held = state.table.get(key)
            if held is None:
                return list(state.put([key], random.choice(SERVERS)))
            return list(state.put([key, port], held.name)) if kind < 0.2 else list(state.touch(key))
        if kind < 0.6:
            return list(state.put([key], random.choice(SERVERS)))
        if kind < 0.72:
            return list(state.remove(key))
        if kind < 0.73:
            return list(state.clear(random.choice(SERVERS)))
        if kind < 0.93:
            return self._flow(state, key, opened=kind < 0.86)
        return list(state.set(self._setting()))

    def _flow(self, state: State, client: bytes, *, opened: bool) -> list[Record]:
        if opened:
            port = self._world.random.randrange(20_000, 60_000)
            flow = FlowOpened("vpn", client, 500, b"", "vpn-1", b"\n<\0\1", port, client, 1)
            return list(state.set(flow))
        return list(state.set(FlowClosed("vpn", client, 500, b"")))

    def _setting(self) -> Record:
        random = self._world.random
        server = random.choice(SERVERS)
        self._number += 1
        kind = random.randrange(3)
        if kind == 0:
            return ServerHealth(GROUP, server, random.choice(("healthy", "unhealthy")), "enabled", 100)
        if kind == 1:
            return ServerAdmin(GROUP, server, random.choice(("enabled", "draining")))
        return Revision(1, self._number, "00", f"text {self._number}")


class Fate:
    """Faults; each ends by itself, at the latest when the faults are over."""

    def __init__(self, world: World) -> None:
        self.story: list[str] = []
        """What happened, for whoever replays a seed."""
        self._world = world
        self._undo: list[Callable[[], None]] = []
        random = world.random
        kinds = (
            self.kill, self.kill, self.lose_power, self.stop, self.freeze, self.cut_link, self.cut_link,
            self.reset, self.slow, self.cut_service, self.lossy_service, self.busy, self.step_down,
            self.step_down, self.terminate, self.harsh, self.kill_both, self.dark,
        )  # fmt: skip
        for _ in range(random.randrange(1, 8)):
            kind = random.choice(kinds)
            world.at(world.now + 0.4 + random.random() * (world.heal_at - world.now - 0.4), kind)

    def heal(self) -> None:
        """The faults are over."""
        for undo in self._undo:
            undo()
        self._tell("healed")

    def _tell(self, what: str) -> None:
        self.story.append(line := f"{self._world.now:8.3f} {what}")
        if self._world.told:
            self._world.told(f"** {line}")

    def _for(self, longest: float, undo: Callable[[], None]) -> float:
        """Undoes it once, after a time by chance or when the faults are over."""
        done = False

        def once() -> None:
            nonlocal done
            if not done:
                done = True
                undo()

        self._undo.append(once)
        random = self._world.random.random
        took = longest * random() * random()
        self._world.after(took, once)
        return took

    def _machine(self) -> Machine:
        return self._world.random.choice(self._world.machines)

    def kill(self, machine: Machine | None = None) -> None:
        machine = machine or self._machine()
        machine.kill()
        took = self._for(2.5, machine.start)
        self._tell(f"the daemon of {machine.name} is killed, for {took:.3f}")

    def kill_both(self) -> None:
        for machine in self._world.machines:
            self.kill(machine)

    def lose_power(self, machine: Machine | None = None) -> None:
        machine = machine or self._machine()
        machine.lose_power()

        def back() -> None:
            machine.powered = True
            machine.start()

        self._tell(f"{machine.name} loses power, for {self._for(3.0, back):.3f}")

    def dark(self) -> None:
        for machine in self._world.machines:
            self.lose_power(machine)

    def stop(self) -> None:
        machine = self._machine()
        daemon = machine.daemon
        if daemon is None:
            return
        daemon.stop()
        self._tell(f"the daemon of {machine.name} is stopped, for {self._for(1.5, daemon.go_on):.3f}")

    def freeze(self) -> None:
        machine, began = self._machine(), self._world.now
        machine.freeze()
        self._tell(f"{machine.name} is frozen, for {self._for(2.0, lambda: machine.thaw(began)):.3f}")

    def busy(self) -> None:
        """A daemon that gets its turn late, again and again."""
        machine, world = self._machine(), self._world
        until = world.now + world.random.random()
        self._tell(f"{machine.name} is busy until {until:.3f}")

        def pause() -> None:
            daemon = machine.daemon
            if world.now < min(until, world.heal_at):
                world.after(0.05 * world.random.random() + 0.001, pause)
                if daemon and not daemon.stopped:
                    daemon.stop()
                    world.after(0.06 * world.random.random(), daemon.go_on)

        pause()

    def cut_link(self) -> None:
        self._cut("link")

    def cut_service(self) -> None:
        self._cut("service")

    def _cut(self, name: str) -> None:
        world = self._world
        network = world.link if name == "link" else world.service
        directions = world.random.choice(((0, 1), (0, 1), (0,), (1,)))
        for each in directions:
            network.down[each] += 1
        world.checker.health()

        def undo() -> None:
            for each in directions:
                network.down[each] -= 1
                if name == "link":
                    world.link.raise_direction(each)
            world.checker.health()

        self._tell(f"the {name} is cut, {directions}, for {self._for(2.5, undo):.3f}")

    def reset(self) -> None:
        self._world.link.reset()
        self._tell("the connection is reset")

    def slow(self) -> None:
        link = self._world.link
        link.slow = self._world.random.choice((0.005, 0.03, 0.1))

        def undo() -> None:
            link.slow = 0.0

        self._tell(f"the link takes {link.slow} more, for {self._for(2.0, undo):.3f}")

    def harsh(self) -> None:
        link = self._world.link
        link.harsh = self._world.random.choice((0.02, 0.2))

        def undo() -> None:
            link.harsh = 0.0

        self._tell(f"the link is harsh, {link.harsh}, for {self._for(3.0, undo):.3f}")

    def lossy_service(self) -> None:
        service = self._world.service
        service.loss = self._world.random.choice((0.1, 0.5))
        self._world.checker.health()

        def undo() -> None:
            service.loss = 0.0
            self._world.checker.health()

        self._tell(f"the service network loses {service.loss}, for {self._for(2.0, undo):.3f}")

    def step_down(self) -> None:
        world = self._world
        force = world.random.random() < 0.2
        for machine in world.machines:
            if machine.daemon and half_active(machine):
                daemon = machine.daemon
                self._tell(f"{machine.name} is told to step down, {force=}")
                daemon.act(lambda daemon=daemon: daemon.pair.step_down(world.now, force))  # type: ignore[misc]

    def terminate(self) -> None:
        """SIGTERM; a daemon that does not end is killed."""
        machine, world = self._machine(), self._world
        daemon = machine.daemon
        if daemon is None:
            return
        self._tell(f"the daemon of {machine.name} is terminated")
        daemon.act(lambda: daemon.pair.stop(world.now))
        world.after(2.0, lambda: None if daemon.dead else machine.kill())
        self._undo.append(machine.start)
        world.after(2.0 + world.random.random(), machine.start)


def half_active(machine: Machine) -> bool:
    return machine.daemon is not None and machine.daemon.active
