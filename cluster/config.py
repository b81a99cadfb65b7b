"""The ``[cluster]`` table of the configuration: what a node is told of its pair.

What is secret, and what the peer says of itself, is not in the file but in the state directory, where
``sapin cluster init`` and ``join`` put it (:mod:`sapin.cluster.certificates`).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from ipaddress import IPv4Interface, IPv6Interface, ip_interface
from typing import Annotated, ClassVar

from pydantic import AfterValidator, BeforeValidator, Field

from sapin.core.faults import Loc, Report, show
from sapin.core.model import IPAddress
from sapin.core.schema import Document, Port, Section, ServiceTable, Table, Tables, parse_server_address
from sapin.core.units import Duration

Interface = IPv4Interface | IPv6Interface

HEARTBEAT = (0.01, 10.0)
"""Seconds between two heartbeats, at least and at most."""
SYNC_TIMEOUT = (0.001, 1.0)
"""Seconds that a reply may wait for the peer, at least and at most."""
DEFAULT_PORT = 4510
"""Of the link (TCP) and of the beacons (UDP)."""
MAX_LINKS = 4
MAX_VIRTUAL_ADDRESSES = 64

_DEVICE = re.compile(r"[^/:\s\x00-\x1f\x7f]{1,15}")
"""dev_valid_name in Linux's net/core/dev.c, IFNAMSIZ in linux/if.h; an alias after a colon is no device."""


class Takeover(StrEnum):
    """Who moves the virtual addresses."""

    NETLINK = "netlink"
    """The node itself."""
    KEEPALIVED = "keepalived"
    """keepalived, by VRRP."""
    NONE = "none"
    """Something else; the node follows what it sees on its devices."""


class Side(StrEnum):
    """Who speaks to a virtual address."""

    CLIENTS = "clients"
    SERVERS = "servers"
    """It is the address that real servers see datagrams come from, and the next hop of their replies."""


@dataclass(frozen=True, slots=True)
class VirtualAddress:
    """An address that the active node has."""

    interface: Interface
    """The address, and the length of its network's prefix."""
    device: str
    side: Side = Side.CLIENTS

    @property
    def address(self) -> IPAddress:
        """The address alone."""
        return self.interface.ip


@dataclass(frozen=True, slots=True)
class Cluster:
    """This node's part of the pair; times in seconds."""

    links: tuple[IPAddress, ...]
    """Own addresses of the cluster's links, the preferred one first."""
    virtual_addresses: tuple[VirtualAddress, ...]
    port: int = DEFAULT_PORT
    priority: int = 100
    """The higher one becomes active where nothing else decides."""
    preempt: bool = False
    """Whether the node of the higher priority asks for its role back."""
    heartbeat: float = 0.025
    missed: int = 3
    """So many heartbeats in a row are missed before the peer counts as silent."""
    sync_timeout: float = 0.02
    takeover: Takeover = Takeover.NETLINK

    @property
    def floating(self) -> Mapping[int, IPAddress]:
        """The source of what goes to real servers, by address family."""
        servers = [each.address for each in self.virtual_addresses if each.side is Side.SERVERS]
        return {address.version: address for address in reversed(servers)}


def _interface(value: object) -> Interface:
    try:
        if not isinstance(value, str) or "/" not in value:
            raise ValueError
        found = ip_interface(value)
    except ValueError:
        raise ValueError("must be an address and the length of its prefix, like 198.18.0.1/24") from None
    _own_address(str(found.ip))
    return found


def _own_address(value: object) -> IPAddress:
    """An address that a node can have."""
    try:
        return parse_server_address(value)
    except ValueError as error:
        raise ValueError(str(error).replace("which no server has", "which no node has")) from None


def _device(value: str) -> str:
    if not _DEVICE.fullmatch(value) or value in (".", ".."):
        raise ValueError(
            "must be the name of a network device, like eth0: 1 to 15 characters without / : or space"
        )
    return value


def _between(bounds: tuple[float, float], text: str) -> AfterValidator:
    def check(value: float) -> float:
        if not bounds[0] <= value <= bounds[1]:
            raise ValueError(f"must be from {text}")
        return value

    return AfterValidator(check)


class VirtualAddressTable(Table):
    """A virtual address."""

    required = ("address", "device")
    address: Annotated[Interface, BeforeValidator(_interface)] | None = None
    device: Annotated[str, AfterValidator(_device)] | None = None
    side: Annotated[Side, Field(strict=False)] | None = None

    def virtual_address(self) -> VirtualAddress:
        """The virtual address that the table describes."""
        assert self.address is not None
        assert self.device is not None
        return VirtualAddress(self.address, self.device, **self.stated("side"))


