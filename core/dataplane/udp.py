"""The userspace forwarder for UDP: from clients to servers and back.

One task waits on one epoll descriptor that has every socket, listening and upstream. When it is readable the
forwarder works in *rounds*, each bounded, and lets other tasks run every :data:`HOLD` seconds. Per
datagram there is one dict lookup; what a datagram needs besides is in :mod:`~sapin.core.dataplane.admission`.
Datagrams of one flow that are in a batch together leave together (:mod:`~sapin.core.dataplane.segments`).
"""

from __future__ import annotations

import errno
import select
import socket
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from ipaddress import ip_address
from random import Random
from types import MappingProxyType

import trio

from sapin.core.dataplane.admission import Admission
from sapin.core.dataplane.batch import SOL_UDP, UDP_GRO, Batch, peer_address
from sapin.core.dataplane.flows import Address, Flow, FlowTable, Peer
from sapin.core.dataplane.listeners import MAX_LOCALS, Listener, ListenError, local_address, merged_size
from sapin.core.dataplane.outlet import Outlet
from sapin.core.dataplane.segments import Run, count, pieces, runs, send_run
from sapin.core.journal import Record
from sapin.core.model import Framing, IPAddress
from sapin.core.snapshot import Snapshot

HOLD = 0.001
"""Seconds that the forwarder may keep the loop while there is traffic; epoll counts in milliseconds."""
EVENTS = 128
"""Sockets that one round looks at, and datagrams from servers that leave together."""
RECEIVED = 256
"""Datagrams that one round takes from a listener. The more there are, the more of them belong to one flow and leave
together; the fewer, the sooner other sockets have their turn."""
BULK = 256
"""Datagrams from a server between two looks at its client: from then on the flow is read in batches."""

_FROM_ICMP = {
    errno.ECONNREFUSED,
    errno.EHOSTUNREACH,
    errno.ENETUNREACH,
    errno.EHOSTDOWN,
    errno.ENOPROTOOPT,
    errno.EACCES,
    errno.EPROTO,
    errno.EMSGSIZE,
}
"""What an ICMP error becomes on a connected socket (icmp_err_convert in Linux's net/ipv4/icmp.c)."""

_IPV4, _IPV6 = socket.AF_INET, socket.AF_INET6
_ALL_IKE, _NO_IKE = [0] * RECEIVED, [1] * RECEIVED


