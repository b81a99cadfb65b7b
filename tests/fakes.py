"""Plugins, services and datagrams that tests are made of. The plugins do what they are told."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from importlib.metadata import EntryPoint
from ipaddress import ip_address
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import BaseModel

from sapin.core import ike
from sapin.core.contracts import KINDS, Candidate, Client, Datagram, Key, Request, key
from sapin.core.ike import Kind
from sapin.core.model import (
    Config,
    Endpoint,
    Framing,
    Node,
    PluginRef,
    RealServer,
    VirtualService,
)
from sapin.core.registry import Registry


class Point(EntryPoint):
    """An entry point of an object that is there already; one that is an exception cannot be imported."""

    def __init__(self, kind: str, name: str, plugin: object, value: str = "fakes:plugin") -> None:
        super().__init__(name, value, KINDS[kind])
        vars(self)["plugin"] = plugin

    def load(self) -> Any:
        plugin = vars(self)["plugin"]
        if isinstance(plugin, Exception):
            raise plugin
        return plugin


class First:
    """A scheduler that takes the first candidate."""

    def pick(self, request: Request, candidates: Sequence[Candidate]) -> Candidate:
        return candidates[0]


class Source:
    """A persistence by the client's address."""

    def keys(self, datagram: Datagram) -> Sequence[Key]:
        return (key("src", datagram.client.address),)


class SamePort:
    """A following to the follower's port."""

    def endpoint(self, server: RealServer, leader: VirtualService, follower: VirtualService) -> Endpoint:
        return Endpoint(server.address, follower.port)


def registry(**plugins: Mapping[str, object]) -> Registry:
    """The fakes above as ``first``, ``source`` and ``port``, and what is given, by kind and name."""
    own: dict[str, dict[str, object]] = {
        "scheduler": {"first": First},
        "persistence": {"source": Source},
        "following": {"port": SamePort},
        "check": {},
    }
    for kind, named in plugins.items():
        own[kind].update(named)
    return Registry(
        [Point(kind, name, plugin) for kind, named in own.items() for name, plugin in named.items()]
    )


def scheduler(pick: Callable[[Request, Sequence[Candidate]], Any]) -> type:
    """A scheduler that picks so."""
    return type("FakeScheduler", (), {"pick": lambda self, request, candidates: pick(request, candidates)})


def persistence(keys: Callable[[Datagram], Any]) -> type:
    """A persistence that has these keys."""
    return type("FakePersistence", (), {"keys": lambda self, datagram: keys(datagram)})


def servers(*names: str, address: str = "10.60.0.11", **rest: Any) -> tuple[RealServer, ...]:
    """Real servers at addresses that follow each other."""
    first = ip_address(address)
    return tuple(RealServer(name, first + n, **rest) for n, name in enumerate(names))


def leader(*real_servers: RealServer, name: str = "ike", **changes: Any) -> VirtualService:
    """A virtual service on UDP 500."""
    settings: dict[str, Any] = {
        "address": ip_address("198.18.0.1"),
        "port": 500,
        "framing": Framing.IKE,
        "scheduler": PluginRef("first"),
        "persistence": PluginRef("source"),
        "pin_timeout": 28_800.0,
        "flow_timeout": 3_600.0,
    }
    return VirtualService(name=name, real_servers=real_servers, **(settings | changes))


def follower(service: VirtualService, name: str = "ike-natt", **changes: Any) -> VirtualService:
    """A virtual service on UDP 4500 that follows the other."""
    settings: dict[str, Any] = {"port": 4500, "framing": Framing.NATT, "checks": ()}
    return replace(service, name=name, follows=service.name, **(settings | changes))


class Living:
    """A plugin of any kind whose life is recorded, and that fails as its options say."""

    lives: ClassVar[Lives]

    class Config(BaseModel, extra="forbid"):
        size: int = 0
        unopenable: bool = False
        unclosable: bool = False
        endpoint: Literal["fine", "raises", "nonsense"] = "fine"

    def __init__(self, config: Config) -> None:
        self.config = config

    def open(self) -> None:
        if self.config.unopenable:
            raise OSError("no such file")
        self.lives.open.append(self)

    def close(self) -> None:
        self.lives.open.remove(self)
        self.lives.closed.append(self)
        if self.config.unclosable:
            raise OSError("busy")

    def pick(self, request: Request, candidates: Sequence[Candidate]) -> Candidate:
        return candidates[0]

    def keys(self, datagram: Datagram) -> Sequence[Key]:
        return (key("src", datagram.client.address),)

    def endpoint(self, server: RealServer, leader: VirtualService, follower: VirtualService) -> Any:
        if self.config.endpoint == "raises":
            raise LookupError(server.name)
        if self.config.endpoint == "nonsense":
            return str(server.address), follower.port
        return Endpoint(server.address, follower.port)


class Lives:
    """Which living plugins are open, and which were closed; they are registered as ``living``."""

    def __init__(self) -> None:
        self.open: list[Living] = []
        self.closed: list[Living] = []
        cls = type("Living", (Living,), {"lives": self})
        self.registry = registry(
            **{kind: {"living": cls} for kind in ("scheduler", "persistence", "following")}
        )


def own(**options: Any) -> PluginRef:
    """A living plugin of these options."""
    return PluginRef("living", options)


def living(*real_servers: RealServer, name: str = "ike", **changes: Any) -> VirtualService:
    """A virtual service all of whose plugins are living ones."""
    plugins = {"scheduler": own(), "persistence": own(), "following": own()}
    return leader(*(real_servers or servers("gw1", "gw2")), name=name, **(plugins | changes))


def config(*services: VirtualService, **node: Any) -> Config:
    """A configuration of these services, with little room for pins."""
    return Config(Node("lb", Path("/nonexistent"), **({"max_pins": 100} | node)), services)


def datagram(
    address: str = "192.0.2.7", port: int = 500, spi: bytes = b"", service_port: int = 500
) -> Datagram:
    """A datagram from a client: IKE if it has an SPI."""
    client = Client(ip_address(address).packed, port)
    return Datagram(client, service_port, Kind.IKE if spi else Kind.ESP, spi, bytes(8) if spi else b"")


def ike_header(spi_i: bytes, spi_r: bytes = bytes(8), exchange: int = ike.Exchange.IKE_SA_INIT) -> bytes:
    """The shortest IKE message."""
    return ike.message(ike.Header(spi_i, spi_r, exchange=exchange), [])
