"""What the simulation needs to know of a :class:`~sapin.cluster.pair.Pair` beside its inputs and effects."""

from __future__ import annotations

from typing import Any

from sapin.cluster.pair import Pair
from sapin.cluster.replication import Limits, Sync
from sapin.cluster.role import HOLDING, State
from sapin.cluster.settings import Saved, Settings

LIMITS = Limits(window=4_000, ring=12_000)
"""So small that windows and rings fill up in a simulation."""
WAIT = 0.2


def settings(name: str, peer: str, **changed: Any) -> Settings:
    return Settings(
        name, peer, "sim", wait=WAIT, handover=0.5, settled=1.0, abstain=0.5, limits=LIMITS, **changed
    )


def fresh() -> Saved:
    return Saved()


def active(pair: Pair) -> bool:
    return pair.role.state is State.ACTIVE


def standby(pair: Pair) -> bool:
    return pair.role.state is State.STANDBY


def holding(pair: Pair) -> bool:
    """Whether the node has the addresses, as it says to whoever probes it."""
    return pair.role.state in HOLDING


def source(pair: Pair) -> Any:
    return pair._stream.source


def waiting(pair: Pair) -> int:
    return len(pair._stream._waiting)


def synced(pair: Pair) -> bool:
    """Whether the node's changes are acknowledged in time."""
    return source(pair).state is Sync.SYNCED
