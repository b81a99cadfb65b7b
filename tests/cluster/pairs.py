"""Two ends of a link on loopback, with certificates of their own; what the tests of this folder share."""

from __future__ import annotations

import os
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from itertools import count
from typing import NamedTuple

import trio

from sapin.cluster import certificates
from sapin.cluster.link import Connected, Link, Received
from sapin.cluster.membership import Credentials, Member, parse_member

NETWORK = f"127.{30 + os.getpid() % 100}"  # so that two runs at a time do not meet
PATIENCE = 10.0
_ports = count(20_000 + os.getpid() % 10_000)


class Authority(NamedTuple):
    """A CA, and what it makes."""

    certificate: bytes
    key: bytes

    @classmethod
    def new(cls) -> Authority:
        return cls(*certificates.new_authority("0" * 32, time.time()))

    def issue(self, node: str, *, age: float = 0.0) -> Credentials:
        """Credentials of a node, as they were issued some seconds ago."""
        key = certificates.new_key()
        asked = certificates.request(node, key)
        made = certificates.sign(asked, node, self.certificate, self.key, time.time() - age)
        return Credentials(self.certificate, made, key)


def members(*links: str) -> tuple[Member, Member]:
    """Two nodes; the first listens, on these addresses."""
    port = next(_ports)
    return (
        parse_member("lb-a", list(links) or [f"{NETWORK}.0.1"], port),
        parse_member("lb-b", [f"{NETWORK}.0.2"], port),
    )


async def next_of(link: Link) -> Received:
    """What the link has next."""
    with trio.fail_after(PATIENCE):
        while (received := link.receive()) is None:
            await link.readable()
        return received


async def put(link: Link, data: bytes) -> None:
    """Send a message as soon as the link takes it."""
    with trio.fail_after(PATIENCE):
        while not link.send(data):
            await link.writable()


async def until(true: Callable[[], bool]) -> None:
    with trio.fail_after(PATIENCE):
        while not true():  # noqa: ASYNC110  # what happens on threads of a library sets no event
            await trio.sleep(0.01)


@asynccontextmanager
async def running(*links: Link) -> AsyncIterator[None]:
    async with trio.open_nursery() as nursery:
        for link in links:
            await nursery.start(link.run)
        yield
        nursery.cancel_scope.cancel()


@asynccontextmanager
async def connected() -> AsyncIterator[tuple[Link, Link]]:
    """Both ends of a link that is up."""
    authority = Authority.new()
    a, b = members()
    left, right = Link(a, b, authority.issue("lb-a")), Link(b, a, authority.issue("lb-b"))
    async with running(left, right):
        for link in (left, right):
            assert isinstance(await next_of(link), Connected)
        yield left, right
