"""The link between two nodes, on real sockets over loopback."""

from __future__ import annotations

import time
from statistics import median

import pytest
import trio

from sapin.cluster.link import Connected, Disconnected, Link, LinkError
from sapin.cluster.membership import Credentials
from tests.cluster.pairs import NETWORK, PATIENCE, Authority, connected, members, next_of, put, running, until


async def test_messages_go_both_ways_in_order() -> None:
    async with connected() as (left, right):
        for number in range(200):
            await put(left, b"%d" % number)
            assert await next_of(right) == b"%d" % number
            await put(right, b"re %d" % number)
            assert await next_of(left) == b"re %d" % number
        assert right.link == f"{NETWORK}.0.1"


async def test_a_full_link_pushes_back_and_loses_nothing() -> None:
    async with connected() as (left, right):
        sent = 0
        while left.send(b"%07d" % sent + bytes(60_000)):
            sent += 1
            assert sent < 10_000, "the link takes everything, so somebody buffers without bound"
            await trio.lowlevel.checkpoint()
            if sent % 20 == 0:
                await trio.sleep(0.02)
        for number in range(sent):
            received = await next_of(right)
            assert isinstance(received, bytes)
            assert received[:7] == b"%07d" % number


async def test_a_message_that_is_too_long_ends_the_connection() -> None:
    async with connected() as (left, right):
        with trio.fail_after(10):
            await put(left, bytes(5 * 1024 * 1024))
        assert isinstance(await next_of(right), Disconnected)
        assert isinstance(await next_of(right), Connected)


async def test_the_end_of_a_connection_is_told_within_milliseconds_and_it_comes_back() -> None:
    async with connected() as (left, right):
        began = trio.current_time()
        right.close_pipe()
        assert isinstance(await next_of(left), Disconnected)
        assert trio.current_time() - began < 0.5
        assert not left.send(b"to nobody")
        assert left.link is None
        for link in (left, right):
            while not isinstance(await next_of(link), Connected):
                pass
        await put(left, b"again")
        assert await next_of(right) == b"again"


async def test_what_was_sent_before_the_end_comes_before_it() -> None:
    for _ in range(20):
        async with connected() as (left, right):
            sent = 0
            for number in range(5):
                with trio.fail_after(5):
                    await left.writable()
                sent += left.send(b"%d" % number)
            await trio.sleep(0.02)
            left.close_pipe()
            got = []
            while isinstance(received := await next_of(right), bytes):
                got.append(received)
            assert isinstance(received, Disconnected)
            assert got == [b"%d" % number for number in range(sent)]


async def test_what_waited_for_a_connection_that_ended_does_not_go_to_the_next() -> None:
    async with connected() as (left, right):
        sent = 0
        for _ in range(50):
            await trio.sleep(0.002)
            while left.send(b"old" + bytes(50_000)):
                sent += 1
        left.close_pipe()
        seen = []
        while not isinstance(received := await next_of(right), Connected):
            seen.append(received)
        assert isinstance(seen[-1], Disconnected)
        assert len(seen) - 1 < sent, "nothing was left waiting, so this test shows nothing"
        while not isinstance(await next_of(left), Connected):
            pass
        with trio.fail_after(1):
            await left.writable()
        assert left.send(b"new")
        assert await next_of(right) == b"new"


async def test_a_reader_that_was_paused_finds_out_that_the_connection_ended() -> None:
    async with connected() as (left, right):
        for _ in range(50):
            await trio.sleep(0.002)
            while left.send(b"old" + bytes(50_000)):
                pass
        left.close_pipe()
        await trio.sleep(0.5)
        with trio.fail_after(8):
            while not isinstance(await next_of(right), Connected):
                pass


