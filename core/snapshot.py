"""The immutable view of the running configuration that the dataplane, the checks and the API read.

A :class:`Snapshot` is replaced, never changed. What moves while it stands is in :class:`Member`, one live
record per real server and affinity group: its counters are written by the affinity table and the
checks, its states by the writer alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from sapin.core.model import AdminState, Config, Endpoint, Health, RealServer, VirtualService

if TYPE_CHECKING:
    from sapin.core.affinity import AffinityTable
    from sapin.core.contracts import Following, Persistence, Scheduler
    from sapin.core.registry import Hosted


class Member:
    """A real server in an affinity group, as it is now; fulfils :class:`~sapin.core.contracts.Candidate`."""

    __slots__ = (
        "admin",
        "asked",
        "health",
        "keeps",
        "name",
        "pinned",
        "response_time",
        "server",
        "share",
        "takes",
        "weight",
    )

    def __init__(self, server: RealServer) -> None:
        self.server = server
        self.name = server.name
        self.weight = server.weight
        self.admin = server.state
        """What the operator wants."""
        self.asked = AdminState.ENABLED
        """What the server itself asks for, through an agent."""
        self.health = Health.UNKNOWN
        self.pinned = 0
        self.response_time: float | None = None
        self.share = 100
        self.keeps = False
        """Whether clients that are pinned to it stay."""
        self.takes = False
        """Whether new clients may be pinned to it."""
        self.settle()

    def settle(self) -> None:
        """Work out ``keeps`` and ``takes`` after a state has changed."""
        states = (self.admin, self.asked)
        self.keeps = self.health is not Health.UNHEALTHY and AdminState.DISABLED not in states
        self.takes = self.keeps and self.weight > 0 and AdminState.DRAINING not in states

    @property
    def version(self) -> int:
        """The address family of the server: 4 or 6."""
        return self.server.address.version

    def __repr__(self) -> str:
        return f"<Member {self.name} {self.admin} {self.health} pinned={self.pinned}>"


@dataclass(frozen=True, slots=True)
class Pool:
    """The members of one address family that may get new clients, and their scheduler."""

    candidates: tuple[Member, ...]
    scheduler: Hosted[Scheduler]


@dataclass(frozen=True, slots=True)
class Group:
    """An affinity group: a leader, its followers, one pool per address family, one table of pins."""

    services: tuple[VirtualService, ...]
    members: Mapping[str, Member]
    pools: Mapping[int, Pool]
    persistence: Hosted[Persistence]
    following: Mapping[str, Hosted[Following]]
    """By the follower's name."""
    endpoints: Mapping[str, Mapping[str, Endpoint]]
    """Where each real server serves each service, by the service's and then the server's name."""
    table: AffinityTable[Member]

    @property
    def name(self) -> str:
        """The leader's name."""
        return self.services[0].name

    @property
    def leader(self) -> VirtualService:
        """The service that the others follow."""
        return self.services[0]


@dataclass(frozen=True, slots=True)
class ServiceView:
    """A virtual service and its group."""

    service: VirtualService
    group: Group

    @property
    def endpoints(self) -> Mapping[str, Endpoint]:
        """Where each real server serves this service, by the server's name."""
        return self.group.endpoints[self.service.name]


@dataclass(frozen=True, slots=True)
class Snapshot:
    """Everything a reader needs, as of one version."""

    version: int
    config: Config
    groups: Mapping[str, Group]
    services: Mapping[str, ServiceView]
