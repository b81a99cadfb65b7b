"""The frames that announce addresses, byte by byte."""

from __future__ import annotations

import socket

from sapin.cluster.netlink import Address, address_of, frames

MAC = bytes.fromhex("020000000001")


def test_gratuitous_arp_comes_as_request_and_as_reply() -> None:
    request, reply = frames(Address("198.18.0.1", 24, "eth0"), MAC)
    head = b"\xff" * 6 + MAC + bytes.fromhex("0806 0001 0800 06 04")
    here = socket.inet_aton("198.18.0.1")
    assert request == head + b"\0\x01" + MAC + here + bytes(6) + here
    assert reply == head + b"\0\x02" + MAC + here + MAC + here


def test_an_advertisement_is_valid_and_overrides() -> None:
    (frame,) = frames(Address("2001:db8::1", 64, "eth0"), MAC)
    here = socket.inet_pton(socket.AF_INET6, "2001:db8::1")
    assert frame[:14] == bytes.fromhex("333300000001") + MAC + b"\x86\xdd"
    ip, icmp = frame[14:54], frame[54:]
    assert ip[6:8] == bytes([58, 255])
    assert ip[8:24] == here
    assert icmp[0] == 136
    assert icmp[4] & 0x20
    assert icmp[8:24] == here
    assert icmp[24:] == bytes([2, 1]) + MAC
    pseudo = ip[8:40] + len(icmp).to_bytes(4, "big") + bytes([0, 0, 0, 58])
    total = sum(int.from_bytes((pseudo + icmp)[at : at + 2], "big") for at in range(0, 72, 2))
    assert (total & 0xFFFF) + (total >> 16) == 0xFFFF


def test_an_address_in_cidr_notation() -> None:
    assert address_of("198.18.0.1/24", "front") == Address("198.18.0.1", 24, "front")
    assert address_of("2001:db8::1/64", "front").family == socket.AF_INET6
