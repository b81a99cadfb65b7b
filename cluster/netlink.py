"""Addresses of this machine's devices, by rtnetlink (RFC 3549, rtnetlink(7)), and the frames that announce them.

By hand and with the standard library alone, for the guard (:mod:`sapin.cluster.guard`) has to be small and quick: an address takes
some 20 µs.
"""

from __future__ import annotations

import errno
import os
import socket
import sys
from collections.abc import Iterable, Iterator, Sequence
from ipaddress import IPv4Address, IPv6Address, ip_interface
from struct import Struct
from typing import NamedTuple

RTM_NEWADDR, RTM_DELADDR, RTM_GETADDR = 20, 21, 22
_RTM_SETLINK = 19
_NLMSG_ERROR, _NLMSG_DONE = 2, 3
_REQUEST, _ACK, _DUMP = 0x1, 0x4, 0x300
_REPLACE, _CREATE = 0x100, 0x400
_IFA_ADDRESS, _IFA_LOCAL, _IFA_CACHEINFO = 1, 2, 6
_IFA_F_NODAD = 0x02
"""linux/if_addr.h: usable at once, rather than a second later when nobody else claimed it (RFC 4862 section 5.4)."""
RTMGRP_IPV4_IFADDR, RTMGRP_IPV6_IFADDR = 0x10, 0x100
_FOREVER = 0xFFFFFFFF
_HEADER = Struct("=IHHII")
_ADDRESS = Struct("=BBBBI")
_LINK = Struct("=BBHiII")
_IFLA_AF_SPEC, _IFLA_INET_CONF, _PROMOTE_SECONDARIES = 26, 1, 20
"""linux/if_link.h, and IPV4_DEVCONF_PROMOTE_SECONDARIES of linux/ip.h."""
_ATTRIBUTE = Struct("=HH")
_CACHE = Struct("=IIII")
_ERROR = Struct("=i")
_GONE = (errno.EADDRNOTAVAIL, errno.ENODEV)

_ARP = Struct("!6s6sH HHBBH 6s4s6s4s")
_NA = Struct("!6s6sH IHBB16s16s BBHI16sBB6s")
_BROADCAST = b"\xff" * 6
_ALL_NODES = b"\x33\x33\x00\x00\x00\x01"
ETH_P_ARP, ETH_P_IP, ETH_P_IPV6 = 0x0806, 0x0800, 0x86DD


class Address(NamedTuple):
    """An address on a device."""

    address: str
    prefix: int
    device: str

    @property
    def packed(self) -> bytes:
        """The address in network byte order."""
        return ip_interface(self.address).ip.packed

    @property
    def family(self) -> socket.AddressFamily:
        """``AF_INET`` or ``AF_INET6``."""
        return socket.AF_INET6 if ":" in self.address else socket.AF_INET


class AddressError(Exception):
    """An address cannot be added or removed; the text says which, why, and what to do."""


