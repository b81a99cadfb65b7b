"""Datagrams pass both ways byte for byte, in order, and the answer comes from where the client sent to."""

from __future__ import annotations

from random import Random

import pytest
import trio

from tests.dataplane.farm import IKE, NATT, SILENCE, VIP, Client, Farm, esp, framed, ike_message, running

SIZES = [0, 1, 2, 1472, 1473, 9000, 65_507]
"""An Ethernet MTU just filled and just missed, a jumbo frame's payload, the most that IPv4 allows."""
KEEPALIVE = b"\xff"


@pytest.mark.parametrize("framing", ["ike", "ike-natt", "opaque"])
async def test_every_size_passes_both_ways_byte_for_byte(farm: Farm, framing: str) -> None:
    random = Random(7)
    async with running(farm.document(framing=framing)) as plane:
        client = farm.client()
        for size in SIZES:
            data = random.randbytes(size)
            assert await client.ask(data) == data
        assert [len(seen.data) for seen in farm.seen] == SIZES
        assert len({(seen.gateway, seen.upstream) for seen in farm.seen}) == 1, "one flow"
        assert not plane.forwarder.drops


async def test_both_ports_of_a_client_reach_one_gateway(farm: Farm) -> None:
    async with running(farm.document(scheduler="round-robin", persistence="ike-spi")):
        for number in range(9):
            spi = bytes([number + 1]) * 8
            ike, natt = farm.client(IKE), farm.client(NATT)
            gateway, _ = await farm.route(ike, ike_message(spi))
            assert gateway == f"gw{number % 3 + 1}", "new clients are spread"
            assert (await farm.route(natt, framed(ike_message(spi))))[0] == gateway
            for data in (esp(number), framed(ike_message(spi)), esp(number), KEEPALIVE):
                assert await natt.ask(data) == data
                assert farm.where(data)[:2] == (gateway, NATT)
    assert {seen.service for seen in farm.seen} == {IKE, NATT}


async def test_clients_behind_one_address_stay_together_by_their_source(farm: Farm) -> None:
    async with running(farm.document(scheduler="round-robin", persistence="source-address")):
        reached = {
            (await farm.route(farm.client(service, source=source), data))[0]
            for source in ("127.9.7.7",)
            for service, data in [(IKE, ike_message(b"1" * 8)), (NATT, esp(1)), (IKE, ike_message(b"2" * 8))]
        }
        other, _ = await farm.route(farm.client(IKE, source="127.9.7.8"), ike_message(b"3" * 8))
    assert len(reached) == 1
    assert other not in reached


async def test_without_persistence_every_flow_is_a_client_of_its_own(farm: Farm) -> None:
    async with running(farm.document(scheduler="round-robin", persistence="none")) as plane:
        reached = [(await farm.route(farm.client(NATT), esp(number)))[0] for number in range(6)]
        assert reached == ["gw1", "gw2", "gw3"] * 2
        assert not len(plane.snapshot.groups[IKE].table)


async def test_a_new_spi_on_a_known_tuple_stays_and_a_known_spi_on_a_new_tuple_returns(farm: Farm) -> None:
    """Re-keying an IKE SA, then roaming."""
    async with running(farm.document(scheduler="round-robin", persistence="ike-spi")):
        client = farm.client(NATT)
        home, upstream = await farm.route(client, framed(ike_message(b"old_spi!")))
        await farm.route(farm.client(NATT), framed(ike_message(b"another!")))
        assert await farm.route(client, framed(ike_message(b"new_spi!"))) == (home, upstream)
        roamed = farm.client(NATT, source="127.9.8.1")
        assert (await farm.route(roamed, framed(ike_message(b"new_spi!"))))[0] == home
        assert (await farm.route(roamed, esp(1)))[0] == home


