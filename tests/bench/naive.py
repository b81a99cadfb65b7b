"""The older ways to forward in Python, kept beside the newer one so that their cost stays in sight.

naive: a trio task per flow and an await per datagram. drain: wait once, then read and send until nothing is left.
Both take a server by round robin per client address, and know neither IKE nor limits nor expiry.
"""

from __future__ import annotations

import select
import socket
import sys
from collections.abc import Callable, Sequence
from itertools import cycle

import trio

Address = tuple[str, int]
BATCH = 256
"""Datagrams after which a loop lets others run."""
SIZE = 2048
BUFFER = 4 * 1024 * 1024


class Servers:
    """Gives each client address a server, the same on every port."""

    def __init__(self, addresses: Sequence[str]) -> None:
        self._next = cycle(addresses)
        self._pins: dict[str, str] = {}

    def of(self, client: str) -> str:
        """The server of a client, chosen when it is first seen."""
        if client not in self._pins:
            self._pins[client] = next(self._next)
        return self._pins[client]


def listener(address: str, port: int) -> socket.socket:
    """A non-blocking UDP socket that clients send to."""
    sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, BUFFER)
    sock.bind((address, port))
    return sock


def upstream(server: Address) -> socket.socket:
    """A non-blocking UDP socket of one flow, connected to its server."""
    sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
    sock.connect(server)
    return sock


async def naive(address: str, port: int, servers: Servers) -> None:
    """Forward one port with an await for each datagram and a task for each flow's replies."""
    front = trio.socket.from_stdlib_socket(listener(address, port))
    flows: dict[Address, trio.socket.SocketType] = {}

    async def replies(back: trio.socket.SocketType, client: Address) -> None:
        while True:
            await front.sendto(await back.recv(SIZE), client)

    async with trio.open_nursery() as nursery:
        while True:
            data, client = await front.recvfrom(SIZE)
            back = flows.get(client)
            if back is None:
                back = trio.socket.from_stdlib_socket(upstream((servers.of(client[0]), port)))
                flows[client] = back
                nursery.start_soon(replies, back, client)
            await back.send(data)


async def drain(address: str, port: int, servers: Servers) -> None:
    """Forward one port: wait for readable, then read and send a batch without another await."""
    front = listener(address, port)
    flows: dict[Address, socket.socket] = {}
    backs: dict[int, tuple[socket.socket, Address]] = {}
    ready = select.epoll()
    buffer = bytearray(SIZE)
    view = memoryview(buffer)

    def requests() -> None:
        for _ in range(BATCH):
            size, client = front.recvfrom_into(buffer)
            back = flows.get(client)
            if back is None:
                back = flows[client] = upstream((servers.of(client[0]), port))
                backs[back.fileno()] = back, client
                ready.register(back.fileno(), select.EPOLLIN)
            back.send(view[:size])

    def replies() -> None:
        for descriptor, _ in ready.poll(0, BATCH):
            back, client = backs[descriptor]
            front.sendto(view[: back.recv_into(buffer)], client)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(_whenever, front.fileno(), requests)
        nursery.start_soon(_whenever, ready.fileno(), replies)


async def _whenever(descriptor: int, work: Callable[[], None]) -> None:
    while True:
        await trio.lowlevel.wait_readable(descriptor)
        try:
            work()
        except (BlockingIOError, ConnectionRefusedError):
            continue


async def _serve(way: str, address: str, ports: Sequence[int], servers: Servers) -> None:
    forward = {"naive": naive, "drain": drain}[way]
    async with trio.open_nursery() as nursery:
        for port in ports:
            nursery.start_soon(forward, address, port, servers)


if __name__ == "__main__":
    _way, _address, _ports, *_servers = sys.argv[1:]
    trio.run(_serve, _way, _address, [int(port) for port in _ports.split(",")], Servers(_servers))
