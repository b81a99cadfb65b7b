"""Clients and servers in one process: whoever sends and whoever counts never compete for their CPU.

A loop sends a batch, then reads whatever arrived, so the sending outruns every forwarder while the counting
keeps up. Only round trips need somebody who sleeps until a datagram comes; that is a child process.
"""

from __future__ import annotations

import itertools
import os
import select
import signal
import socket
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from random import Random

from lab import Lab, Sender
from mmsg import Incoming, Outgoing
from traffic import (
    SEQUENCE_OFFSET,
    SPI_OFFSET,
    Endpoint,
    datagram,
    esp,
    framed_ike_auth,
    ike_sa_init,
)

BATCH = 64
FIRST = 256
"""The first client that sends ESP. A client's number is its SPI, and lower ones are reserved (RFC 4303 section 2.1)."""
UDP_GRO = 104
SUPER = 65_536
NUMBERS = 50_000_000
"""Sequence numbers of a stream: each begins above all that came before, so that stragglers are known as such."""
ESTABLISH_TIMEOUT = 5.0
QUIET, QUIET_LIMIT = 0.1, 3.0
"""Seconds without a packet after which a forwarder's queues are empty, and how long to wait for that."""
ANY = "0.0.0.0"


def clients(flows: int) -> range:
    """The clients that so many flows belong to."""
    return range(FIRST, FIRST + flows)