async def test_a_known_spi_takes_the_tuple_of_another_client_over(farm: Farm) -> None:
    """A NAT that gave a port to somebody else."""
    async with running(farm.document(scheduler="round-robin", persistence="ike-spi")):
        first, second = farm.client(NATT), farm.client(NATT)
        one, _ = await farm.route(first, framed(ike_message(b"spi_one!")))
        two, _ = await farm.route(second, framed(ike_message(b"spi_two!")))
        assert one != two
        assert (await farm.route(second, framed(ike_message(b"spi_one!"))))[0] == one
        assert (await farm.route(second, esp(2)))[0] == one


async def test_answers_come_from_where_the_client_sent_to_and_from_nowhere_else(farm: Farm) -> None:
    """The client's socket is connected, so that it hears nobody but the address and port it sent to."""
    async with running(farm.document()) as plane:
        ike, natt = farm.client(IKE, source="127.9.5.5"), farm.client(NATT, source="127.9.5.5")
        assert await ike.ask(b"one") == b"one"
        assert await natt.ask(b"two") == b"two"
        stranger = Client(VIP, farm.ports[IKE])
        with stranger.sock:
            (upstream,) = {flow.port for flow in plane.forwarder.flows if flow.listener.service.name == IKE}
            stranger.plain.connect(("127.0.0.1", upstream))
            stranger.send(b"forged")
            assert await ike.hears_nothing(), "only the server's endpoint reaches the client"


async def test_a_server_may_speak_first_once_there_is_a_flow(farm: Farm) -> None:
    async with running(farm.document()):
        client = farm.client(IKE)
        gateway, upstream = await farm.route(client, b"hello")
        sock = farm.gateways[gateway].socks[IKE]
        for data in (b"rekey", b"", b"delete"):
            await sock.sendto(data, ("127.0.0.1", upstream))
        assert await client.receive(3) == [b"rekey", b"", b"delete"]


async def test_thousands_of_datagrams_over_many_flows_keep_the_order_of_their_flow(farm: Farm) -> None:
    random = Random(11)
    clients = [farm.client(random.choice((IKE, NATT)), source=f"127.9.9.{n % 40 + 1}") for n in range(100)]
    sent: dict[Client, list[bytes]] = {client: [] for client in clients}
    heard: dict[Client, list[bytes]] = {client: [] for client in clients}
    async with running(farm.document(persistence="ike-spi")) as plane:
        for _ in range(12):
            burst = [client for client in clients for _ in range(random.randrange(6))]
            random.shuffle(burst)
            for client in burst:
                data = random.randbytes(random.choice((0, 1, 60, 60, 60, 1400, random.randrange(3000))))
                sent[client].append(data)
                client.send(data)
            for client in clients:
                heard[client] += await client.receive(len(sent[client]) - len(heard[client]))
        assert heard == sent
        assert len(plane.forwarder.flows) == len(set(burst) | {c for c in clients if sent[c]})
        assert not plane.forwarder.drops
    total = sum(map(len, sent.values()))
    assert total > 2500
    assert len(farm.seen) == total
    order: dict[tuple[str, str, int], list[bytes]] = {}
    for gateway, service, upstream, data in farm.seen:
        order.setdefault((gateway, service, upstream), []).append(data)
    assert sorted(order.values()) == sorted(each for each in sent.values() if each)


async def test_counters_tell_datagrams_and_bytes_both_ways(farm: Farm) -> None:
    async with running(farm.document(scheduler="round-robin")) as plane:
        client = farm.client(IKE)
        gateway, _ = await farm.route(client, b"x" * 10)
        client.send(b"y" * 20, b"z" * 30)
        await client.receive(2)
        farm.gateways[gateway].answers = False
        client.send(b"unanswered")
        await trio.sleep(SILENCE)
        counters = plane.counters(IKE)[gateway]
        assert (counters.packets_in, counters.bytes_in) == (4, 70)
        assert (counters.packets_out, counters.bytes_out) == (3, 60)
        assert counters.flows == 1
