"""Runs the prober for a while, and says what its figures mean."""

from __future__ import annotations

import json
import subprocess
import sys
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

import trio

from tests.net.lab import INSIDE, Tunnel
from tests.net.namespaces import LabError
from tests.net.pair.lab import PairLab

PROGRAM = Path(__file__).with_name("probe.py")
Speaker = Literal["both", "client", "gateway"]


@dataclass(frozen=True)
class Seen:
    """What the prober saw; times in seconds of CLOCK_MONOTONIC.

    Args:
        arrivals: by client, when a datagram came out of its tunnel, at the gateway and at the client.
        held: when an address came to a node (``True``) or went: time, node, address.
        late: when the prober itself woke up too late, and by how much.
    """

    arrivals: Mapping[str, tuple[Sequence[float], Sequence[float]]]
    held: Sequence[tuple[float, str, str, bool]]
    late: Sequence[tuple[float, float]]

    def outage(self, client: str, since: float, until: float) -> float:
        """The longest time without a datagram that ended after ``since``, in either direction."""
        return max(longest_gap(times, since, until) for times in self.arrivals[client])

    def lateness(self, since: float, until: float) -> float:
        """By how much the prober was late at most."""
        return max((late for at, late in self.late if since <= at <= until), default=0.0)

    def holders(self, addresses: Iterable[str], since: float, until: float) -> tuple[float, float]:
        """For how long one of the addresses was on no node, and on two of them: the worst of them each."""
        spans = [shares(self.held, address, since, until) for address in addresses]
        return max(span[0] for span in spans), max(span[1] for span in spans)


def longest_gap(times: Sequence[float], since: float, until: float) -> float:
    """The longest time between two arrivals, of which the second is after ``since``.

    The end of the watch counts as an arrival: a tunnel that stays silent has an outage up to there.
    """
    first = max(0, bisect_left(times, since) - 1)
    within = [*times[first : bisect_left(times, until)], until]
    if times and times[0] < since:
        return max(b - a for a, b in pairwise(within))
    return until - since


def shares(
    held: Sequence[tuple[float, str, str, bool]], address: str, since: float, until: float
) -> tuple[float, float]:
    """Seconds between two times at which an address was on no node, and on two of them."""
    none = both = 0.0
    for start, end, count in _spans(held, address, until):
        length = max(0.0, end - max(start, since))
        none += length * (count == 0)
        both += length * (count == 2)
    return none, both


def _spans(
    held: Sequence[tuple[float, str, str, bool]], address: str, until: float
) -> Iterator[tuple[float, float, int]]:
    holders: set[str] = set()
    start = 0.0
    for at, node, what, here in held:
        if what != address or at >= until:
            continue
        yield start, at, len(holders)
        start = at
        if here:
            holders.add(node)
        else:
            holders.discard(node)
    yield start, until, len(holders)


class Probes:
    """Traffic inside tunnels as long as the context lasts; then :attr:`seen` says what came of it.

    Args:
        interval: seconds between two datagrams in one direction.
        speaker: who sends by itself; the other one only answers.
    """

    def __init__(
        self, lab: PairLab, tunnels: Iterable[Tunnel], *, interval: float = 0.01, speaker: Speaker = "both"
    ) -> None:
        self._tunnels = list(tunnels)
        self._task = {
            "interval": interval,
            "speaker": speaker,
            "nodes": {node.name: node.namespace.name for node in lab.nodes},
            "tunnels": [
                {
                    "client": tunnel.client.namespace.name,
                    "inner": tunnel.near.inner[0],
                    "gateway": tunnel.gateway.namespace.name,
                    "inside": INSIDE,
                }
                for tunnel in self._tunnels
            ],
        }
        self._output = lab.folder / "probe.json"
        self._process: subprocess.Popen[bytes] | None = None
        self.seen = Seen({}, (), ())

    async def __aenter__(self) -> Self:
        self._process = self._start()
        return self

    def _start(self) -> subprocess.Popen[bytes]:
        argv = ["setpriv", "--pdeathsig", "KILL", sys.executable, "-I", str(PROGRAM)]
        with self._output.open("wb") as output:
            process = subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=output)
        assert process.stdin is not None
        process.stdin.write(json.dumps(self._task).encode() + b"\n")
        process.stdin.flush()
        return process

    async def __aexit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._process is not None
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            with trio.CancelScope(shield=True):
                status = await trio.to_thread.run_sync(self._process.wait, 10)
        finally:
            self._process.kill()
        if status:
            raise LabError(f"the prober ended with {status}")
        self.seen = self._read(json.loads(self._output.read_text()))

    def _read(self, told: dict[str, Any]) -> Seen:
        arrivals = {
            tunnel.client.name: (told["up"][n], told["down"][n]) for n, tunnel in enumerate(self._tunnels)
        }
        return Seen(arrivals, [tuple(each) for each in told["held"]], told["late"])