@dataclass(frozen=True)
class Mix:
    """Which flows send, in which order, and how much."""

    flows: int
    burst: int
    """Datagrams of one flow in a row."""
    size: int
    """Bytes of UDP payload."""

    def __str__(self) -> str:
        order = f"{self.burst} in a row" if self.burst > 1 else "each packet another"
        return f"{self.flows:,} flows, {order}, {self.size:,} bytes"

    def cycle(self) -> Sequence[int]:
        """The client of each datagram, over and over; no shorter than a batch."""
        once = [client for client in clients(self.flows) for _ in range(self.burst)]
        return once * -(-BATCH // len(once))


class Stream:
    """ESP packets of a mix without end, numbered per flow."""

    def __init__(
        self,
        sender: Sender,
        spis: Sequence[int],
        ways: Sequence[tuple[Endpoint, Endpoint]],
        size: int,
        first: int,
    ) -> None:
        """A packet of ``spis[i]`` goes from ``ways[i][0]`` to ``ways[i][1]``; each flow counts from ``first``."""
        self.first = first
        self._sender = sender
        body = Random(0)
        self._batch: Outgoing = sender.prepare(
            [(*way, esp(spi, size, body)) for spi, way in zip(spis, ways, strict=True)]
        )
        times = Counter(spis)
        self._step = [times[spi] for spi in spis]
        seen: Counter[int] = Counter()
        self._numbers: list[int] = []
        for spi in spis:
            self._numbers.append(first + seen[spi])
            seen[spi] += 1
        self._at = 0
        self._number()

    def push(self, limit: int = BATCH) -> int:
        """Send the next packets, up to ``limit``; how many the kernel took."""
        sent = self._sender.send(self._batch, self._at, min(limit, self._batch.count - self._at))
        self._at += sent
        if self._at == self._batch.count:
            self._at = 0
            self._numbers = [number + step for number, step in zip(self._numbers, self._step, strict=True)]
            self._number()
        return sent

    def _number(self) -> None:
        self._batch.number(self._sender.payload_offset + SEQUENCE_OFFSET, self._numbers)


class Pace:
    """A steady rate. Whoever could not keep it for a moment goes on with it, and does not catch up in a burst."""

    def __init__(self, rate: float, now: float) -> None:
        self._interval = 1 / rate
        self._next = now

    def due(self, now: float) -> int:
        """How many to send now."""
        late = now - self._next
        if late > 2 * BATCH * self._interval:
            self._next = now
            late = 0.0
        return min(BATCH, int(late / self._interval) + 1) if late >= 0 else 0

    def sent(self, count: int) -> None:
        """So many were sent."""
        self._next += count * self._interval


class Load:
    """All sockets of clients and servers, and the flows that were set up."""

    def __init__(self, lab: Lab, direct: bool, forwarder_cpu: int) -> None:
        self.lab = lab
        self.direct = direct
        self._forwarder_cpu = forwarder_cpu
        self._random = Random(1)
        self.incoming = Incoming(BATCH)
        """What the last read of a socket brought."""
        self.client_ike = lab.udp("clients", Endpoint(ANY, lab.client.ike))
        self.client_natt = lab.udp("clients", Endpoint(ANY, lab.client.natt))
        self.sinks_ike = [lab.udp("servers", Endpoint(each, lab.service.ike)) for each in lab.servers]
        self.sinks_natt = [lab.udp("servers", Endpoint(each, lab.service.natt)) for each in lab.servers]
        self.from_ike = lab.sender("clients", self.client_ike)
        self.from_natt = lab.sender("clients", self.client_natt)
        self._from_servers = [lab.sender("servers", sink) for sink in self.sinks_natt]
        self._peers: dict[int, tuple[int, Endpoint]] = {}
        self._numbers = itertools.count(NUMBERS, NUMBERS)

    def close(self) -> None:
        """Close all sockets."""
        for sender in (self.from_ike, self.from_natt, *self._from_servers):
            sender.close()
        for sock in (self.client_ike, self.client_natt, *self.sinks_ike, *self.sinks_natt):
            sock.close()

    def target(self, client: int, port: int) -> Endpoint:
        """Where a client sends to: the virtual address, or one of the servers on the direct path."""
        servers = self.lab.servers
        return Endpoint(servers[client % len(servers)] if self.direct else self.lab.vip, port)

    def ike_way(self, client: int) -> tuple[Endpoint, Endpoint]:
        """From a client's IKE port to its target."""
        source = Endpoint(self.lab.client_address(client), self.lab.client.ike)
        return source, self.target(client, self.lab.service.ike)

    def natt_way(self, client: int) -> tuple[Endpoint, Endpoint]:
        """From a client's NAT traversal port to its target."""
        source = Endpoint(self.lab.client_address(client), self.lab.client.natt)
        return source, self.target(client, self.lab.service.natt)

    def ike_requests(self, clients: Sequence[int]) -> Outgoing:
        """An IKE_SA_INIT of each client, with an SPI of its own."""
        return self.from_ike.prepare(
            [(*self.ike_way(each), ike_sa_init(_ike_spi(each), self._random)) for each in clients]
        )

    def establish(self, flows: int) -> None:
        """Let the clients of so many flows begin as VPN clients do: IKE on one port, then on the other, then ESP.

        Raises:
            TimeoutError: not all of their ESP reached a server.
        """
        missing = [client for client in clients(flows) if client not in self._peers]
        for start in range(0, len(missing), BATCH):
            self._establish(missing[start : start + BATCH])

    def _establish(self, group: Sequence[int]) -> None:
        random = self._random
        first = self.ike_requests(group)
        second = self.from_natt.prepare(
            [
                (*self.natt_way(each), framed_ike_auth(_ike_spi(each), random.randbytes(8), random))
                for each in group
            ]
        )
        third = self.from_natt.prepare([(*self.natt_way(each), esp(each, 200, random)) for each in group])
        deadline = time.monotonic() + ESTABLISH_TIMEOUT
        while not all(each in self._peers for each in group):
            if time.monotonic() > deadline:
                raise TimeoutError(f"ESP of {len(group)} new clients did not reach the servers")
            self.from_ike.send(first, 0, first.count)
            self._settle(self.sinks_ike, self.client_ike)
            self.from_natt.send(second, 0, second.count)
            self._settle(self.sinks_natt, self.client_natt)
            self.from_natt.send(third, 0, third.count)
            self._settle(self.sinks_natt, self.client_natt)

    def _settle(self, sinks: Sequence[socket.socket], client: socket.socket) -> None:
        """Answer what arrives until nothing does for a moment; note where ESP comes from."""
        quiet = time.monotonic() + 0.02
        while time.monotonic() < quiet:
            for number, sink in enumerate(sinks):
                count = self.incoming.receive(sink.fileno())
                if count:
                    quiet = time.monotonic() + 0.02
                    for slot, spi in enumerate(self.incoming.numbers(SPI_OFFSET, count)):
                        if self.incoming.lengths(count)[slot] == 200:
                            self._peers[spi] = number, Endpoint.unpack(self.incoming.source(slot))
                    self.incoming.echo(sink.fileno(), count)
            self.drain([client])

    def quiet(self) -> None:
        """Wait until nothing arrives any more that an earlier scenario left in a forwarder's queue."""
        end = time.monotonic() + QUIET_LIMIT
        still = time.monotonic() + QUIET
        while time.monotonic() < min(still, end):
            if self.drain([*self.sinks_ike, *self.sinks_natt, self.client_ike, self.client_natt]):
                still = time.monotonic() + QUIET
            time.sleep(QUIET / 10)

    def upward(self, mix: Mix) -> list[Stream]:
        """ESP from clients to servers."""
        spis = mix.cycle()
        ways = [self.natt_way(spi) for spi in spis]
        return [Stream(self.from_natt, spis, ways, mix.size, next(self._numbers))]

    def downward(self, mix: Mix) -> list[Stream]:
        """ESP from servers to the flows that :meth:`establish` set up, one stream from each server."""
        streams = []
        for number, (address, sender) in enumerate(zip(self.lab.servers, self._from_servers, strict=True)):
            source = Endpoint(address, self.lab.service.natt)
            spis = [spi for spi in mix.cycle() if self._peers[spi][0] == number]
            if spis:
                ways = [(source, self._peers[spi][1]) for spi in spis]
                streams.append(Stream(sender, spis, ways, mix.size, next(self._numbers)))
        return streams

    def super_packets(self, flows: int, segments: int, size: int) -> Outgoing:
        """ESP from clients as GSO super-packets of so many datagrams each."""
        body = Random(0)
        return Outgoing(
            [
                datagram(*self.natt_way(spi), b"".join(esp(spi, size, body) for _ in range(segments)), size)
                for spi in clients(flows)
            ]
        )

    def drain(self, sinks: Sequence[socket.socket]) -> int:
        """Read everything that waits; the number of datagrams."""
        total = 0
        receive = self.incoming.receive
        for sink in sinks:
            while count := receive(sink.fileno()):
                total += count
                if count < BATCH:
                    break
        return total

    def answer(self, sinks: Sequence[socket.socket]) -> int:
        """Send everything that waits back to where it came from; the number of datagrams."""
        total = 0
        for sink in sinks:
            while count := self.incoming.receive(sink.fileno()):
                total += self.incoming.echo(sink.fileno(), count)
                if count < BATCH:
                    break
        return total

    @contextmanager
    def super_sinks(self) -> Iterator[SuperSink]:
        """Let the servers take merged datagrams (UDP_GRO) for a while, as a NIC with receive offload does."""
        for sink in self.sinks_natt:
            sink.setsockopt(socket.IPPROTO_UDP, UDP_GRO, 1)
        try:
            yield SuperSink(self.sinks_natt)
        finally:
            for sink in self.sinks_natt:
                sink.setsockopt(socket.IPPROTO_UDP, UDP_GRO, 0)

    @contextmanager
    def echoing(self) -> Iterator[None]:
        """Let a child process answer on the servers' NAT traversal ports meanwhile.

        On the direct path it has the CPU that is the forwarder's otherwise: with both ends on one CPU a
        datagram would wake nobody from idle, and direct would look better than any two machines are.
        """
        pid = os.fork()
        if pid == 0:
            try:
                if self.direct:
                    os.sched_setaffinity(0, {self._forwarder_cpu})
                self._echo_until_killed()
            finally:
                os._exit(1)
        try:
            yield
        finally:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)

    def _echo_until_killed(self) -> None:
        parent = os.getppid()
        poll = select.epoll()
        for sink in self.sinks_natt:
            poll.register(sink.fileno(), select.EPOLLIN)
        while os.getppid() == parent:
            for descriptor, _ in poll.poll(1.0):
                self.incoming.echo(descriptor, self.incoming.receive(descriptor))


def _ike_spi(client: int) -> bytes:
    """The initiator's SPI of a client, the same in all its messages."""
    return Random(client).randbytes(8)


class SuperSink:
    """Counts datagrams that may arrive merged."""

    def __init__(self, sinks: Sequence[socket.socket]) -> None:
        self._sinks = sinks
        self._incoming = Incoming(32, SUPER)

    def drain(self, size: int) -> int:
        """Read everything that waits; the number of datagrams of ``size`` bytes in it."""
        total = 0
        for sink in self._sinks:
            while count := self._incoming.receive(sink.fileno()):
                total += sum(self._incoming.lengths(count)) // size
                if count < self._incoming.count:
                    break
        return total
