"""Flows that are known before they are open: those of a former process, and those that the peer has.

A flow is opened again with the upstream port that it had, by which its server knows the client's tunnel. On a
node that has a peer, one that cannot be opened now (its port is taken, there is no route, descriptors have run out)
is *dormant*: it is remembered, is in checkpoints and digests, and is tried again every :data:`RETRY` seconds,
when the node becomes active, and when its client sends a datagram. Elsewhere it is lost, and the client is
decided anew.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from ipaddress import ip_address
from itertools import islice
from math import inf

import structlog
import trio

from sapin.core.contracts import Client
from sapin.core.dataplane.flows import Flow, digest
from sapin.core.dataplane.listeners import Listener, ListenError
from sapin.core.dataplane.udp import Forwarder
from sapin.core.journal import FlowClosed, FlowOpened, Record
from sapin.core.model import IPAddress, VirtualService
from sapin.core.snapshot import Snapshot

RETRY = 5.0
"""Seconds between two tries to open what is dormant."""
STEP = 16
"""Flows that are opened in one step: some 0.5 ms."""
PART = 500
"""Flows that are looked at in one step."""

log = structlog.get_logger("sapin.dataplane")

Identity = tuple[str, bytes, int, bytes]
"""Service, client, client port and local address of a flow: the first fields of its records."""
Bind = Callable[[VirtualService, IPAddress], Listener]


@dataclass(slots=True)
class _Dormant:
    record: FlowOpened
    digest: int
    mark: int


class Reopener:
    """Opens flows by their records.

    Args:
        snapshot: answers the running one.
        bind: makes a listener of a wildcard service for a local address.
        journal: gets what is given up.
        flush: makes that safe, and tells the peer.
    """

    def __init__(
        self,
        forwarder: Forwarder,
        snapshot: Callable[[], Snapshot],
        bind: Bind,
        journal: Callable[[Record], None],
        flush: Callable[[], None],
        clock: Callable[[], float],
    ) -> None:
        self.digest = 0
        """The sum of what the dormant flows add to the digest of all flows."""
        self._forwarder = forwarder
        self._snapshot = snapshot
        self._bind = bind
        self._clock = clock
        self._journal = journal
        self._flush = flush
        self._dormant: dict[Identity, _Dormant] = {}
        self._queue: deque[Identity] = deque()
        """What is to be tried soon."""
        self._next = -inf
        """When everything is to be tried, by trio's clock."""
        self._active_since: float | None = None
        self._warned = ""
        self._due = trio.Event()

    def __len__(self) -> int:
        return len(self._dormant)

    def open(self, old: FlowOpened) -> Flow | None:
        """The flow, opened with its upstream port; ``None`` if that cannot be."""
        view = self._snapshot().services.get(old.service)
        member = view.group.members.get(old.server) if view else None
        if view is None or member is None or not member.keeps:
            return None
        listener = self._forwarder.listener(old.service, old.local) or self._local(view.service, old.local)
        if listener is None or not _may_have(listener, old):
            return None
        route = self._forwarder.admission.route(old.service, old.server)
        return self._forwarder.flows.restore(listener, old, member, route, int(self._clock()))

    def _local(self, service: VirtualService, local: bytes) -> Listener | None:
        """The listener of a wildcard service for a local address that a client has sent to."""
        if not local or not service.address.is_unspecified:
            return None
        try:
            listener = self._bind(service, ip_address(local))
        except (ListenError, ValueError):
            return None
        self._forwarder.add_listener(listener)
        return listener

    # dormant flows

    def remember(self, record: FlowOpened, mark: int = 0) -> None:
        """Have it opened soon."""
        self.forget(record[:4])
        self._dormant[record[:4]] = _Dormant(record, digest(record), mark)
        self.digest += self._dormant[record[:4]].digest
        self._queue.append(record[:4])
        self._due.set()

    def forget(self, flow: Identity) -> bool:
        """Forget a dormant flow; whether there was such a one."""
        found = self._dormant.pop(flow, None)
        if found is not None:
            self.digest -= found.digest
        return found is not None

    def wake(self, listener: Listener, client: Client) -> Flow | None:
        """The dormant flow of a client that has sent something, open."""
        if not self._dormant:
            return None
        found: Identity = (listener.service.name, client.address, client.port, listener.local)
        opened = self._try(found)
        if opened is None:
            self._give_up(found)  # the client cannot wait: it is decided anew
        return opened

    def records(self) -> Iterator[FlowOpened]:
        """What is dormant, as of the first call; what is not any more is left out."""
        for flow in list(self._dormant):
            if flow in self._dormant:
                yield self._dormant[flow].record

    def forget_unmarked(self, mark: int) -> Iterator[list[Identity]]:
        """Forget, step by step, the dormant flows that were not in the peer's snapshot of that mark."""
        flows = iter(list(self._dormant))
        while part := list(islice(flows, PART)):
            yield [
                flow
                for flow in part
                if flow in self._dormant and self._dormant[flow].mark != mark and self.forget(flow)
            ]

    def activate(self, now: float) -> None:
        """The node is the active one: try everything now, and forget later what nobody has used."""
        self._active_since, self._next = now, -inf
        self._due.set()

    def deactivate(self) -> None:
        """The peer says from now on what is there."""
        self._active_since = None

    async def run(self) -> None:
        """Open what is dormant, a few at a time, until cancelled."""
        flows = self._forwarder.flows
        while True:
            if trio.current_time() >= self._next:
                self._next = trio.current_time() + RETRY
                self._queue = deque(self._dormant)
                self._expire()
            self._due = trio.Event()
            flows.short_of = ""
            while self._queue and not flows.short_of:
                for _ in range(min(STEP, len(self._queue))):
                    self._try(self._queue.popleft())
                await trio.lowlevel.checkpoint()
            self._queue.clear()
            self._warn()
            with trio.move_on_at(self._next):
                await self._due.wait()

    def _expire(self) -> None:
        if self._active_since is None:
            return
        now, services = self._clock(), self._snapshot().services
        for flow in list(self._dormant):
            view = services.get(flow[0])
            if view is None or now - self._active_since > view.service.flow_timeout:
                self._give_up(flow)
        self._flush()

    def _give_up(self, flow: Identity) -> None:
        if self.forget(flow):
            self._journal(FlowClosed(*flow))

    def _warn(self) -> None:
        """Say once what makes this node hold fewer flows than its peer."""
        short_of = self._forwarder.flows.short_of if self._dormant else ""
        if short_of and short_of != self._warned:
            log.error(
                "this node cannot open all flows of its peer: at a takeover, their clients are decided anew",
                short_of=short_of,
                open=len(self._forwarder.flows),
                dormant=len(self._dormant),
                remedy="give both nodes the same limit of open files (LimitNOFILE=) and the same max_flows",
            )
        self._warned = short_of

    def _try(self, flow: Identity) -> Flow | None:
        dormant = self._dormant.get(flow)
        opened = None if dormant is None else self.open(dormant.record)
        if dormant is None or opened is None:
            return None
        opened.mark = dormant.mark
        self.forget(flow)
        return opened


def _may_have(listener: Listener, flow: FlowOpened) -> bool:
    """Whether the flow can be the listener's; the configuration may have changed since it was."""
    return not listener.wildcard and len(flow.client) == listener.address.max_prefixlen // 8