class Addresses:
    """Adds and removes addresses, and tells which are there."""

    def __init__(self) -> None:
        self._socket = socket.socket(
            socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, socket.NETLINK_ROUTE
        )
        self._socket.bind((0, 0))
        self._socket.settimeout(1.0)
        self._number = 0

    def add(self, addresses: Sequence[Address]) -> None:
        """Have the addresses on their devices; those that are there stay.

        Raises:
            AddressError: one cannot be added; the others are.
        """
        self._change(RTM_NEWADDR, _CREATE | _REPLACE, addresses, (errno.EEXIST,))

    def remove(self, addresses: Sequence[Address]) -> None:
        """Have the addresses gone from their devices.

        Raises:
            AddressError: one cannot be removed; the others are.
        """
        self._change(RTM_DELADDR, 0, addresses, _GONE)

    def promote(self, devices: Iterable[str]) -> None:
        """Have the other IPv4 addresses of a device stay when one is removed.

        The kernel removes with the first address of a network all others of that network, the node's own among them, unless
        the device promotes one of them (``promote_secondaries``). By netlink, for /proc/sys may be read-only.

        Raises:
            AddressError: a device does not take it.
        """
        failed: list[str] = []
        for device in dict.fromkeys(devices):
            try:
                index = socket.if_nametoindex(device)
            except OSError:
                continue  # no device, no addresses
            self._number += 1
            setting = _attribute(_PROMOTE_SECONDARIES, (1).to_bytes(4, sys.byteorder))
            inet = _attribute(socket.AF_INET, _attribute(_IFLA_INET_CONF, setting))
            body = _LINK.pack(socket.AF_UNSPEC, 0, 0, index, 0, 0) + _attribute(_IFLA_AF_SPEC, inet)
            head = _HEADER.pack(_HEADER.size + len(body), _RTM_SETLINK, _REQUEST | _ACK, self._number, 0)
            self._socket.send(head + body)
            if code := self._result(self._number):
                failed.append(f"{device}: {os.strerror(code)}")
        if failed:
            raise AddressError(f"promote_secondaries cannot be set; {'; '.join(failed)}")

    def there(self) -> set[tuple[str, bytes]]:
        """All addresses of this machine: device and packed address."""
        self._number += 1
        body = _ADDRESS.pack(socket.AF_UNSPEC, 0, 0, 0, 0)
        size = _HEADER.size + len(body)
        self._socket.send(_HEADER.pack(size, RTM_GETADDR, _REQUEST | _DUMP, self._number, 0) + body)
        found: set[tuple[str, bytes]] = set()
        while True:
            for kind, number, data in _messages(self._socket.recv(65_536)):
                if number != self._number:
                    continue
                if kind in (_NLMSG_DONE, _NLMSG_ERROR):
                    return found
                found.update(_addresses(data))

    def close(self) -> None:
        """Close the socket."""
        self._socket.close()

    def _result(self, request: int) -> int:
        """The error number of a request; 0 if it was done."""
        while True:
            for kind, number, data in _messages(self._socket.recv(65_536)):
                if number == request and kind == _NLMSG_ERROR:
                    return -int(_ERROR.unpack_from(data)[0])

    def _change(self, kind: int, flags: int, addresses: Sequence[Address], fine: Sequence[int]) -> None:
        """One system call for all of them."""
        waiting: dict[int, Address] = {}
        failed: list[str] = []
        batch = b""
        for each in addresses:
            try:
                index = socket.if_nametoindex(each.device)
            except OSError:
                if kind == RTM_NEWADDR:
                    failed.append(f"{each.address} on {each.device}: there is no such device")
                continue
            self._number += 1
            waiting[self._number] = each
            body = _body(each, index, adding=kind == RTM_NEWADDR)
            size = _HEADER.size + len(body)
            batch += _HEADER.pack(size, kind, _REQUEST | _ACK | flags, self._number, 0) + body
        if batch:
            self._socket.send(batch)
        while waiting:
            for reply, number, data in _messages(self._socket.recv(65_536)):
                address = waiting.pop(number, None)
                if address is None or reply != _NLMSG_ERROR:
                    continue
                code = -_ERROR.unpack_from(data)[0]
                if code and code not in fine:
                    failed.append(f"{address.address} on {address.device}: {os.strerror(code)}")
        if failed:
            what = "added" if kind == RTM_NEWADDR else "removed"
            hint = " (the daemon needs CAP_NET_ADMIN)" if "not permitted" in failed[0] else ""
            raise AddressError(f"virtual addresses could not be {what}: {'; '.join(failed)}{hint}")


def monitor() -> socket.socket:
    """A socket that becomes readable when an address comes or goes."""
    sock = socket.socket(
        socket.AF_NETLINK,
        socket.SOCK_RAW | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC,
        socket.NETLINK_ROUTE,
    )
    sock.bind((0, RTMGRP_IPV4_IFADDR | RTMGRP_IPV6_IFADDR))
    return sock


class Announcer:
    """Tells the neighbours of a device where addresses are: gratuitous ARP, unsolicited neighbour advertisements.

    Its sockets stay open: to close one takes 10 ms and more.

    Raises:
        OSError: there is no such device, or ``CAP_NET_RAW`` is missing.
    """

    def __init__(self) -> None:
        self._sockets: dict[str, socket.socket] = {}

    def open(self, device: str) -> None:
        """Be ready for a device.

        Raises:
            OSError: there is no such device, or ``CAP_NET_RAW`` is missing.
        """
        if device in self._sockets:
            return
        # Protocol 0: nothing is received.
        sock = socket.socket(
            socket.AF_PACKET, socket.SOCK_RAW | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC, 0
        )
        try:
            sock.bind((device, 0))
        except OSError:
            sock.close()
            raise
        self._sockets[device] = sock

    def announce(self, address: Address) -> None:
        """Say that the address is here. What cannot be sent is not: it is said again later.

        Raises:
            OSError: as :meth:`open`.
        """
        self.open(address.device)
        sock = self._sockets[address.device]
        mac = sock.getsockname()[4]
        if len(mac) != 6:
            return  # not Ethernet, as the loopback device: nobody has a table of neighbours
        for frame in frames(address, mac):
            try:
                sock.send(frame)
            except OSError:
                return


