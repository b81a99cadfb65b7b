"""The only mutator: takes a change, validates it whole, then publishes snapshot n + 1.

Health, admin states and configuration all change here and nowhere else. A change that cannot be made
raises before anything has changed. Subscribers are told (old, new) after each publication.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

from sapin.core.affinity import AffinityTable, Feed
from sapin.core.contracts import Following, Persistence, Scheduler
from sapin.core.journal import ServerAdmin, ServerHealth
from sapin.core.model import AdminState, Config, Endpoint, Health, PluginRef, RealServer, VirtualService
from sapin.core.registry import Hosted, PluginError, Registry
from sapin.core.snapshot import Group, Member, Pool, ServiceView, Snapshot

Subscriber = Callable[[Snapshot, Snapshot], None]
Overrides = Mapping[str, Mapping[str, AdminState]]
"""Admin states set at run time, by group and server; they stand over those of the configuration."""


MakeTable = Callable[[str, int, int, Feed], AffinityTable[Member]]
"""Makes a table of pins: an :class:`AffinityTable`, or one like it, with these arguments."""


class UnknownObject(LookupError):
    """The operator named a service, server or pin that does not exist; the text says which."""

    def __str__(self) -> str:
        return str(self.args[0])


class Writer:
    """Owns the live state of the configuration.

    Args:
        registry: where plugins come from.
        feed: gets every change of every affinity table.
        config: the first configuration, already validated.
        overrides: admin states that were set at run time before a restart.
        table: what makes a table of pins.
        told: gets every change of a server's health or admin state that is made at run time.

    Raises:
        PluginError: a plugin of the configuration cannot be used.
    """

    def __init__(
        self,
        registry: Registry,
        feed: Feed,
        config: Config,
        overrides: Overrides | None = None,
        *,
        table: MakeTable = AffinityTable,
        told: Callable[[ServerHealth | ServerAdmin], None] | None = None,
    ) -> None:
        self._registry = registry
        self._feed = feed
        self._table = table
        self._told = told
        self._overrides = {group: dict(states) for group, states in (overrides or {}).items()}
        self._subscribers: list[Subscriber] = []
        self.snapshot = Snapshot(0, config, {}, {})
        self.load(config)

    @property
    def overrides(self) -> Overrides:
        """The admin states that were set at run time, for keeping them over a restart."""
        return self._overrides

    def subscribe(self, subscriber: Subscriber) -> None:
        """Have it called with the old and the new snapshot after each change."""
        self._subscribers.append(subscriber)

    def load(self, config: Config) -> None:
        """Make the configuration the running one; what it does not change keeps its live state.

        An admin state that was set at run time stands until the configuration gives the server another state
        than it gave before. The room for pins is that of the start.

        Raises:
            PluginError: a plugin cannot be used; nothing has changed.
            OSError: there is no memory for a table of pins; nothing has changed.
        """
        old = self.snapshot
        made: list[Hosted[Any]] = []
        try:
            parts = {
                name: self._parts(services, old.groups.get(name), config.node.max_pins, made)
                for name, services in config.groups().items()
            }
        except BaseException:
            for hosted in made:
                hosted.close()
            raise
        groups = {
            name: self._group(services, parts[name], old.groups.get(name))
            for name, services in config.groups().items()
        }
        self._overrides = {
            name: {s: state for s, state in self._overrides.get(name, {}).items() if s in group.members}
            for name, group in groups.items()
        }
        self._publish(Snapshot(old.version + 1, config, groups, _services(groups)))
        for group in old.groups.values():
            for member in group.members.values():
                if group.name not in groups or groups[group.name].members.get(member.name) is not member:
                    group.table.clear(member)
        kept = {id(hosted) for group in groups.values() for hosted in plugins_of(group)}
        for group in old.groups.values():
            for hosted in plugins_of(group):
                if id(hosted) not in kept:
                    hosted.close()

    def close(self) -> None:
        """Close every plugin."""
        for group in self.snapshot.groups.values():
            for hosted in plugins_of(group):
                hosted.close()

    def set_admin(self, service: str, server: str, state: AdminState) -> None:
        """Set what the operator wants of a server, in the whole affinity group of the service.

        Raises:
            UnknownObject: there is no such service or server.
        """
        view = self.snapshot.services.get(service)
        if view is None:
            known = ", ".join(self.snapshot.services) or "none"
            raise UnknownObject(f"there is no virtual service {service!r} (there is: {known})")
        member = view.group.members.get(server)
        if member is None:
            known = ", ".join(view.group.members) or "none"
            raise UnknownObject(f"service {service!r} has no real server {server!r} (it has: {known})")
        self._overrides.setdefault(view.group.name, {})[server] = state
        member.admin = state
        self._settle(view.group, member)
        if self._told:
            self._told(ServerAdmin(view.group.name, server, state))

    def set_health(self, group: str, server: str, health: Health, asked: AdminState, share: int) -> None:
        """Take over what the checks found: the server's health, and what its agent asks for."""
        found = self.snapshot.groups.get(group)
        member = found.members.get(server) if found else None
        if found is None or member is None:
            return  # a check was still on its way when a reload took the server away
        news = (health, asked, share) != (member.health, member.asked, member.share)
        member.health, member.asked, member.share = health, asked, share
        self._settle(found, member)
        if news and self._told:
            self._told(ServerHealth(group, server, health, asked, share))

    def _settle(self, group: Group, member: Member) -> None:
        before = (member.keeps, member.takes)
        member.settle()
        if before == (member.keeps, member.takes):
            return
        if not member.keeps:
            group.table.clear(member)
        old = self.snapshot
        pools = {
            v: Pool(_candidates(group.members, v, pool.candidates), pool.scheduler)
            for v, pool in group.pools.items()
        }
        groups = {**old.groups, group.name: replace(group, pools=pools)}
        self._publish(Snapshot(old.version + 1, old.config, groups, _services(groups)))

    def _publish(self, new: Snapshot) -> None:
        old, self.snapshot = self.snapshot, new
        for subscriber in self._subscribers:
            subscriber(old, new)

    def _parts(
        self, services: tuple[VirtualService, ...], old: Group | None, max_pins: int, made: list[Hosted[Any]]
    ) -> _Parts:
        """What may fail of a group: its table, and its plugins, of which new ones go to ``made`` too.

        They are the old ones where they are there, and their options are as before.
        """

        def plugin(kind: str, ref: PluginRef, kept: Hosted[Any] | None) -> Hosted[Any]:
            if kept is not None and (kept.name, kept.options) == (ref.plugin, ref.options):
                return kept
            made.append(self._registry.make(kind, ref))
            return made[-1]

        leader, followers = services[0], services[1:]
        pools, following = (old.pools, old.following) if old else ({}, {})
        timeout = math.ceil(leader.pin_timeout)
        table = old.table if old else self._table(leader.name, max_pins, timeout, self._feed)
        schedulers: dict[int, Hosted[Scheduler]] = {
            v: plugin("scheduler", leader.scheduler, pools[v].scheduler if v in pools else None)
            for v in sorted({server.address.version for server in leader.real_servers})
        }
        persistence = plugin("persistence", leader.persistence, old.persistence if old else None)
        following = {s.name: plugin("following", s.following, following.get(s.name)) for s in followers}
        return _Parts(schedulers, persistence, following, _endpoints(services, following), table)

    def _group(self, services: tuple[VirtualService, ...], parts: _Parts, old: Group | None) -> Group:
        """The group of these parts; members and pins are the old ones where they still apply."""
        leader = services[0]
        schedulers, persistence, following, endpoints, table = parts
        table.timeout = math.ceil(leader.pin_timeout)
        members = {server.name: self._member(leader, server, old) for server in leader.real_servers}
        before = old.pools if old is not None and _weights(old.leader) == _weights(leader) else {}
        pools = {
            v: Pool(_candidates(members, v, before[v].candidates if v in before else ()), scheduler)
            for v, scheduler in schedulers.items()
        }
        return Group(services, members, pools, persistence, following, endpoints, table)

    def _member(self, leader: VirtualService, server: RealServer, old: Group | None) -> Member:
        """The live record of a server; a server that has moved to another address is another one."""
        overrides = self._overrides.setdefault(leader.group, {})
        member = old.members.get(server.name) if old else None
        if member is not None and member.server.state != server.state:
            overrides.pop(server.name, None)
        if old is None or member is None or _home(member.server, old.leader) != _home(server, leader):
            member = Member(server)
        before = member.keeps
        member.server, member.weight = server, server.weight
        member.admin = overrides.get(server.name, server.state)
        member.settle()
        if before and not member.keeps and old is not None:
            old.table.clear(member)
        return member


