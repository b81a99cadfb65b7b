"""Sapin between real strongSwan clients and gateways.

Twenty-two clients, twelve of them behind two NAT routers, and three gateways. Each test starts Sapin with a
configuration of its own, and asks the gateways, which know best, who is where.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from itertools import product
from typing import get_args

import pytest
import trio

from tests.net.balancer import Balancer
from tests.net.lab import (
    CERTIFICATE,
    CERTIFICATE_WHOLE,
    PSK,
    PSK6,
    VIP,
    VIP6,
    WATCHFUL,
    Client,
    Connection,
    Gateway,
    Lab,
    SaKind,
    Tunnel,
    together,
)
from tests.net.namespaces import until

pytestmark = [
    pytest.mark.net,
    pytest.mark.slow,
    pytest.mark.root("network namespaces and TUN devices"),
    pytest.mark.programs(
        "charon-systemd", "swanctl", "ip", "nft", "ping", "openssl", "nsenter", "setpriv", "sysctl", "bash"
    ),
]
KINDS: tuple[SaKind, ...] = get_args(SaKind)
both_persistences = pytest.mark.parametrize("persistence", ["source-address", "ike-spi"])


async def connect(lab: Lab, clients: Iterable[Client], how: Connection = PSK) -> dict[str, Tunnel]:
    """Connects clients, each to one gateway with traffic inside; all tunnels that are up then."""
    clients = list(clients)
    results = await lab.connect(clients, how)
    assert all(results), [client.name for client, up in zip(clients, results, strict=True) if not up]
    tunnels = await lab.tunnels()
    assert {client.name for client in clients} <= set(tunnels)
    await assert_traffic(clients)
    return tunnels


async def assert_traffic(clients: Iterable[Client]) -> None:
    """Pings from inside each tunnel, all at the same time."""
    clients = list(clients)
    answered = await together(client.ping for client in clients)
    assert all(answered), [
        client.name for client, answer in zip(clients, answered, strict=True) if not answer
    ]


def assert_same_tunnels(before: dict[str, Tunnel], after: dict[str, Tunnel]) -> None:
    """These tunnels were neither set up again nor rekeyed, and are where they were."""
    for name, tunnel in before.items():
        assert after[name].gateway is tunnel.gateway
        for kind in KINDS:
            assert after[name].spis(kind) == tunnel.spis(kind)


def gateways_of(clients: Iterable[Client], tunnels: dict[str, Tunnel]) -> list[str]:
    """The gateway of each client."""
    return [tunnels[client.name].gateway.name for client in clients]


@both_persistences
async def test_both_ports_of_every_client_are_on_one_gateway(lab: Lab, persistence: str) -> None:
    async with Balancer(lab, persistence=persistence) as sapin:
        tunnels = await connect(lab, lab.clients)
        for client in lab.direct:
            gateway = tunnels[client.name].gateway.name
            assert await sapin.flows(client.outer) == {("ike", gateway), ("ike-natt", gateway)}
        if persistence == "ike-spi":
            pins = await sapin.pins()
            for tunnel in tunnels.values():
                assert pins[f"spi:{tunnel.near.spi_i}"] == tunnel.gateway.name


async def test_source_address_keeps_the_clients_behind_a_nat_together(lab: Lab) -> None:
    async with Balancer(lab) as sapin:
        tunnels = await connect(lab, lab.clients)
        for household in lab.behind_nat:
            (gateway,) = set(gateways_of(household, tunnels))
            assert await sapin.flows(household[0].outer) == {("ike", gateway), ("ike-natt", gateway)}


async def test_ike_spi_spreads_the_clients_behind_a_nat(lab: Lab) -> None:
    async with Balancer(lab, persistence="ike-spi"):
        for household in lab.behind_nat:
            tunnels = await connect(lab, household)
            assert len(set(gateways_of(household, tunnels))) == len(lab.gateways)


@pytest.mark.parametrize("follows", [True, False])
async def test_only_with_following_everybody_connects(lab: Lab, follows: bool) -> None:
    async with Balancer(lab, scheduler="round-robin", follows=follows):
        # Somebody comes with a tunnel that runs already, as ever so often: the two ports are out of step from here on.
        await lab.direct[0].stray(4500)
        assert all(await lab.connect(lab.clients)) is follows


@both_persistences
async def test_tunnels_outlive_rekeying_by_either_end(lab: Lab, persistence: str) -> None:
    async with Balancer(lab, persistence=persistence):
        tunnels = await connect(lab, lab.clients)
        home = gateways_of(lab.clients, tunnels)
        both_ends: list[Sequence[Client | Gateway]] = [lab.clients, lab.gateways]
        for kind, ends in product(KINDS, both_ends):
            tunnels = await rekey(lab, tunnels, kind, ends)
            assert gateways_of(lab.clients, tunnels) == home
            await assert_traffic(lab.clients)


async def rekey(
    lab: Lab, before: dict[str, Tunnel], kind: SaKind, ends: Iterable[Client | Gateway]
) -> dict[str, Tunnel]:
    """Has these ends rekey their tunnels, and waits until these tunnels have new SPIs; all tunnels then."""
    await together(partial(end.charon.control, "--rekey", f"--{kind}", PSK.name) for end in ends)
    after = dict(before)

    async def done() -> bool:
        after.update(await lab.tunnels())
        return all(after[name].spis(kind).isdisjoint(old.spis(kind)) for name, old in before.items())

    await until(done, f"every {kind} SA has new SPIs at both ends", patience=15)
    return after


async def test_long_certificates_pass_in_fragments_of_ike(lab: Lab) -> None:
    clients = [*lab.direct[:3], *lab.behind_nat[0][:3]]
    split = [client.charon.log.count("splitting IKE message") for client in clients]
    reassembled = await lab.reassembled()
    async with Balancer(lab):
        await connect(lab, clients, CERTIFICATE)
    assert await lab.reassembled() == reassembled
    for client, before in zip(clients, split, strict=True):
        assert client.charon.log.count("splitting IKE message") > before


async def test_long_certificates_pass_in_fragments_of_ip(lab: Lab) -> None:
    clients = [*lab.direct[:3], *lab.behind_nat[0][:3]]
    reassembled = await lab.reassembled()
    async with Balancer(lab):
        await connect(lab, clients, CERTIFICATE_WHOLE)
    requests_and_responses = 2 * len(clients)
    assert await lab.reassembled() >= reassembled + requests_and_responses


@both_persistences
async def test_ipv6_clients_are_beside_ipv4_clients(lab: Lab, persistence: str) -> None:
    async with Balancer(lab, persistence=persistence):
        old, new = lab.direct[:3], lab.direct[3:]
        await connect(lab, old, PSK)
        tunnels = await connect(lab, new, PSK6)
        assert {tunnels[client.name].near.peer for client in old} == {VIP}
        assert {tunnels[client.name].near.peer for client in new} == {VIP6}
        assert len(set(gateways_of(new, tunnels))) == len(lab.gateways)
        await assert_traffic(old)


@pytest.mark.parametrize(
    ("persistence", "die"), [("source-address", Gateway.crash), ("ike-spi", Gateway.lose_power)]
)
async def test_clients_of_a_dead_gateway_come_back_on_the_others(
    lab: Lab, persistence: str, die: Callable[[Gateway], None]
) -> None:
    async with Balancer(lab, persistence=persistence) as sapin:
        before = await connect(lab, lab.clients, WATCHFUL)
        await until(lambda: health_is(sapin, "healthy", lab.gateways), "all gateways are healthy")
        lost, *others = lab.gateways
        assert lost.name in gateways_of(lab.clients, before)
        die(lost)
        await until(lambda: health_is(sapin, "unhealthy", [lost]), "the checks notice")

        async def everybody_is_back() -> bool:
            return len(await lab.tunnels()) == len(lab.clients)

        # A client notices after 1 s without traffic and 8 s without answers.
        await until(everybody_is_back, "all clients have tunnels again", patience=40)
        await assert_traffic(lab.clients)
        after = await lab.tunnels()
        assert set(gateways_of(lab.clients, after)) == {gateway.name for gateway in others}
        assert_same_tunnels({n: tunnel for n, tunnel in before.items() if tunnel.gateway is not lost}, after)


async def health_is(sapin: Balancer, health: str, gateways: Iterable[Gateway]) -> bool:
    found = await sapin.health()
    return all(found[gateway.name] == health for gateway in gateways)


@both_persistences
async def test_tunnels_outlive_crashes_of_the_balancer(lab: Lab, persistence: str) -> None:
    async with Balancer(lab, persistence=persistence) as sapin:
        before = await connect(lab, lab.clients)
        begun = await lab.connects_begun()
        async with trio.open_nursery() as nursery:
            for client in lab.clients:
                nursery.start_soon(client.talk, 4)
            await trio.sleep(1)
            sapin.kill()
            await sapin.start()
        await assert_traffic(lab.clients)
        # Now nobody talks, and afterwards the gateways speak first: only their way to the clients leads there.
        sapin.kill()
        await sapin.start()
        assert all(await together(partial(t.gateway.ping, t.far.inner[0]) for t in before.values()))
        after = await lab.tunnels()
        assert_same_tunnels(before, after)
        assert await lab.connects_begun() == begun
        rekeyed = await rekey(lab, after, "ike", lab.clients)
        assert gateways_of(lab.clients, rekeyed) == gateways_of(lab.clients, before)


async def test_draining_keeps_tunnels_and_gets_no_new_ones(lab: Lab) -> None:
    async with Balancer(lab, persistence="ike-spi") as sapin:
        early, late = lab.clients[::2], lab.clients[1::2]
        before = await connect(lab, early)
        drained = lab.gateways[0].name
        assert drained in gateways_of(early, before)
        await sapin.command("server", "drain", drained)
        after = await connect(lab, late)
        assert drained not in gateways_of(late, after)
        await assert_traffic(early)
        assert_same_tunnels(before, after)
        rekeyed = await rekey(lab, before, "ike", early)
        assert gateways_of(early, rekeyed) == gateways_of(early, before)
        await assert_traffic(early)