async def test_a_connection_over_which_nothing_comes_is_made_anew() -> None:
    """A peer that hangs keeps its connection up: the kernel answers for it."""
    authority = Authority.new()
    a, b = members()
    left, right = Link(a, b, authority.issue("lb-a"), 0.3), Link(b, a, authority.issue("lb-b"), 30.0)
    async with running(left, right):
        assert isinstance(await next_of(left), Connected)
        for number in range(8):  # alive for as long as it says something
            await trio.sleep(0.1)
            await next_of(right) if right.link is None else None
            await put(right, b"%d" % number)
            assert await next_of(left) == b"%d" % number
        began = trio.current_time()
        assert isinstance(await next_of(left), Disconnected)
        assert trio.current_time() - began < 2.0
        assert isinstance(await next_of(left), Connected)
        assert left.refused["silent"] >= 1


async def test_waiting_to_send_does_not_spin_where_nobody_is() -> None:
    authority = Authority.new()
    a, b = members()
    link = Link(a, b, authority.issue("lb-a"))
    async with running(link):
        with trio.move_on_after(0.2) as scope:
            await link.writable()
        assert scope.cancelled_caught


async def test_the_second_link_is_used_where_the_first_is_not() -> None:
    authority = Authority.new()
    a, b = members(f"{NETWORK}.0.1", f"{NETWORK}.0.5")
    only_second = a.model_copy(update={"links": a.links[1:]})
    left, right = Link(only_second, b, authority.issue("lb-a")), Link(b, a, authority.issue("lb-b"))
    async with running(left, right):
        came = await next_of(right)
        assert came == Connected("lb-a", f"{NETWORK}.0.5")


async def test_a_certificate_is_renewed_without_another_descriptor() -> None:
    authority = Authority.new()
    a, b = members()
    left, right = Link(a, b, authority.issue("lb-a")), Link(b, a, authority.issue("lb-b"))
    async with running(left, right):
        for link, node in ((left, "lb-a"), (right, "lb-b")):
            descriptor = link.fd
            while right.link is None or left.link is None:
                await next_of(left), await next_of(right)
            link.renew(authority.issue(node))
            assert isinstance(await next_of(left), Disconnected)
            assert isinstance(await next_of(right), Disconnected)
            for end in (left, right):
                while not isinstance(await next_of(end), Connected):
                    pass
            assert link.fd == descriptor
        received = None
        with trio.fail_after(PATIENCE):  # the connection may be made once more: both ends have to hear of it
            while received != b"renewed":
                left.receive()
                left.send(b"renewed")
                await trio.sleep(0.01)
                received = right.receive()


async def test_a_certificate_that_ends_while_the_link_is_up_lets_nobody_in_anew() -> None:
    authority = Authority.new()
    a, b = members()
    left, right = Link(a, b, authority.issue("lb-a")), Link(b, a, authority.issue("lb-b"))
    async with running(left, right):
        assert isinstance(await next_of(right), Connected)
        right.renew(authority.issue("lb-b", age=366 * 86_400))
        assert isinstance(await next_of(right), Disconnected)
        await until(lambda: left.refused.get("handshake", 0) >= 2)
        assert right.link is None


async def test_damaged_credentials_are_told() -> None:
    a, b = members()
    with pytest.raises(LinkError, match="does not accept"):
        Link(a, b, Credentials(b"no", b"certificate", b"at all"))


async def test_a_link_that_is_closed_sends_nothing() -> None:
    authority = Authority.new()
    a, b = members()
    link = Link(a, b, authority.issue("lb-a"))
    link.close()
    link.close()
    assert not link.send(b"x")
    assert link.receive() is None


async def test_a_round_trip_takes_less_than_the_budget_of_an_ack() -> None:
    """0.6 ms is the aim on an idle machine; the bound is one that a busy machine meets too."""
    async with connected() as (left, right), trio.open_nursery() as nursery:
        nursery.start_soon(_echo, right)
        took = []
        for _ in range(500):
            began = time.perf_counter()
            left.send(bytes(100))
            await next_of(left)
            took.append(time.perf_counter() - began)
        nursery.cancel_scope.cancel()
    print(f"round trip p50 {median(took) * 1000:.2f} ms, p99 {sorted(took)[495] * 1000:.2f} ms")
    assert median(took) < 0.005


async def _echo(link: Link) -> None:
    while True:
        received = await next_of(link)
        assert isinstance(received, bytes)
        await put(link, received)
