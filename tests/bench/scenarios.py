"""What is measured of a forwarder. Each function runs one scenario once and gives its figures by metric name."""

from __future__ import annotations

import select
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from random import Random
from typing import NamedTuple

from forwarders import Running
from load import BATCH, FIRST, Load, Mix, Pace, Stream
from traffic import SEQUENCE_OFFSET, SPI_OFFSET, esp

Figures = Mapping[str, float]

PACED_RATE = 50_000
GSO_SIZES = (1400, 200)
"""Bytes of the datagrams in super-packets."""
SEGMENTS = 16
"""Datagrams in a super-packet."""
SUPER_BATCH = 4
"""Super-packets in one send: as many datagrams as :data:`~load.BATCH`."""
WINDOW = 128
"""New flows under way at once: as many as a receive buffer of the default size holds."""
STALL = 0.1
"""Seconds without progress after which datagrams under way count as lost."""
BULK = Mix(flows=64, burst=16, size=1400)
INTERLEAVED = Mix(flows=64, burst=1, size=200)
SCATTERED = Mix(flows=1000, burst=1, size=200)
MIXES = {"bulk": BULK, "interleaved": INTERLEAVED, "scattered": SCATTERED}


@dataclass(frozen=True)
class Effort:
    """How long each scenario goes on."""

    seconds: float
    """Of each saturated or paced scenario, after its warm-up."""
    warm_up: float
    round_trips: int
    new_flows: int


class Metric(NamedTuple):
    """A figure that is reported; those of one group stand together."""

    name: str
    group: str
    figure: str
    unit: str
    lower_is_better: bool = False


def metrics() -> Sequence[Metric]:
    """All figures, in the order of the report."""
    found = []
    for name in (*MIXES, "down"):
        found += [
            Metric(f"{name}_cpu", name, "CPU per packet", "µs", True),
            Metric(f"{name}_rate", name, "throughput", "k/s"),
            Metric(f"{name}_loss", name, "lost", "%", True),
            Metric(f"{name}_busy", name, "busy", "%"),
        ]
    for size in GSO_SIZES:
        found += [
            Metric(f"gso{size}_cpu", f"GSO {size:,}", "CPU per packet", "µs", True),
            Metric(f"gso{size}_rate", f"GSO {size:,}", "throughput", "k/s"),
            Metric(f"gso{size}_busy", f"GSO {size:,}", "busy", "%"),
        ]
    found += [
        Metric("paced_rate", "paced", "offered", "k/s"),
        Metric("paced_loss", "paced", "lost", "packets", True),
        Metric("paced_disorder", "paced", "out of order", "packets", True),
        Metric("paced_cpu", "paced", "CPU per packet", "µs", True),
        Metric("trip_p50", "round trip", "p50", "µs", True),
        Metric("trip_p99", "round trip", "p99", "µs", True),
        Metric("trip_cpu", "round trip", "CPU", "µs", True),
    ]
    for name, group in (("first", "new flows, first packet"), ("reply", "new flows, request and reply")):
        found += [
            Metric(f"{name}_rate", group, "rate", "k/s"),
            Metric(f"{name}_cpu", group, "CPU per flow", "µs", True),
            Metric(f"{name}_lost", group, "lost", "packets", True),
        ]
    return [
        *found,
        Metric("memory", "memory (RSS)", "10,000 flows", "MiB", True),
        Metric("memory_all", "memory (RSS)", "all, with them", "MiB", True),
    ]


def legend() -> Sequence[str]:
    """What the names of scenarios mean."""
    return [
        *(f"{name}: clients to servers, {mix}, more offered than passes" for name, mix in MIXES.items()),
        f"down: servers to clients, {INTERLEAVED}, more offered than passes",
        f"paced: clients to servers, {INTERLEAVED}, {PACED_RATE:,} packets/s",
        f"GSO: {BULK.flows} flows, clients send super-packets of {SEGMENTS} datagrams of so many bytes",
        "CPU per packet: user and system time of all processes for a packet that came through;",
        "the kernel's work within a send, up to the receiver's socket, counts for the sender",
        "busy: CPU used, of the time in which no other program held the CPU; well below 100 the load was the limit",
    ]


