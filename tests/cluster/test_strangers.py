"""Whoever comes to the link and is not the peer: refused and counted, and the peer does not notice."""

from __future__ import annotations

import socket
import ssl
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest
import trio
from structlog.testing import capture_logs

from sapin.cluster import link as link_module
from sapin.cluster.link import Connected, Disconnected, Link
from sapin.cluster.membership import Credentials, Member
from sapin.cluster.strangers import MAX_STRANGERS, PATIENCE, Connection, Strangers, connections
from tests.cluster.pairs import Authority, members, next_of, put, running, until

YEAR = 366 * 86_400


class Ends:
    """A node that listens, and what its peer needs to come."""

    def __init__(self) -> None:
        self.authority = Authority.new()
        self.a, self.b = members()
        self.left = Link(self.a, self.b, self.authority.issue("lb-a"))
        self.address = str(self.a.links[0]), self.a.port

    def peer(self, credentials: Credentials | None = None, member: Member | None = None) -> Link:
        return Link(member or self.b, self.a, credentials or self.authority.issue("lb-b"))

    def connect(self, data: bytes = b"") -> socket.socket:
        sock = socket.create_connection(self.address)
        sock.sendall(data)
        return sock


@pytest.fixture
async def ends() -> AsyncIterator[Ends]:
    ends = Ends()
    async with running(ends.left):
        yield ends


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


async def refused(ends: Ends, link: Link, cause: str) -> None:
    """It never gets in, it is counted, and the right peer gets in beside it."""
    async with running(link):
        await until(lambda: ends.left.refused.get(cause, 0) >= 2)
        assert not any(isinstance(received, Connected) for received in everything(ends.left))
        await gets_in(ends)


def everything(link: Link) -> Iterator[object]:
    while (received := link.receive()) is not None:
        yield received


async def gets_in(ends: Ends) -> None:
    right = ends.peer()
    async with running(right):
        assert isinstance(await next_of(ends.left), Connected)
        assert isinstance(await next_of(right), Connected)
        await put(right, b"it is me")
        assert await next_of(ends.left) == b"it is me"


async def test_an_expired_certificate(ends: Ends) -> None:
    await refused(ends, ends.peer(ends.authority.issue("lb-b", age=YEAR)), "handshake")


async def test_a_certificate_of_another_cluster(ends: Ends) -> None:
    other = Authority.new().issue("lb-b")
    lent = Credentials(ends.authority.certificate, other.certificate, other.key)
    await refused(ends, ends.peer(lent), "handshake")


async def test_a_node_that_is_not_on_the_list(ends: Ends) -> None:
    stranger = Member(name="lb-c", links=ends.b.links, port=ends.b.port)
    await refused(ends, ends.peer(ends.authority.issue("lb-c"), stranger), "not-a-member")


async def test_the_node_that_listens_must_be_the_right_one_too() -> None:
    ends = Ends()
    other, expired = ends.authority.issue("lb-x"), ends.authority.issue("lb-a", age=YEAR)
    for credentials in (other, expired):
        false = Link(ends.a, ends.b, credentials)
        right = ends.peer()
        async with running(false, right):
            await trio.sleep(0.5)
            assert right.receive() is None
            assert false.receive() is None
    ends.left.close()


@pytest.mark.parametrize(
    "data",
    [
        b"\0SP\0\0\x11\0\0",
        b"GET / HTTP/1.1\r\nHost: lb\r\n\r\n",
        b"\x16\x03\x01\x00\x50" + bytes(0x50),
        b"\x16\x03\x01\xff\xff" + bytes(100),
        bytes(range(256)) * 100,
    ],
    ids=["cleartext peer", "HTTP", "no hello", "oversize record", "garbage"],
)
async def test_what_is_no_handshake(ends: Ends, data: bytes) -> None:
    for _ in range(2):
        with ends.connect() as sock:
            with suppress(OSError):  # closed while we were sending
                sock.sendall(data)
            await until(lambda: closed(sock))
    await until(lambda: sum(ends.left.refused.values()) >= 1)
    await gets_in(ends)


def closed(sock: socket.socket) -> bool:
    sock.setblocking(False)
    try:
        return not sock.recv(4096)
    except BlockingIOError:
        return False
    except OSError:
        return True