class _Parts(NamedTuple):
    schedulers: Mapping[int, Hosted[Scheduler]]
    persistence: Hosted[Persistence]
    following: Mapping[str, Hosted[Following]]
    endpoints: Mapping[str, Mapping[str, Endpoint]]
    table: AffinityTable[Member]


def _home(server: RealServer, leader: VirtualService) -> Endpoint:
    """Where a server serves the leader of its group; one that is elsewhere is another server."""
    return Endpoint(server.address, server.port or leader.port)


def plugins_of(group: Group) -> Iterator[Hosted[Any]]:
    """Every plugin instance of the group."""
    for pool in group.pools.values():
        yield pool.scheduler
    yield group.persistence
    yield from group.following.values()


def _candidates(
    members: Mapping[str, Member], version: int, before: tuple[Member, ...]
) -> tuple[Member, ...]:
    """Who takes new clients; ``before`` itself if that is the same, since schedulers compare by identity."""
    found = tuple(member for member in members.values() if member.takes and member.version == version)
    return before if found == before else found


def _weights(service: VirtualService) -> Mapping[str, int]:
    return {server.name: server.weight for server in service.real_servers}


def _services(groups: Mapping[str, Group]) -> Mapping[str, ServiceView]:
    return {
        service.name: ServiceView(service, group) for group in groups.values() for service in group.services
    }


def _endpoints(
    services: tuple[VirtualService, ...], following: Mapping[str, Hosted[Following]]
) -> Mapping[str, Mapping[str, Endpoint]]:
    """Where each real server serves each service of the group.

    Raises:
        PluginError: a following plugin raised, or answered something else than an endpoint.
    """
    leader = services[0]
    servers = leader.real_servers
    endpoints = {leader.name: {server.name: _home(server, leader) for server in servers}}
    for follower in services[1:]:
        hosted = following[follower.name]
        try:
            found = {s.name: hosted.plugin.endpoint(s, leader, follower) for s in servers}
        except Exception as error:
            raise PluginError(
                f"following plugin {hosted.name!r} of {follower.name!r} failed: {error!r}"
            ) from error
        for server, endpoint in found.items():
            if not isinstance(endpoint, Endpoint):
                raise PluginError(
                    f"following plugin {hosted.name!r} of {follower.name!r} answered {endpoint!r} for {server!r}, "
                    "which is not an Endpoint"
                )
        endpoints[follower.name] = found
    return endpoints
