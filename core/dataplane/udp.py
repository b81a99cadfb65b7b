"""The userspace forwarder for UDP: from clients to servers and back.

One task waits on one epoll descriptor that has every socket, listening and upstream. When it is readable the
forwarder works in *rounds*, each bounded, and returns to trio after :data:`HOLD` seconds at most. Per
datagram there is one dict lookup; what a datagram needs besides (a decision, a new socket, a look at an IKE
message, holding a flow against its pin once per tick) is the slow path, :meth:`Forwarder._admit`.

Datagrams of one flow that are in a batch together leave together (:mod:`~sapin.core.dataplane.segments`).
"""

from __future__ import annotations

import errno
import select
import socket
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Sequence
from ipaddress import ip_address
from random import Random

import trio

from sapin.core import balancer, ike
from sapin.core.contracts import Client, Datagram
from sapin.core.dataplane.batch import SLOTS, SOL_UDP, UDP_GRO, Batch, peer_address, peer_name, peer_of
from sapin.core.dataplane.flows import Flow, FlowTable, Peer
from sapin.core.dataplane.listeners import MAX_LOCALS, Listener, ListenError, local_address
from sapin.core.dataplane.ports import PortPool
from sapin.core.dataplane.segments import Run, pieces, runs, send_run
from sapin.core.journal import FlowClosed, FlowOpened, Record
from sapin.core.model import Framing, VirtualService
from sapin.core.snapshot import Group, Member, Snapshot

HOLD = 0.001
"""Seconds that the forwarder may keep the loop while there is traffic."""
EVENTS = 128
"""Sockets that one round looks at."""
BULK = 256
"""Datagrams from a server between two of its client's: from then on the flow is read in batches."""
_BIND_TRIES = 8

_IPV4, _IPV6 = socket.AF_INET, socket.AF_INET6
_ALL_IKE, _NO_IKE = [0] * SLOTS, [1] * SLOTS