class ClusterTable(Section):
    """The ``[cluster]`` table."""

    required = ("links", "virtual_addresses")
    tables: ClassVar[Tables] = {("virtual_addresses",): VirtualAddressTable}
    links: (
        Annotated[
            list[Annotated[IPAddress, BeforeValidator(_own_address)]],
            Field(min_length=1, max_length=MAX_LINKS),
        ]
        | None
    ) = None
    port: Port | None = None
    priority: Annotated[int, Field(ge=1, le=255)] | None = None
    preempt: bool | None = None
    heartbeat: Annotated[Duration, _between(HEARTBEAT, "10 ms to 10 s")] | None = None
    missed: Annotated[int, Field(ge=2, le=100)] | None = None
    sync_timeout: Annotated[Duration, _between(SYNC_TIMEOUT, "1 ms to 1 s")] | None = None
    takeover: Annotated[Takeover, Field(strict=False)] | None = None
    virtual_addresses: (
        Annotated[list[VirtualAddressTable], Field(min_length=1, max_length=MAX_VIRTUAL_ADDRESSES)] | None
    ) = None

    def check(self, loc: Loc, document: Document, report: Report) -> None:
        """Report every rule that the table breaks."""
        services = document.virtual_services or []
        whole = self._whole(loc, report)
        self._check_links(loc, report)
        self._check_duplicates(loc, report)
        self._check_port(loc, services, report)
        if whole:
            self._check_listening(services, report)
            self._check_sources(loc, services, report)

    def build(self) -> Cluster:
        """The pair that the table describes."""
        keys = ("port", "priority", "preempt", "heartbeat", "missed", "sync_timeout", "takeover")
        tables = self.virtual_addresses or []
        return Cluster(
            tuple(self.links or ()), tuple(each.virtual_address() for each in tables), **self.stated(*keys)
        )

    def _addresses(self) -> Iterator[tuple[int, VirtualAddressTable, IPAddress]]:
        for index, table in enumerate(self.virtual_addresses or []):
            if table.address is not None:
                yield index, table, table.address.ip

    def _whole(self, loc: Loc, report: Report) -> bool:
        """Whether all is known of the virtual addresses: a refused one might be the one that is missed."""
        tables = enumerate(self.virtual_addresses or [])
        places = [(*loc, "virtual_addresses", n, key) for n, _ in tables for key in ("address", "side")]
        return bool(places) and not any(map(report.blames, places))

    def _check_links(self, loc: Loc, report: Report) -> None:
        seen: dict[IPAddress, int] = {}
        virtual = {address: index for index, _, address in self._addresses()}
        for index, link in enumerate(self.links or []):
            if (first := seen.setdefault(link, index)) != index:
                report.add((*loc, "links", index), f"is links[{first}] already")
            elif link in virtual:
                report.add(
                    (*loc, "links", index),
                    f"is virtual_addresses[{virtual[link]}]: a link is an address that the node always has",
                )

    def _check_duplicates(self, loc: Loc, report: Report) -> None:
        seen: dict[IPAddress, int] = {}
        for index, _, address in self._addresses():
            if (first := seen.setdefault(address, index)) != index:
                report.add(
                    (*loc, "virtual_addresses", index, "address"), f"is virtual_addresses[{first}] already"
                )

    def _check_port(self, loc: Loc, services: Sequence[ServiceTable], report: Report) -> None:
        """The beacons are on UDP, at the links and at the virtual addresses."""
        port = DEFAULT_PORT if self.port is None else self.port
        ours = {address for _, _, address in self._addresses()} | set(self.links or [])
        for service in services:
            address = service.address
            if service.port == port and address is not None and (address in ours or address.is_unspecified):
                report.add(
                    (*loc, "port"),
                    f"is taken: {_named(service)} is at this port, which the cluster needs for itself",
                )

    def _check_listening(self, services: Sequence[ServiceTable], report: Report) -> None:
        """Where the node moves the addresses itself, each service must be at one that it moves."""
        if self.takeover not in (None, Takeover.NETLINK):
            return
        moved = {address for _, _, address in self._addresses()}
        for index, service in enumerate(services):
            address = service.address
            if address is None or address.is_unspecified or address in moved:
                continue
            report.add(
                ("virtual_services", index, "address"),
                f"is none of cluster.virtual_addresses, so {_named(service)} would stay behind at a takeover",
            )

    def _check_sources(self, loc: Loc, services: Sequence[ServiceTable], report: Report) -> None:
        """In nat mode a server knows a tunnel by where it comes from: that address has to move too."""
        floating = {a.version for _, table, a in self._addresses() if table.side is Side.SERVERS}
        missed: dict[int, ServiceTable] = {}
        for service in services:
            for server in service.real_servers or []:
                if service.source in (None, "nat") and server.address is not None:
                    missed.setdefault(server.address.version, service)
        for version in sorted(missed.keys() - floating):
            report.add(
                (*loc, "virtual_addresses"),
                f'has no IPv{version} address with side = "servers", which the real servers of '
                f"{_named(missed[version])} must see their datagrams come from",
            )


def _named(service: ServiceTable) -> str:
    return "a virtual service" if service.name is None else show(service.name)
