"""Traffic inside every tunnel, and who has which address: a process of its own, so that nothing disturbs its clock.

It has a socket in the namespace of each client and each gateway, and a netlink socket in that of each node. What it
is to do comes as JSON on the first line of standard input; when standard input ends, what it saw goes to standard
output as JSON. All times are those of CLOCK_MONOTONIC, in seconds.

It needs nothing but the standard library, and runs as a program.
"""

from __future__ import annotations

import ctypes
import json
import os
import socket
import struct
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from ipaddress import ip_address
from pathlib import Path
from select import EPOLLIN, epoll
from typing import Any

PORT = 4009
MESSAGE = struct.Struct("!HI")
"""Number of the tunnel, sequence."""
IP_FREEBIND = 15
CLONE_NEWNET = 0x40000000
RTMGRP_IFADDR = 0x10 | 0x100
"""RTMGRP_IPV4_IFADDR and RTMGRP_IPV6_IFADDR of linux/rtnetlink.h."""
RTM_NEWADDR, RTM_DELADDR, RTM_GETADDR = 20, 21, 22
NLM_F_DUMP_REQUEST = 0x301
IFA_ADDRESS, IFA_LOCAL = 1, 2
NOTICED = 0.005
"""A wake-up that comes so much too late is written down: gaps around it say nothing of the network."""
BURST = 64


class Prober:
    """Sends, receives and writes down.

    Args:
        task: ``interval`` in seconds between datagrams, ``speaker`` ("both", "client": gateways only answer, or
            "gateway": clients only answer), ``tunnels``, ``nodes`` (namespaces to watch, by name).
    """

    def __init__(self, task: dict[str, Any]) -> None:
        self._interval: float = task["interval"]
        self._speaker: str = task["speaker"]
        self._epoll = epoll()
        self._handlers: dict[int, Callable[[], None]] = {}
        self._senders: list[Callable[[], None]] = []
        self._sequence = 0
        self.up: list[list[float]] = []
        self.down: list[list[float]] = []
        self.addresses: list[tuple[float, str, str, bool]] = []
        self.late: list[tuple[float, float]] = []
        gateways: dict[str, socket.socket] = {}
        for number, tunnel in enumerate(task["tunnels"]):
            gateway = tunnel["gateway"]
            if gateway not in gateways:
                gateways[gateway] = self._gateway(gateway, tunnel["inside"])
            self._tunnel(number, tunnel, gateways[gateway])
        for name, namespace in task["nodes"].items():
            self._watch(name, namespace)

    def run(self) -> None:
        """Work until standard input ends."""
        running = [True]
        self._on(sys.stdin.fileno(), lambda: running.__setitem__(0, bool(os.read(0, 4096))))
        step = self._interval / len(self._senders) if self._senders else 1.0
        due, turn = time.monotonic(), 0
        while running[0]:
            now = time.monotonic()
            if now - due > NOTICED:
                self.late.append((now, now - due))
            if now - due > 10 * self._interval:
                due = now
            while due <= now:
                if self._senders:
                    self._senders[turn % len(self._senders)]()
                turn, due = turn + 1, due + step
            for fd, _ in self._epoll.poll(max(0.0, due - time.monotonic())):
                self._handlers[fd]()

    def _on(self, fd: int, handler: Callable[[], None]) -> None:
        self._handlers[fd] = handler
        self._epoll.register(fd, EPOLLIN)

    def _gateway(self, namespace: str, inside: str) -> socket.socket:
        made = _udp(namespace, inside)
        self._on(made.fileno(), lambda: self._receive(made, self.up, self._speaker == "client"))
        return made

    def _tunnel(self, number: int, tunnel: dict[str, str], gateway: socket.socket) -> None:
        self.up.append([])
        self.down.append([])
        client = _udp(tunnel["client"], tunnel["inner"])
        self._on(client.fileno(), lambda: self._receive(client, self.down, self._speaker == "gateway"))
        if self._speaker != "gateway":
            self._senders.append(lambda: self._send(client, number, (tunnel["inside"], PORT)))
        if self._speaker != "client":
            self._senders.append(lambda: self._send(gateway, number, (tunnel["inner"], PORT)))

    def _send(self, sender: socket.socket, number: int, to: tuple[str, int]) -> None:
        self._sequence = self._sequence + 1 & 0xFFFFFFFF
        with suppress(OSError):  # a tunnel that is down has no route
            sender.sendto(MESSAGE.pack(number, self._sequence), to)

    def _receive(self, receiver: socket.socket, log: list[list[float]], answer: bool) -> None:
        for _ in range(BURST):
            try:
                data, source = receiver.recvfrom(64)
            except OSError:
                return
            number, _ = MESSAGE.unpack(data)
            log[number].append(time.monotonic())
            if answer:
                with suppress(OSError):
                    receiver.sendto(data, source)

    def _watch(self, node: str, namespace: str) -> None:
        netlink = _inside(
            namespace, lambda: socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, socket.NETLINK_ROUTE)
        )
        netlink.bind((0, RTMGRP_IFADDR))
        netlink.setblocking(False)
        netlink.send(struct.pack("=IHHIIB3x", 20, RTM_GETADDR, NLM_F_DUMP_REQUEST, 1, 0, socket.AF_UNSPEC))
        self._on(netlink.fileno(), lambda: self._changes(netlink, node))

    def _changes(self, netlink: socket.socket, node: str) -> None:
        with suppress(BlockingIOError):
            while True:
                data, now = netlink.recv(65536), time.monotonic()
                self.addresses.extend((now, node, address, held) for address, held in _parse(data))


