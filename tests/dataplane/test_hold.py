"""The first answer of a new pin waits until the peer has the pin; nothing else waits, and nothing waits for long."""

from __future__ import annotations

import os

import pytest
import trio

from sapin.core.dataplane import outlet as outlets
from sapin.core.journal import FlowClosed, FlowOpened
from sapin.core.pins import Put
from tests.dataplane.farm import Farm, advance, eventually, flow_of, ike_message, settle
from tests.dataplane.twins import Stream, document, outlet, plane_of, running


async def test_the_first_answer_waits_until_the_peer_has_the_pin(farm: Farm) -> None:
    async with running(plane_of(document(farm))) as plane:
        plane.activate()
        stream = Stream(plane, waits=True)
        client, message = farm.client(), ike_message(os.urandom(8))
        client.send(message)
        await settle()
        assert farm.where(message).data == message  # the server has it at once
        assert await client.hears_nothing()
        assert [type(record) for record in stream.records] == [Put, FlowOpened]
        outlet(plane).release(1)
        assert await client.receive() == [message]
        assert await client.ask(message) == message  # and nothing waits any more
        assert len(stream.told) == 1


async def test_only_what_is_acknowledged_is_released(farm: Farm) -> None:
    async with running(plane_of(document(farm))) as plane:
        plane.activate()
        Stream(plane, waits=True)
        first, second = farm.client(), farm.client()
        for client in (first, second):
            client.send(ike_message(os.urandom(8)))
            await settle()
        outlet(plane).release(1)
        await first.receive()
        assert await second.hears_nothing()
        outlet(plane).release(2)
        await second.receive()


async def test_a_new_key_of_an_old_flow_waits_too(farm: Farm) -> None:
    async with running(plane_of(document(farm, persistence="ike-spi"))) as plane:
        plane.activate()
        stream = Stream(plane, waits=True)
        client, message = farm.client(), ike_message(os.urandom(8))
        client.send(message)
        await settle()
        outlet(plane).release(1)
        await client.receive()
        other = ike_message(os.urandom(8))
        client.send(other, other)
        await settle()
        assert await client.hears_nothing()
        put, *opened = stream.told[1]
        assert isinstance(put, Put)
        assert all(isinstance(record, FlowOpened) for record in opened)
        assert opened[-1].key == flow_of(plane, client).key  # type: ignore[union-attr]
        outlet(plane).release(2)
        assert await client.receive(2) == [other, other]


async def test_an_answer_that_waits_for_two_messages_waits_for_both(farm: Farm) -> None:
    async with running(plane_of(document(farm, persistence="ike-spi"))) as plane:
        plane.activate()
        Stream(plane, waits=True)
        client = farm.client()
        for _ in range(2):
            client.send(ike_message(os.urandom(8)))
            await settle()
        outlet(plane).release(1)
        assert await client.hears_nothing()
        outlet(plane).release(2)
        await client.receive(2)


async def test_nothing_waits_where_there_is_nobody_to_wait_for(farm: Farm) -> None:
    async with running(plane_of(document(farm))) as plane:
        plane.activate()
        Stream(plane)
        message = ike_message(os.urandom(8))
        assert await farm.client().ask(message) == message


async def test_nothing_waits_before_there_is_a_link(farm: Farm) -> None:
    async with running(plane_of(document(farm))) as plane:
        plane.activate()
        message = ike_message(os.urandom(8))
        assert await farm.client().ask(message) == message


async def test_a_standby_forwards_what_comes_and_tells_nobody(farm: Farm) -> None:
    async with running(plane_of(document(farm))) as plane:
        stream = Stream(plane, waits=True)
        message = ike_message(os.urandom(8))
        assert await farm.client().ask(message) == message
        assert stream.told == []


