"""A small IKEv2 initiator: connects on two ports as every VPN client does, then keeps a tunnel busy."""

from __future__ import annotations

import socket
from collections.abc import Callable
from contextlib import suppress
from enum import Enum
from random import Random

import trio

from sapin.api.demo.stage import Network, Pace
from sapin.core import ike
from sapin.core.ike import Answer, Exchange, Header, Notify, Payload
from sapin.core.model import Endpoint, Framing, IPAddress

TRIES = 3
RETRANSMIT = 1.0
"""Seconds until a request is sent once more."""


class State(Enum):
    """How a client fares."""

    TRYING = "connecting"
    UP = "with a tunnel"
    REFUSED = "refused"
    SILENT = "no answer"


class Client:
    """A client at an address of its own, or of a NAT that it shares with others."""

    def __init__(self, address: IPAddress, network: Network, pace: Pace, random: Random) -> None:
        self.address = address
        self.patience = pace.patience
        self.state = State.TRYING
        self.gateway = 0
        """The number of the gateway that answered IKE_SA_INIT."""
        self.spi = b""
        """Its own SPI of the latest attempt."""
        self.connects = 0
        """How often it got a tunnel."""
        self.heard = 0.0
        """When something last came back through the tunnel, in trio's time."""
        self._esp = b""
        self._retry = trio.Event()
        self._pace = pace
        self._random = random
        self._ike = _socket(address, network.virtual(Framing.IKE))
        self._natt = _socket(address, network.virtual(Framing.NATT))

    @property
    def settled(self) -> bool:
        """It has a tunnel, or was refused."""
        return self.state in (State.UP, State.REFUSED)

    async def live(self) -> None:
        """Connect, keep the tunnel busy, and connect again when it falls silent; when refused, upon :meth:`retry`."""
        with self._ike, self._natt:
            while True:
                self.state = await self._attempt()
                if self.state is State.UP:
                    await self._use()
                elif self.state is State.REFUSED:
                    await self._retry.wait()
                else:
                    await trio.sleep(RETRANSMIT)
                self.state = State.TRYING

    def retry(self) -> None:
        """Have a client that was refused try once more, from the same ports."""
        self.state = State.TRYING
        self._retry.set()
        self._retry = trio.Event()

    async def _attempt(self) -> State:
        spi = self.spi = bytes((255,)) + self._random.randbytes(7)
        request = ike.ike_sa_init(spi, self._random.randbytes(32), self._random.randbytes(256))
        answer = await _ask(self._ike, request, lambda data: ike.classify_answer(spi, data) is Answer.SA)
        header = ike.parse_header(answer) if answer else None
        if header is None:
            return State.SILENT
        self.gateway = header.spi_r[0]
        await trio.sleep(self._random.uniform(*self._pace.think))
        return await self._authenticate(header)

    async def _authenticate(self, begun: Header) -> State:
        header = Header(begun.spi_i, begun.spi_r, exchange=Exchange.IKE_AUTH, message_id=1)
        request = ike.message(header, [(Payload.ENCRYPTED, self._random.randbytes(200))])
        answer = await _ask(self._natt, ike.NON_ESP_MARKER + request, lambda data: _answers(header, data))
        if answer is None:
            return State.SILENT
        message = answer[len(ike.NON_ESP_MARKER) :]
        if any(kind == Notify.INVALID_IKE_SPI for kind, _ in ike.notifies(message)):
            return State.REFUSED
        self._esp = next(body[:4] for kind, body in ike.payloads(message) if kind == Payload.ENCRYPTED)
        self.connects += 1
        return State.UP

    async def _use(self) -> None:
        """Send ESP and look for what comes back, until nothing did for too long."""
        self.heard = trio.current_time()
        number = 0
        while trio.current_time() - self.heard < self.patience:
            number += 1
            datagram = self._esp + number.to_bytes(4) + self._random.randbytes(100)
            if await _ask(self._natt, datagram, lambda data: data[:4] == self._esp, 1, self._pace.esp):
                self.heard = trio.current_time()
                await trio.sleep(self._pace.esp)


def _answers(request: Header, data: bytes) -> bool:
    header = ike.parse_header(data, len(ike.NON_ESP_MARKER))
    return header is not None and header.response and header[:2] == request[:2] and header.message_id == 1


async def _ask(
    sock: trio.socket.SocketType,
    request: bytes,
    wanted: Callable[[bytes], bool],
    tries: int = TRIES,
    wait: float = RETRANSMIT,
) -> bytes | None:
    """Send, and wait for the datagram that is wanted; what else comes is dropped."""
    for _ in range(tries):
        with trio.move_on_after(wait):
            await _send(sock, request)
            while True:
                data = await _receive(sock)
                if wanted(data):
                    return data
    return None


async def _send(sock: trio.socket.SocketType, data: bytes) -> None:
    with suppress(ConnectionRefusedError):  # the answer to a datagram before this one
        await sock.send(data)


async def _receive(sock: trio.socket.SocketType) -> bytes:
    try:
        return await sock.recv(65_535)
    except ConnectionRefusedError:
        return b""


def _socket(address: IPAddress, to: Endpoint) -> trio.socket.SocketType:
    sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    try:
        sock.bind((str(address), 0))
        sock.connect((str(to.address), to.port))
        return trio.socket.from_stdlib_socket(sock)
    except OSError:
        sock.close()
        raise
