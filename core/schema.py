"""The configuration file as pydantic models: what each key may hold, looked at by itself.

Nothing is required here and every default is absent, so that a table of which one key is wrong can still
be held against its neighbours (:mod:`sapin.core.config`), and one reading finds every fault.
"""

from __future__ import annotations

import re
from abc import abstractmethod
from collections.abc import Mapping
from ipaddress import IPv6Address, ip_address
from typing import Annotated, Any, ClassVar, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    create_model,
    model_validator,
)

from sapin.core.faults import Loc, Report
from sapin.core.model import AdminState, CheckSpec, Framing, IPAddress, PluginRef, RealServer
from sapin.core.units import Duration, Size

MIN_FLOW_TIMEOUT = 60
"""Seconds; well above the 20 s between NAT keepalives (RFC 3948 section 4)."""
MIN_INTERVAL = 0.1
"""Seconds between two checks of a server, at least."""
MAX_STATE_DIR = 90
"""Bytes; the path of a Unix socket in it must stay below 108 (unix(7))."""

DEFAULT_SCHEDULER = PluginRef("least-connections")
DEFAULT_PERSISTENCE = PluginRef("source-address")
DEFAULT_FOLLOWING = PluginRef("port")
DEFAULT_PIN_TIMEOUT = 8 * 3_600.0
"""Seconds; idle security associations live for hours."""
DEFAULT_FLOW_TIMEOUT = 3_600.0
"""Seconds; far longer than the 20 s between NAT keepalives (RFC 3948 section 4)."""

_NAME = re.compile(r"[A-Za-z0-9._-]{1,63}")


def parse_address(value: object) -> IPAddress:
    """An address that datagrams can be sent to or received on; the wildcards are among them.

    Raises:
        ValueError: it is no address, or none of that use.
    """
    try:
        found = ip_address(value) if isinstance(value, str) else None
    except ValueError:
        found = None
    if found is None:
        raise ValueError("must be an IPv4 or IPv6 address")
    if found.is_multicast:
        raise ValueError("is a multicast address")
    if str(found) == "255.255.255.255":
        raise ValueError("is the broadcast address")
    if isinstance(found, IPv6Address):
        _refuse_odd_ipv6(found)
    return found


def parse_server_address(value: object) -> IPAddress:
    """The address of a real server.

    Raises:
        ValueError: it is no address, or one that no single machine has.
    """
    found = parse_address(value)
    if found.is_unspecified:
        raise ValueError("is the unspecified address, which no server has")
    return found


def families(vip: IPAddress) -> tuple[int, ...]:
    """The address families of the clients that reach a service on ``vip``; ``::`` is dual-stack."""
    return (4, 6) if vip.version == 6 and vip.is_unspecified else (vip.version,)


def _refuse_odd_ipv6(found: IPv6Address) -> None:
    if found.ipv4_mapped is not None:
        raise ValueError(f"is an IPv4 address in IPv6 form; write {found.ipv4_mapped}")
    if found.scope_id is not None or found.is_link_local:
        raise ValueError(
            "is a link-local address, which is of no use without a zone; zones are not supported"
        )


def _name(value: str) -> str:
    if not _NAME.fullmatch(value):
        raise ValueError("must be 1 to 63 of the characters A-Z a-z 0-9 . _ -")
    return value


def _source(value: str) -> str:
    if value == "transparent":
        raise ValueError('is not available in this version; use "nat"')
    if value != "nat":
        raise ValueError('must be "nat"')
    return value


def _state_dir(value: str) -> str:
    if not value.startswith("/") or not value.isprintable():
        raise ValueError("must be an absolute path")
    if len(value.encode()) > MAX_STATE_DIR:
        raise ValueError(f"must have at most {MAX_STATE_DIR} bytes, as a Unix socket is kept in it")
    return value


def _flow_timeout(value: float) -> float:
    if value < MIN_FLOW_TIMEOUT:
        raise ValueError(f"must be at least {MIN_FLOW_TIMEOUT} s, well above the 20 s of a NAT keepalive")
    return value


def _interval(value: float) -> float:
    if value < MIN_INTERVAL:
        raise ValueError("must be at least 100 ms")
    return value


Name = Annotated[str, AfterValidator(_name)]
Port = Annotated[int, Field(ge=1, le=65_535)]


class Table(BaseModel):
    """A table of the file; unknown keys are refused and no type is converted."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)
    required: ClassVar[tuple[str, ...]] = ()
    """Keys without which the table means nothing."""

    def stated(self, *keys: str) -> dict[str, Any]:
        """Those of the keys that the table holds, for a constructor that has the defaults."""
        return {key: value for key in keys if (value := getattr(self, key)) is not None}


class PluginTable(Table):
    """A plugin by its name alone, or by a table of its name and options."""

    model_config = ConfigDict(extra="allow")
    required = ("plugin",)
    plugin: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _bare_name(cls, value: object) -> object:
        if isinstance(value, str):
            return {"plugin": value}
        if not isinstance(value, dict):
            raise ValueError("must be the name of a plugin, or a table with it")
        return value

    @property
    def options(self) -> dict[str, Any]:
        """What the table holds for the plugin's own ``Config``."""
        return dict(self.model_extra or {})

    def ref(self) -> PluginRef:
        """The plugin that the table names."""
        assert self.plugin is not None
        return PluginRef(self.plugin, self.options)


