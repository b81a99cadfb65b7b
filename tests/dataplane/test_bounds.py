"""What is scarce runs out: it is counted, costs whoever comes too late, and nobody else."""

from __future__ import annotations

import os
import socket
import struct
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from random import Random

import pytest
import trio

from sapin.core.dataplane import runtime
from sapin.core.dataplane.flows import UNCONFIRMED
from sapin.core.dataplane.limits import RESERVED, flows_that_fit, raise_descriptor_limit
from sapin.core.model import AdminState
from tests.dataplane.farm import (
    DESCRIPTORS,
    IKE,
    NATT,
    SILENCE,
    Client,
    Clock,
    Daemon,
    Farm,
    advance,
    esp,
    flow_of,
    framed,
    ike_message,
    no_descriptor,
    running,
    settle,
)


async def answered(client: Client) -> bool:
    """Whether a datagram of this client comes back."""
    return await served([client]) == [client]


async def served(clients: Iterable[Client]) -> list[Client]:
    """Those who get an answer."""
    sent = {client: esp(number) for number, client in enumerate(clients)}
    for client, data in sent.items():
        client.send(data)
    await trio.sleep(4 * SILENCE)
    return [client for client, data in sent.items() if data in heard(client)]


def heard(client: Client) -> Iterator[bytes]:
    """What has come by now."""
    with suppress(BlockingIOError):
        while True:
            yield client.plain.recv(65_535, socket.MSG_DONTWAIT)


# flows


async def test_a_full_flow_table_refuses_new_flows_and_serves_the_others(farm: Farm) -> None:
    document = farm.document(persistence="ike-spi", scheduler="round-robin")
    document["node"]["max_flows"] = 5
    async with running(document) as plane:
        clients = [farm.client(NATT) for _ in range(8)]
        for client in clients:
            client.send(framed(ike_message(os.urandom(8))))
        await settle()
        assert plane.forwarder.drops == {"flow-table-full": 3}
        assert len(plane.forwarder.flows) == 5
        assert await served(clients[:5]) == clients[:5]
        plane.delete_pins([(plane.snapshot.groups[IKE], flow_of(plane, clients[0]).key)])
        assert await answered(clients[7]), "there is room again"


async def test_fewer_flows_after_a_reload_close_none(farm: Farm) -> None:
    document = farm.document()
    async with running(document) as plane:
        clients = [farm.client(NATT) for _ in range(4)]
        homes = [await farm.route(client, esp(n)) for n, client in enumerate(clients)]
        document["node"]["max_flows"] = 2
        farm.reload(plane, document)
        assert [await farm.route(client, esp(n)) for n, client in enumerate(clients)] == homes
        assert not await answered(farm.client(NATT))


async def test_upstream_ports_run_out_for_one_server_at_a_time(
    farm: Farm, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runtime, "UPSTREAM_PORTS", (20_000, 20_003))
    async with running(farm.document(persistence="none", scheduler="round-robin")) as plane:
        clients = [farm.client(NATT) for _ in range(15)]
        for number, client in enumerate(clients):
            client.send(esp(number))
        await settle()
        assert plane.forwarder.drops == {"no-upstream-port": 3}
        assert await served(clients) == clients[:12]
        assert plane.forwarder.drops == {"no-upstream-port": 6}
        by_server = [(flow.member.name, flow.port) for flow in plane.forwarder.flows]
        assert len(set(by_server)) == 12, "each endpoint has the whole range to itself"
        gone = flow_of(plane, clients[0])
        plane.forwarder.flows.close(gone)
        for name in {"gw1", "gw2", "gw3"} - {gone.member.name}:
            plane.set_admin(IKE, name, AdminState.DRAINING)
        assert await answered(clients[14]), "a port that was given back is used again"


async def test_without_a_descriptor_new_flows_wait_and_old_ones_go_on(farm: Farm) -> None:
    async with running(farm.document()) as plane:
        old, new = farm.client(NATT), farm.client(NATT)
        home = await farm.route(old, esp(1))
        with no_descriptor():
            new.send(esp(2))
            await settle()
            assert plane.forwarder.drops == {"no-file-descriptor": 1}
            assert await farm.route(old, esp(3)) == home
        assert await answered(new)
        assert not plane.failures