def saturated(load: Load, running: Running, effort: Effort, name: str) -> Figures:
    """Offer more than the forwarder takes: what comes through, and what each packet costs it."""
    mix = MIXES[name]
    load.establish(mix.flows)
    return _saturate(load.upward(mix), lambda: load.drain(load.sinks_natt), running, effort, name)


def saturated_down(load: Load, running: Running, effort: Effort) -> Figures:
    """The same from the servers to the clients."""
    load.establish(INTERLEAVED.flows)
    return _saturate(
        load.downward(INTERLEAVED), lambda: load.drain([load.client_natt]), running, effort, "down"
    )


def _saturate(
    streams: Sequence[Stream], drain: Callable[[], int], running: Running, effort: Effort, name: str
) -> Figures:
    def push() -> int:
        return sum(stream.push(BATCH // len(streams)) for stream in streams)

    counts = _flood(push, drain, running, effort)
    time.sleep(0.05)
    drain()
    return {
        f"{name}_cpu": counts.cpu_per_packet,
        f"{name}_rate": counts.rate / 1e3,
        f"{name}_loss": counts.loss * 100,
        f"{name}_busy": counts.busy * 100,
    }


@dataclass(frozen=True)
class Counts:
    """What a flood sent and got through."""

    sent: int
    received: int
    seconds: float
    cpu: float
    waited: float
    """Seconds in which the forwarder could have run, but another program held the CPU."""

    @property
    def rate(self) -> float:
        """Packets that came through per second."""
        return self.received / self.seconds

    @property
    def loss(self) -> float:
        """The share that did not come through."""
        return max(0.0, 1 - self.received / max(1, self.sent))

    @property
    def cpu_per_packet(self) -> float:
        """Microseconds of the forwarder for a packet that came through."""
        return self.cpu * 1e6 / max(1, self.received)

    @property
    def busy(self) -> float:
        """The share of its CPU that the forwarder used, as far as others let it."""
        return self.cpu / max(1e-9, self.seconds - self.waited)


def _flood(push: Callable[[], int], drain: Callable[[], int], running: Running, effort: Effort) -> Counts:
    _push_until(time.monotonic() + effort.warm_up, push, drain)
    began, before = time.monotonic(), running.usage()
    sent, received = _push_until(began + effort.seconds, push, drain)
    used = running.usage() - before
    return Counts(sent, received, time.monotonic() - began, used.cpu, used.waited)


def _push_until(end: float, push: Callable[[], int], drain: Callable[[], int]) -> tuple[int, int]:
    sent = received = 0
    while time.monotonic() < end:
        sent += push()
        received += drain()
    return sent, received


def paced(load: Load, running: Running, effort: Effort) -> Figures:
    """Offer a steady rate that must pass without loss; the sequence numbers of ESP show loss and disorder."""
    load.establish(INTERLEAVED.flows)
    (stream,) = load.upward(INTERLEAVED)
    tally = Tally(stream.first)
    before, sent = running.usage(), 0
    began = now = time.monotonic()
    pace = Pace(PACED_RATE, now)
    while now < began + effort.seconds:
        if due := pace.due(now):
            pushed = stream.push(due)
            pace.sent(pushed)
            sent += pushed
        tally.read(load)
        now = time.monotonic()
    used = running.usage() - before
    quiet = time.monotonic() + STALL
    while time.monotonic() < quiet:
        tally.read(load)
    return {
        "paced_rate": sent / (now - began) / 1e3,
        "paced_loss": float(sent - tally.received),
        "paced_disorder": float(tally.disorder),
        "paced_cpu": used.cpu * 1e6 / max(1, tally.received),
    }


class Tally:
    """Follows the sequence numbers of each flow from ``first`` on; lower ones are of an earlier stream."""

    def __init__(self, first: int) -> None:
        self.received = self.disorder = 0
        self._first = first
        self._last: dict[int, int] = {}

    def read(self, load: Load) -> None:
        """Take note of what waits at the servers."""
        incoming = load.incoming
        for sink in load.sinks_natt:
            count = incoming.receive(sink.fileno())
            spis, numbers = incoming.numbers(SPI_OFFSET, count), incoming.numbers(SEQUENCE_OFFSET, count)
            for spi, number in zip(spis, numbers, strict=True):
                if number < self._first:
                    continue
                self.received += 1
                if number <= self._last.get(spi, 0):
                    self.disorder += 1
                self._last[spi] = number


def round_trip(load: Load, running: Running, effort: Effort) -> Figures:
    """Send one ESP packet at a time and wait for its echo; the forwarder is otherwise idle."""
    load.establish(1)
    batch = load.from_natt.prepare([(*load.natt_way(FIRST), esp(FIRST, 200, Random(0)))])
    descriptor = load.client_natt.fileno()
    poll = select.poll()
    poll.register(descriptor, select.POLLIN)
    trips = []
    before = running.usage()
    with load.echoing():
        for _ in range(effort.round_trips):
            began = time.perf_counter_ns()
            load.from_natt.send(batch, 0, 1)
            if poll.poll(STALL * 1000):
                load.incoming.receive(descriptor)
                trips.append((time.perf_counter_ns() - began) / 1e3)
    used = running.usage() - before
    if not trips:
        raise TimeoutError("no echo came back")
    trips.sort()
    return {
        "trip_p50": trips[len(trips) // 2],
        "trip_p99": trips[len(trips) * 99 // 100],
        "trip_cpu": used.cpu * 1e6 / len(trips),
    }


def new_flows_first(load: Load, running: Running, effort: Effort) -> Figures:
    """Clients that were never seen send IKE_SA_INIT; how fast these reach a server."""
    return _new_flows(load, running, effort, "first", lambda: load.drain(load.sinks_ike), lambda: 0)


def new_flows_answered(load: Load, running: Running, effort: Effort) -> Figures:
    """Clients that were never seen send IKE_SA_INIT and get an answer; what the forwarder keeps for each."""
    before = running.memory()
    figures = _new_flows(
        load,
        running,
        effort,
        "reply",
        lambda: load.drain([load.client_ike]),
        lambda: load.answer(load.sinks_ike),
    )
    after = running.memory()
    return {
        **figures,
        "memory": (after - before) / 2**20 * 10_000 / effort.new_flows,
        "memory_all": after / 2**20,
    }


def _new_flows(
    load: Load,
    running: Running,
    effort: Effort,
    name: str,
    drain: Callable[[], int],
    serve: Callable[[], int],
) -> Figures:
    """Set up new flows as fast as they go, with at most :data:`WINDOW` under way."""
    count = effort.new_flows
    batch = load.ike_requests(range(count))
    sent = done = lost = 0
    before = running.usage()
    began = arrival = since = time.perf_counter()
    while done + lost < count:
        if room := min(BATCH, count - sent, WINDOW - (sent - done - lost)):
            sent += load.from_ike.send(batch, sent, room)
        serve()
        if arrived := drain():
            done += arrived
            arrival = since = time.perf_counter()
        elif time.perf_counter() - since > STALL:
            lost, since = sent - done, time.perf_counter()
    used = running.usage() - before
    return {
        f"{name}_rate": done / max(arrival - began, 1e-9) / 1e3,
        f"{name}_cpu": used.cpu * 1e6 / max(1, done),
        f"{name}_lost": float(lost),
    }


def gso(load: Load, running: Running, effort: Effort, size: int) -> Figures:
    """Clients with segmentation offload: the kernel carries super-packets as long as nobody splits them."""
    load.establish(BULK.flows)
    batch = load.super_packets(BULK.flows, SEGMENTS, size)
    at = 0

    def push() -> int:
        nonlocal at
        sent = batch.send(load.client_natt.fileno(), at, min(SUPER_BATCH, batch.count - at))
        at = (at + sent) % batch.count
        return sent * SEGMENTS

    with load.super_sinks() as sink:
        counts = _flood(push, lambda: sink.drain(size), running, effort)
        time.sleep(0.05)
        sink.drain(size)
    return {
        f"gso{size}_rate": counts.rate / 1e3,
        f"gso{size}_cpu": counts.cpu_per_packet,
        f"gso{size}_busy": counts.busy * 100,
    }
