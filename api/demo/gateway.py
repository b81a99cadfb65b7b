"""A small IKEv2 responder: enough of a VPN gateway to show what a balancer must get right.

It answers IKE_SA_INIT, IKE_AUTH and ESP as to their form, without any cryptography. What matters is its memory: an
IKE_AUTH for an SA that began elsewhere is refused, as every real gateway must.
"""

from __future__ import annotations

import socket
from collections import deque
from random import Random

import trio

from sapin.api.demo.stage import port
from sapin.core import ike
from sapin.core.ike import FLAG_RESPONSE, Exchange, Group, Header, Kind, Notify, Payload
from sapin.core.model import Framing, IPAddress

MAX_SAS = 500
"""SAs that a gateway remembers; the oldest is forgotten."""


class Gateway:
    """A gateway on the ports of both framings; it can be stopped, and forgets everything then."""

    def __init__(self, number: int, address: IPAddress, random: Random) -> None:
        self.number = number
        self.name = f"gw{number}"
        self.refused: deque[bytes] = deque(maxlen=MAX_SAS)
        """The initiator's SPIs of what was refused."""
        self._address = address
        self._random = random
        self._sas: dict[bytes, bytes] = {}
        """The ESP SPI of each SA, by the initiator's SPI."""
        self._scope = trio.CancelScope()

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Serve until stopped.

        Raises:
            OSError: an address is in use.
        """
        self._sas.clear()
        with trio.CancelScope() as self._scope:
            async with trio.open_nursery() as nursery:
                for framing in (Framing.IKE, Framing.NATT):
                    await nursery.start(self._serve, framing)
                task_status.started()

    def stop(self) -> None:
        """Close the sockets, as a gateway that dies."""
        self._scope.cancel()

    async def _serve(self, framing: Framing, *, task_status: trio.TaskStatus[None]) -> None:
        with trio.socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
            await sock.bind((str(self._address), port(framing)))
            task_status.started()
            while True:
                data, peer = await sock.recvfrom(65_535)
                answer = self.answer(data, framing)
                if answer is not None:
                    await sock.sendto(answer, peer)

    def answer(self, data: bytes, framing: Framing) -> bytes | None:
        """What it says to a datagram, if anything."""
        kind, offset = ike.classify(data, framing)
        if kind is Kind.ESP:
            return data if data[:4] in self._sas.values() else None
        if kind is not Kind.IKE:
            return None
        answer = self._answer_ike(data[offset:])
        return None if answer is None else data[:offset] + answer

    def _answer_ike(self, request: bytes) -> bytes | None:
        header = ike.parse_header(request)
        if header is None or header.response:
            return None
        if header.exchange == Exchange.IKE_SA_INIT:
            return self._begin(header, request)
        if header.exchange == Exchange.IKE_AUTH:
            return self._authenticate(header)
        return None

    def _begin(self, header: Header, request: bytes) -> bytes:
        """An SA, if the key exchange group is the one that it wants."""
        body = next((body for kind, body in ike.payloads(request) if kind == Payload.KE), b"")
        if body[:2] != Group.MODP2048.to_bytes(2):
            wanted = ike.notify(Notify.INVALID_KE_PAYLOAD, Group.MODP2048.to_bytes(2))
            return ike.message(header._replace(flags=FLAG_RESPONSE), [wanted])
        while len(self._sas) >= MAX_SAS:
            del self._sas[next(iter(self._sas))]
        spi_r = bytes((self.number,)) + self._random.randbytes(7)
        self._sas[header.spi_i] = spi_r[:4]
        return ike.ike_sa_init_response(
            header.spi_i, spi_r, self._random.randbytes(32), self._random.randbytes(256)
        )

    def _authenticate(self, header: Header) -> bytes:
        """The ESP SPI of its SA; of an SA that it does not know it says so (RFC 7296 section 2.21.4)."""
        esp = self._sas.get(header.spi_i)
        if esp is None:
            self.refused.append(header.spi_i)
            payload = ike.notify(Notify.INVALID_IKE_SPI)
        else:
            payload = (Payload.ENCRYPTED, esp + self._random.randbytes(60))
        return ike.message(header._replace(flags=FLAG_RESPONSE), [payload])
