"""Flows: one client address and port towards one virtual service, and its upstream socket.

The table is bounded, and idle flows are given back. A flow on which the client has not spoken again after
an answer is *unconfirmed* and goes after seconds: a flood of forged first packets holds few of them. The last file
descriptors are not for flows, so that checks and the control socket work when there are as many as fit.
"""

from __future__ import annotations

import errno
import select
import socket
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from random import Random
from types import MappingProxyType
from typing import TYPE_CHECKING

from sapin.core.contracts import Client
from sapin.core.dataplane.batch import peer_address, peer_name, peer_of
from sapin.core.dataplane.limits import RESERVED
from sapin.core.dataplane.ports import PortPool
from sapin.core.journal import FlowClosed, FlowOpened, Record
from sapin.core.model import IPAddress
from sapin.core.replicated import mix
from sapin.core.wheel import TimerWheel

if TYPE_CHECKING:
    from sapin.core.dataplane.listeners import Listener
    from sapin.core.dataplane.outlet import Outlet
    from sapin.core.snapshot import Member

UNCONFIRMED = 30
"""Seconds that an unconfirmed flow is kept after its last datagram (conntrack's value for unreplied UDP)."""
NO_PATH_MTU = {
    socket.AF_INET: (socket.IPPROTO_IP, 10, 0),
    socket.AF_INET6: (socket.IPPROTO_IPV6, 23, 0),
}
"""The socket option IP_MTU_DISCOVER, IP_PMTUDISC_DONT (linux/in.h): datagrams leave without DF, and one that is too
long for its path is fragmented, not answered by an error. See also RFC 4301 section 8.2.1."""
FREEBIND = {
    socket.AF_INET: (socket.IPPROTO_IP, 15),
    socket.AF_INET6: (socket.IPPROTO_IPV6, 78),
}
"""IP_FREEBIND and IPV6_FREEBIND (linux/in.h, in6.h): a socket may be bound to an address that is elsewhere for now."""
_TRANSPARENT = {
    socket.AF_INET: (socket.IPPROTO_IP, 19),
    socket.AF_INET6: (socket.IPPROTO_IPV6, 75),
}
"""IP_TRANSPARENT and IPV6_TRANSPARENT: such a socket may be connected too; for CAP_NET_ADMIN."""
_BIND_TRIES = 8

Peer = int | bytes
"""A client's socket address as the kernel gave it, see :meth:`~.batch.Batch.peers`."""
Address = tuple[str, int]
"""An endpoint as connect(2) wants it."""


class Counters:
    """Datagrams and bytes, from clients (in) and to clients (out)."""

    __slots__ = ("bytes_in", "bytes_out", "flows", "packets_in", "packets_out")

    def __init__(self) -> None:
        self.packets_in = 0
        self.bytes_in = 0
        self.packets_out = 0
        self.bytes_out = 0
        self.flows = 0
        """Open now."""


class Flow:
    """A client's way to its server. Times in seconds of the forwarder's clock."""

    __slots__ = (
        "answered",
        "answers",
        "bulk",
        "confirmed",
        "counters",
        "digest",
        "endpoint",
        "fd",
        "held",
        "key",
        "last",
        "listener",
        "mark",
        "member",
        "name",
        "opened",
        "peer",
        "port",
        "segment",
        "sock",
        "tick",
    )

    def __init__(
        self,
        listener: Listener,
        peer: Peer,
        member: Member,
        key: bytes,
        sock: socket.SocketType,
        port: int,
        endpoint: Address,
        now: int,
    ) -> None:
        self.listener = listener
        self.peer = peer
        self.name = peer_name(peer)
        """The client as a socket address, for sending to it."""
        self.member = member
        self.key = key
        """A key of its pin; empty if it has none."""
        self.sock = sock
        self.fd = sock.fileno()
        self.port = port
        """The upstream port."""
        self.endpoint = endpoint
        """Where the server is."""
        self.counters = listener.counters[member.name]
        self.opened = now
        self.last = now
        """When the client was last heard, or the server seen to have answered; to some seconds."""
        self.tick = 0
        """The forwarder's tick at which the flow was last held against the pins."""
        self.answers = 0
        """Datagrams from the server since the client was last looked at."""
        self.answered = False
        """There were answers before those."""
        self.confirmed = False
        """The client has spoken after an answer: it is where it says it is."""
        self.bulk = False
        """Many datagrams come from the server: they are read in batches."""
        self.segment = True
        """Whether its runs can be segmented by the kernel."""
        self.held = 0
        """So many messages the peer has to acknowledge first; until then, answers wait in the kernel."""
        self.digest = 0
        """What it adds to the digest of all flows."""
        self.mark = 0
        """The peer's snapshot that it was in last."""


