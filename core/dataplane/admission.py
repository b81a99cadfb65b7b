"""The slow path: the flow for a datagram that one look-up does not settle.

That is the first datagram of a client, each IKE message, and the first datagram of a flow in a tick (a second, or
less when something has changed): then the flow is held against its pin, which may have been moved, cleared or
deleted, and the pin is touched.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from random import Random

from sapin.core import balancer, ike
from sapin.core.contracts import Client, Datagram
from sapin.core.dataplane.batch import peer_address
from sapin.core.dataplane.flows import Address, Flow, FlowTable, Peer
from sapin.core.dataplane.listeners import Listener
from sapin.core.dataplane.outlet import Outlet
from sapin.core.snapshot import Group, Member, Snapshot


class Admission:
    """Decides by the balancer, pins, and opens flows.

    Args:
        suspect: called with a group and a server that cannot be reached.
        now: seconds, as of the start.
        outlet: on a node that has a peer, what tells it of changes.
    """

    def __init__(
        self,
        flows: FlowTable,
        suspect: Callable[[str, str], None],
        random: Random,
        now: int,
        outlet: Outlet | None = None,
    ) -> None:
        self._flows = flows
        self._suspect = suspect
        self._random = random
        self._routes: Mapping[str, Mapping[str, Address]] = {}
        self.now = now
        self.tick = 1
        """Changes with each second and each snapshot; a flow with another one has to be looked at."""
        self.groups: Mapping[str, Group] = {}
        """The affinity group of each service."""
        self.decisions: Counter[tuple[str, balancer.Reason]] = Counter()
        """Decisions by service and reason."""
        self.wake: Callable[[Listener, Client], Flow | None] | None = None
        """Opens a flow that the peer had and that is dormant here."""
        self._outlet = outlet
        self.drops: Counter[str] = Counter()
        """Datagrams that could not be decided or had no way to their server, by cause."""

    def apply(self, snapshot: Snapshot) -> None:
        """Take over a new snapshot; each flow is held against it at its next datagram."""
        self.groups = {name: view.group for name, view in snapshot.services.items()}
        self._routes = {
            name: {server: (str(at.address), at.port) for server, at in view.endpoints.items()}
            for name, view in snapshot.services.items()
        }
        self.tick += 1

    def advance(self, now: int) -> None:
        """A second has passed: each flow touches its pin at its next datagram."""
        self.now = now
        self.tick += 1

    def route(self, service: str, server: str) -> Address:
        """Where a server serves a service."""
        return self._routes[service][server]

    def endpoints(self) -> set[Address]:
        """Everything that flows may go to."""
        return {endpoint for servers in self._routes.values() for endpoint in servers.values()}

    def belongs(self, flow: Flow) -> bool:
        """Whether the flow's server is still there, where it was, and keeps its clients."""
        service = flow.listener.service.name
        group = self.groups.get(service)
        if group is None or not _belongs(flow.member, group):
            return False
        return self._routes[service][flow.member.name] == flow.endpoint

    def admit(self, listener: Listener, peer: Peer, flow: Flow | None, data: memoryview) -> Flow | None:
        """The flow that the datagram belongs to, perhaps a new one; ``None`` if it is to be dropped.

        ``flow`` is the one that the client has so far.
        """
        service = listener.service
        group = self.groups[service.name]
        kind, at = ike.classify(data, service.framing)
        is_ike = kind is ike.Kind.IKE
        if flow is not None:
            flow.confirmed = flow.confirmed or flow.answered or flow.answers > 0
            flow.last, flow.answers = self.now, 0
            if not is_ike and self._holds(flow, group):
                return flow
        client = Client(*peer_address(peer))
        spi_i, spi_r = (bytes(data[at : at + 8]), bytes(data[at + 8 : at + 16])) if is_ike else (b"", b"")
        datagram = Datagram(client, service.port, kind, spi_i, spi_r)
        if flow is None and self.wake is not None:
            flow = self.wake(listener, client)
        if flow is not None:
            if self._stays(flow, group, datagram):
                return flow
            self._flows.close(flow)
        decision = balancer.decide(group, datagram, self._random, self.now)
        self.decisions[service.name, decision.reason] += 1
        if decision.member is None:
            self.drops[decision.reason] += 1
            return None
        if decision.keys:
            group.table.put(decision.keys, decision.member, self.now)
        return self._open(listener, peer, client, decision.member, decision)

    def _holds(self, flow: Flow, group: Group) -> bool:
        """Touch the flow's pin; whether it still says where the flow goes."""
        if not _belongs(flow.member, group):
            return False
        if flow.key and group.table.touch(flow.key, self.now) is not flow.member:
            return False
        flow.tick = self.tick
        return True

    def _stays(self, flow: Flow, group: Group, datagram: Datagram) -> bool:
        """Whether the flow is right for the client of the datagram; what is new of its keys is pinned.

        A client that comes back with a new SPI on its old tuple stays on its server; a known
        SPI on the tuple of another client takes the tuple over, since the SPI is the client. A pin that was
        evicted or has expired is made again: the living flow knows best where its client was.
        """
        if not _belongs(flow.member, group):
            return False
        keys = balancer.keys_of(group, datagram, self.now)
        if not keys:
            return self._holds(flow, group)
        found = group.table.find(keys)
        if found is not None and found.member is not flow.member:
            return False
        changes = len(self._outlet.records) if self._outlet else 0
        group.table.put(keys, flow.member, self.now)
        key = keys[0] if found is None else found.key
        if flow.key != key:
            self._flows.change_key(flow, key)
        if self._outlet and len(self._outlet.records) > changes:
            self._flows.hold(flow)
        flow.tick = self.tick
        return True

    def _open(
        self, listener: Listener, peer: Peer, client: Client, member: Member, decision: balancer.Decision
    ) -> Flow | None:
        service = listener.service
        key = decision.matched or (decision.keys[0] if decision.keys else b"")
        try:
            flow = self._flows.open(
                listener, peer, client, member, self._routes[service.name][member.name], key, self.now
            )
        except OSError:
            self.drops["server-unreachable"] += 1
            self._suspect(service.group, member.name)
            return None
        if flow is not None:
            flow.tick = self.tick
        return flow


def _belongs(member: Member, group: Group) -> bool:
    return member.keeps and group.members.get(member.name) is member