def _parse(data: bytes) -> Iterator[tuple[str, bool]]:
    """Addresses that came and went, as netlink tells it."""
    while len(data) >= 16:
        length, kind = struct.unpack_from("=IH", data)
        if kind in (RTM_NEWADDR, RTM_DELADDR):
            attributes = dict(_attributes(data[24:length]))
            raw = attributes.get(IFA_LOCAL) or attributes[IFA_ADDRESS]
            yield str(ip_address(raw)), kind == RTM_NEWADDR
        data = data[(length + 3) & ~3 :]


def _attributes(data: bytes) -> Iterator[tuple[int, bytes]]:
    while len(data) >= 4:
        length, kind = struct.unpack_from("=HH", data)
        yield kind, data[4:length]
        data = data[(length + 3) & ~3 :]


def _udp(namespace: str, address: str) -> socket.socket:
    made = _inside(namespace, lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
    made.setsockopt(socket.IPPROTO_IP, IP_FREEBIND, 1)
    made.bind((address, PORT))
    made.setblocking(False)
    return made


def _inside(namespace: str, make: Callable[[], socket.socket]) -> socket.socket:
    """A socket stays in the namespace that it was made in."""
    libc = ctypes.CDLL(None, use_errno=True)
    with Path("/proc/self/ns/net").open("rb") as home, Path("/run/netns", namespace).open("rb") as there:
        if libc.setns(there.fileno(), CLONE_NEWNET):
            raise OSError(ctypes.get_errno(), f"cannot enter {namespace}")
        try:
            return make()
        finally:
            libc.setns(home.fileno(), CLONE_NEWNET)


def main() -> None:
    """Run as a program."""
    # It must be on time whatever else the machine does; it takes little.
    with suppress(OSError):
        os.sched_setscheduler(0, os.SCHED_RR, os.sched_param(1))
    line = b""
    while not line.endswith(b"\n"):
        line += os.read(0, 65536)
    prober = Prober(json.loads(line))
    prober.run()
    json.dump(
        {"up": prober.up, "down": prober.down, "held": prober.addresses, "late": prober.late},
        sys.stdout,
    )


if __name__ == "__main__":
    main()
