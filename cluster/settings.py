"""What a :class:`~sapin.cluster.pair.Pair` is told at its start, and what it asks of the shell around it.

Pure values. An effect is to be carried out by whoever drives the pair, in the order in which they come.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from sapin.cluster.replication import Limits
from sapin.cluster.wire import NEWEST, OLDEST


@dataclass(frozen=True, slots=True)
class Settings:
    """A node's part of the pair; times in seconds."""

    node: str
    peer: str
    cluster: str
    """The cluster's identity."""
    priority: int = 100
    preempt: bool = False
    """Whether it asks for the role when its priority is the higher one."""
    heartbeat: float = 0.025
    missed: int = 3
    """So many heartbeats of silence, and the peer is silent."""
    sync_timeout: float = 0.02
    """How long a reply waits for the peer."""
    moves: bool = True
    """Whether the node moves the addresses itself, rather than following what else does."""
    wait: float = 1.0
    """At a start, how long the peer is waited for; ten times as long by a node that was not in sync."""
    handover: float = 1.0
    """How long the peer has to take over when it is asked to."""
    grace: float = 0.15
    """How long a node goes on forwarding after the peer has claimed."""
    settled: float = 10.0
    """How long a node has been in sync before it asks for the role."""
    abstain: float = 10.0
    """How long a node that was told to step down leaves the addresses to others."""
    versions: tuple[int, int] = (OLDEST, NEWEST)
    """Of the wire format, that it speaks."""
    limits: Limits = field(default_factory=Limits)


class Saved(NamedTuple):
    """What outlives the daemon."""

    floor: int = 0
    """Every epoch up to this one may have been used; a takeover takes one that was reserved, or a later one."""
    epoch: int = 0
    """Of the active node whose data these are."""
    active: bool = False
    """Whether that was this node."""
    whole: bool = False
    """Whether it had everything, rather than half of a snapshot."""


class Send(NamedTuple):
    """Send these bytes over the link, after those before; they are lost if it closes."""

    data: bytes


class Claim(NamedTuple):
    """Take the addresses, and announce them; then call ``claimed`` (or ``address_lost`` if that cannot be)."""

    epoch: int


class Release(NamedTuple):
    """Give the addresses up; then call ``released``."""


class Probe(NamedTuple):
    """Ask the peer's beacons, at all of its addresses and at the virtual ones, whether it is alive."""


class Persist(NamedTuple):
    """Keep this over a restart, soon. Its floor is to be on disk before a :class:`Claim` that follows is carried out."""

    saved: Saved


class Acked(NamedTuple):
    """Replies that wait for this sequence or an earlier one may go."""

    sequence: int
    held: bool = True
    """Whether the peer has what they waited for, rather than nobody waiting for it any more."""


class CloseLink(NamedTuple):
    """End the connection. No input of it follows but ``disconnected``."""

    reason: str


class Activate(NamedTuple):
    """The dataplane is this node's: checks, expiry, and changes that go to the peer."""


class Deactivate(NamedTuple):
    """The dataplane is the peer's. Changes that were not flushed are flushed (``changed``) before."""


class Event(NamedTuple):
    """Something that an operator wants to know of."""

    name: str
    fields: Mapping[str, str | int | float | bool]


class Stopped(NamedTuple):
    """The daemon may end: the addresses are elsewhere, or free."""


Effect = (
    Send | Claim | Release | Probe | Persist | Acked | CloseLink | Activate | Deactivate | Event | Stopped
)
