"""The role of a node: every state, every signal, and what follows, in one table.

Pure. :data:`TABLE` is the whole behaviour: a row for each signal that a state knows, with the next state and what is to
be done. A signal without a row raises :class:`RoleError`: whoever composes the machine has to know what can happen when.
When a signal is due (how long is silent, who is better) is not decided here but in :mod:`sapin.cluster.pair`.

Epochs number takeovers. Each node has numbers of its own (:func:`following`: one takes the even ones, the other the odd
ones), so two takeovers never have the same number, and "the lower epoch yields" always has an answer.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from typing import NamedTuple


class State(StrEnum):
    """What a node is to its pair."""

    STARTING = "starting"
    """It has not found out yet."""
    STANDBY = "standby"
    """It follows the peer."""
    SUSPECTING = "suspecting"
    """A standby whose peer is silent on the link, and has not answered a probe since."""
    CUT = "cut"
    """A standby whose peer is silent on the link, but answers probes."""
    CLAIMING = "claiming"
    """It has taken over, and waits for the addresses to be there."""
    ACTIVE = "active"
    """It has the addresses."""
    HANDING = "handing over"
    """It has asked the peer to take over, and goes on meanwhile."""
    GRACE = "grace"
    """The peer has claimed; what is under way still comes here, and is still forwarded."""
    RELEASING = "releasing"
    """It gives the addresses up, and waits for them to be gone."""
    STOPPED = "stopped"
    """It takes part no more."""


class Signal(StrEnum):
    """What can happen to a role."""

    FOUND = "found"
    """The peer is active, and this node is not, or has the lower epoch."""
    RIVAL = "rival"
    """The peer is active too, with the lower epoch: it will yield when it hears of ours."""
    ELECTED = "elected"
    """Neither is active, and this node is the better one."""
    PASSED = "passed"
    """Neither is active, and the peer is the better one."""
    SILENT = "silent"
    """The link to the peer is closed or silent."""
    HEARD = "heard"
    """The link speaks again."""
    ANSWERED = "answered"
    """A probe was answered while the link was silent."""
    GONE = "gone"
    """Nobody is active any more, and this node may take over."""
    ASKED = "asked"
    """The active peer asks this node to take over; it has everything."""
    STEP_DOWN = "step-down"
    """This node is to hand over; the peer has everything."""
    LEAVE = "leave"
    """This node is to give up, whoever takes over."""
    CLAIMED = "claimed"
    """The addresses are here, as asked for."""
    RELEASED = "released"
    """The addresses are gone, as asked for."""
    GAINED = "gained"
    """Something else has brought the addresses here."""
    LOST = "lost"
    """The addresses are gone without being asked for, or could not be had."""
    TIMEOUT = "timeout"
    """The time of the state is over."""
    STOP = "stop"
    """The daemon ends."""


class Act(StrEnum):
    """What a transition asks for."""

    CLAIM = "claim"
    """Raise the epoch, activate the dataplane, take the addresses."""
    ADOPT = "adopt"
    """Raise the epoch and activate the dataplane: the addresses are here already."""
    ANNOUNCE = "announce"
    """Tell the peer of the epoch and that it is ours."""
    INSIST = "insist"
    """Tell an active peer of the higher epoch at once."""
    HAND_OVER = "hand over"
    """Ask the peer to take over."""
    KEEP = "keep"
    """The peer did not take over: say so."""
    YIELD = "yield"
    """Deactivate and release at once; what the peer has not acknowledged it will not get any more."""
    GIVE_UP = "give up"
    """Deactivate and release; what the peer has not acknowledged still goes to it."""
    DROP = "drop"
    """Deactivate: the addresses are gone already."""
    DRAIN = "drain"
    """Tell the peer that the addresses are free, after everything else."""
    FINISH = "finish"
    """Nothing is left to do; the daemon may end."""


class Transition(NamedTuple):
    """A row's right side."""

    state: State
    acts: tuple[Act, ...] = ()


class RoleError(Exception):
    """A signal that the state does not know."""


_S, _E, _T = State, Signal, Transition

_FOLLOWING: Mapping[Signal, Transition] = {
    _E.FOUND: _T(_S.STANDBY),
    _E.PASSED: _T(_S.STANDBY),
    _E.ELECTED: _T(_S.CLAIMING, (Act.CLAIM,)),
    _E.GONE: _T(_S.CLAIMING, (Act.CLAIM,)),
    _E.GAINED: _T(_S.ACTIVE, (Act.ADOPT, Act.ANNOUNCE)),
    _E.STOP: _T(_S.STOPPED, (Act.FINISH,)),
}
"""What every state without the addresses has in common."""

