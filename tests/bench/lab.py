"""Where the benchmark runs: three network namespaces joined by veth, or loopback without root.

    clients 198.19.0.0/16 ── 198.18.0.254 ══ 198.18.0.1 balancer 10.60.0.1 ══ 10.60.0.11 … .13 servers

The client namespace owns a whole /16, so that one socket stands for 65,000 clients with an address each.
The balancer namespace routes too: that is the path "direct", without any forwarder.
One CPU is the forwarder's own; clients and servers share the other.
"""

from __future__ import annotations

import ctypes
import os
import socket
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from ipaddress import IPv4Address
from pathlib import Path

from mmsg import Outgoing
from traffic import FRAME_HEADERS, Endpoint, datagram, frame

CLONE_NEWNET = 0x40000000
SO_SNDBUFFORCE, SO_RCVBUFFORCE = 32, 33
BUFFER = 32 * 1024 * 1024
"""Socket buffers of the load itself, so that losses are the forwarder's."""
FRAME_LEAD = -FRAME_HEADERS % 4
"""Padding that puts the UDP payload of a frame on a word boundary."""

_libc = ctypes.CDLL(None, use_errno=True)


class LabError(Exception):
    """The machine does not let the lab be built."""


@dataclass(frozen=True)
class Ports:
    """A UDP port for IKE and one for NAT traversal."""

    ike: int
    natt: int


class Sender:
    """Puts datagrams of any source address on the way: as whole frames where the lab has wires of its own."""

    def __init__(self, sock: socket.socket, macs: bytes = b"") -> None:
        self.descriptor = sock.fileno()
        self._sock = sock
        self._macs = macs

    @property
    def payload_offset(self) -> int:
        """Where the UDP payload starts in a prepared message."""
        return FRAME_HEADERS if self._macs else 0

    def prepare(self, datagrams: Sequence[tuple[Endpoint, Endpoint, bytes]]) -> Outgoing:
        """Lay out datagrams, each a source, a destination and a payload; the payloads are of one size."""
        if self._macs:
            return Outgoing([frame(self._macs, *each) for each in datagrams], FRAME_LEAD)
        return Outgoing([datagram(*each) for each in datagrams])

    def send(self, batch: Outgoing, start: int, count: int) -> int:
        """Send some of a prepared batch; the number that the kernel took."""
        return batch.send(self.descriptor, start, count)

    def close(self) -> None:
        """Close the socket that was given."""
        self._sock.close()


PREFIX = "sapin-bench-"
MACS = {
    ("clients", "wire"): "02:00:00:00:00:01",
    ("balancer", "outside"): "02:00:00:00:00:02",
    ("balancer", "inside"): "02:00:00:00:00:03",
    ("servers", "wire"): "02:00:00:00:00:04",
}
"""Ends of the two links, by side and interface. Fixed, so that frames can be made without asking for them."""
GATEWAYS = {"clients": ("balancer", "outside"), "servers": ("balancer", "inside")}
"""The far end of each side's wire."""


class Lab:
    """Addresses, ports and sockets of the benchmark; this one is loopback, and needs no privilege."""

    remark = "loopback without root: no direct path over veth, forwarder and load share the stack"
    vip = "127.1.0.1"
    back = vip
    """The balancer's address towards the servers."""
    servers = ("127.2.0.11", "127.2.0.12", "127.2.0.13")
    service = Ports(10500, 14500)
    client = Ports(20500, 24500)
    _first_client = IPv4Address("127.100.0.1")

    def client_address(self, number: int) -> str:
        """The address of one of 65,000 clients."""
        return str(self._first_client + number)

    @contextmanager
    def inside(self, side: str) -> Iterator[None]:
        """Work on one side: sockets that are opened meanwhile stay there."""
        yield

    def enter(self, side: str) -> None:
        """Move this process to one side for good."""

    def udp(self, side: str, endpoint: Endpoint) -> socket.socket:
        """A non-blocking UDP socket with large buffers, bound on one side."""
        with self.inside(side):
            sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
        enlarge(sock)
        sock.bind(endpoint)
        return sock

    def sender(self, side: str, bound: socket.socket) -> Sender:
        """Something that sends from one side; ``bound`` is a UDP socket there with the port to send from."""
        return Sender(bound)


