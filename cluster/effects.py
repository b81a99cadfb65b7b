"""What a pair is told at the start, and what it asks its node to do: plain values."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from sapin.cluster.role import Saved, State
from sapin.cluster.watch import Verdict


@dataclass(frozen=True, slots=True)
class Settings:
    """This node's part of the pair; times in seconds."""

    cluster: str
    node: str
    peer: str
    priority: int = 100
    preempt: bool = False
    heartbeat: float = 0.025
    missed: int = 3
    sync_timeout: float = 0.02
    decides: bool = True
    """Whether the nodes decide who is active, rather than follow whoever moves the addresses."""
    start_wait: float = 1.0
    """How long a node that starts looks for its peer."""
    stale_factor: float = 10.0
    """A node that is not in sync waits so many times longer."""
    grace: float = 0.15
    """How long a node that has handed over goes on forwarding."""
    handover_wait: float = 1.0
    """How long the peer may take to claim what is handed over."""
    preempt_after: float = 10.0
    """How long a node must have been in sync before it asks for its role back."""


class Send(NamedTuple):
    """Send this to the peer, after what was to be sent before."""

    data: bytes


class Probe(NamedTuple):
    """Ask the peer on the service network whether it is alive."""


class Claim(NamedTuple):
    """Add and announce the virtual addresses; tell by ``claimed``."""

    epoch: int


class Release(NamedTuple):
    """Remove the virtual addresses; tell by ``released``."""


class Activate(NamedTuple):
    """The dataplane checks and expires for itself from now on."""


class Deactivate(NamedTuple):
    """The dataplane goes by the peer from now on; its last changes come before that."""


class Persist(NamedTuple):
    """Keep this over a restart."""

    saved: Saved
    now: bool
    """It must be durable before what follows is done."""


class Acked(NamedTuple):
    """Replies that wait for this sequence, or an earlier one, may go."""

    sequence: int


class CloseLink(NamedTuple):
    """Close the connection; a new one may be better."""

    reason: str


Effect = Send | Probe | Claim | Release | Activate | Deactivate | Persist | Acked | CloseLink


@dataclass(frozen=True, slots=True)
class Failover:
    """The last takeover of this node; times in seconds."""

    cause: str
    at: float
    """When the addresses were here."""
    duration: float
    """From when the active node was last heard of."""
    epoch: int


@dataclass(frozen=True, slots=True)
class Status:
    """A pair as one of its nodes sees it."""

    node: str
    state: State
    epoch: int
    peer: str
    connected: bool
    peer_state: str | None
    peer_epoch: int | None
    last_heard: float
    """Seconds since then."""
    verdict: Verdict
    replication: str
    """Of the stream that matters: to the standby, or from the active node."""
    in_sync: bool
    sequence: int
    acked: int
    lag: int
    digest: int
    snapshots: int
    resumed: int
    divergences: int
    desyncs: int
    overflows: int
    failover: Failover | None