async def test_a_flow_that_is_closed_while_it_waits_leaves_nothing_behind(farm: Farm) -> None:
    async with running(plane_of(document(farm))) as plane:
        plane.activate()
        stream = Stream(plane, waits=True)
        client, other, message = farm.client(), farm.client(), ike_message(os.urandom(8))
        client.send(ike_message(os.urandom(8)))
        await settle()
        closed = flow_of(plane, client)
        plane.forwarder.flows.close(closed)
        other.send(message)
        await settle()
        assert flow_of(plane, other).fd == closed.fd
        assert [type(record) for record in stream.told[1]] == [FlowClosed, FlowOpened]
        outlet(plane).release(1)  # what waited for that is gone; its descriptor is another's
        assert await other.hears_nothing()
        outlet(plane).release(2)
        assert await other.receive() == [message]


async def test_a_server_that_refuses_meanwhile_is_no_trouble(farm: Farm) -> None:
    async with running(plane_of(document(farm))) as plane:
        plane.activate()
        Stream(plane, waits=True)
        for gateway in farm.gateways.values():
            gateway.stop()
        client = farm.client()
        client.send(ike_message(os.urandom(8)))
        await settle()
        assert not plane.forwarder.errors
        outlet(plane).release(1)
        await eventually(lambda: plane.forwarder.errors)
        assert dict(plane.forwarder.errors) == {"ECONNREFUSED": 1}


async def test_who_becomes_a_standby_lets_everything_go(farm: Farm) -> None:
    async with running(plane_of(document(farm))) as plane:
        plane.activate()
        Stream(plane, waits=True)
        client, message = farm.client(), ike_message(os.urandom(8))
        client.send(message)
        await settle()
        plane.deactivate()
        assert await client.receive() == [message]
        assert outlet(plane).held == 0


async def test_what_nobody_releases_is_released(farm: Farm, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outlets, "AT_MOST", 0.05)
    async with running(plane_of(document(farm))) as plane:
        plane.activate()
        Stream(plane, waits=True)
        client, message = farm.client(), ike_message(os.urandom(8))
        client.send(message)
        assert await client.receive() == [message]
        assert outlet(plane).overdue == 1


async def test_a_link_that_fails_holds_nobody(farm: Farm) -> None:
    """The forwarder starts anew, and the flow that was new is read."""

    def fail(records: object) -> int:
        raise RuntimeError(f"no link for {records}")

    async with running(plane_of(document(farm))) as plane:
        plane.activate()
        outlet(plane).replicate = fail
        client, message = farm.client(), ike_message(os.urandom(8))
        client.send(message)
        assert await client.receive() == [message]
        assert plane.failures == {"forwarder": 1}


async def test_the_changes_of_one_flush_go_at_once(farm: Farm) -> None:
    """The peer may be told the digest with any of them: it must be that of what was told."""
    async with running(plane_of(document(farm))) as plane:
        plane.activate()
        stream = Stream(plane)
        await settle()
        group = plane.snapshot.groups["ike"]
        for number in range(600):
            group.table.put([b"src:%d" % number], group.members["gw1"], int(plane.clock()))
        await farm.client().ask(ike_message(os.urandom(8)))
        assert [len(part) for part in stream.told] == [602]


async def test_expiry_tells_before_anything_else_runs(farm: Farm) -> None:
    """The peer compares digests at any time: what is in the digest must have been told."""
    made = document(farm, persistence={"plugin": "source-address", "timeout": "1s"})
    async with running(plane_of(made)) as plane:
        plane.activate()
        stream = Stream(plane)
        group = plane.snapshot.groups["ike"]
        for number in range(600):
            group.table.put([b"src:%d" % number], group.members["gw1"], int(plane.clock()) - 10)
        outlet(plane).flush()

        async def watch() -> None:
            while len(group.table):
                told = sum(1 if isinstance(each, Put) else -1 for each in stream.records)
                assert told == len(group.table)
                await trio.lowlevel.checkpoint()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(watch)
            await advance(plane)
        assert len(group.table) == 0