class PersistenceTable(PluginTable):
    """A persistence plugin, and how long its pins last."""

    timeout: Duration | None = None


class CheckTable(PluginTable):
    """A health check, and its times."""

    interval: Annotated[Duration, AfterValidator(_interval)] | None = None
    timeout: Duration | None = None
    rise: Annotated[int, Field(ge=1, le=1_000)] | None = None
    fall: Annotated[int, Field(ge=1, le=1_000)] | None = None
    jitter: Annotated[float, Field(ge=0, le=0.5, allow_inf_nan=False)] | None = None

    def spec(self) -> CheckSpec:
        """The check that the table describes."""
        return CheckSpec(self.ref(), **self.stated("interval", "timeout", "rise", "fall", "jitter"))


class ServerTable(Table):
    """A real server."""

    required = ("name", "address")
    name: Name | None = None
    address: Annotated[IPAddress, BeforeValidator(parse_server_address)] | None = None
    port: Port | None = None
    weight: Annotated[int, Field(ge=0, le=65_535)] | None = None
    state: Annotated[AdminState, Field(strict=False)] | None = None

    def server(self) -> RealServer:
        """The real server that the table describes."""
        assert self.name is not None
        assert self.address is not None
        return RealServer(self.name, self.address, **self.stated("port", "weight", "state"))


class ServiceTable(Table):
    """A virtual service."""

    required = ("name", "address", "port")
    name: Name | None = None
    address: Annotated[IPAddress, BeforeValidator(parse_address)] | None = None
    port: Port | None = None
    protocol: Literal["udp"] | None = None
    framing: Annotated[Framing, Field(strict=False)] | None = None
    source: Annotated[str, AfterValidator(_source)] | None = None
    scheduler: PluginTable | None = None
    persistence: PersistenceTable | None = None
    checks: Annotated[list[CheckTable], Field(max_length=16)] | None = None
    flow_timeout: Annotated[Duration, AfterValidator(_flow_timeout)] | None = None
    follows: Name | None = None
    following: PluginTable | None = None
    real_servers: Annotated[list[ServerTable], Field(min_length=1, max_length=4_096)] | None = None

    def scheduler_ref(self) -> PluginRef:
        """The scheduler, stated or by default."""
        return self.scheduler.ref() if self.scheduler else DEFAULT_SCHEDULER

    def persistence_ref(self) -> PluginRef:
        """The persistence, stated or by default."""
        return self.persistence.ref() if self.persistence else DEFAULT_PERSISTENCE

    def pin_timeout(self) -> float:
        """Seconds that a pin lasts, stated or by default."""
        stated = self.persistence.timeout if self.persistence else None
        return DEFAULT_PIN_TIMEOUT if stated is None else stated


class NodeTable(Table):
    """This balancer."""

    required = ("name",)
    name: Name | None = None
    state_dir: Annotated[str, AfterValidator(_state_dir)] | None = None
    max_pins: Annotated[int, Field(ge=1, le=10_000_000)] | None = None
    max_flows: Annotated[int, Field(ge=1, le=1_000_000)] | None = None
    receive_buffer: Annotated[Size, Field(ge=4_096, le=2**30)] | None = None


class Document(Table):
    """The whole file."""

    required = ("node",)
    node: NodeTable | None = None
    virtual_services: Annotated[list[ServiceTable], Field(max_length=1_024)] | None = None


Tables = Mapping[tuple[str, ...], type[Table]]
"""The tables that refuse unknown keys, by the keys that lead to them."""

TABLES: Tables = {
    (): Document,
    ("node",): NodeTable,
    ("virtual_services",): ServiceTable,
    ("virtual_services", "real_servers"): ServerTable,
}


class Section(Table):
    """A table of the file that is somebody else's, who says what may be in it, by itself and beside the rest.

    What it becomes is in ``Config.sections`` under the table's name.
    """

    tables: ClassVar[Tables] = {}
    """The tables inside it, by the keys that lead to them from here."""

    def check(self, loc: Loc, document: Document, report: Report) -> None:
        """Report every rule that the section, which stands at ``loc``, breaks.

        As everywhere, a key that is absent or was refused is ``None``.
        """

    @abstractmethod
    def build(self) -> object:
        """The frozen value that the section describes, once the document has no fault."""


def with_sections(sections: Mapping[str, type[Section]]) -> tuple[type[Document], Tables]:
    """The document that may have these sections too, by their names, and its tables."""
    if not sections:
        return Document, TABLES
    fields: dict[str, Any] = {name: (section | None, None) for name, section in sections.items()}
    document = create_model("Document", __base__=Document, **fields)
    tables = {(): document} | {
        (name, *path): table
        for name, section in sections.items()
        for path, table in ({(): section} | dict(section.tables)).items()
    }
    return document, {**TABLES, **tables}
