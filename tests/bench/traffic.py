"""What VPN clients send: IKE_SA_INIT on UDP 500, framed IKE and then ESP on UDP 4500, with plausible sizes.

ESP numbers its packets (RFC 4303 section 2): the SPI names the flow and the sequence number shows loss and
reordering, so the load needs no marks of its own.
"""

from __future__ import annotations

import socket
import struct
from random import Random
from typing import NamedTuple

from mmsg import Message

SPI_OFFSET, SEQUENCE_OFFSET = 0, 4
"""Where an ESP packet has its SPI and its sequence number (RFC 4303 section 2)."""
NON_ESP_MARKER = bytes(4)
"""Precedes IKE on UDP 4500 (RFC 3948 section 2.2)."""
IP_PKTINFO, UDP_SEGMENT = 8, 103
"""Control messages of linux/in.h and linux/udp.h that the socket module lacks."""

_IKE_HEADER = struct.Struct("!8s8sBBBBII")
_INITIATOR = 0x08
_SA, _KE, _NONCE, _NOTIFY, _ENCRYPTED = 33, 34, 40, 41, 46
_ETHERTYPE_IPV4 = b"\x08\x00"


class Endpoint(NamedTuple):
    """An IPv4 address and a UDP port."""

    address: str
    port: int

    def packed(self) -> bytes:
        """As ``struct sockaddr_in``."""
        return (
            struct.pack("=H", socket.AF_INET)
            + struct.pack("!H", self.port)
            + socket.inet_aton(self.address)
            + bytes(8)
        )

    @classmethod
    def unpack(cls, raw: bytes) -> Endpoint:
        """From ``struct sockaddr_in``."""
        return cls(socket.inet_ntoa(raw[4:8]), int.from_bytes(raw[2:4]))


def _payload(following: int, body: bytes) -> bytes:
    """An IKE payload behind its generic header (RFC 7296 section 3.2)."""
    return struct.pack("!BBH", following, 0, 4 + len(body)) + body


def _ike(spi_i: bytes, spi_r: bytes, first: int, exchange: int, number: int, body: bytes) -> bytes:
    length = _IKE_HEADER.size + len(body)
    return _IKE_HEADER.pack(spi_i, spi_r, first, 0x20, exchange, _INITIATOR, number, length) + body


def ike_sa_init(spi_i: bytes, random: Random) -> bytes:
    """The first message of a client (RFC 7296 section 1.2): SA, KE of group 14, nonce, NAT detection."""
    transforms = ((1, 12, b"\x80\x0e\x01\x00"), (2, 5, b""), (3, 12, b""), (4, 14, b""))
    last = len(transforms) - 1
    proposal = b"".join(
        struct.pack("!BBHBBH", 0 if i == last else 3, 0, 8 + len(attributes), kind, 0, number) + attributes
        for i, (kind, number, attributes) in enumerate(transforms)
    )
    sa = struct.pack("!BBHBBBB", 0, 0, 8 + len(proposal), 1, 1, 0, len(transforms)) + proposal
    body = (
        _payload(_KE, sa)
        + _payload(_NONCE, struct.pack("!HH", 14, 0) + random.randbytes(256))
        + _payload(_NOTIFY, random.randbytes(32))
        + _payload(_NOTIFY, struct.pack("!BBH", 0, 0, 16388) + random.randbytes(20))
        + _payload(0, struct.pack("!BBH", 0, 0, 16389) + random.randbytes(20))
    )
    return _ike(spi_i, bytes(8), _SA, 34, 0, body)


def framed_ike_auth(spi_i: bytes, spi_r: bytes, random: Random) -> bytes:
    """The second message of a client, as on UDP 4500: marker, header, encrypted payload."""
    sealed = _payload(35, random.randbytes(360))
    return NON_ESP_MARKER + _ike(spi_i, spi_r, _ENCRYPTED, 35, 1, sealed)


def esp(spi: int, size: int, random: Random) -> bytes:
    """An ESP packet of ``size`` bytes of UDP payload, with sequence number 1."""
    return struct.pack("!II", spi, 1) + random.randbytes(size - 8)


def _checksum(header: bytes) -> int:
    total: int = sum(struct.unpack(f"!{len(header) // 2}H", header))
    total = (total & 0xFFFF) + (total >> 16)
    return ~(total + (total >> 16)) & 0xFFFF


def frame(macs: bytes, source: Endpoint, destination: Endpoint, payload: bytes) -> Message:
    """A whole Ethernet frame for a packet socket; ``macs`` is destination then source.

    The UDP checksum is left out, which IPv4 allows (RFC 768): no forwarder here pays for it either way.
    """
    udp = struct.pack("!HHHH", source.port, destination.port, 8 + len(payload), 0)
    addresses = socket.inet_aton(source.address) + socket.inet_aton(destination.address)
    fixed = struct.pack("!BBHHHBB", 0x45, 0, 20 + len(udp) + len(payload), 0, 0x4000, 64, socket.IPPROTO_UDP)
    ip = fixed + struct.pack("!H", _checksum(fixed + bytes(2) + addresses)) + addresses
    return Message(macs + _ETHERTYPE_IPV4 + ip + udp + payload)


FRAME_HEADERS = 14 + 20 + 8


def _control(level: int, kind: int, value: bytes) -> bytes:
    """A control message, padded to the next (cmsg(3))."""
    raw = struct.pack("@Nii", 16 + len(value), level, kind) + value
    return raw + bytes(-len(raw) % 8)


def datagram(source: Endpoint, destination: Endpoint, payload: bytes, segment: int = 0) -> Message:
    """For an unconnected UDP socket that is bound to the source's port; ``segment`` makes it a GSO super-packet."""
    control = _control(
        socket.IPPROTO_IP, IP_PKTINFO, struct.pack("@i4s4x", 0, socket.inet_aton(source.address))
    )
    if segment:
        control += _control(socket.IPPROTO_UDP, UDP_SEGMENT, struct.pack("@H", segment))
    return Message(payload, destination.packed(), control)