class FlowTable:
    """All flows, by upstream descriptor; each listener has its own by the client's address.

    Args:
        epoll: has the upstream sockets to be read.
        journal: gets every flow that is opened or closed.
        descriptors: all file descriptors are below this number.
        ports: the upstream ports, in the order of preference.
        outlet: on a node that has a peer, what holds flows back.
        sources: on such a node, where upstream sockets are bound, by family; elsewhere the kernel chooses.
    """

    def __init__(
        self,
        epoll: select.epoll,
        journal: Callable[[Record], None],
        random: Random,
        descriptors: int,
        ports: Sequence[range],
        outlet: Outlet | None = None,
        sources: Mapping[socket.AddressFamily, IPAddress] = MappingProxyType({}),
    ) -> None:
        self.by_fd: dict[int, Flow] = {}
        self.limit = 0
        self.resumed = 0
        """When this node took the flows over: none was silent before, as far as it knows."""
        self.digest = 0
        """The sum of what the flows add, on a node that has a peer."""
        self.short_of = ""
        """What the last flow that could not be restored was refused for want of."""
        self._outlet = outlet
        self._sources = sources
        self._upstreams: set[tuple[Address, int]] = set()
        """Server and port of every flow, on a node that has a peer."""
        self.refusals: Counter[str] = Counter()
        """Flows that could not be opened, by cause."""
        self._epoll = epoll
        self._journal = journal
        self._random = random
        self._ranges = ports
        self._end = descriptors - RESERVED
        """From this descriptor on, none is for a flow. The kernel gives the lowest that is free."""
        self._wheel = TimerWheel(descriptors)
        self._ports: dict[Address, PortPool] = {}
        self._taken: dict[Address, set[int]] = {}
        """Ports of restored flows to endpoints that have no pool yet."""

    def __len__(self) -> int:
        return len(self.by_fd)

    def open(
        self,
        listener: Listener,
        peer: Peer,
        client: Client,
        member: Member,
        endpoint: Address,
        key: bytes,
        now: int,
    ) -> Flow | None:
        """A new flow with an upstream port of its own; ``None`` if there can be none, which is counted.

        Raises:
            OSError: the server cannot be reached from here.
        """
        if len(self.by_fd) >= self.limit:
            self.refusals["flow-table-full"] += 1
            return None
        opened = self._connect(listener, endpoint)
        if opened is None:
            return None
        flow = Flow(listener, peer, member, key, *opened, endpoint, now)
        opening = record(flow, *client, self._source(listener))
        try:
            self._add(flow, opening, hold=True)
        except OSError:
            self._ports[endpoint].give(flow.port)
            self.refusals["no-epoll-watch"] += 1
            return None
        self._journal(opening)
        return flow

    def restore(
        self, listener: Listener, record: FlowOpened, member: Member, endpoint: Address, now: int
    ) -> Flow | None:
        """A flow that a former process had, or the peer has, with its upstream port; ``None`` if that cannot be."""
        peer = peer_of(record.client, record.client_port)
        if not self._room(endpoint, record.upstream_port):
            return None
        try:
            sock = _upstream(
                listener.family, record.upstream_port, endpoint, self._sources.get(listener.family)
            )
        except OSError as error:
            if error.errno in (errno.EMFILE, errno.ENFILE):
                self.short_of = "file descriptors"
            return None
        if self._outlet and sock.fileno() >= self._end:
            sock.close()
            self.short_of = "file descriptors"
            return None
        flow = Flow(listener, peer, member, record.key, sock, record.upstream_port, endpoint, now)
        flow.confirmed = True
        flow.opened = record.opened
        try:
            self._add(flow, record)
        except OSError:
            return None
        if endpoint in self._ports:
            self._ports[endpoint].reserve(flow.port)
        else:
            self._taken.setdefault(endpoint, set()).add(flow.port)
        return flow

    def _room(self, endpoint: Address, port: int) -> bool:
        """Whether a flow of the peer can be there too."""
        if self._outlet and len(self.by_fd) >= self.limit:
            self.short_of = "max_flows"
            return False
        return (endpoint, port) not in self._upstreams

    def close(self, flow: Flow) -> None:
        """Give a flow up; the client's next datagram is decided anew."""
        listener = flow.listener
        del self.by_fd[flow.fd]
        if listener.flows.get(flow.peer) is flow:
            del listener.flows[flow.peer]
        self._wheel.discard(flow.fd)
        # Not left to close(): a child between fork and exec may hold the socket, and epoll would go on reporting it.
        if not flow.held:
            self._epoll.unregister(flow.fd)
        flow.sock.close()
        flow.counters.flows -= 1
        if not flow.key:
            flow.member.pinned -= 1
        if flow.endpoint in self._ports:
            self._ports[flow.endpoint].give(flow.port)
        else:
            self._taken[flow.endpoint].discard(flow.port)
        if self._outlet:
            self.digest -= flow.digest
            self._upstreams.discard((flow.endpoint, flow.port))
        address, port = peer_address(flow.peer)
        self._journal(FlowClosed(listener.service.name, address, port, listener.local))

    def close_sockets(self) -> None:
        """Close everything without a word to the journal: the next process is to restore the flows."""
        for flow in self.by_fd.values():
            flow.sock.close()

    def expire(self, now: int, limit: int) -> bool:
        """Close flows that were silent for too long, looking at ``limit`` at most; whether there may be more."""
        looked = 0
        for fd, _ in self._wheel.due(now, limit):
            looked += 1
            flow = self.by_fd[fd]
            if flow.answers:
                flow.last, flow.answers, flow.answered = now, 0, True
            elif flow.last < self.resumed:
                flow.last = self.resumed
            if _due(flow) > now:
                self._wheel.file(fd, _due(flow))
            else:
                self.close(flow)
        return looked == limit

    def postpone(self, now: int, limit: int) -> bool:
        """As :meth:`expire`, but closes nothing: somebody else says when a flow ends."""
        looked = 0
        for fd, _ in self._wheel.due(now, limit):
            looked += 1
            self._wheel.file(fd, max(_due(self.by_fd[fd]), now + UNCONFIRMED))
        return looked == limit

    def forget(self, group: str, keys: Collection[bytes]) -> None:
        """Close the flows of a group's pins that somebody deleted, so that their clients are decided anew."""
        for flow in [flow for flow in self.by_fd.values() if flow.key in keys]:
            if flow.listener.service.group == group:
                self.close(flow)

    def forget_ports(self, wanted: Collection[Address]) -> None:
        """Forget the pools of endpoints that are neither wanted nor have a flow left."""
        living = {flow.endpoint for flow in self}
        for pools in (self._ports, self._taken):
            for endpoint in [each for each in pools if each not in wanted and each not in living]:
                del pools[endpoint]

    def close_some(self, flows: Iterable[Flow], kept: Callable[[Flow], bool]) -> None:
        """Close those of the flows that are still open and not to be kept."""
        for flow in flows:
            if self.by_fd.get(flow.fd) is flow and not kept(flow):
                self.close(flow)

    def __iter__(self) -> Iterator[Flow]:
        return iter(self.by_fd.values())

    def record(self, flow: Flow) -> FlowOpened:
        """What a restart, or the peer, needs to open the flow again."""
        return record(flow, *peer_address(flow.peer), self._source(flow.listener))

    def change_key(self, flow: Flow, key: bytes) -> None:
        """Find the flow's pin by this key from now on."""
        if not flow.key:
            flow.member.pinned -= 1
        flow.key = key
        if self._outlet:
            self._journal(self.record(flow))

    def hold(self, flow: Flow) -> None:
        """Leave the server's answers in the kernel until :meth:`resume`, if there is a peer to wait for."""
        if self._outlet and self._outlet.hold(flow):
            if not flow.held:
                self._epoll.unregister(flow.fd)
            flow.held += 1

    def resume(self, flows: Iterable[Flow]) -> None:
        """Read the server's answers of those that were held and are still open."""
        for flow in flows:
            if self.by_fd.get(flow.fd) is not flow:
                continue
            flow.held -= 1
            try:
                if not flow.held:
                    self._epoll.register(flow.fd, select.EPOLLIN)
            except OSError:
                flow.held = 1
                self.refusals["no-epoll-watch"] += 1
                self.close(flow)

    def _add(self, flow: Flow, record: FlowOpened, *, hold: bool = False) -> None:
        try:
            if hold and self._outlet and self._outlet.hold(flow):
                flow.held = 1
            else:
                self._epoll.register(flow.fd, select.EPOLLIN)
        except OSError:  # fs.epoll.max_user_watches
            flow.sock.close()
            raise
        if self._outlet:
            flow.digest = digest(record)
            self.digest += flow.digest
            self._upstreams.add((flow.endpoint, flow.port))
        self.by_fd[flow.fd] = flow
        flow.listener.flows[flow.peer] = flow
        flow.counters.flows += 1
        if not flow.key:
            flow.member.pinned += 1
        self._wheel.file(flow.fd, _due(flow))

    def _source(self, listener: Listener) -> bytes:
        """The packed source of the listener's upstream sockets; empty if the kernel chooses."""
        source = self._sources.get(listener.family)
        return b"" if source is None else source.packed

    def _connect(self, listener: Listener, endpoint: Address) -> tuple[socket.SocketType, int] | None:
        """An upstream socket and its port; ``None`` if there is none to be had, which is counted."""
        pool = self._ports.get(endpoint)
        if pool is None:
            pool = PortPool(self._ranges, self._taken.pop(endpoint, ()), self._random)
            self._ports[endpoint] = pool
        for _ in range(_BIND_TRIES):
            port = pool.take()
            if port is None:
                break
            try:
                sock = _upstream(listener.family, port, endpoint, self._sources.get(listener.family))
                if sock.fileno() < self._end:
                    return sock, port
                sock.close()
                raise OSError(errno.EMFILE, "what is left is not for flows")
            except OSError as error:
                pool.give(port)
                if error.errno in (errno.EMFILE, errno.ENFILE):
                    self.refusals["no-file-descriptor"] += 1
                    return None
                if error.errno != errno.EADDRINUSE:
                    raise
        self.refusals["no-upstream-port"] += 1
        return None