class Namespaces(Lab):
    """The lab of three namespaces; their names carry the process id, so that two runs do not meet."""

    remark = ""
    vip = "198.18.0.1"
    back = "10.60.0.1"
    servers = ("10.60.0.11", "10.60.0.12", "10.60.0.13")
    service = client = Ports(500, 4500)
    _first_client = IPv4Address("198.19.0.1")

    def __init__(self) -> None:
        self._home = os.open("/proc/self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
        self._names = {side: f"{PREFIX}{os.getpid()}-{side}" for side in ("clients", "balancer", "servers")}

    def build(self) -> None:
        """Make namespaces, links, addresses and routes; remove what a run that was killed has left.

        Raises:
            LabError: ``ip`` refused a step.
        """
        for left in Path("/run/netns").glob(f"{PREFIX}*"):
            if not Path("/proc", left.name.removeprefix(PREFIX).partition("-")[0]).exists():
                _ip("netns", "delete", left.name)
        for name in self._names.values():
            _ip("netns", "add", name)
            _ip("-n", name, "link", "set", "lo", "up")
        self._join(("clients", "wire"), ("balancer", "outside"))
        self._join(("balancer", "inside"), ("servers", "wire"))
        self._address("clients", "wire", "198.18.0.254/24")
        self._address("balancer", "outside", f"{self.vip}/24")
        self._address("balancer", "inside", f"{self.back}/24")
        for server in self.servers:
            self._address("servers", "wire", f"{server}/24")
        self._route("clients", "local", "198.19.0.0/16", "dev", "lo")
        self._route("clients", "default", "via", self.vip)
        self._route("balancer", "198.19.0.0/16", "via", "198.18.0.254")
        self._route("servers", "default", "via", self.back)
        with self.inside("balancer"):
            Path("/proc/sys/net/ipv4/ip_forward").write_text("1")
            Path("/proc/sys/net/ipv4/ip_local_port_range").write_text("1024 65535")

    def remove(self) -> None:
        """Remove the namespaces, as far as they were made."""
        for name in self._names.values():
            subprocess.run(["ip", "netns", "delete", name], capture_output=True, check=False)
        os.close(self._home)

    @contextmanager
    def inside(self, side: str) -> Iterator[None]:
        self.enter(side)
        try:
            yield
        finally:
            _setns(self._home)

    def enter(self, side: str) -> None:
        with Path(f"/run/netns/{self._names[side]}").open("rb") as namespace:
            _setns(namespace.fileno())

    def sender(self, side: str, bound: socket.socket) -> Sender:
        with self.inside(side):
            sock = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0)
            enlarge(sock)
            sock.bind(("wire", 0))
        return Sender(sock, _mac(MACS[GATEWAYS[side]]) + _mac(MACS[side, "wire"]))

    def _join(self, one: tuple[str, str], other: tuple[str, str]) -> None:
        (side, link), (far_side, far_link) = one, other
        peer = ("peer", "name", far_link, "address", MACS[other], "netns", self._names[far_side])
        _ip("-n", self._names[side], "link", "add", link, "address", MACS[one], "type", "veth", *peer)
        for each, name in (one, other):
            _ip("-n", self._names[each], "link", "set", name, "up")

    def _address(self, side: str, link: str, address: str) -> None:
        _ip("-n", self._names[side], "address", "add", address, "dev", link)

    def _route(self, side: str, *route: str) -> None:
        _ip("-n", self._names[side], "route", "add", *route)


def enlarge(sock: socket.socket) -> None:
    """Ask for large buffers, past the system's limit where that is allowed."""
    for forced, plain in ((SO_RCVBUFFORCE, socket.SO_RCVBUF), (SO_SNDBUFFORCE, socket.SO_SNDBUF)):
        try:
            sock.setsockopt(socket.SOL_SOCKET, forced, BUFFER)
        except PermissionError:
            sock.setsockopt(socket.SOL_SOCKET, plain, BUFFER)


@contextmanager
def open_lab(privileged: bool) -> Iterator[Lab]:
    """The lab of namespaces, or loopback; nothing is left behind.

    Raises:
        LabError: the namespaces cannot be made.
    """
    if not privileged:
        yield Lab()
        return
    lab = Namespaces()
    try:
        lab.build()
        yield lab
    finally:
        lab.remove()


def _ip(*arguments: str) -> None:
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise LabError(f"ip {' '.join(arguments)}: {done.stderr.strip()}")


def _setns(descriptor: int) -> None:
    if _libc.setns(descriptor, CLONE_NEWNET):
        error = ctypes.get_errno()
        raise LabError(f"cannot enter a network namespace: {os.strerror(error)}")


def _mac(text: str) -> bytes:
    return bytes.fromhex(text.replace(":", ""))
