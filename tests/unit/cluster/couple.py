"""Two pairs' halves wired together by a perfect link, under a clock that the test moves."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from sapin.cluster.effects import (
    Acked,
    Activate,
    Claim,
    CloseLink,
    Deactivate,
    Effect,
    Persist,
    Probe,
    Release,
    Send,
    Settings,
)
from sapin.cluster.pair import Pair
from sapin.cluster.role import Saved, State
from tests.unit.cluster.replicas import MappingReplica

STEP = 0.001


@dataclass
class Node:
    """A node without chance: what it is asked to do is done at once."""

    name: str
    peer: str
    couple: Couple
    priority: int = 100
    preempt: bool = False
    decides: bool = True
    saved: Saved = field(default_factory=Saved)
    replica: MappingReplica = field(default_factory=MappingReplica)
    alive: bool = False
    address: bool = False
    serving: bool = False
    boots: int = 0
    acked: int = 0
    probes: int = 0
    inbox: deque[bytes] = field(default_factory=deque)
    done: list[Effect] = field(default_factory=list)

    def boot(self) -> None:
        self.alive, self.boots = True, self.boots + 1
        settings = Settings(
            "c", self.name, self.peer, self.priority, self.preempt, decides=self.decides, preempt_after=2.0
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
        now = self.couple.now
        match effect:
            case Send():
                self.couple.send(self, effect.data)
            case Claim():
                self.address = True
                self.pair.claimed(now)
            case Release():
                self.address = False
                self.pair.released(now)
            case Activate():
                self.serving = True
            case Deactivate():
                self.serving = False
            case Persist():
                self.saved = effect.saved
            case Acked():
                self.acked = effect.sequence
            case Probe():
                self.probes += 1
                self.couple.probe(self)
            case CloseLink():
                self.couple.cut()


class Couple:
    """Two nodes, a link that is up or down, and a service network that is up or down."""

    def __init__(self, **settings: object) -> None:
        self.now = 100.0
        self.link = False
        self.service = True
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

    def send(self, node: Node, data: bytes) -> None:
        if self.link:
            self.other(node).inbox.append(data)

    def probe(self, node: Node) -> None:
        if self.service and self.other(node).alive:
            node.pair.answered(self.now)

    def run(self, seconds: float) -> None:
        end = self.now + seconds
        while self.now < end:
            self.now += STEP
            for node in self.nodes:
                if not node.alive:
                    continue
                while node.inbox:
                    node.pair.received(node.inbox.popleft(), self.now)
                    node.carry_out()
                if node.pair.deadline <= self.now:
                    node.pair.wake(self.now)
                    node.carry_out()

    def kill(self, node: Node, *, farewell: bool) -> None:
        boot, epoch = node.pair.source.boot, node.pair.epoch
        node.die()
        self.cut()
        other = self.other(node)
        if farewell:
            other.pair.farewell(boot, epoch, self.now)
            other.carry_out()

    @property
    def active(self) -> Node:
        (node,) = [node for node in self.nodes if node.alive and node.address]
        assert node.pair.state in (State.ACTIVE, State.LEAVING)
        return node

    @property
    def standby(self) -> Node:
        return self.other(self.active)