def record(flow: Flow, address: bytes, port: int, source: bytes = b"") -> FlowOpened:
    """What a restart needs to open the flow of that client again, with its source if that is not the kernel's choice."""
    listener = flow.listener
    return FlowOpened(
        listener.service.name,
        address,
        port,
        listener.local,
        flow.member.name,
        source,
        flow.port,
        flow.key,
        flow.opened,
    )


def _due(flow: Flow) -> int:
    return flow.last + (flow.listener.flow_timeout if flow.confirmed else UNCONFIRMED)


def digest(flow: FlowOpened) -> int:
    """What the flow adds to the digest of all flows."""
    ports = b"%d %d" % (flow.client_port, flow.upstream_port)
    return mix(b"\0".join((flow.service.encode(), flow.server.encode(), ports, flow.client, flow.local)))


def _upstream(
    family: socket.AddressFamily, port: int, endpoint: Address, source: IPAddress | None
) -> socket.SocketType:
    """A connected socket on that local port; it may share the port with sockets that go elsewhere.

    A source may be an address that the node does not have now.
    """
    sock = socket.SocketType(family, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        sock.setsockopt(*NO_PATH_MTU[family])
        if source is not None:
            sock.setsockopt(*FREEBIND[family], 1)
            with suppress(PermissionError):  # then connect(2) answers EINVAL until the node has the address
                sock.setsockopt(*_TRANSPARENT[family], 1)
        sock.bind(("" if source is None else str(source), port))
        sock.connect(endpoint)
    except OSError:
        sock.close()
        raise
    return sock
