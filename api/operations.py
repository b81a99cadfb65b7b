"""What an operator can ask of a running node, as plain data: the one list of operations behind every way in.

Each operation takes and gives JSON-able values. The control socket offers them to the command line by name;
whatever else will let people in calls the same ones.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict
from importlib.metadata import version
from ipaddress import IPv4Address, IPv6Address, ip_address
from pathlib import Path
from random import Random
from typing import Any

import trio

from sapin.api.cluster_operations import ClusterOperations
from sapin.api.keys import client_of, parse_key, show_key
from sapin.api.refused import Refused
from sapin.api.reloading import ReloadError, reload
from sapin.cluster.node import Node
from sapin.core import balancer, ike
from sapin.core.affinity import Pin
from sapin.core.contracts import KINDS, Client, Datagram, Key
from sapin.core.dataplane.batch import peer_address
from sapin.core.dataplane.flows import Counters, Flow
from sapin.core.dataplane.runtime import Dataplane
from sapin.core.model import AdminState, VirtualService
from sapin.core.registry import Hosted, Registry
from sapin.core.snapshot import Group, Member, Pool, ServiceView
from sapin.core.writer import UnknownObject, plugins_of

PAGE = 500
"""Pins or flows in one answer, at most."""
STEP = 100
"""Pins or flows that are looked at between two checkpoints: well below a millisecond."""
MAX_STEPS = 1000
"""Steps in one answer; a search over more goes on at the answer's cursor."""

Row = dict[str, Any]


