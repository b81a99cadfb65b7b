"""What happens to the pair, and how it is measured what that does to the tunnels."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import trio

from tests.net.lab import Tunnel
from tests.net.pair.lab import Node, PairLab
from tests.net.pair.probes import Probes, Seen, Speaker

BEFORE = 0.7
"""Seconds of traffic before anything happens."""
PAUSE = 1.2
"""Seconds that a paused process does not run."""


class Pair(Protocol):
    """Two balancers: Sapin's, or the yardstick's."""

    @property
    def lab(self) -> PairLab:
        """Where it is."""

    @property
    def addresses(self) -> Sequence[str]:
        """The virtual addresses."""

    async def start(self, node: Node) -> None:
        """Start it on a node, unless it runs there."""

    def kill(self, node: Node) -> None:
        """End it on a node as a crash would (SIGKILL)."""

    def terminate(self, node: Node) -> None:
        """Ask it to end on a node (SIGTERM)."""

    def pause(self, node: Node) -> None:
        """Have it hang on a node (SIGSTOP)."""

    def resume(self, node: Node) -> None:
        """Let it go on (SIGCONT)."""

    async def mend(self) -> None:
        """Put all cables back, and start it on both nodes unless it runs there."""

    async def settled(self) -> Node:
        """Wait until both run, and the standby could take over; the active one."""

    async def pins(self, node: Node) -> Mapping[str, str]:
        """The server of each key, as a node knows them."""

    async def ended(self, node: Node) -> None:
        """Wait until it has ended on a node that was asked to."""

    async def step_down(self, node: Node) -> None:
        """Have the active node hand over."""

    async def stop(self) -> None:
        """End it on both nodes."""


@dataclass(frozen=True)
class Scenario:
    """Something that happens to a pair whose tunnels carry traffic.

    Args:
        strike: does it to the pair, given the active node.
        watch: seconds of traffic after it was done.
        bound: seconds of outage that no tunnel may have, on the lab's machine; a test allows more.
        moves: whether the other node is active afterwards.
    """

    name: str
    title: str
    strike: Callable[[Pair, Node], Awaitable[None]]
    watch: float = 1.5
    bound: float | None = None
    moves: bool = True


async def kill(pair: Pair, active: Node) -> None:
    """The active daemon crashes."""
    pair.kill(active)


async def terminate(pair: Pair, active: Node) -> None:
    """The active daemon is asked to end."""
    pair.terminate(active)


async def pause(pair: Pair, active: Node) -> None:
    """The active daemon hangs, and goes on later."""
    pair.pause(active)
    await trio.sleep(PAUSE)
    pair.resume(active)


async def lose_power(pair: Pair, active: Node) -> None:
    """The active machine is gone."""
    active.lose_power()


async def cut_cluster_link(pair: Pair, active: Node) -> None:
    """The nodes cannot hear each other on their link."""
    active.cluster.unplug()


async def cut_client_link(pair: Pair, active: Node) -> None:
    """The active node cannot hear the clients."""
    active.front.unplug()


async def restart_both(pair: Pair, active: Node) -> None:
    """Both daemons are restarted at the same time."""
    for node in pair.lab.nodes:
        pair.terminate(node)
    for node in pair.lab.nodes:
        await pair.ended(node)
    for node in pair.lab.nodes:
        await pair.start(node)
    await pair.settled()


async def step_down(pair: Pair, active: Node) -> None:
    """The active node is asked to hand over."""
    await pair.step_down(active)


async def fail_back(pair: Pair, active: Node) -> None:
    """The other node comes back from a power loss, and gets its role back."""
    pair.lab.other(active).plug()
    await pair.start(pair.lab.other(active))
    await pair.settled()
    await pair.step_down(active)


async def upgrade(pair: Pair, active: Node) -> None:
    """Both daemons are restarted one after the other, the active one after a step-down."""
    standby = pair.lab.other(active)
    await _restart(pair, standby)
    await pair.step_down(active)
    await pair.settled()
    await _restart(pair, active)


async def _restart(pair: Pair, node: Node) -> None:
    pair.terminate(node)
    await pair.ended(node)
    await pair.start(node)
    await pair.settled()


SCENARIOS = {
    each.name: each
    for each in (
        Scenario("kill", "daemon killed (kill -9)", kill, bound=0.05),
        Scenario("terminate", "daemon ended (SIGTERM)", terminate, bound=0.05),
        Scenario("pause", "daemon paused (SIGSTOP)", pause, bound=0.35),
        Scenario("power", "power loss", lose_power, bound=0.1),
        Scenario("cluster-link", "cluster link cut", cut_cluster_link, bound=0.05, moves=False),
        Scenario("client-link", "client-side link cut", cut_client_link, bound=1.0),
        Scenario("step-down", "step-down", step_down, bound=0.05),
        Scenario("fail-back", "return and fail-back", fail_back, bound=0.05),
        Scenario("upgrade", "upgrade by step-down", upgrade, bound=0.05),
        Scenario("restart", "both restarted", restart_both, bound=None, moves=False),
    )
}


@dataclass(frozen=True)
class Round:
    """What one round of a scenario gave; times in seconds.

    Args:
        outages: by client, the longest time without a datagram in either direction.
        before: the same, in the time before anything happened.
        kept: clients whose IKE_SA has the same SPIs at the same gateway at both ends.
        pins: how many keys the active node knew before.
        lost: those of them that the active node afterwards does not know, or knows at another server.
        nobody, both: for how long a virtual address was on no node, and on two.
        late: by how much the prober itself was late at most.
    """

    scenario: str
    active: str
    successor: str
    outages: Mapping[str, float]
    before: float
    kept: Sequence[str]
    pins: int
    lost: Sequence[str]
    nobody: float
    both: float
    late: float


async def play(
    pair: Pair,
    scenario: Scenario,
    *,
    interval: float = 0.01,
    speaker: Speaker = "both",
    watch: float | None = None,
) -> Round:
    """Play one round, with all tunnels that are up; afterwards the pair is whole again."""
    lab = pair.lab
    active = await pair.settled()
    tunnels = await lab.tunnels()
    pins = await pair.pins(active)
    if scenario.strike is fail_back:
        pair.lab.other(active).lose_power()
    async with Probes(lab, tunnels.values(), interval=interval, speaker=speaker) as probes:
        await trio.sleep(BEFORE)
        struck = time.monotonic()
        await scenario.strike(pair, active)
        await trio.sleep(scenario.watch if watch is None else watch)
        end = time.monotonic()
    await pair.mend()
    successor = await pair.settled()
    after, pins_after = await lab.tunnels(), await pair.pins(successor)
    seen = probes.seen
    nobody, both = seen.holders(pair.addresses, struck, end)
    return Round(
        scenario=scenario.name,
        active=active.name,
        successor=successor.name,
        outages={name: seen.outage(name, struck, end) for name in tunnels},
        before=worst(seen, struck),
        kept=[name for name, tunnel in tunnels.items() if same(tunnel, after.get(name))],
        pins=len(pins),
        lost=[key for key, server in pins.items() if pins_after.get(key) != server],
        nobody=nobody,
        both=both,
        late=seen.lateness(struck, end),
    )


def worst(seen: Seen, struck: float) -> float:
    """The longest gap of any tunnel before anything happened, which is the measurement's own noise."""
    return max(seen.outage(name, struck - BEFORE / 2, struck) for name in seen.arrivals)


def same(before: Tunnel, after: Tunnel | None) -> bool:
    """Whether a tunnel is the one that it was."""
    return after is not None and after.gateway is before.gateway and after.spis("ike") == before.spis("ike")
