"""What a plugin implements, and nothing else.

A plugin is a class that is registered under an entry point group (:data:`KINDS`), whose instances
fulfil the Protocol of its kind. It may have an inner ``Config``, a pydantic model; then it is made
with ``cls(config)``, else with ``cls()``. It may have ``open()`` and ``close()``, called once each.

A plugin that raises, or answers what its contract does not allow, is counted and answered by a
fallback; it never takes the dataplane down (:mod:`sapin.core.registry`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random
from typing import NamedTuple, Protocol, runtime_checkable

from sapin.core.ike import Kind
from sapin.core.model import AdminState, Endpoint, Framing, RealServer, VirtualService

KINDS = {
    "scheduler": "sapin.schedulers.v1",
    "persistence": "sapin.persistence.v1",
    "following": "sapin.following.v1",
    "check": "sapin.checks.v1",
}
"""Plugin kinds and their entry point groups; the group carries the contract's major version."""


Key = bytes
"""What a pin is found by: a kind, a colon, then the raw value; made by :func:`key`.

Bytes rather than tuples: a million of them cost a third of the memory, none of the garbage
collector's time, and they go to disk and to a peer as they are.
"""


def key(kind: str, value: bytes) -> Key:
    """A key of that kind: ``key("spi", spi)``. Kinds keep keys of different meaning apart."""
    return kind.encode() + b":" + value


class Client(NamedTuple):
    """Where a datagram came from."""

    address: bytes
    """The packed address, 4 or 16 bytes."""
    port: int


class Datagram(NamedTuple):
    """What a persistence plugin sees of a datagram from a client."""

    client: Client
    port: int
    """The virtual service's port."""
    kind: Kind
    """What it carries, by the service's framing."""
    spi_i: bytes
    """The IKE initiator's SPI, 8 bytes; empty unless it is an IKE message."""
    spi_r: bytes
    """The IKE responder's SPI, 8 bytes, zero in the first request; empty unless it is IKE."""


class Candidate(Protocol):
    """A real server that may take a new client, with its live figures, as schedulers see it."""

    @property
    def name(self) -> str:
        """The real server's name."""

    @property
    def weight(self) -> int:
        """The configured weight, at least 1 here."""

    @property
    def pinned(self) -> int:
        """Clients that hold it: pins, and flows that have none."""

    @property
    def response_time(self) -> float | None:
        """Seconds that its checks took of late (a moving average), ``None`` before the first."""

    @property
    def share(self) -> int:
        """Percent of its weight that its agent asks for; 100 without an agent."""


class Request(NamedTuple):
    """What a scheduler may look at besides the candidates."""

    client: Client
    key: Key
    """The first key of the persistence, or the client's address where there is none."""
    random: Random
    """The only source of randomness a scheduler may use."""


@runtime_checkable
class Scheduler(Protocol):
    """Chooses a real server for a new client.

    ``candidates`` is never empty, and is the same tuple object until a server, a weight or a state
    changes: a scheduler that prepares tables may compare it by identity. Called in the
    dataplane's loop: it must not block.

    It may have ``prepare(candidates)``, called in a worker thread after each change of the
    candidates and once before the first pick. ``pick`` may come first all the same.

    It may have ``checks``, a sequence of :class:`~sapin.core.model.CheckSpec` that it needs on every server.
    """

    def pick(self, request: Request, candidates: Sequence[Candidate]) -> Candidate:
        """One of the candidates."""
        ...


@runtime_checkable
class Persistence(Protocol):
    """Says by which keys the client of a datagram is recognised.

    The keys are looked up in their order, and the first that is pinned decides. All of them
    are then pinned to the same server, so that the client may be recognised by any of them later.
    """

    def keys(self, datagram: Datagram) -> Sequence[Key]:
        """The keys, the strongest first; none means that this datagram does not pin."""
        ...


@runtime_checkable
class Following(Protocol):
    """Says where a real server serves a service that follows another."""

    def endpoint(self, server: RealServer, leader: VirtualService, follower: VirtualService) -> Endpoint:
        """The server's endpoint for the follower."""
        ...


@dataclass(frozen=True, slots=True)
class Target:
    """What a health check is to look at."""

    server: str
    endpoint: Endpoint
    framing: Framing


@dataclass(frozen=True, slots=True)
class CheckResult:
    """What a health check found; ``reason`` is for the operator, a few words with the cause."""

    healthy: bool
    reason: str
    round_trip: float | None = None
    """Seconds, where the check measured it."""
    share: int | None = None
    """Percent of its weight that the server asks for; ``None`` says nothing about it."""
    state: AdminState | None = None
    """What the server asks to be; ``None`` says nothing about it."""


@runtime_checkable
class HealthCheck(Protocol):
    """Looks whether a real server can take clients. Runs in a trio task of its own."""

    async def check(self, target: Target) -> CheckResult:
        """The finding.

        Raises:
            OSError: counts as a failure of the server, as running over the timeout does. Any other
                exception is a fault of the plugin and says nothing about the server.
        """
        ...
