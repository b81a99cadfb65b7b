"""What the tables of a configuration must be to one another, and to the plugins that they name.

Each rule looks at what the schema has left (:mod:`sapin.core.schema`): a key that is absent or was refused
is ``None`` here, and no rule speaks of it, so that one mistake is one fault.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from ipaddress import IPv4Address, IPv6Address
from typing import Literal, NamedTuple, Protocol, TypeVar

from pydantic import BaseModel, ValidationError
from pydantic_core import to_json

from sapin.core.faults import Loc, Report, reason, show, suggest
from sapin.core.model import AdminState, Endpoint, IPAddress, PluginRef
from sapin.core.schema import (
    DEFAULT_PERSISTENCE,
    DEFAULT_SCHEDULER,
    PluginTable,
    ServerTable,
    ServiceTable,
    families,
)

_SHARED = {"address": None, "port": None, "weight": 1, "state": AdminState.ENABLED}
"""What leader and follower agree on for a server, and what each key is when it is absent."""
_WILDCARDS: dict[int, tuple[IPAddress, ...]] = {4: (IPv4Address(0), IPv6Address(0)), 6: (IPv6Address(0),)}
"""Addresses whose sockets take datagrams of a family, whatever address of the node they are for."""


class PluginCatalogue(Protocol):
    """The plugins that a configuration may name; kinds are those of ``sapin.core.contracts.KINDS``."""

    def names(self, kind: str) -> Sequence[str]:
        """The names of all plugins of that kind."""
        ...

    def config_model(self, kind: str, name: str) -> type[BaseModel] | None:
        """The model of a plugin's options, ``None`` for a plugin that takes none.

        Raises:
            Exception: the plugin cannot be used; the text says why.
        """
        ...


class _Server(NamedTuple):
    """A real server and where it stands."""

    loc: Loc
    table: ServerTable


class _Service(NamedTuple):
    """A virtual service and where it stands."""

    loc: Loc
    table: ServiceTable
    servers: tuple[_Server, ...]

    def __str__(self) -> str:
        return "another service" if self.table.name is None else show(self.table.name)


_Entry = TypeVar("_Entry", _Server, _Service)
_Listening = Mapping[tuple[IPAddress | None, int | None], _Service]


def check_services(tables: Sequence[ServiceTable], plugins: PluginCatalogue, report: Report) -> None:
    """Report every rule that a virtual service breaks."""
    services = [_service(index, table) for index, table in enumerate(tables)]
    named = _by_name(services)
    listening = {(service.table.address, service.table.port): service for service in services}
    _check_names(services, report)
    _check_endpoints(services, report)
    for service in services:
        if service.table.follows is None:
            _check_leader(service, report)
            _check_server_endpoints(service, listening, report)
        elif leader := _leader(service, named, report):
            _check_follower(service, leader, report)
            _check_followed_endpoints(service, leader, listening, report)
        _check_servers(service, report)
        for loc, kind, table in _plugin_tables(service):
            _check_plugin(loc, kind, table, plugins, report)


def _service(index: int, table: ServiceTable) -> _Service:
    loc: Loc = ("virtual_services", index)
    servers = enumerate(table.real_servers or [])
    return _Service(loc, table, tuple(_Server((*loc, "real_servers", n), server) for n, server in servers))


def _by_name(entries: Sequence[_Entry]) -> dict[str | None, _Entry]:
    """Entries by name, the first where one is there twice; ``None`` where one has none."""
    return {entry.table.name: entry for entry in reversed(entries)}


def _check_names(services: Sequence[_Service], report: Report) -> None:
    seen: dict[str, int] = {}
    for index, service in enumerate(services):
        name = service.table.name
        if name is not None and (first := seen.setdefault(name, index)) != index:
            report.add((*service.loc, "name"), f"is the name of virtual_services[{first}] already")


def _check_endpoints(services: Sequence[_Service], report: Report) -> None:
    """No datagram belongs to two services."""
    seen: dict[int, list[tuple[IPAddress, _Service]]] = {}
    for service in services:
        address, port = service.table.address, service.table.port
        if address is None or port is None:
            continue
        earlier = seen.setdefault(port, [])
        for taken, other in earlier:
            if _overlap(address, taken):
                report.add((*service.loc, "port"), f"is taken: {other} is at {Endpoint(taken, port)}")
                break
        earlier.append((address, service))


def _overlap(one: IPAddress, other: IPAddress) -> bool:
    """Whether sockets on the two would take the same datagrams."""
    return one == other or any(
        wide.is_unspecified and narrow.version in families(wide)
        for wide, narrow in ((one, other), (other, one))
    )


# Real servers


def _check_leader(service: _Service, report: Report) -> None:
    servers = (*service.loc, "real_servers")
    if service.table.real_servers is None and not report.blames(servers):
        report.add(servers, "is missing; a service has real servers, or follows one that has")
    if service.table.following is not None:
        report.add((*service.loc, "following"), "has no meaning in a service that does not follow another")


def _check_servers(service: _Service, report: Report) -> None:
    names: dict[str, int] = {}
    for index, (loc, server) in enumerate(service.servers):
        if server.name is not None and (first := names.setdefault(server.name, index)) != index:
            report.add((*loc, "name"), f"is the name of real_servers[{first}] already")
        mine, its = service.table.address, server.address
        if mine is not None and its is not None and its.version not in families(mine):
            report.add((*loc, "address"), f"is IPv{its.version}, but the service is at {mine}")


def _check_server_endpoints(service: _Service, listening: _Listening, report: Report) -> None:
    seen: dict[Endpoint, int] = {}
    for index, (loc, server) in enumerate(service.servers):
        port = server.port or service.table.port
        if server.address is None or port is None:
            continue
        endpoint = Endpoint(server.address, port)
        if (first := seen.setdefault(endpoint, index)) != index:
            report.add((*loc, "address"), f"leads to {endpoint}, as real_servers[{first}] does already")
        if other := _listener(endpoint, listening):
            report.add(
                (*loc, "address"), f"leads to {endpoint}, which is {other}: datagrams would go in circles"
            )


def _listener(endpoint: Endpoint, listening: _Listening) -> _Service | None:
    """The service that takes what is sent there, as far as a file can tell."""
    address, port = endpoint
    everywhere = _WILDCARDS[address.version] if address.is_loopback else ()
    found = (listening.get((each, port)) for each in (address, *everywhere))
    return next((service for service in found if service), None)


# Leaders and followers


def _leader(service: _Service, named: Mapping[str | None, _Service], report: Report) -> _Service | None:
    """The service that this one may follow, if it names such a one."""
    loc = (*service.loc, "follows")
    follows = service.table.follows or ""
    leader = named.get(follows)
    if follows == service.table.name:
        report.add(loc, "is the service itself")
    elif leader is None:
        others = sorted(name for name in named if name and name != service.table.name)
        report.add(loc, f"there is no virtual service of that name; {suggest(follows, others)}")
    elif leader.table.follows is not None:
        report.add(loc, f"{leader} follows {show(leader.table.follows)}; follow a service that follows none")
    else:
        return leader
    return None


def _check_follower(service: _Service, leader: _Service, report: Report) -> None:
    _check_same_plugin("scheduler", DEFAULT_SCHEDULER, service, leader, report)
    _check_same_plugin("persistence", DEFAULT_PERSISTENCE, service, leader, report)
    _check_same_timeout(service, leader, report)
    if service.table.real_servers is None:
        _check_inherited(service, leader, report)
    else:
        _check_same_servers(service, leader, report)


def _check_followed_endpoints(
    service: _Service, leader: _Service, listening: _Listening, report: Report
) -> None:
    """By default the leader's servers are reached at their addresses, on the follower's port."""
    port, following = service.table.port, service.table.following
    if port is None or (following is not None and (following.plugin != "port" or following.options)):
        return
    loc = (*service.loc, "port")
    seen: dict[IPAddress, str | None] = {}
    for _, server in leader.servers:
        if server.address is None:
            continue
        name, endpoint = server.name, Endpoint(server.address, port)
        if (first := seen.setdefault(server.address, name)) != name:
            report.add(loc, f"leads {first} and {name} of {leader} both to {endpoint}")
            return
        if other := _listener(endpoint, listening):
            report.add(loc, f"leads {name} to {endpoint}, which is {other}: datagrams would go in circles")
            return


def _check_same_plugin(
    key: str, default: PluginRef, service: _Service, leader: _Service, report: Report
) -> None:
    mine: PluginTable | None = getattr(service.table, key)
    its: PluginTable | None = getattr(leader.table, key)
    if (
        mine is None
        or report.blames((*service.loc, key, "plugin"))
        or report.blames((*leader.loc, key, "plugin"))
    ):
        return
    inherited = default if its is None else its.ref()
    if mine.plugin != inherited.plugin:
        report.add((*service.loc, key), f"differs from {leader}, which has {show(inherited.plugin)}")
    elif mine.options != inherited.options:
        report.add((*service.loc, key), f"differs in its options from {leader}; leave it out to inherit them")


def _check_same_timeout(service: _Service, leader: _Service, report: Report) -> None:
    mine, its = service.table.persistence, leader.table.pin_timeout()
    if mine is None or report.blames((*leader.loc, "persistence", "timeout")):
        return
    if mine.timeout is not None and mine.timeout != its:
        report.add((*service.loc, "persistence", "timeout"), f"differs from {leader}, which has {its:g} s")


def _check_inherited(service: _Service, leader: _Service, report: Report) -> None:
    address = service.table.address
    for _, server in leader.servers:
        if address and server.address and server.address.version not in families(address):
            version = server.address.version
            report.add((*service.loc, "address"), f"cannot be served by the IPv{version} servers of {leader}")
            return


def _check_same_servers(service: _Service, leader: _Service, report: Report) -> None:
    """A follower that lists servers lists its leader's; only the ports are its own."""
    mine, theirs = _by_name(service.servers), _by_name(leader.servers)
    if not theirs or None in theirs or None in mine:
        return
    for name, server in mine.items():
        if name in theirs:
            _check_same_server(server, theirs[name], leader, report)
        else:
            report.add((*server.loc, "name"), f"is not among the real servers of {leader}")
    for name in theirs:
        if name not in mine:
            report.add((*service.loc, "real_servers"), f"lacks {show(name)}, a real server of {leader}")