class Forwarder:
    """Sockets, and the way of a datagram. Only one task at a time may use it.

    Args:
        journal: gets every flow that is opened or closed.
        flush: makes the journal safe against the death of the process; called before a reply can pass.
        suspect: called with a group and a server when the server refused a datagram.
        descriptors: file descriptors are below this number.
        ports: the upstream ports, in the order of preference.
        clock: seconds, never going back.
        outlet: on a node that has a peer, what holds flows back.
        sources: on such a node, where upstream sockets are bound, by family.
    """

    def __init__(
        self,
        *,
        journal: Callable[[Record], None],
        flush: Callable[[], None],
        suspect: Callable[[str, str], None],
        random: Random,
        descriptors: int,
        ports: Sequence[range],
        clock: Callable[[], float],
        outlet: Outlet | None = None,
        sources: Mapping[socket.AddressFamily, IPAddress] = MappingProxyType({}),
    ) -> None:
        self._flush = flush
        self._suspect = suspect
        self._clock = clock
        self._epoll = select.epoll()
        self._inbox = {family: Batch(family, RECEIVED) for family in (_IPV4, _IPV6)}
        self._outbox = {f: Batch(f, EVENTS, control=False) for f in (_IPV4, _IPV6)}
        self._listeners: dict[int, Listener] = {}
        self._by_name: dict[tuple[str, bytes], Listener] = {}
        self._floating = outlet is not None
        self._give_way = False
        """Somebody else's descriptor is readable."""
        self.flows = FlowTable(self._epoll, journal, random, descriptors, ports, outlet, sources)
        self.admission = Admission(self.flows, suspect, random, int(clock()), outlet)
        self._drops: Counter[str] = Counter()
        self.errors: Counter[str] = Counter()
        """ICMP errors from servers, by name."""

    @property
    def listeners(self) -> Sequence[Listener]:
        """All listening sockets."""
        return list(self._listeners.values())

    @property
    def drops(self) -> Counter[str]:
        """Datagrams that were not forwarded, by cause."""
        return self._drops + self.admission.drops + self.flows.refusals

    def add_listener(self, listener: Listener) -> None:
        """Start to serve a listening socket."""
        self._listeners[listener.fd] = listener
        self._by_name[listener.service.name, listener.local] = listener
        self._epoll.register(listener.fd, select.EPOLLIN)

    def remove_listener(self, listener: Listener) -> None:
        """Stop serving a listening socket, close it and its flows."""
        for flow in list(listener.flows.values()):
            self.flows.close(flow)
        del self._listeners[listener.fd]
        if self._by_name.get((listener.service.name, listener.local)) is listener:
            del self._by_name[listener.service.name, listener.local]
        self._epoll.unregister(listener.fd)
        listener.close()

    def listener(self, service: str, local: bytes) -> Listener | None:
        """The listener of a service, at a packed local address if the service is on a wildcard."""
        return self._by_name.get((service, local))

    def watch(self, fd: int) -> None:
        """Give way to other tasks at once, even amid traffic, when this descriptor is readable.

        For one that another task waits for in trio's own epoll: otherwise it might wait for :data:`HOLD`.
        """
        with suppress(FileExistsError):
            self._epoll.register(fd, select.EPOLLIN)

    def unwatch(self, fd: int) -> None:
        """No longer; a descriptor that was closed is not watched anyway."""
        with suppress(OSError, ValueError):
            self._epoll.unregister(fd)

    def apply(self, snapshot: Snapshot) -> None:
        """Take over a new snapshot."""
        self.flows.limit = snapshot.config.node.max_flows
        self.admission.apply(snapshot)

    def forget_ports(self) -> None:
        """Give up the ports of endpoints that are gone, once their flows are."""
        self.flows.forget_ports(self.admission.endpoints())

    def tick(self) -> None:
        """A second has passed."""
        self.admission.advance(int(self._clock()))

    def close(self) -> None:
        """Close every socket, without a word to the journal: the flows are to be restored."""
        self.flows.close_sockets()
        for listener in self.listeners:
            listener.close()
        self._epoll.close()

    async def run(self) -> None:
        """Forward until cancelled.

        While there is traffic the forwarder sleeps in its own epoll rather than in trio's: that spares some
        15 µs per wake-up, and costs the other tasks :data:`HOLD` at most.
        """
        while True:
            await trio.lowlevel.wait_readable(self._epoll.fileno())
            until = self._clock() + HOLD
            events = self._epoll.poll(
                0, EVENTS
            )  # nothing, if it was a watched one that its reader has seen to
            while events:
                self._round(events)
                if self._give_way or self._clock() > until:
                    self._give_way = False
                    break
                events = self._epoll.poll(HOLD, EVENTS)

    def _round(self, events: Sequence[tuple[int, int]]) -> None:
        """Look at the sockets that are readable, servers first."""
        by_fd = self.flows.by_fd
        listener: Listener | None = None
        listeners: list[Listener] = []
        ready: dict[Listener, list[Flow]] = {}
        flows: list[Flow] = []
        for fd, _ in events:
            flow = by_fd.get(fd)
            if flow is None:
                if fd in self._listeners:
                    listeners.append(self._listeners[fd])
                else:
                    self._give_way = True
                continue
            if flow.listener is not listener:
                listener = flow.listener
                flows = ready.setdefault(listener, [])
            flows.append(flow)
        for listener, flows in ready.items():
            self._from_servers(listener, flows)
        for listener in listeners:
            if listener.wildcard:
                self._from_strangers(listener)
            else:
                self._from_clients(listener)

    # from clients to servers

    def _from_clients(self, listener: Listener) -> None:
        batch = self._inbox[listener.family]
        try:
            filled = batch.receive(listener.fd)
        except OSError:
            self._drops["receive-error"] += 1
            return
        sizes = batch.sizes(filled)
        peers = batch.peers(filled)
        segments = batch.segments(filled)
        heads = _heads(listener, batch, filled)
        admit, tick, flows = self.admission.admit, self.admission.tick, listener.flows
        datagrams = batch.datagrams(sizes)
        if segments is not None or (filled > 1 and len(set(peers)) < filled):
            self._in_runs(listener, peers, datagrams, segments, heads)
            return
        for peer, datagram, size, head in zip(peers, datagrams, sizes, heads, strict=False):
            flow = flows.get(peer)
            if flow is None or flow.tick != tick or not head:
                flow = admit(listener, peer, flow, datagram)
                if flow is None:
                    continue
            counters = flow.counters
            counters.packets_in += 1
            counters.bytes_in += size
            try:
                flow.sock.send(datagram)
            except OSError as error:
                self._send_again(flow, None, Run([datagram], 0), error)
        self._flush()

    def _in_runs(
        self,
        listener: Listener,
        peers: Sequence[Peer],
        datagrams: Sequence[memoryview],
        segments: Sequence[int] | None,
        heads: Sequence[int],
    ) -> None:
        """A batch in which a flow has several datagrams: those of a flow leave together."""
        admit, tick, flows = self.admission.admit, self.admission.tick, listener.flows
        waiting: dict[Flow, list[memoryview]] = {}
        merged: dict[Flow, list[int]] = {}
        for slot, peer in enumerate(peers):
            flow = flows.get(peer)
            if flow is None or flow.tick != tick or not heads[slot]:
                if flow in waiting:  # it may be closed now, and must not lose what came before
                    self._send_runs(flow, None, runs(waiting.pop(flow), merged.pop(flow, None)))
                flow = admit(listener, peer, flow, datagrams[slot])
                if flow is None:
                    continue
            flow.counters.packets_in += count(len(datagrams[slot]), segments[slot]) if segments else 1
            flow.counters.bytes_in += len(datagrams[slot])
            if flow in waiting:
                waiting[flow].append(datagrams[slot])
            else:
                waiting[flow] = [datagrams[slot]]
            if segments is not None:
                merged.setdefault(flow, []).append(segments[slot])
        for flow, run in waiting.items():
            self._send_runs(flow, None, runs(run, merged.get(flow)))
        self._flush()

    def _from_strangers(self, wildcard: Listener) -> None:
        """Datagrams to local addresses of a wildcard service that have no socket of their own yet."""
        batch = self._inbox[wildcard.family]
        try:
            filled = batch.receive(wildcard.fd)
        except OSError:
            self._drops["receive-error"] += 1
            return
        peers, datagrams = batch.peers(filled), batch.datagrams(batch.sizes(filled))
        for slot, control in enumerate(batch.controls(filled)):
            listener = self._local(wildcard, control)
            if listener is None:
                self._drops["no-local-address"] += 1
                continue
            peer, datagram = peers[slot], datagrams[slot]
            flow = self.admission.admit(listener, peer, listener.flows.get(peer), datagram)
            if flow is not None:
                merged = merged_size(control)
                flow.counters.packets_in += count(len(datagram), merged)
                flow.counters.bytes_in += len(datagram)
                self._send_runs(flow, None, runs([datagram], [merged]))
        self._flush()

    def _local(self, wildcard: Listener, control: bytes) -> Listener | None:
        """The listener for the local address in the control data, opened if need be."""
        address = local_address(control)
        if address is None:
            return None
        service = wildcard.service
        own = [each for each in self._listeners.values() if each.service.name == service.name]
        found = next((each for each in own if each.address == address), None)
        if found is not None:
            return found
        if len(own) >= MAX_LOCALS:
            return None
        try:
            listener = Listener(service, address, wildcard.buffer, wildcard.counters, floating=self._floating)
        except ListenError:
            return None
        self.add_listener(listener)
        return listener

    # from servers to clients

    def _from_servers(self, listener: Listener, flows: Sequence[Flow]) -> None:
        """One datagram of each flow, all sent in one call; of bulk flows as many as there are."""
        batch = self._outbox[listener.family]
        views = batch.views
        names: list[bytes] = []
        sizes: list[int] = []
        for flow in flows:
            if flow.bulk:
                self._relay_bulk(flow)
                continue
            try:
                size = flow.sock.recv_into(views[len(sizes)])
            except BlockingIOError:
                continue
            except OSError as error:
                self._upstream_error(flow, error)
                continue
            names.append(flow.name)
            sizes.append(size)
            counters = flow.counters
            counters.packets_out += 1
            counters.bytes_out += size
            flow.answers += 1
            if flow.answers > BULK:
                self._make_bulk(flow)
        if sizes:
            lost = len(sizes) - batch.send(listener.fd, names, sizes)
            if lost:
                self._drops["not-sent-to-client"] += lost

    def _make_bulk(self, flow: Flow) -> None:
        """Read the flow in batches from now on. Never undone: a merged datagram may be in its queue."""
        flow.bulk = True
        with suppress(OSError):  # a kernel before 5.0: batches help all the same
            flow.sock.setsockopt(SOL_UDP, UDP_GRO, 1)

    def _relay_bulk(self, flow: Flow) -> None:
        batch = self._inbox[flow.listener.family]
        try:
            filled = batch.receive(flow.fd)
        except OSError as error:
            self._upstream_error(flow, error)
            return
        if not filled:
            return
        sizes, segments = batch.sizes(filled), batch.segments(filled)
        flow.answers += filled
        flow.counters.packets_out += sum(map(count, sizes, segments)) if segments else filled
        flow.counters.bytes_out += sum(sizes)
        address, port = peer_address(flow.peer)
        client = (str(ip_address(address)), port)
        self._send_runs(flow, client, runs(batch.datagrams(sizes), segments))

    # both ways

    def _send_runs(self, flow: Flow, client: Address | None, all_runs: Iterable[Run]) -> None:
        """Send runs to the server, or through the listener's socket to the client."""
        for run in all_runs:
            if not self._send_run(flow, client, run):
                flow.segment = False
                for piece in pieces(run):
                    self._send_run(flow, client, Run([piece], 0))

    def _send_run(self, flow: Flow, client: Address | None, run: Run) -> bool:
        """Send a run, or count it as lost; false if it has to be sent in pieces."""
        if run.segment and not flow.segment:
            return False
        try:
            return send_run(flow.sock if client is None else flow.listener.sock, client, run)
        except OSError as error:
            return self._send_again(flow, client, run, error)

    def _send_again(self, flow: Flow, client: Address | None, run: Run, error: OSError) -> bool:
        """Send what failed once more if the error was that of an *earlier* datagram, which is reported so (udp(7))."""
        if client is None and error.errno in _FROM_ICMP:
            self._upstream_error(flow, error)
            try:
                return send_run(flow.sock, None, run)
            except OSError as second:
                error = second
        self._drops[errno.errorcode.get(error.errno or 0, "unknown")] += len(run.buffers)
        return True

    def _upstream_error(self, flow: Flow, error: OSError) -> None:
        """An ICMP error came back from the server's side: nothing is lost here, but its check should look."""
        self.errors[errno.errorcode.get(error.errno or 0, "unknown")] += 1
        self._suspect(flow.listener.service.group, flow.member.name)


def _heads(listener: Listener, batch: Batch, filled: int) -> Sequence[int]:
    """For each datagram a number that is zero if it may be an IKE message."""
    framing = listener.service.framing
    if framing is Framing.NATT:
        return batch.first_words(filled)
    return _ALL_IKE if framing is Framing.IKE else _NO_IKE