class Forwarder:
    """Sockets, flows, and the way of a datagram. Written and read by one task at a time.

    Args:
        journal: gets every flow that is opened or closed.
        flush: makes the journal safe against the death of the process; called before a reply can pass.
        suspect: called with a group and a server when the server refused a datagram.
        descriptors: file descriptors are below this number.
        ports: the range of upstream ports, both ends included.
        clock: seconds, never going back.
    """

    def __init__(
        self,
        *,
        journal: Callable[[Record], None],
        flush: Callable[[], None],
        suspect: Callable[[str, str], None],
        random: Random,
        descriptors: int,
        ports: tuple[int, int],
        clock: Callable[[], float],
    ) -> None:
        self._journal = journal
        self._flush = flush
        self._suspect = suspect
        self._random = random
        self._range = ports
        self._clock = clock
        self._epoll = select.epoll()
        self._inbox = {_IPV4: Batch(_IPV4), _IPV6: Batch(_IPV6)}
        self._outbox = {_IPV4: Batch(_IPV4, control=False), _IPV6: Batch(_IPV6, control=False)}
        self._ports: dict[tuple[str, int], PortPool] = {}
        self._taken: dict[tuple[str, int], set[int]] = {}
        """Ports of restored flows to endpoints that have no pool yet."""
        self._routes: dict[str, dict[str, tuple[str, int]]] = {}
        """Where each server serves each service, as connect(2) wants it."""
        self._by_fd: dict[int, Listener] = {}
        self._tick = 1
        self._now = int(clock())
        self.max_flows = 0
        self.groups: dict[str, Group] = {}
        """The affinity group of each service."""
        self.flows = FlowTable(descriptors)
        self.drops: Counter[str] = Counter()
        """Datagrams that were not forwarded, by cause."""
        self.errors: Counter[str] = Counter()
        """ICMP errors from servers, by name."""
        self.decisions: Counter[tuple[str, balancer.Reason]] = Counter()
        """Decisions by service and reason."""

    # what others do with it

    @property
    def listeners(self) -> Sequence[Listener]:
        """All listening sockets."""
        return list(self._by_fd.values())

    def add_listener(self, listener: Listener) -> None:
        """Start to serve a listening socket."""
        self._by_fd[listener.fd] = listener
        self._epoll.register(listener.fd, select.EPOLLIN)

    def remove_listener(self, listener: Listener) -> None:
        """Stop serving a listening socket, close it and its flows."""
        for flow in list(listener.flows.values()):
            self.close_flow(flow)
        del self._by_fd[listener.fd]
        self._epoll.unregister(listener.fd)
        listener.close()

    def apply(self, snapshot: Snapshot) -> None:
        """Take over a new snapshot; each flow is held against it at its next datagram."""
        self.max_flows = snapshot.config.node.max_flows
        self.groups = {name: view.group for name, view in snapshot.services.items()}
        self._routes = {
            name: {server: (str(at.address), at.port) for server, at in view.endpoints.items()}
            for name, view in snapshot.services.items()
        }
        self._tick += 1

    def tick(self) -> None:
        """A second has passed: each flow touches its pin at its next datagram."""
        self._now = int(self._clock())
        self._tick += 1

    def expire(self, limit: int) -> int:
        """Close flows that were idle for too long, looking at ``limit`` at most; how many were closed."""
        closed = 0
        for flow in self.flows.idle(self._now, limit):
            self.close_flow(flow)
            closed += 1
        return closed

    def close_flow(self, flow: Flow) -> None:
        """Give a flow up; the client's next datagram is decided anew."""
        listener = flow.listener
        self.flows.remove(flow)
        flow.sock.close()
        if not flow.key:
            flow.member.pinned -= 1
        if flow.endpoint in self._ports:
            self._ports[flow.endpoint].give(flow.port)
        else:
            self._taken[flow.endpoint].discard(flow.port)
        address, port = peer_address(flow.peer)
        self._journal(FlowClosed(listener.service.name, address, port, listener.local))

    def forget(self, keys: Collection[bytes]) -> None:
        """Close the flows of pins that somebody deleted, so that their clients are decided anew."""
        for flow in [flow for flow in self.flows.by_fd.values() if flow.key in keys]:
            self.close_flow(flow)

    def stale(self) -> list[Flow]:
        """Flows whose server does not keep its clients any more, or is gone."""
        groups = self.groups
        return [
            flow
            for flow in self.flows.by_fd.values()
            if not self._belongs(flow.member, groups[flow.listener.service.name])
        ]

    def drop_stale(self, flows: Iterable[Flow]) -> None:
        """Close those of the flows that are still open and still stale."""
        for flow in flows:
            group = self.groups.get(flow.listener.service.name)
            if self.flows.by_fd.get(flow.fd) is flow and (
                group is None or not self._belongs(flow.member, group)
            ):
                self.close_flow(flow)

    def restore(self, listener: Listener, record: FlowOpened, member: Member) -> bool:
        """Open a flow again that a former process had, with its upstream port; false if that cannot be."""
        peer = peer_of(record.client, record.client_port)
        endpoint = self._routes[listener.service.name][member.name]
        try:
            sock = _upstream(listener.family, record.upstream_port, endpoint)
        except OSError:
            return False
        flow = Flow(
            listener,
            peer,
            peer_name(peer),
            member,
            record.key,
            sock,
            record.upstream_port,
            endpoint,
            self._now,
        )
        flow.confirmed = flow.answered = True
        self._taken.setdefault(endpoint, set()).add(flow.port)
        self._register(flow)
        return True

    def close(self) -> None:
        """Close every socket, without a word to the journal: the flows are to be restored."""
        for flow in self.flows.by_fd.values():
            flow.sock.close()
        for listener in self.listeners:
            listener.close()
        self._epoll.close()

    async def run(self) -> None:
        """Forward until cancelled."""
        while True:
            await trio.lowlevel.wait_readable(self._epoll.fileno())
            until = self._clock() + HOLD
            while self._round() and self._clock() < until:
                pass

    def _round(self) -> int:
        """Look at the sockets that are readable; how many there were."""
        events = self._epoll.poll(0, EVENTS)
        upstream = []
        for fd, _ in events:
            listener = self._by_fd.get(fd)
            if listener is None:
                upstream.append(fd)
            elif listener.wildcard:
                self._from_strangers(listener)
            else:
                self._from_clients(listener)
        if upstream:
            self._from_servers(upstream)
        return len(events)

    # from clients to servers

    def _from_clients(self, listener: Listener) -> None:
        batch = self._inbox[listener.family]
        try:
            count = batch.receive(listener.fd)
        except OSError:
            self.drops["receive-error"] += 1
            return
        peers, sizes = batch.peers(count), batch.sizes(count)
        segments = batch.segments(count)
        heads = self._heads(listener, batch, count)
        tick, flows = self._tick, listener.flows
        waiting: dict[Flow, list[int]] = {}
        for slot, peer in enumerate(peers):
            flow = flows.get(peer)
            if flow is None or flow.tick != tick or not heads[slot]:
                flow = self._admit(listener, peer, flow, batch.views[slot][: sizes[slot]])
                if flow is None:
                    continue
            slots = waiting.get(flow)
            if slots is None:
                waiting[flow] = [slot]
            else:
                slots.append(slot)
        self._flush()
        views = batch.views
        for flow, slots in waiting.items():
            counters = flow.counters
            counters.packets_in += len(slots)
            if len(slots) == 1 and segments is None:
                size = sizes[slots[0]]
                counters.bytes_in += size
                try:
                    flow.sock.send(views[slots[0]][:size])
                except OSError as error:
                    self._unsent(flow, error, views[slots[0]][:size])
            else:
                counters.bytes_in += sum([sizes[slot] for slot in slots])
                self._send_runs(flow, None, flow.sock, runs(slots, sizes, segments), views, sizes)

    def _heads(self, listener: Listener, batch: Batch, count: int) -> Sequence[int]:
        """For each datagram a number that is zero if it may be an IKE message."""
        framing = listener.service.framing
        if framing is Framing.NATT:
            return batch.first_words(count)
        return _ALL_IKE if framing is Framing.IKE else _NO_IKE

    def _from_strangers(self, wildcard: Listener) -> None:
        """Datagrams to local addresses of a wildcard service that have no socket of their own yet."""
        batch = self._inbox[wildcard.family]
        try:
            count = batch.receive(wildcard.fd)
        except OSError:
            self.drops["receive-error"] += 1
            return
        peers, sizes, segments = batch.peers(count), batch.sizes(count), batch.segments(count)
        for slot, control in enumerate(batch.controls(count)):
            listener = self._local(wildcard, control)
            if listener is None:
                self.drops["no-local-address"] += 1
                continue
            peer = peers[slot]
            view = batch.views[slot][: sizes[slot]]
            flow = self._admit(listener, peer, listener.flows.get(peer), view)
            if flow is not None:
                self._flush()
                flow.counters.packets_in += 1
                flow.counters.bytes_in += sizes[slot]
                self._send_runs(flow, None, flow.sock, runs([slot], sizes, segments), batch.views, sizes)

    def _local(self, wildcard: Listener, control: bytes) -> Listener | None:
        """The listener for the local address in the control data, opened if need be."""
        address = local_address(control)
        if address is None:
            return None
        service = wildcard.service
        own = [x for x in self._by_fd.values() if x.service.name == service.name]
        found = next((x for x in own if x.address == address), None)
        if found is not None:
            return found
        if len(own) >= MAX_LOCALS:
            return None
        try:
            listener = Listener(service, address, wildcard.buffer, wildcard.counters)
        except ListenError:
            return None
        self.add_listener(listener)
        return listener

    # the slow path

    def _admit(self, listener: Listener, peer: Peer, flow: Flow | None, data: memoryview) -> Flow | None:
        """The flow for a datagram: of a new client, of one that sends IKE, or the first in a tick.

        Returns:
            The flow it belongs to, perhaps a new one to another server; ``None`` if it is to be dropped.
        """
        group = self.groups[listener.service.name]
        if flow is not None:
            flow.confirmed = flow.answered
            flow.reads = 0
            flow.last = self._now
        kind, at = ike.classify(data, listener.service.framing)
        if flow is not None and kind is not ike.Kind.IKE and self._holds(flow, group):
            return flow
        address, port = peer_address(peer)
        spi_i, spi_r = (
            (bytes(data[at : at + 8]), bytes(data[at + 8 : at + 16])) if kind is ike.Kind.IKE else (b"", b"")
        )
        datagram = Datagram(Client(address, port), listener.service.port, kind, spi_i, spi_r)
        if flow is not None:
            if self._stays(flow, group, datagram):
                return flow
            self.close_flow(flow)
        decision = balancer.decide(group, datagram, self._random, self._now)
        self.decisions[listener.service.name, decision.reason] += 1
        if decision.member is None:
            self.drops[decision.reason] += 1
            return None
        if decision.keys:
            group.table.put(decision.keys, decision.member, self._now)
        return self._open(listener, peer, decision)

    def _holds(self, flow: Flow, group: Group) -> bool:
        """Touch the flow's pin; whether it still says where the flow goes. At most once per tick and flow."""
        if not self._belongs(flow.member, group):
            return False
        if flow.key and group.table.touch(flow.key, self._now) is not flow.member:
            return False
        flow.tick = self._tick
        return True

    def _stays(self, flow: Flow, group: Group, datagram: Datagram) -> bool:
        """Whether the flow is right for the client of the datagram; what is new of its keys is pinned.

        A client that comes back with a new SPI on its old tuple stays on its server; a known
        SPI on the tuple of another client takes the tuple over, since the SPI is the client. A pin that was
        evicted or has expired is made again: the living flow knows best where its client was.
        """
        if not self._belongs(flow.member, group):
            return False
        keys = balancer.keys_of(group, datagram, self._now)
        if not keys:
            return self._holds(flow, group)
        found = group.table.find(keys)
        if found is not None and found.member is not flow.member:
            return False
        group.table.put(keys, flow.member, self._now)
        if not flow.key:
            flow.member.pinned -= 1
        flow.key = keys[0] if found is None else found.key
        flow.tick = self._tick
        return True

    @staticmethod
    def _belongs(member: Member, group: Group) -> bool:
        return member.keeps and group.members.get(member.name) is member

    def _open(self, listener: Listener, peer: Peer, decision: balancer.Decision) -> Flow | None:
        """A new flow to the decided server, with an upstream port of its own."""
        member = decision.member
        assert member is not None
        if len(self.flows) >= self.max_flows:
            self.drops["flow-table-full"] += 1
            return None
        endpoint = self._routes[listener.service.name][member.name]
        opened = self._connect(listener, member, endpoint)
        if opened is None:
            return None
        sock, port = opened
        key = decision.matched or (decision.keys[0] if decision.keys else b"")
        flow = Flow(listener, peer, peer_name(peer), member, key, sock, port, endpoint, self._now)
        flow.tick = self._tick
        self._register(flow)
        self._journal(self.record(flow))
        return flow

    def _connect(
        self, listener: Listener, member: Member, endpoint: tuple[str, int]
    ) -> tuple[socket.SocketType, int] | None:
        """An upstream socket and its port; ``None`` if there is none to be had, which is counted."""
        pool = self._ports.get(endpoint)
        if pool is None:
            pool = PortPool(*self._range, self._taken.pop(endpoint, ()), self._random)
            self._ports[endpoint] = pool
        for _ in range(_BIND_TRIES):
            port = pool.take()
            if port is None:
                break
            try:
                return _upstream(listener.family, port, endpoint), port
            except OSError as error:
                pool.give(port)
                if error.errno != errno.EADDRINUSE:
                    self._not_opened(error, listener.service, member)
                    return None
        self.drops["no-upstream-port"] += 1
        return None

    def record(self, flow: Flow) -> FlowOpened:
        """What a restart needs to open the flow again."""
        address, port = peer_address(flow.peer)
        listener = flow.listener
        return FlowOpened(
            listener.service.name,
            address,
            port,
            listener.local,
            flow.member.name,
            b"",
            flow.port,
            flow.key,
            flow.opened,
        )

    def _register(self, flow: Flow) -> None:
        if not flow.key:
            flow.member.pinned += 1
        self.flows.add(flow)
        self._epoll.register(flow.fd, select.EPOLLIN)

    def _not_opened(self, error: OSError, service: VirtualService, member: Member) -> None:
        if error.errno in (errno.EMFILE, errno.ENFILE):
            self.drops["no-file-descriptor"] += 1
        else:
            self.drops["server-unreachable"] += 1
            self._suspect(service.group, member.name)

    # from servers to clients

    def _from_servers(self, descriptors: Iterable[int]) -> None:
        ready: dict[Listener, list[Flow]] = {}
        by_fd = self.flows.by_fd
        for fd in descriptors:
            flow = by_fd.get(fd)
            if flow is None:
                continue  # closed in this very round
            if flow.bulk:
                self._relay_bulk(flow)
                continue
            flows = ready.get(flow.listener)
            if flows is None:
                ready[flow.listener] = [flow]
            else:
                flows.append(flow)
        for listener, flows in ready.items():
            for at in range(0, len(flows), SLOTS):
                self._relay(listener, flows[at : at + SLOTS])

    def _relay(self, listener: Listener, flows: Sequence[Flow]) -> None:
        """One datagram of each flow, all sent in one call."""
        batch = self._outbox[listener.family]
        views, now = batch.views, self._now
        names: list[bytes] = []
        sizes: list[int] = []
        for flow in flows:
            try:
                size = flow.sock.recv_into(views[len(sizes)])
            except BlockingIOError:
                continue
            except OSError as error:
                self._upstream_error(flow, error)
                continue
            names.append(flow.name)
            sizes.append(size)
            flow.last = now
            flow.answered = True
            flow.counters.packets_out += 1
            flow.counters.bytes_out += size
            flow.reads += 1
            if flow.reads > BULK:
                self._make_bulk(flow)
        if sizes:
            lost = len(sizes) - batch.send(listener.fd, names, sizes)
            if lost:
                self.drops["not-sent-to-client"] += lost

    def _make_bulk(self, flow: Flow) -> None:
        """Read the flow in batches from now on. Never undone: a merged datagram may be in its queue."""
        flow.bulk = True
        flow.sock.setsockopt(SOL_UDP, UDP_GRO, 1)

    def _relay_bulk(self, flow: Flow) -> None:
        batch = self._inbox[flow.listener.family]
        try:
            count = batch.receive(flow.fd)
        except OSError as error:
            self._upstream_error(flow, error)
            return
        sizes, segments = batch.sizes(count), batch.segments(count)
        flow.last = self._now
        flow.counters.packets_out += count
        flow.counters.bytes_out += sum(sizes)
        address, port = peer_address(flow.peer)
        client = (str(ip_address(address)), port)
        self._send_runs(
            flow, client, flow.listener.sock, runs(range(count), sizes, segments), batch.views, sizes
        )

    # both ways

    def _send_runs(
        self,
        flow: Flow,
        client: tuple[str, int] | None,
        sock: socket.SocketType,
        all_runs: Iterable[Run],
        views: Sequence[memoryview],
        sizes: Sequence[int],
    ) -> None:
        """Send runs to the server, or through the listener's socket to the client."""
        for run in all_runs:
            try:
                if (flow.segment or not run.segment) and send_run(sock, client, run, views, sizes):
                    continue
            except OSError as error:
                self._unsent(flow, error)
                continue
            flow.segment = False
            for piece in pieces(run, views, sizes):
                try:
                    sock.sendmsg([piece], (), 0, client)
                except OSError as error:
                    self._unsent(flow, error)

    def _unsent(self, flow: Flow, error: OSError, again: memoryview | None = None) -> None:
        """A datagram could not be sent. A refusal of an *earlier* one is reported here, and costs this one too."""
        if error.errno == errno.ECONNREFUSED:
            self._suspect(flow.listener.service.group, flow.member.name)
            if again is not None:
                try:
                    flow.sock.send(again)
                    return
                except OSError:
                    pass
        self.drops[errno.errorcode.get(error.errno or 0, "unknown")] += 1

    def _upstream_error(self, flow: Flow, error: OSError) -> None:
        """An ICMP error came back from the server's side: nothing is lost here, but its check should look."""
        self.errors[errno.errorcode.get(error.errno or 0, "unknown")] += 1
        self._suspect(flow.listener.service.group, flow.member.name)


def _upstream(family: socket.AddressFamily, port: int, endpoint: tuple[str, int]) -> socket.SocketType:
    """A connected socket on that local port; it may share the port with sockets that go elsewhere."""
    sock = socket.SocketType(family, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == _IPV6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        sock.bind(("", port))
        sock.connect(endpoint)
    except OSError:
        sock.close()
        raise
    return sock
