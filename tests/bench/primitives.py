"""What the system calls of a forwarder cost one by one: process CPU per datagram or flow, in microseconds.

Sending is measured from the balancer's namespace to a socket of the servers', receiving from a socket that was filled
before, so nothing here waits and nobody is woken. The older way stands beside the newer one.
"""

from __future__ import annotations

import os
import select
import shutil
import socket
import statistics
import struct
import sys
import time
from collections.abc import Callable

# Beside this file, like run.py's.
from lab import Lab, LabError, open_lab
from mmsg import Incoming, Message, Outgoing
from traffic import UDP_SEGMENT, Endpoint

COUNT = 2048
ROUNDS = 9
SIZE = 200
FLOWS = 1000
PORT = 9
Work = Callable[[], int]


def measure(title: str, work: Work, prepare: Callable[[], object]) -> None:
    """Print the median CPU for one of what ``work`` counts; ``prepare`` is not timed."""
    costs = []
    for _ in range(ROUNDS):
        prepare()
        began = time.process_time_ns()
        count = work()
        costs.append((time.process_time_ns() - began) / count / 1e3)
    print(f"{title:62}{statistics.median(costs):7.2f}")


def until_empty(read: Callable[[], object]) -> Work:
    """Read datagrams one by one until there are no more."""

    def work() -> int:
        count = 0
        try:
            while True:
                read()
                count += 1
        except BlockingIOError:
            return count

    return work


def times(count: int, each: int, send: Callable[[], object]) -> Work:
    """Send so often, ``each`` datagrams a time."""

    def work() -> int:
        for _ in range(count // each):
            send()
        return count

    return work


def receiving(lab: Lab) -> None:
    """Reading a socket that has :data:`COUNT` datagrams."""
    sock = lab.udp("balancer", Endpoint(lab.vip, PORT))
    source = lab.udp("clients", Endpoint("0.0.0.0", PORT))
    source.connect((lab.vip, PORT))
    data, buffer, batch = bytes(SIZE), bytearray(65_536), Incoming(64)

    def fill() -> None:
        for _ in range(COUNT):
            source.send(data)

    def batches() -> int:
        total = 0
        while count := batch.receive(sock.fileno()):
            total += count
        return total

    measure("recvfrom_into", until_empty(lambda: sock.recvfrom_into(buffer)), fill)
    measure("recv_into, no address", until_empty(lambda: sock.recv_into(buffer)), fill)
    measure("recvmsg_into with control data", until_empty(lambda: sock.recvmsg_into([buffer], 64)), fill)
    measure("recvmmsg, 64 at once", batches, fill)


def sending(lab: Lab) -> None:
    """Sending to a socket that takes everything."""
    sink = lab.udp("servers", Endpoint(lab.servers[0], PORT))
    sock = lab.udp("balancer", Endpoint(lab.back, PORT + 1))
    target = (lab.servers[0], PORT)
    data, scratch = memoryview(bytes(SIZE)), bytearray(65_536)
    named = Outgoing([Message(bytes(SIZE), Endpoint(*target).packed())] * 64)
    empty = until_empty(lambda: sink.recv_into(scratch))
    measure("sendto, unconnected", times(COUNT, 1, lambda: sock.sendto(data, target)), empty)
    measure(
        "sendmmsg, unconnected, 64 at once",
        times(COUNT, 64, lambda: named.send(sock.fileno(), 0, 64)),
        empty,
    )
    sock.connect(target)
    measure("send, connected", times(COUNT, 1, lambda: sock.send(data)), empty)
    plain = Outgoing([Message(bytes(SIZE))] * 64)
    for each in (4, 64):
        measure(
            f"sendmmsg, connected, {each} at once",
            times(COUNT, each, lambda each=each: plain.send(sock.fileno(), 0, each)),  # type: ignore[misc]
            empty,
        )
    control = [(socket.IPPROTO_UDP, UDP_SEGMENT, struct.pack("@H", SIZE))]
    for each in (2, 4, 8, 16, 32):
        buffers = [bytearray(SIZE) for _ in range(each)]
        measure(
            f"sendmsg with UDP_SEGMENT, {each} scattered buffers",
            times(COUNT, each, lambda buffers=buffers: sock.sendmsg(buffers, control)),  # type: ignore[misc]
            empty,
        )


def flows(lab: Lab) -> None:
    """Making a flow's socket ready, and closing it."""
    target = (lab.servers[0], PORT)
    held: list[socket.SocketType] = []
    poll = select.epoll()
    kind = socket.SOCK_DGRAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC

    def make(port: int | None) -> None:
        sock = socket.SocketType(socket.AF_INET, kind)
        if port is not None:
            sock.bind(("", port))
        sock.connect(target)
        if port is None:
            sock.getsockname()
        poll.register(sock.fileno(), select.EPOLLIN)
        held.append(sock)

    def autobound() -> int:
        for _ in range(FLOWS):
            make(None)
        return FLOWS

    def bound() -> int:
        for port in range(20_000, 20_000 + FLOWS):
            make(port)
        return FLOWS

    def close() -> int:
        count = len(held)
        while held:
            held.pop().close()
        return count

    with lab.inside("balancer"):
        measure("flow: socket, connect, getsockname, register", autobound, close)
        close()
        measure("flow: socket, bind to a chosen port, connect, register", bound, close)
        close()
        measure("flow: close", close, bound)


def main() -> int:
    """Measure all; the exit code is 2 where namespaces cannot be made."""
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    try:
        with open_lab(os.geteuid() == 0 and shutil.which("ip") is not None) as lab:
            print(lab.remark or f"over veth, {SIZE} bytes, µs of CPU")
            for part in (receiving, sending, flows):
                part(lab)
    except LabError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