def _check_same_server(mine: _Server, its: _Server, leader: _Service, report: Report) -> None:
    for key, default in _SHARED.items():
        if report.blames((*mine.loc, key)) or report.blames((*its.loc, key)):
            continue
        stated, inherited = (getattr(server.table, key) for server in (mine, its))
        expected = default if inherited is None else inherited
        if (default if stated is None else stated) != expected:
            report.add((*mine.loc, key), f"differs from {leader}, which has {show(expected)}")


# Plugins


def _plugin_tables(service: _Service) -> Iterator[tuple[Loc, str, PluginTable]]:
    for kind in ("scheduler", "persistence", "following"):
        table = getattr(service.table, kind)
        if table is not None:
            yield (*service.loc, kind), kind, table
    for index, check in enumerate(service.table.checks or []):
        yield (*service.loc, "checks", index), "check", check


def _check_plugin(loc: Loc, kind: str, table: PluginTable, plugins: PluginCatalogue, report: Report) -> None:
    if table.plugin is None:
        return
    names = plugins.names(kind)
    if table.plugin not in names:
        report.add(
            (*loc, "plugin"), f"there is no {kind} plugin of that name; {suggest(table.plugin, names)}"
        )
        return
    try:
        model = plugins.config_model(kind, table.plugin)
    except Exception as error:
        report.add((*loc, "plugin"), str(error))
        return
    _check_options(loc, table, model or _NoOptions, report)


def _check_options(loc: Loc, table: PluginTable, model: type[BaseModel], report: Report) -> None:
    plugin = f"plugin {show(table.plugin)}"
    # Strict as JSON, which has lists for tuples and strings for paths, as TOML has.
    # A model that says nothing of unknown keys would drop them, and with them a misspelt option.
    extra: Literal["allow", "forbid"] = "allow" if model.model_config.get("extra") == "allow" else "forbid"
    try:
        model.model_validate_json(to_json(table.options, inf_nan_mode="constants"), strict=True, extra=extra)
    except ValidationError as failure:
        known = [*type(table).model_fields, *model.model_fields]
        for error in failure.errors(include_url=False, include_input=False):
            unknown = error["type"] == "extra_forbidden" and len(error["loc"]) == 1
            why = f"unknown option; {suggest(str(error['loc'][0]), known)}" if unknown else reason(error)
            report.add((*loc, *error["loc"]), f"{plugin}: {why}")
    except Exception as error:
        report.add(loc, f"{plugin} failed on its options: {type(error).__name__}: {error}")


class _NoOptions(BaseModel):
    """The options of a plugin that takes none."""