class Operations:
    """The operations of one node.

    Args:
        config_path: the file that ``reload`` reads.
        node: this node's part of a pair, if there is one.
    """

    def __init__(
        self, dataplane: Dataplane, registry: Registry, config_path: Path, node: Node | None = None
    ) -> None:
        self._dataplane = dataplane
        self._registry = registry
        self._path = config_path
        self._node = node

    def table(self) -> Mapping[str, Callable[..., Any]]:
        """The operations by the names that the control socket knows them by."""
        return {
            "status": self.status,
            "explain": self.explain,
            "pins": self.pins,
            "delete-pins": self.delete_pins,
            "set-state": self.set_state,
            "reload": self.reload,
            "plugins": self.plugins,
            **ClusterOperations(self._node).table(),
        }

    # seeing

    def status(self) -> Row:
        """Node, services, servers, health, counters: everything but pins and flows themselves."""
        plane = self._dataplane
        snapshot = plane.snapshot
        return {
            "node": snapshot.config.node.name,
            "version": version("sapin"),
            "snapshot": snapshot.version,
            "time": plane.clock(),
            "started": plane.started,
            "flows": len(plane.forwarder.flows),
            "max_flows": plane.forwarder.flows.limit,
            "drops": dict(plane.forwarder.drops),
            "failures": dict(plane.failures),
            "icmp_errors": dict(plane.forwarder.errors),
            "store": {**asdict(plane.store.statistics), "failed": plane.store.failed},
            "groups": [self._group(group) for group in snapshot.groups.values()],
        }

    def _group(self, group: Group) -> Row:
        return {
            "name": group.name,
            "scheduler": group.leader.scheduler.plugin,
            "persistence": group.persistence.name,
            "pins": asdict(group.table.stats()),
            "services": [self._service(service, group) for service in group.services],
            "servers": [self._server(member, group) for member in group.members.values()],
        }

    def _service(self, service: VirtualService, group: Group) -> Row:
        counters = self._dataplane.counters(service.name)
        decisions = self._dataplane.forwarder.admission.decisions
        return {
            "name": service.name,
            "address": str(service.address),
            "port": service.port,
            "protocol": service.protocol,
            "framing": str(service.framing),
            "follows": service.follows,
            **_sum(counters.values()),
            "decisions": {
                str(r): decisions[service.name, r] for r in balancer.Reason if decisions[service.name, r]
            },
        }

    def _server(self, member: Member, group: Group) -> Row:
        names = [service.name for service in group.services]
        return {
            "name": member.name,
            "endpoints": {name: str(group.endpoints[name][member.name]) for name in names},
            "weight": member.weight,
            "state": str(member.admin),
            "asked": str(member.asked),
            "share": member.share,
            "health": str(member.health),
            "takes_new_clients": member.takes,
            "pinned": member.pinned,
            "response_time": member.response_time,
            **_sum(self._dataplane.counters(name)[member.name] for name in names),
            "checks": [row for name in names for row in self._checks(name, member)],
        }

    def _checks(self, service: str, member: Member) -> Iterator[Row]:
        for finding in self._dataplane.prober.findings:
            probe = finding.probe
            if probe.service == service and probe.target.server == member.name:
                last = finding.last
                yield {
                    "service": service,
                    "check": probe.spec.ref.plugin,
                    "health": str(finding.state.health),
                    "reason": last.reason if last else "not checked yet",
                    "round_trip": last.round_trip if last else None,
                    "faults": finding.hosted.faults.total,
                }

    def plugins(self) -> list[Row]:
        """Every installed plugin: kind, name, origin, and where it is in use with how many faults."""
        rows = []
        for kind in KINDS:
            for name in self._registry.names(kind):
                used = [hosted for hosted in self._in_use() if (hosted.kind, hosted.name) == (kind, name)]
                rows.append(
                    {
                        "kind": kind,
                        "name": name,
                        "origin": self._registry.origin(kind, name),
                        "instances": len(used),
                        "faults": sum(hosted.faults.total for hosted in used),
                        "last_fault": next((h.faults.last for h in used if h.faults.last), None),
                        "suspended": any(not h.usable(self._dataplane.clock()) for h in used),
                    }
                )
        return rows

    def _in_use(self) -> Iterator[Hosted[Any]]:
        for group in self._dataplane.snapshot.groups.values():
            yield from plugins_of(group)
        for finding in self._dataplane.prober.findings:
            yield finding.hosted

    # pins

    async def pins(
        self,
        service: str | None = None,
        server: str | None = None,
        client: str | None = None,
        cursor: str | None = None,
        limit: int = PAGE,
    ) -> Row:
        """A page of pins, those of a service, a server, or a client (address, or a key as shown).

        ``next`` is the cursor of the next page, ``None`` after the last. A page may be empty although more follow.

        Raises:
            Refused: the cursor is none.
            UnknownObject: there is no such service.
        """
        found, following = await self._search(service, server, client, cursor, max(1, min(limit, PAGE)))
        return {"pins": [self._pin(group, pin) for group, pin in found], "next": following}

    async def _search(
        self, service: str | None, server: str | None, client: str | None, cursor: str | None, limit: int
    ) -> tuple[list[tuple[Group, Pin]], str | None]:
        """Pins that match everything that is given, and where to go on."""
        groups = list(self._groups(service))
        at, start = _cursor(cursor, len(groups))
        found: list[tuple[Group, Pin]] = []
        for _ in range(MAX_STEPS):
            if at == len(groups) or len(found) >= limit:
                break
            page = groups[at].table.pins(start, min(STEP, limit - len(found)))
            found += [
                (groups[at], pin)
                for pin in page.pins
                if (server is None or pin.server == server) and (client is None or _is_of(pin, client))
            ]
            at, start = (at, page.next) if page.next is not None else (at + 1, 0)
            await trio.lowlevel.checkpoint()
        return found, f"{at}:{start}" if at < len(groups) else None

    def _pin(self, group: Group, pin: Pin) -> Row:
        return {
            "service": group.name,
            "server": pin.server,
            "keys": [show_key(key) for key in pin.keys],
            "since": pin.since,
            "due": pin.due,
        }

    async def delete_pins(
        self,
        service: str | None = None,
        server: str | None = None,
        client: str | None = None,
        key: str | None = None,
        cursor: str | None = None,
    ) -> Row:
        """Delete the pins that match everything that is given; at least one thing must be.

        One call deletes a page of them; ``next`` is where the next call goes on, ``None`` when all are done.

        Raises:
            Refused: nothing is given, the key or the cursor is none, or this node is a standby.
            UnknownObject: there is no such service.
        """
        self._check_active()
        if service is None and server is None and client is None and key is None:
            raise Refused("say which pins to delete: by service, server, client or key")
        if key is not None:
            return {"deleted": self._dataplane.delete_pins(self._pinned(service, server, key)), "next": None}
        found, following = await self._search(service, server, client, cursor, PAGE)
        return {
            "deleted": self._dataplane.delete_pins((group, pin.keys[0]) for group, pin in found),
            "next": following,
        }

    def _pinned(self, service: str | None, server: str | None, shown: str) -> list[tuple[Group, Key]]:
        try:
            key = parse_key(shown)
        except ValueError as error:
            raise Refused(str(error)) from None
        pins = [(group, group.table.describe(key)) for group in self._groups(service)]
        return [(group, key) for group, pin in pins if pin is not None and server in (None, pin.server)]

    # explain

    async def explain(self, client: str, port: int | None = None, service: str | None = None) -> Row:
        """Where a client is, by which key, since when and why; or what a new one would get.

        Args:
            client: its address.
            port: its source port; without it, all its flows are listed.
            service: one service; all by default.

        Raises:
            Refused: the address or the port makes no sense.
            UnknownObject: there is no such service.
        """
        try:
            address = ip_address(client)
        except ValueError:
            raise Refused(f"{client!r} is not an IPv4 or IPv6 address") from None
        if port is not None and not 0 < port < 65_536:
            raise Refused(f"{port} is not a port: it must be from 1 to 65535")
        services = self._dataplane.snapshot.services
        if service is not None and service not in services:
            raise UnknownObject(_no_service(service, services))
        flows = await self._flows_of(address.packed, port, service)
        views = [view for name, view in self._dataplane.snapshot.services.items() if service in (None, name)]
        return {
            "client": str(address),
            "port": port,
            "flows": [self._flow(flow) for flow in flows],
            "services": [self._would(view, address, port) for view in views],
        }

    async def _flows_of(self, address: bytes, port: int | None, service: str | None) -> list[Flow]:
        """The client's flows, a page at most."""
        by_fd = self._dataplane.forwarder.flows.by_fd
        found: list[Flow] = []
        for number, flow in enumerate(list(by_fd.values()), start=1):
            at, its_port = peer_address(flow.peer)
            if at == address and port in (None, its_port) and service in (None, flow.listener.service.name):
                found.append(flow)
            if len(found) == PAGE:
                break
            if number % STEP == 0:
                await trio.lowlevel.checkpoint()
        return [flow for flow in found if by_fd.get(flow.fd) is flow]

    def _flow(self, flow: Flow) -> Row:
        _, port = peer_address(flow.peer)
        service = flow.listener.service
        pin = (
            self._dataplane.forwarder.admission.groups[service.name].table.describe(flow.key)
            if flow.key
            else None
        )
        return {
            "service": service.name,
            "port": port,
            "server": flow.member.name,
            "upstream_port": flow.port,
            "opened": flow.opened,
            "last": flow.last,
            "confirmed": flow.confirmed,
            "key": show_key(flow.key) if flow.key else None,
            "pinned_since": pin.since if pin else None,
            "keys": [show_key(key) for key in pin.keys] if pin else [],
        }

    def _would(self, view: ServiceView, address: IPv4Address | IPv6Address, port: int | None) -> Row:
        """What a datagram that is not IKE, or the first of a new client, would get: nothing is changed by asking."""
        group = view.group
        datagram = Datagram(Client(address.packed, port or 0), view.service.port, ike.Kind.OTHER, b"", b"")
        trial = _trial(group)
        decision = balancer.decide(trial, datagram, Random(0), self._dataplane.clock())
        pin = group.table.describe(decision.matched) if decision.matched else None
        return {
            "service": view.service.name,
            "server": decision.member.name if decision.member else None,
            "reason": str(decision.reason),
            "key": show_key(decision.matched) if decision.matched else None,
            "pinned_since": pin.since if pin else None,
            "scheduler": group.leader.scheduler.plugin,
            "why": _why(decision, group),
            "left_out": {m.name: why for m in group.members.values() if (why := _left_out(m))},
        }

    # changing

    def set_state(self, server: str, state: str, service: str | None = None) -> Row:
        """Enable, drain or disable a server; in every group that has it unless a service is named.

        Raises:
            Refused: the state is none, this node is a standby, or the new state is in force but could not be saved.
            UnknownObject: there is no such service or server.
        """
        try:
            wanted = AdminState(state)
        except ValueError:
            raise Refused(f"{state!r} is not a state: it must be one of {', '.join(AdminState)}") from None
        self._check_active()
        groups = list(self._groups(service))
        concerned = [group for group in groups if server in group.members] or groups[:1]
        if not concerned:
            raise UnknownObject(f"there is no real server {server!r}: no virtual service is configured")
        if service is None and server not in concerned[0].members:
            known = sorted({name for group in groups for name in group.members})
            raise UnknownObject(f"there is no real server {server!r} (there is: {', '.join(known)})")
        try:
            for group in concerned:
                self._dataplane.set_admin(group.name, server, wanted)
        except OSError as error:
            raise Refused(f"{server} is {state} now, but a restart will forget it: {error}") from None
        return {
            "server": server,
            "state": state,
            "services": [service.name for group in concerned for service in group.services],
            "pinned": sum(group.members[server].pinned for group in concerned),
        }

    def _check_active(self) -> None:
        """Pins and states are the active node's to change; the standby would only lose what was changed here."""
        reason = self._node.refuses_changes() if self._node is not None else None
        if reason is not None:
            raise Refused(reason)

    def reload(self) -> Row:
        """Read the configuration file again and make it the running one, whole or not at all.

        Raises:
            Refused: it cannot be read, has faults, or cannot be brought into force; nothing has changed.
        """
        try:
            return reload(self._path, self._dataplane, self._registry, self._node)
        except ReloadError as error:
            raise Refused(str(error)) from None

    def _groups(self, service: str | None) -> Iterator[Group]:
        snapshot = self._dataplane.snapshot
        if service is None:
            yield from snapshot.groups.values()
            return
        if service not in snapshot.services:
            raise UnknownObject(_no_service(service, snapshot.services))
        yield snapshot.services[service].group