async def test_the_last_descriptors_are_kept_for_checks_and_control(
    farm: Farm, daemon: Callable[..., Daemon]
) -> None:
    """A daemon that has used up its descriptors for flows can still look after its servers, and be asked."""
    check = {"plugin": "udp", "wait": "10ms", "interval": "100ms", "fall": 1}
    document = farm.document(persistence="ike-spi", checks=[check])
    node = daemon(document, descriptors=RESERVED + 40)
    await node.start()
    clients = [farm.client(NATT) for _ in range(60)]
    for client in clients:
        client.send(framed(ike_message(os.urandom(8))))
    await trio.sleep(0.5)  # a few intervals
    status = await node.call("status")
    assert 0 < status["flows"] < 60
    assert status["drops"] == {"no-file-descriptor": 60 - status["flows"]}
    assert {server["health"] for server in status["groups"][0]["servers"]} == {"healthy"}
    lucky = await served(clients)
    assert status["flows"] <= len(lucky) < 60, "some more where a check has given one back"
    assert (await node.call("delete-pins", service=IKE))["deleted"] > 0
    assert await answered(next(client for client in clients if client not in lucky))
    assert node.process is not None
    assert node.process.poll() is None


async def test_the_limit_of_descriptors_is_raised_and_told(
    farm: Farm, daemon: Callable[..., Daemon], logs: list[dict[str, object]]
) -> None:
    assert raise_descriptor_limit() > 1024
    assert flows_that_fit(1000, 4) == 1000 - RESERVED - 4
    assert flows_that_fit(10, 4) == 0
    async with running(farm.document()):
        (warning,) = [entry for entry in logs if "flows_that_fit" in entry]
        assert warning["max_flows"] == 200_000
        assert warning["flows_that_fit"] == DESCRIPTORS - RESERVED - 2


# pins


async def test_a_full_pin_table_evicts_and_living_flows_go_on(farm: Farm) -> None:
    document = farm.document(persistence="ike-spi", scheduler="round-robin")
    document["node"]["max_pins"] = 4
    async with running(document) as plane:
        clients = [farm.client(NATT) for _ in range(10)]
        spis = [bytes([n + 1]) * 8 for n in range(10)]
        homes = [
            await farm.route(client, framed(ike_message(spi)))
            for client, spi in zip(clients, spis, strict=True)
        ]
        stats = plane.snapshot.groups[IKE].table.stats()
        assert (stats.size, stats.evicted) == (4, 6)
        for data in (lambda spi: esp(), lambda spi: framed(ike_message(spi))):
            for client, spi, home in zip(clients, spis, homes, strict=True):
                plane.forwarder.tick()
                assert await farm.route(client, data(spi)) == home


# what strangers send


def garbage(random: Random) -> list[bytes]:
    """Damaged, hostile and meaningless datagrams."""
    message = ike_message(b"a_client", b"x" * 40)
    broken = [message[:cut] for cut in (1, 8, 16, 17, 24, 27, 28, 31)]
    broken += [message[:17] + bytes([version]) + message[18:] for version in (0x00, 0x10, 0x21, 0x30, 0xFF)]
    broken += [
        message[:24] + struct.pack("!I", length) + message[28:] for length in (0, 27, 2**31, 2**32 - 1)
    ]
    broken += [message[:16] + bytes([payload]) + message[17:] for payload in (0, 46, 255)]
    broken += [bytes(8) + message[8:], b"\xff" * 8 + message[8:], bytes(100), b"\xff" * 100]
    zeros = [bytes(number) for number in range(9)]
    keepalives = [b"\xff" * number for number in (1, 2, 4)]
    noise = [random.randbytes(random.randrange(60)) for _ in range(20)]
    return [data for each in (*broken, *zeros, *keepalives, *noise) for data in (each, bytes(4) + each)]


@pytest.mark.parametrize("persistence", ["source-address", "ike-spi"])
async def test_garbage_passes_unharmed_and_harms_nothing(farm: Farm, persistence: str) -> None:
    """What is garbage is the gateway's to say: a balancer that knows better breaks the next version of IKE."""
    sent = garbage(Random(1))
    async with running(farm.document(persistence=persistence, scheduler="round-robin")) as plane:
        for service in (IKE, NATT):
            together, alone = farm.client(service), [farm.client(service) for _ in sent]
            assert [await together.ask(data) for data in sent] == sent
            for client, data in zip(alone, sent, strict=True):
                client.send(data)
            for client, data in zip(alone, sent, strict=True):
                assert await client.receive() == [data]
        assert not plane.failures
        assert not plane.forwarder.drops


@pytest.mark.root("raw sockets")
async def test_a_datagram_from_port_0_passes_and_its_answer_is_dropped(farm: Farm) -> None:
    """The sender wants no answer (RFC 768), and none can be sent."""
    async with running(farm.document()) as plane:
        with socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_UDP) as raw:
            data = ike_message(b"a_client")
            raw.sendto(struct.pack("!HHHH", 0, farm.ports[IKE], 8 + len(data), 0) + data, ("127.9.0.1", 0))
        await settle()
        assert [seen.data for seen in farm.seen] == [data]
        assert plane.forwarder.drops == {"not-sent-to-client": 1}
        assert not plane.failures


