"""Sapin's pair between real strongSwan clients and gateways, whatever happens to a node.

The bounds of time are generous, as the machines that run these tests are shared: what a takeover takes is for
``make failover`` to say, in many rounds. What is exact here is that no pin is lost and no tunnel is set up again.
"""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from os import cpu_count

import pytest
import trio

from tests.net.pair.keepalived import Keepalived
from tests.net.pair.lab import PairLab
from tests.net.pair.nodes import SapinPair
from tests.net.pair.probes import Probes, Speaker
from tests.net.pair.scenarios import SCENARIOS, Round, play

pytestmark = [
    pytest.mark.net,
    pytest.mark.slow,
    pytest.mark.root("network namespaces and TUN devices"),
    pytest.mark.programs(
        "charon-systemd", "swanctl", "ip", "nft", "openssl", "nsenter", "setpriv", "sysctl", "timeout"
    ),
]
GENEROUS = 1.0
"""Seconds of outage that a test allows beyond what the scenario is to take."""
BOTH = 1.0
"""Seconds that an address may be on both nodes here; the aim is 0.5."""
INTERVAL = 0.02
"""Seconds between datagrams: few, as both nodes and all ends share the machine."""
LOAD = 4
"""Seconds of full load."""


def assert_survived(played: Round) -> None:
    """Every tunnel and every pin is what it was."""
    assert played.outages, "no tunnel was up"
    assert set(played.kept) == set(played.outages)
    assert played.pins >= len(played.outages)
    assert not played.lost
    assert played.both <= BOTH


@pytest.mark.parametrize("name", [name for name, each in SCENARIOS.items() if each.moves])
async def test_tunnels_go_on_at_the_other_node(pair: SapinPair, name: str) -> None:
    scenario = SCENARIOS[name]
    played = await play(pair, scenario, interval=INTERVAL)
    assert_survived(played)
    assert played.successor != played.active
    assert max(played.outages.values()) <= (scenario.bound or 0.0) + GENEROUS


async def test_a_cut_cluster_link_changes_nothing(pair: SapinPair) -> None:
    played = await play(pair, SCENARIOS["cluster-link"], interval=INTERVAL)
    assert_survived(played)
    assert played.successor == played.active
    assert played.both == played.nobody == 0


async def test_tunnels_outlive_a_restart_of_both_nodes(pair: SapinPair) -> None:
    assert_survived(await play(pair, SCENARIOS["restart"], interval=INTERVAL))


@pytest.mark.parametrize("speaker", ["gateway", "client"])
async def test_it_does_not_matter_who_speaks_first_after_a_power_loss(
    pair: SapinPair, speaker: Speaker
) -> None:
    played = await play(pair, SCENARIOS["power"], interval=INTERVAL, speaker=speaker)
    assert_survived(played)
    assert max(played.outages.values()) <= (SCENARIOS["power"].bound or 0.0) + GENEROUS


async def test_full_load_on_every_cpu_is_no_failure(pair: SapinPair) -> None:
    active = await pair.settled()
    before = await pair.status(active)
    async with Probes(pair.lab, (), interval=INTERVAL) as probes:
        with busy(2 * (cpu_count() or 1)):
            await trio.sleep(LOAD)
    assert await pair.settled() is active
    assert (await pair.status(active))["epoch"] == before["epoch"]
    moves = [event for event in probes.seen.held[len(pair.addresses) :] if event[2] in pair.addresses]
    assert not [event for event in moves if not event[3] or event[1] != active.name]


@contextmanager
def busy(processes: int) -> Iterator[None]:
    """Processes that do nothing but that, for a bounded time however this one ends."""
    argv = ["setpriv", "--pdeathsig", "KILL", "timeout", str(2 * LOAD), "sh", "-c", "while :; do :; done"]
    loops = [subprocess.Popen(argv) for _ in range(processes)]
    try:
        yield
    finally:
        for loop in loops:
            loop.terminate()  # timeout passes it on
        for loop in loops:
            loop.wait(5)


@pytest.mark.programs("keepalived")
async def test_the_yardstick_is_measured_right(pair_lab: PairLab, whole_pair: SapinPair) -> None:
    """keepalived claims when three adverts and a bit are missed; that is known, so it proves the measurement."""
    await whole_pair.stop()
    pair = Keepalived(pair_lab, adverts=0.1)
    try:
        await pair.mend()
        await pair.settled()
        await pair_lab.reset()
        await pair_lab.connect_all(pair.addresses)
        played = await play(pair, SCENARIOS["power"], interval=INTERVAL)
    finally:
        await pair.stop()
    assert played.successor != played.active
    assert set(played.kept) == set(played.outages)
    assert 0.2 <= min(played.outages.values()) <= max(played.outages.values()) <= 1.0
    assert 0.2 <= played.nobody <= 1.0
    assert played.both == 0