def _no_service(name: str, services: Iterable[str]) -> str:
    return f"there is no virtual service {name!r} (there is: {', '.join(services) or 'none'})"


def _sum(counters: Any) -> Row:
    rows: list[Counters] = list(counters)
    return {
        "flows": sum(c.flows for c in rows),
        "packets_in": sum(c.packets_in for c in rows),
        "bytes_in": sum(c.bytes_in for c in rows),
        "packets_out": sum(c.packets_out for c in rows),
        "bytes_out": sum(c.bytes_out for c in rows),
    }


def _cursor(cursor: str | None, groups: int) -> tuple[int, int]:
    if cursor is None:
        return 0, 0
    at, _, start = cursor.partition(":")
    if not (at.isdecimal() and start.isdecimal() and len(cursor) < 20) or int(at) > groups:
        raise Refused(f"{cursor!r} is not a cursor of this listing")
    return int(at), int(start)


def _is_of(pin: Pin, client: str) -> bool:
    return any(client in (client_of(key), show_key(key)) for key in pin.keys)


def _trial(group: Group) -> Group:
    """The group with copies of its schedulers, so that asking what would happen leaves no trace."""
    pools = {}
    for family, pool in group.pools.items():
        shared: dict[int, Any] = {id(member): member for member in pool.candidates}
        shared[id(pool.candidates)] = pool.candidates
        try:
            pools[family] = Pool(pool.candidates, copy.deepcopy(pool.scheduler, shared))
        except Exception:  # a plugin that cannot be copied: its fallback is what can be told
            pools[family] = Pool(pool.candidates, pool.scheduler)
    return Group(
        group.services, group.members, pools, group.persistence, group.following, group.endpoints, group.table
    )


def _why(decision: balancer.Decision, group: Group) -> str:
    match decision.reason:
        case balancer.Reason.PINNED:
            return "one of its keys is pinned"
        case balancer.Reason.SCHEDULED:
            return f"not pinned: {group.leader.scheduler.plugin} picks for a new client"
        case balancer.Reason.FALLBACK:
            return f"not pinned, and {group.leader.scheduler.plugin} is at fault: the fewest pinned clients"
    return "no real server of its address family takes clients"


def _left_out(member: Member) -> str | None:
    """Why a server gets no new clients; ``None`` if it does."""
    if member.takes:
        return None
    for why in (member.admin, member.asked):
        if why is not AdminState.ENABLED:
            return str(why)
    return str(member.health) if not member.keeps else "weight 0"