TABLE: Mapping[State, Mapping[Signal, Transition]] = {
    _S.STARTING: _FOLLOWING,
    _S.STANDBY: {
        **_FOLLOWING,
        _E.SILENT: _T(_S.SUSPECTING),
        _E.ASKED: _T(_S.CLAIMING, (Act.CLAIM,)),
    },
    _S.SUSPECTING: {
        **_FOLLOWING,
        _E.HEARD: _T(_S.STANDBY),
        _E.ANSWERED: _T(_S.CUT),
    },
    _S.CUT: {
        **_FOLLOWING,
        _E.HEARD: _T(_S.STANDBY),
    },
    _S.CLAIMING: {
        _E.CLAIMED: _T(_S.ACTIVE, (Act.ANNOUNCE,)),
        _E.LOST: _T(_S.STANDBY, (Act.DROP, Act.DRAIN)),
        _E.FOUND: _T(_S.RELEASING, (Act.YIELD,)),
        _E.RIVAL: _T(_S.CLAIMING),
        _E.STOP: _T(_S.RELEASING, (Act.GIVE_UP,)),
    },
    _S.ACTIVE: {
        _E.FOUND: _T(_S.RELEASING, (Act.YIELD,)),
        _E.RIVAL: _T(_S.ACTIVE, (Act.INSIST,)),
        _E.STEP_DOWN: _T(_S.HANDING, (Act.HAND_OVER,)),
        _E.LEAVE: _T(_S.RELEASING, (Act.GIVE_UP,)),
        _E.LOST: _T(_S.STANDBY, (Act.DROP, Act.DRAIN)),
        _E.STOP: _T(_S.RELEASING, (Act.GIVE_UP,)),
    },
    _S.HANDING: {
        _E.FOUND: _T(_S.GRACE),
        _E.RIVAL: _T(_S.HANDING, (Act.INSIST,)),
        _E.TIMEOUT: _T(_S.ACTIVE, (Act.KEEP,)),
        _E.LEAVE: _T(_S.RELEASING, (Act.GIVE_UP,)),
        _E.LOST: _T(_S.STANDBY, (Act.DROP, Act.DRAIN)),
    },
    _S.GRACE: {
        _E.FOUND: _T(_S.GRACE),
        _E.TIMEOUT: _T(_S.RELEASING, (Act.GIVE_UP,)),
        _E.LOST: _T(_S.STANDBY, (Act.DROP, Act.DRAIN)),
    },
    _S.RELEASING: {
        _E.FOUND: _T(_S.RELEASING),
        _E.RIVAL: _T(_S.RELEASING),
        _E.CLAIMED: _T(_S.RELEASING),
        _E.RELEASED: _T(_S.STANDBY, (Act.DRAIN,)),
        _E.LOST: _T(_S.STANDBY, (Act.DRAIN,)),
    },
    _S.STOPPED: {},
}

FOLLOWING = frozenset({State.STARTING, State.STANDBY, State.SUSPECTING, State.CUT})
"""The states of a node that has no addresses and wants none yet."""
HOLDING = frozenset({State.CLAIMING, State.ACTIVE, State.HANDING})
"""The states of a node that holds the highest epoch that it knows, and the addresses."""
LEAVING = frozenset({State.GRACE, State.RELEASING})
"""The states of a node that has the addresses, and whose peer is to have them."""

SAID: Mapping[State, str] = {
    **dict.fromkeys(FOLLOWING - {State.STARTING}, "standby"),
    **dict.fromkeys(HOLDING, "active"),
    **dict.fromkeys(LEAVING, "leaving"),
    State.STARTING: "starting",
    State.STOPPED: "leaving",
}
"""What a node tells its peer of its state."""


class Role:
    """The machine: the state, and the table applied to it."""

    def __init__(self) -> None:
        self.state = State.STARTING

    def knows(self, signal: Signal) -> bool:
        """Whether the state has a row for the signal."""
        return signal in TABLE[self.state]

    def signal(self, signal: Signal) -> tuple[Act, ...]:
        """Make the transition; what it asks for.

        Raises:
            RoleError: the state does not know the signal.
        """
        found = TABLE[self.state].get(signal)
        if found is None:
            raise RoleError(f"{signal.value} means nothing to a node that is {self.state.value}")
        self.state = found.state
        return found.acts


def following(epoch: int, node: str, peer: str) -> int:
    """The first epoch after ``epoch`` that is ``node``'s to take: even numbers are of the node whose name sorts first."""
    parity = 0 if node < peer else 1
    return epoch + 1 if (epoch + 1) % 2 == parity else epoch + 2


class Merit(NamedTuple):
    """What decides between two nodes of which neither is active; the greater one takes over."""

    rank: int
    """How good its data are, see :func:`rank`."""
    priority: int
    node: str

    def beats(self, other: Merit) -> bool:
        """Whether this node is to take over rather than the other; of two that are equal, the one whose name sorts first."""
        if self[:2] != other[:2]:
            return self[:2] > other[:2]
        return self.node < other.node


def rank(epoch: int, active: bool, whole: bool) -> int:
    """How good the data of a node are: of a later epoch; then the active node's; then a standby's that has everything."""
    return 4 * epoch + (2 if active else 1 if whole else 0)
