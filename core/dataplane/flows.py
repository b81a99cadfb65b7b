"""Flows: one client address and port towards one virtual service, and its upstream socket.

The table is bounded, and idle flows are given back. A flow on which the client has not spoken again after
an answer is *unconfirmed* and goes after seconds: a flood of forged first packets holds few of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from socket import SocketType
from typing import TYPE_CHECKING

from sapin.core.wheel import TimerWheel

if TYPE_CHECKING:
    from sapin.core.dataplane.listeners import Listener
    from sapin.core.snapshot import Member

UNCONFIRMED = 30
"""Seconds that an unconfirmed flow is kept (conntrack's value for unreplied UDP)."""

Peer = int | bytes
"""A client's socket address as the kernel gave it, see :meth:`~.batch.Batch.peers`."""


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
    """A client's way to its server. ``last`` and ``opened`` in seconds of the forwarder's clock."""

    __slots__ = (
        "answered",
        "bulk",
        "confirmed",
        "counters",
        "endpoint",
        "fd",
        "key",
        "last",
        "listener",
        "member",
        "name",
        "opened",
        "peer",
        "port",
        "reads",
        "segment",
        "sock",
        "tick",
    )

    def __init__(
        self,
        listener: Listener,
        peer: Peer,
        name: bytes,
        member: Member,
        key: bytes,
        sock: SocketType,
        port: int,
        endpoint: tuple[str, int],
        now: int,
    ) -> None:
        self.listener = listener
        self.peer = peer
        self.name = name
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
        self.opened = self.last = now
        self.tick = 0
        """The forwarder's tick at which the flow was last held against the pins."""
        self.answered = False
        self.confirmed = False
        self.bulk = False
        """Many datagrams come from the server: they are read in batches."""
        self.reads = 0
        self.segment = True
        """Whether its runs can be segmented by the kernel."""


class FlowTable:
    """All flows, by upstream descriptor; each listener has its own by the client's address.

    Args:
        descriptors: all file descriptors are below this number.
    """

    def __init__(self, descriptors: int) -> None:
        self.by_fd: dict[int, Flow] = {}
        self._wheel = TimerWheel(descriptors)

    def __len__(self) -> int:
        return len(self.by_fd)

    def add(self, flow: Flow) -> None:
        """Take in a new flow."""
        self.by_fd[flow.fd] = flow
        flow.listener.flows[flow.peer] = flow
        flow.counters.flows += 1
        self._wheel.file(flow.fd, self._due(flow))

    def remove(self, flow: Flow) -> None:
        """Take a flow out; closing its socket is up to the caller."""
        del self.by_fd[flow.fd]
        if flow.listener.flows.get(flow.peer) is flow:
            del flow.listener.flows[flow.peer]
        flow.counters.flows -= 1
        self._wheel.discard(flow.fd)

    def idle(self, now: int, limit: int) -> Iterator[Flow]:
        """Flows that have been silent for too long, looking at ``limit`` entries at most."""
        for fd, _ in self._wheel.due(now, limit):
            flow = self.by_fd[fd]
            if self._due(flow) > now:
                self._wheel.file(fd, self._due(flow))
            else:
                yield flow

    def of(self, member: Member) -> list[Flow]:
        """The flows that go to a server."""
        return [flow for flow in self.by_fd.values() if flow.member is member]

    def _due(self, flow: Flow) -> int:
        return flow.last + (flow.listener.flow_timeout if flow.confirmed else UNCONFIRMED)
