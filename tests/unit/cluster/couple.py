"""Two pairs' halves wired together by a perfect link, under a clock that the test moves."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from random import Random

from sapin.cluster.pair import Pair
from sapin.cluster.role import HOLDING, LEAVING
from sapin.cluster.settings import (
    Acked,
    Activate,
    Claim,
    CloseLink,
    Deactivate,
    Effect,
    Persist,
    Probe,
    Release,
    Saved,
    Send,
    Settings,
    Stopped,
)
from tests.unit.cluster.replicas import MappingReplica

STEP = 0.001
RECONNECT = 0.05


@dataclass
class Node:
    """A node without chance: what it is asked to do is done at once."""

    name: str
    peer: str
    couple: Couple
    priority: int = 100
    preempt: bool = False
    moves: bool = True
    versions: tuple[int, int] = (1, 2)
    saved: Saved = field(default_factory=Saved)
    replica: MappingReplica = field(default_factory=MappingReplica)
    alive: bool = False
    address: bool = False
    serving: bool = False
    boots: int = 0
    acked: int = 0
    probes: int = 0
    persisted: int = 0
    stopped: bool = False
    busy: float = 0.0
    """Seconds that it does not run for at most, again and again."""
    runs_at: float = 0.0
    held: bool = False
    """The addresses come and go only when the test says so."""
    inbox: deque[bytes] = field(default_factory=deque)
    done: list[Effect] = field(default_factory=list)

    def boot(self) -> None:
        self.alive, self.boots = True, self.boots + 1
        settings = Settings(
            self.name,
            self.peer,
            "c",
            self.priority,
            self.preempt,
            moves=self.moves,
            settled=2.0,
            versions=self.versions,
        )
        number = 1000 * self.boots + ord(self.name)
        self.pair = Pair(settings, self.replica, self.saved, number, self.couple.now)

    def die(self) -> None:
        """Its guard removes the addresses; what is on its disk stays."""
        self.alive = self.address = self.serving = False
        self.inbox.clear()

    def put(self, key: bytes, server: str) -> int:
        sequence = self.pair.changed(self.replica.put(key, server), self.couple.now)
        self.carry_out()
        return sequence

    def carry_out(self) -> None:
        while effects := self.pair.effects():
            for effect in effects:
                self.done.append(effect)
                self._do(effect)

    def _do(self, effect: Effect) -> None:
        match effect:
            case Send():
                self.couple.send(self, effect.data)
            case Persist():
                self.saved = effect.saved
                self.persisted += 1
            case Acked():
                self.acked = effect.sequence
            case Probe():
                self.probes += 1
                self.couple.probe(self)
            case CloseLink():
                self.couple.close(self)
            case _:
                self._turn(effect)

    def _turn(self, effect: Effect) -> None:
        match effect:
            case Claim() if not self.held:
                self.address = True
                self.pair.claimed(self.couple.now, len(self.replica.pins))
            case Release():
                self.address = False
                self.pair.released(self.couple.now)
            case Activate():
                self.serving = True
            case Deactivate():
                self.serving = False
            case Stopped():
                self.stopped = True


class Couple:
    """Two nodes, a link that is up or down, and a service network that is up or down."""

    def __init__(self, **settings: object) -> None:
        self.now = 100.0
        self.link = False
        self.service = True
        self.chance = Random(1)
        self.again: float | None = None
        self.a = Node("a", "b", self, **settings)  # type: ignore[arg-type]
        self.b = Node("b", "a", self, **settings)  # type: ignore[arg-type]

    @property
    def nodes(self) -> tuple[Node, Node]:
        return self.a, self.b

    def other(self, node: Node) -> Node:
        return self.b if node is self.a else self.a

    def start(self) -> None:
        for node in self.nodes:
            node.boot()
        self.join()

    def join(self) -> None:
        if not self.link and self.a.alive and self.b.alive:
            self.link = True
            for node in self.nodes:
                node.inbox.clear()
                node.pair.connected(self.now)
            for node in self.nodes:
                node.carry_out()

    def cut(self) -> None:
        if self.link:
            self.link = False
            for node in self.nodes:
                node.inbox.clear()
                if node.alive:
                    node.pair.disconnected(self.now)
                    node.carry_out()

    def close(self, node: Node) -> None:
        """A node has closed the link; a new connection comes a little later."""
        self.cut()
        self.again = self.now + RECONNECT

    def send(self, node: Node, data: bytes) -> None:
        if self.link:
            self.other(node).inbox.append(data)

    def probe(self, node: Node) -> None:
        if self.service and self.other(node).alive:
            other = self.other(node).pair
            node.pair.answered(other.epoch, other.role.state in HOLDING, self.now)

    def run(self, seconds: float) -> None:
        end = self.now + seconds
        while self.now < end:
            self.now += STEP
            if self.again is not None and self.now >= self.again:
                self.again = None
                self.join()
            for node in self.nodes:
                if not node.alive or self.now < node.runs_at:
                    continue
                node.runs_at = self.now + self.chance.random() * node.busy
                while node.inbox:
                    node.pair.received(node.inbox.popleft(), self.now)
                    node.carry_out()
                if node.pair.room <= 0:
                    node.pair.writable(self.now)
                    node.carry_out()
                if node.pair.deadline <= self.now:
                    node.pair.wake(self.now)
                    node.carry_out()

    def kill(self, node: Node, *, farewell: bool) -> None:
        boot, epoch = node.pair.boot, node.pair.epoch
        node.die()
        self.cut()
        other = self.other(node)
        if farewell:
            other.pair.farewell(boot, epoch, self.now)
            other.carry_out()

    @property
    def active(self) -> Node:
        (node,) = [node for node in self.nodes if node.alive and node.address]
        assert node.pair.role.state in HOLDING | LEAVING
        return node

    @property
    def standby(self) -> Node:
        return self.other(self.active)
