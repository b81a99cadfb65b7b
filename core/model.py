"""The words of Sapin as frozen values: services, real servers, pools of them, and what refers to plugins.

Nothing here changes after it was made, and nothing here does anything: decisions are in
:mod:`sapin.core.balancer`, live state in :mod:`sapin.core.snapshot` and :mod:`sapin.core.affinity`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from ipaddress import IPv4Address, IPv6Address
from pathlib import Path
from typing import Any, NamedTuple

IPAddress = IPv4Address | IPv6Address


class AdminState(StrEnum):
    """What the operator wants of a real server."""

    ENABLED = "enabled"
    DRAINING = "draining"
    """Keeps the clients that are pinned to it, and gets no new ones."""
    DISABLED = "disabled"
    """Loses its pinned clients and gets no new ones."""


class Health(StrEnum):
    """What the checks say of a real server."""

    HEALTHY = "healthy"
    UNHEALTHY = "unhealthy"
    UNKNOWN = "unknown"
    """Not decided yet: it is used like a healthy one, so that a start never waits for checks."""


class Framing(StrEnum):
    """What the datagrams of a virtual service carry."""

    IKE = "ike"
    """Bare IKE messages, as on UDP 500 (RFC 7296 section 2)."""
    NATT = "ike-natt"
    """IKE behind four zero bytes, ESP, and NAT keepalives, as on UDP 4500 (RFC 3948)."""
    OPAQUE = "opaque"
    """Anything: only addresses and ports are looked at."""


class Endpoint(NamedTuple):
    """An address and a port to send to."""

    address: IPAddress
    port: int

    def __str__(self) -> str:
        host = f"[{self.address}]" if self.address.version == 6 else str(self.address)
        return f"{host}:{self.port}"


@dataclass(frozen=True, slots=True)
class PluginRef:
    """A plugin by its name, and the options that its ``Config`` takes."""

    plugin: str
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class CheckSpec:
    """A health check of each real server of a service; all times in seconds."""

    ref: PluginRef
    interval: float = 5.0
    timeout: float = 2.0
    rise: int = 2
    """So many successes in a row make an unhealthy server healthy."""
    fall: int = 3
    """So many failures in a row make a server unhealthy."""
    jitter: float = 0.1
    """Each interval is varied by up to this share, so that checks do not march in step."""


@dataclass(frozen=True, slots=True)
class RealServer:
    """A VPN gateway behind a virtual service."""

    name: str
    address: IPAddress
    port: int | None = None
    """``None``: the virtual service's own port."""
    weight: int = 1
    """A share of new clients, relative to the others; 0 gets none."""
    state: AdminState = AdminState.ENABLED


@dataclass(frozen=True, slots=True)
class VirtualService:
    """An address and port that clients connect to.

    A service that ``follows`` another has the leader's real servers, persistence and scheduler, and
    shares its affinity group.
    """

    name: str
    address: IPAddress
    port: int
    framing: Framing
    real_servers: tuple[RealServer, ...]
    scheduler: PluginRef
    persistence: PluginRef
    pin_timeout: float
    """Seconds after the last datagram of a client until its pin expires."""
    flow_timeout: float
    """Seconds after the last datagram of a flow until its upstream port is given back."""
    checks: tuple[CheckSpec, ...] = ()
    follows: str | None = None
    following: PluginRef = PluginRef("port")
    protocol: str = "udp"
    source: str = "nat"

    @property
    def group(self) -> str:
        """The affinity group: the leader's name."""
        return self.follows or self.name

    @property
    def endpoint(self) -> Endpoint:
        """Where clients send to."""
        return Endpoint(self.address, self.port)


@dataclass(frozen=True, slots=True)
class Node:
    """This balancer and its limits."""

    name: str
    state_dir: Path
    max_pins: int = 1_000_000
    """Pins of each affinity group; a full table evicts the least recently due. Taken at the start."""
    max_flows: int = 200_000
    """Flows over all services; each costs one file descriptor."""
    receive_buffer: int = 8 * 1024 * 1024
    """Bytes of socket buffer asked for per virtual service."""


@dataclass(frozen=True, slots=True)
class Config:
    """A whole valid configuration."""

    node: Node
    virtual_services: tuple[VirtualService, ...]
    sections: Mapping[str, Any] = field(default_factory=dict)
    """What other tables of the file say, by their names; whoever they are for knows what is there."""

    def service(self, name: str) -> VirtualService:
        """The virtual service of that name.

        Raises:
            KeyError: there is none.
        """
        for service in self.virtual_services:
            if service.name == name:
                return service
        raise KeyError(name)

    def groups(self) -> Mapping[str, tuple[VirtualService, ...]]:
        """Affinity groups by the leader's name, the leader first."""
        found: dict[str, list[VirtualService]] = {}
        for service in sorted(self.virtual_services, key=lambda s: s.follows is not None):
            found.setdefault(service.group, []).append(service)
        return {name: tuple(services) for name, services in found.items()}