# unconfirmed flows


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """The dataplane's clock, to be put forward."""
    clock = Clock()
    monkeypatch.setattr(runtime, "steady_wall_clock", lambda: clock)
    return clock


async def test_a_flood_from_forged_addresses_leaves_flows_for_seconds_only(farm: Farm, clock: Clock) -> None:
    async with running(farm.document(scheduler="round-robin")) as plane:
        real = farm.client(NATT)
        home = await farm.route(real, framed(ike_message(b"a_client")))
        for number in range(300):
            with Client(
                "127.9.0.1", farm.ports[NATT], f"127.9.{50 + number // 250}.{number % 250 + 1}"
            ).sock as one:
                one._sock.send(framed(ike_message(os.urandom(8))))  # type: ignore[attr-defined]
        await settle()
        assert len(plane.forwarder.flows) == 301
        clock.ahead += 5
        await advance(plane)
        assert await farm.route(real, esp(1)) == home
        for _ in range(2):  # what the gateways answered came later than the flood
            clock.ahead += UNCONFIRMED
            await advance(plane)
        assert [flow.port for flow in plane.forwarder.flows] == [home[1]]
        assert plane.counters(NATT)[home[0]].flows == 1
        assert await farm.route(real, esp(2)) == home


async def test_a_flow_is_confirmed_when_the_client_speaks_after_an_answer(farm: Farm, clock: Clock) -> None:
    async with running(farm.document()) as plane:
        client = farm.client(NATT)
        client.send(esp(1), esp(2))
        await settle()
        assert not flow_of(plane, client).confirmed, "the client has not seen an answer yet"
        clock.ahead += 1
        await advance(plane)
        client.send(esp(3))
        await settle()
        assert flow_of(plane, client).confirmed


async def test_ike_confirms_within_a_second(farm: Farm, clock: Clock) -> None:
    """IKE_SA_INIT, its answer, IKE_AUTH."""
    async with running(farm.document()) as plane:
        client = farm.client(NATT)
        await farm.route(client, framed(ike_message(b"a_client")))
        await farm.route(client, framed(ike_message(b"a_client")))
        assert flow_of(plane, client).confirmed


async def test_a_slow_client_confirms_although_its_answer_was_long_ago(farm: Farm, clock: Clock) -> None:
    """Sleeping phones send a keepalive every 50 s and more, to which nothing answers."""
    async with running(farm.document()) as plane:
        client = farm.client(NATT)
        home = await farm.route(client, framed(ike_message(b"a_client")))
        farm.gateways[home[0]].answers = False
        for _ in range(6):
            for seconds in (UNCONFIRMED, 20):
                clock.ahead += seconds
                await advance(plane)
            client.send(b"\xff")
            await settle()
        farm.gateways[home[0]].answers = True
        assert await farm.route(client, esp(1)) == home


async def test_an_idle_flow_goes_after_its_timeout_and_not_before(farm: Farm, clock: Clock) -> None:
    document = farm.document()
    document["virtual_services"][1]["flow_timeout"] = "10m"
    async with running(document) as plane:
        client = farm.client(NATT)
        for _ in range(2):
            await farm.route(client, framed(ike_message(b"a_client")))
        clock.ahead += 590
        await advance(plane)
        assert len(plane.forwarder.flows) == 1
        farm.gateways[farm.seen[-1].gateway].socks[NATT]._sock.sendto(
            b"x", ("127.0.0.1", farm.seen[-1].upstream)
        )  # type: ignore[attr-defined]
        await settle()
        clock.ahead += 20
        await advance(plane)
        assert len(plane.forwarder.flows) == 1, "the server has spoken meanwhile"
        for _ in range(2):  # it is looked at only so often
            clock.ahead += 600
            await advance(plane)
        assert len(plane.forwarder.flows) == 0
        assert len(plane.snapshot.groups[IKE].table) == 1, "the pin lasts longer"


# descriptors that others hold


async def test_a_closed_flow_whose_descriptor_a_child_still_holds_is_no_flow(farm: Farm) -> None:
    """A check's program has our descriptors between fork and exec, and epoll watches what they refer to."""
    async with running(farm.document()) as plane:
        client = farm.client(NATT)
        home, upstream = await farm.route(client, esp(1))
        flow = flow_of(plane, client)
        held = os.dup(flow.fd)
        try:
            plane.forwarder.flows.close(flow)
            await farm.gateways[home].socks[NATT].sendto(b"late", ("127.0.0.1", upstream))
            await settle()
            assert not plane.failures
            assert await answered(client)
        finally:
            os.close(held)