def frames(address: Address, mac: bytes) -> Sequence[bytes]:
    """The Ethernet frames that announce an address.

    For IPv4 both forms of RFC 5944 section 4.6, since some neighbours heed but one of them.
    """
    if address.family == socket.AF_INET:
        here = address.packed
        return [
            _ARP.pack(_BROADCAST, mac, ETH_P_ARP, 1, ETH_P_IP, 6, 4, form, mac, here, target, here)
            for form, target in ((1, bytes(6)), (2, mac))
        ]
    return [_advertisement(address.packed, mac)]


def _advertisement(here: bytes, mac: bytes) -> bytes:
    """An unsolicited neighbour advertisement that overrides (RFC 4861 sections 4.4 and 7.2.6)."""
    all_nodes = IPv6Address("ff02::1").packed
    override = 0x20000000

    def packed(checksum: int) -> bytes:
        ip = (0x60000000, 32, 58, 255, here, all_nodes)
        return _NA.pack(_ALL_NODES, mac, ETH_P_IPV6, *ip, 136, 0, checksum, override, here, 2, 1, mac)

    pseudo = here + all_nodes + (32).to_bytes(4, "big") + bytes(3) + b"\x3a"
    return packed(_checksum(pseudo + packed(0)[54:]))


def _checksum(data: bytes) -> int:
    total = sum(int.from_bytes(data[at : at + 2], "big") for at in range(0, len(data), 2))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF


def _body(address: Address, index: int, *, adding: bool) -> bytes:
    here = address.packed
    flags = _IFA_F_NODAD if address.family == socket.AF_INET6 else 0
    body = _ADDRESS.pack(address.family, address.prefix, flags, 0, index)
    body += _attribute(_IFA_LOCAL, here) + _attribute(_IFA_ADDRESS, here)
    if adding and address.family == socket.AF_INET6:
        # Deprecated: it answers, but is no source of what the node itself sends (RFC 6724, rule 3).
        body += _attribute(_IFA_CACHEINFO, _CACHE.pack(0, _FOREVER, 0, 0))
    return body


def _attribute(kind: int, data: bytes) -> bytes:
    size = _ATTRIBUTE.size + len(data)
    return _ATTRIBUTE.pack(size, kind) + data + bytes(-size % 4)


def _messages(data: bytes) -> Iterator[tuple[int, int, bytes]]:
    """Kind, number and body of each message; what is cut short is left out."""
    while len(data) >= _HEADER.size:
        size, kind, _, number, _ = _HEADER.unpack_from(data)
        if not _HEADER.size <= size <= len(data):
            return
        yield kind, number, data[_HEADER.size : size]
        data = data[(size + 3) & ~3 :]


def _addresses(data: bytes) -> Iterator[tuple[str, bytes]]:
    if len(data) < _ADDRESS.size:
        return
    _, _, _, _, index = _ADDRESS.unpack_from(data)
    found: dict[int, bytes] = {}
    rest = data[_ADDRESS.size :]
    while len(rest) >= _ATTRIBUTE.size:
        size, kind = _ATTRIBUTE.unpack_from(rest)
        if not _ATTRIBUTE.size <= size <= len(rest):
            break
        found[kind] = rest[_ATTRIBUTE.size : size]
        rest = rest[(size + 3) & ~3 :]
    here = found.get(_IFA_LOCAL) or found.get(_IFA_ADDRESS)
    if here is not None:
        try:
            yield socket.if_indextoname(index), here
        except OSError:
            return


def address_of(interface: str, device: str) -> Address:
    """An address in CIDR notation on a device."""
    found = ip_interface(interface)
    ip: IPv4Address | IPv6Address = found.ip
    return Address(str(ip), found.network.prefixlen, device)