async def test_a_client_without_a_certificate(ends: Ends) -> None:
    context = ssl.create_default_context(cadata=ends.authority.certificate.decode())
    context.check_hostname = False

    def visit() -> bytes:
        with (
            suppress(OSError),
            socket.create_connection(ends.address) as sock,
            context.wrap_socket(sock) as tls,
        ):
            return tls.recv(1)
        return b""

    assert await trio.to_thread.run_sync(visit) == b""
    await until(lambda: ends.left.refused.get("handshake", 0) >= 1)
    await gets_in(ends)


async def test_silent_strangers_take_no_place_and_are_ended(
    ends: Ends, stack: ExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sapin.cluster.strangers.PATIENCE", 0.5)
    silent = [stack.enter_context(ends.connect(b"\x16\x03\x01"[:n])) for n in (0, 1, 3) for _ in range(3)]
    right = ends.peer()
    async with running(right):
        assert isinstance(await next_of(ends.left), Connected)
        await until(lambda: all(closed(sock) for sock in silent))
        await until(lambda: ends.left.refused.get("half-open") == len(silent))
        assert right.receive() is not None
        await put(right, b"still here")
        assert await next_of(ends.left) == b"still here"


async def test_a_crowd_of_silent_strangers_is_bounded(ends: Ends, stack: ExitStack) -> None:
    before = len(list(Path("/proc/self/fd").iterdir()))
    crowd = [stack.enter_context(ends.connect()) for _ in range(3 * MAX_STRANGERS)]
    await until(lambda: sum(closed(sock) for sock in crowd) >= 2 * MAX_STRANGERS)
    await until(lambda: len(connections(ends.a.port)) <= MAX_STRANGERS)
    limit = before + len(crowd) + MAX_STRANGERS + 10
    await until(lambda: len(list(Path("/proc/self/fd").iterdir())) < limit)
    await gets_in(ends)


async def test_a_storm_does_not_keep_the_peer_out(ends: Ends) -> None:
    async def storm() -> None:
        while True:
            with ends.connect(b"rubbish"):
                await trio.sleep(0.01)

    async with trio.open_nursery() as nursery:
        for _ in range(4):
            nursery.start_soon(storm)
        await trio.sleep(0.5)
        await gets_in(ends)
        nursery.cancel_scope.cancel()


async def test_a_peer_that_comes_again_replaces_the_connection_that_hangs(ends: Ends) -> None:
    """A machine that lost its power says no goodbye: its old connection must not hold the place."""
    first = ends.peer()
    async with running(first):
        assert isinstance(await next_of(ends.left), Connected)
        second = ends.peer()
        async with running(second):
            while not isinstance(await next_of(ends.left), Disconnected):
                pass
            assert isinstance(await next_of(ends.left), Connected)
        assert ends.left.refused["second"] >= 1


async def test_refusals_are_logged_once_a_minute(ends: Ends, monkeypatch: pytest.MonkeyPatch) -> None:
    with capture_logs() as lines:
        for _ in range(3):
            with ends.connect(b"rubbish") as sock:
                await until(lambda: closed(sock))
        await until(lambda: bool(lines))
        for _ in range(20):
            with ends.connect(b"rubbish") as sock:
                await until(lambda: closed(sock))
        await trio.sleep(1.5)
    (line,) = lines
    assert line["log_level"] == "warning"
    assert line["handshake"] >= 1
    assert link_module.LOG_EVERY == 60.0


# who is to be ended


def stranger(number: int) -> Connection:
    return Connection(f"192.0.2.1:{number}", str(number))


def test_only_those_who_take_too_long_are_ended() -> None:
    strangers = Strangers(4510)
    peer, slow, new = stranger(1), stranger(2), stranger(3)
    assert strangers.overdue([peer, slow], peer.remote, 0.0) == []
    assert strangers.overdue([peer, slow, new], peer.remote, PATIENCE - 0.1) == []
    assert strangers.overdue([peer, slow, new], peer.remote, PATIENCE) == [slow]
    assert strangers.overdue([peer, new], peer.remote, 2 * PATIENCE) == [new]


def test_of_too_many_the_oldest_are_ended() -> None:
    strangers = Strangers(4510)
    old, crowd = stranger(0), [stranger(number) for number in range(1, MAX_STRANGERS + 1)]
    assert strangers.overdue([old], None, 0.0) == []
    assert strangers.overdue([*crowd, old], None, 1.0) == [old]
