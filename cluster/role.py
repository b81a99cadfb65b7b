"""Who is active: the states of a node, what may happen to it, and what it does then, in one table.

Pure. The table is the whole of it; what is not in it is a fault, and raises. When an event
has happened is for :mod:`sapin.cluster.pair` to find out.

A node with a better *rank* becomes active where nothing else decides: better data first, then the higher priority,
then the name that comes first. The *epoch* is raised at each takeover. The node of the lower epoch yields, always.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Final


class State(StrEnum):
    """What a node is."""

    STARTING = "starting"
    """It looks for its peer."""
    STANDBY = "standby"
    ACTIVE = "active"
    LEAVING = "leaving"
    """Active still, and handing over."""

    @property
    def forwards(self) -> bool:
        """Whether the node has the virtual addresses, or claims them."""
        return self in (State.ACTIVE, State.LEAVING)


class Event(StrEnum):
    """What may happen."""

    PEER_ACTIVE = "the peer is active"
    PEER_BETTER = "neither is active, and the peer has the better rank"
    PEER_WORSE = "neither is active, and this node has the better rank"
    PEER_GONE = "the peer is gone"
    ALONE = "no peer was found at the start"
    ASKED = "the active node hands over"
    STEP_DOWN = "somebody asks this node to step down"
    TAKEN = "the peer has claimed what was handed over"
    GRACE_OVER = "what was on its way has arrived"
    NOT_TAKEN = "the peer has not claimed what was handed over"
    OUTDONE = "the peer is active with a higher epoch, or the same and a better rank"
    GAINED = "somebody gave the virtual addresses to this node"
    LOST = "somebody took the virtual addresses from this node"


class Action(StrEnum):
    """What is to be done."""

    NOTHING = "nothing"
    CLAIM = "raise the epoch and claim the addresses"
    RELEASE = "give the addresses up"
    HAND_OVER = "ask the peer to take over"
    LINGER = "go on forwarding for a moment"
    GO_ON = "stay active after all"


_S, _E, _A = State, Event, Action

TABLE: Final[Mapping[tuple[State, Event], tuple[State, Action]]] = {
    (_S.STARTING, _E.PEER_ACTIVE): (_S.STANDBY, _A.NOTHING),
    (_S.STARTING, _E.PEER_BETTER): (_S.STANDBY, _A.NOTHING),
    (_S.STARTING, _E.PEER_WORSE): (_S.ACTIVE, _A.CLAIM),
    (_S.STARTING, _E.ALONE): (_S.ACTIVE, _A.CLAIM),
    (_S.STARTING, _E.GAINED): (_S.ACTIVE, _A.CLAIM),
    (_S.STARTING, _E.LOST): (_S.STANDBY, _A.NOTHING),
    (_S.STARTING, _E.ASKED): (_S.ACTIVE, _A.CLAIM),
    (_S.STANDBY, _E.PEER_ACTIVE): (_S.STANDBY, _A.NOTHING),
    (_S.STANDBY, _E.PEER_BETTER): (_S.STANDBY, _A.NOTHING),
    (_S.STANDBY, _E.PEER_WORSE): (_S.ACTIVE, _A.CLAIM),
    (_S.STANDBY, _E.PEER_GONE): (_S.ACTIVE, _A.CLAIM),
    (_S.STANDBY, _E.ASKED): (_S.ACTIVE, _A.CLAIM),
    (_S.STANDBY, _E.GAINED): (_S.ACTIVE, _A.CLAIM),
    (_S.STANDBY, _E.LOST): (_S.STANDBY, _A.NOTHING),
    (_S.ACTIVE, _E.PEER_ACTIVE): (_S.ACTIVE, _A.NOTHING),
    (_S.ACTIVE, _E.PEER_BETTER): (_S.ACTIVE, _A.NOTHING),
    (_S.ACTIVE, _E.PEER_WORSE): (_S.ACTIVE, _A.NOTHING),
    (_S.ACTIVE, _E.STEP_DOWN): (_S.LEAVING, _A.HAND_OVER),
    (_S.ACTIVE, _E.OUTDONE): (_S.STANDBY, _A.RELEASE),
    (_S.ACTIVE, _E.GAINED): (_S.ACTIVE, _A.NOTHING),
    (_S.ACTIVE, _E.LOST): (_S.STANDBY, _A.RELEASE),
    (_S.LEAVING, _E.PEER_ACTIVE): (_S.LEAVING, _A.NOTHING),
    (_S.LEAVING, _E.PEER_BETTER): (_S.LEAVING, _A.NOTHING),
    (_S.LEAVING, _E.PEER_WORSE): (_S.LEAVING, _A.NOTHING),
    (_S.LEAVING, _E.TAKEN): (_S.LEAVING, _A.LINGER),
    (_S.LEAVING, _E.GRACE_OVER): (_S.STANDBY, _A.RELEASE),
    (_S.LEAVING, _E.NOT_TAKEN): (_S.ACTIVE, _A.GO_ON),
    (_S.LEAVING, _E.PEER_GONE): (_S.ACTIVE, _A.GO_ON),
    (_S.LEAVING, _E.OUTDONE): (_S.LEAVING, _A.LINGER),
    (_S.LEAVING, _E.GAINED): (_S.LEAVING, _A.NOTHING),
    (_S.LEAVING, _E.LOST): (_S.STANDBY, _A.RELEASE),
}
"""What becomes of a node in a state to which something happens, and what it does."""


class Impossible(Exception):
    """What cannot happen in that state; a fault of the program."""


def after(state: State, event: Event) -> tuple[State, Action]:
    """The next state, and what is to be done.

    Raises:
        Impossible: the event cannot happen in that state.
    """
    try:
        return TABLE[state, event]
    except KeyError:
        raise Impossible(f"a node that is {state} cannot be told that {event}") from None


@dataclass(frozen=True, slots=True)
class Rank:
    """How much a node is called to be active; compared by :meth:`better`."""

    data: int
    """How good its data are, see :attr:`Saved.rank`; more is better."""
    priority: int
    node: str

    def better(self, other: Rank) -> bool:
        """Whether this rank goes before the other one."""
        ours, theirs = (self.data, self.priority), (other.data, other.priority)
        return ours > theirs or (ours == theirs and self.node < other.node)


@dataclass(frozen=True, slots=True)
class Saved:
    """What a node has to know after a restart."""

    epoch: int = 0
    """The highest that was ever used or reserved: the next takeover has a higher one."""
    data: int = 0
    """The epoch in which the node was last active, or had all pins of the active node."""
    active: bool = False
    """It was active in that epoch."""
    synced: bool = False
    """It was active, or had all pins of the active node, when last heard of."""

    @property
    def rank(self) -> int:
        """How good the data are that the node has on its disk."""
        return 4 * self.data + 2 * self.active + self.synced
