"""Gateways and clients on loopback, and Sapin between them, in this process or in one of its own.

Ports of listeners and gateways are below the upstream ports and the kernel's ephemeral ones, so that no
socket that the machine opens meanwhile takes them.
"""

from __future__ import annotations

import json
import os
import resource
import socket
import struct
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from random import Random, SystemRandom
from typing import Any, NamedTuple

import trio
from trio.testing import wait_all_tasks_blocked

from sapin.api import client
from sapin.core import ike
from sapin.core.config import parse
from sapin.core.dataplane.batch import peer_address
from sapin.core.dataplane.flows import Flow
from sapin.core.dataplane.limits import raise_descriptor_limit
from sapin.core.dataplane.runtime import UPSTREAM_PORTS, Dataplane
from sapin.core.registry import Registry

VIP = "127.9.0.1"
IKE, NATT = "ike", "ike-natt"
PATIENCE = 10.0
"""Seconds to wait for what should come at once, on a busy machine."""
SILENCE = 0.05
"""Seconds after which nothing comes any more; loopback delivers within the system call."""
DESCRIPTORS = raise_descriptor_limit()
SOL_UDP, UDP_SEGMENT = 17, 103
REGISTRY = Registry()

Document = dict[str, Any]


def free_ports(number: int) -> list[int]:
    """UDP ports that no socket of this machine has."""
    found: list[int] = []
    while len(found) < number:
        port = SystemRandom().randrange(5_000, UPSTREAM_PORTS[0])
        with socket.socket(socket.AF_INET6, socket.SOCK_DGRAM) as probe:
            try:
                probe.bind(("::", port))
            except OSError:
                continue
        if port not in found:
            found.append(port)
    return found


def family(address: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in address else socket.AF_INET


# datagrams


def ike_message(spi_i: bytes, body: bytes = b"", spi_r: bytes = bytes(8)) -> bytes:
    """An IKE_SA_INIT of that initiator, as on UDP 500."""
    return ike.message(ike.Header(spi_i, spi_r), [(ike.Payload.NONCE, body or os.urandom(16))])


def framed(message: bytes) -> bytes:
    """An IKE message as on UDP 4500."""
    return ike.NON_ESP_MARKER + message


def esp(number: int = 0, size: int = 100) -> bytes:
    """An ESP packet in UDP, distinguishable from others."""
    return struct.pack("!II", 0xC0FFEE00, number) + os.urandom(size)


# gateways and clients


class Seen(NamedTuple):
    """A datagram that a gateway got."""

    gateway: str
    service: str
    upstream: int
    """The port it came from."""
    data: bytes


class Gateway:
    """A server that answers each datagram with the same bytes, on one socket for each service."""

    def __init__(self, name: str, address: str, ports: Mapping[str, int], seen: list[Seen]) -> None:
        self.name = name
        self.address = address
        self.ports = ports
        self.answers = True
        self.socks: dict[str, trio.socket.SocketType] = {}
        self._seen = seen
        self._scope = trio.CancelScope()

    def bind(self) -> None:
        """Open the sockets; nobody reads them yet."""
        for service, port in self.ports.items():
            sock = trio.socket.socket(family(self.address), socket.SOCK_DGRAM)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4 * 1024 * 1024)
            self.socks[service] = sock
            sock._sock.bind((self.address, port))  # type: ignore[attr-defined]  # trio's own would wait

    async def serve(self) -> None:
        """Answer until stopped."""
        self._scope = trio.CancelScope()
        with self._scope:
            async with trio.open_nursery() as nursery:
                for service, sock in self.socks.items():
                    nursery.start_soon(self._echo, service, sock)

    async def _echo(self, service: str, sock: trio.socket.SocketType) -> None:
        while True:
            data, source = await sock.recvfrom(65_535)
            self._seen.append(Seen(self.name, service, source[1], data))
            if self.answers:
                await sock.sendto(data, source)

    def stop(self) -> None:
        """Close the sockets: from now on the kernel refuses what comes."""
        self._scope.cancel()
        for sock in self.socks.values():
            sock.close()
        self.socks.clear()


class Client:
    """A connected UDP socket: it hears what comes from exactly where it sends to, and nothing else."""

    def __init__(self, host: str, port: int, source: str = "", source_port: int = 0) -> None:
        self.sock = trio.socket.socket(family(host), socket.SOCK_DGRAM)
        plain: socket.socket = self.sock._sock  # type: ignore[attr-defined]
        plain.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4 * 1024 * 1024)
        if source_port:
            plain.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if source or source_port:
            plain.bind((source, source_port))
        plain.connect((host, port))
        self.plain = plain
        self.port: int = plain.getsockname()[1]

    def send(self, *datagrams: bytes) -> None:
        """Send at once, without letting other tasks run."""
        for data in datagrams:
            self.plain.send(data)

    def send_segmented(self, data: bytes, segment: int) -> None:
        """Have the kernel cut datagrams of that size, as a client with GSO does."""
        self.plain.sendmsg([data], [(SOL_UDP, UDP_SEGMENT, struct.pack("H", segment))])

    async def receive(self, number: int = 1) -> list[bytes]:
        """The next datagrams."""
        with trio.fail_after(PATIENCE):
            return [await self.sock.recv(65_535) for _ in range(number)]

    async def ask(self, data: bytes) -> bytes:
        """Send a datagram; the next one that comes back."""
        self.send(data)
        (answer,) = await self.receive()
        return answer

    async def hear(self, data: bytes) -> None:
        """Wait for this datagram, whatever comes before it."""
        with trio.fail_after(PATIENCE):
            while await self.sock.recv(65_535) != data:
                pass

    async def hears_nothing(self) -> bool:
        """Whether nothing comes any more."""
        with trio.move_on_after(SILENCE):
            await self.sock.recv(65_535)
            return False
        return True


class Farm:
    """Gateways for two services, the second of which follows the first, and the clients that tests open.

    Args:
        gateways: addresses by name.
        apart: the gateways have other ports than the services, which wildcard services need on one machine.
    """

    def __init__(
        self, state_dir: Path, nursery: trio.Nursery, gateways: Mapping[str, str], *, apart: bool = False
    ) -> None:
        self.state_dir = state_dir
        self.spare_port, *ports = free_ports(5)
        self.ports = dict(zip((IKE, NATT), ports[:2], strict=True))
        self.apart = dict(zip((IKE, NATT), ports[2:], strict=True)) if apart else {}
        self.seen: list[Seen] = []
        """What gateways got, in order; over all of them."""
        self.gateways = {
            name: Gateway(name, address, self.apart or self.ports, self.seen)
            for name, address in gateways.items()
        }
        self._nursery = nursery
        self._clients: list[Client] = []

    def start(self, *names: str) -> None:
        """Start these gateways, or all."""
        for name in names or self.gateways:
            self.gateways[name].bind()
            self._nursery.start_soon(self.gateways[name].serve)

    def close(self) -> None:
        for gateway in self.gateways.values():
            gateway.stop()
        for each in self._clients:
            each.sock.close()

    def document(self, *, vip: str = VIP, **leader: Any) -> Document:
        """A configuration of the two services, to be changed at will; ``leader`` has keys of the first one."""
        servers = [{"name": each.name, "address": each.address} for each in self.gateways.values()]
        first = {
            "name": IKE,
            "address": vip,
            "port": self.ports[IKE],
            "framing": IKE,
            "real_servers": servers,
        }
        second = {"name": NATT, "address": vip, "port": self.ports[NATT], "framing": NATT, "follows": IKE}
        if self.apart:
            second["following"] = {"plugin": "port", "port": self.apart[NATT]}
            first["real_servers"] = [{**server, "port": self.apart[IKE]} for server in servers]
        node = {"name": "lb", "state_dir": str(self.state_dir), "max_pins": 1000}
        return {"node": node, "virtual_services": [{**first, **leader}, second]}

    def client(
        self, service: str = IKE, *, host: str = VIP, source: str = "", source_port: int = 0
    ) -> Client:
        """A new client of a service."""
        opened = Client(host, self.ports[service], source, source_port)
        self._clients.append(opened)
        return opened

    def where(self, data: bytes) -> Seen:
        """Who got that datagram last."""
        return next(seen for seen in reversed(self.seen) if seen.data == data)

    def reload(self, plane: Dataplane, document: Document) -> None:
        """Make it the running configuration."""
        plane.reload(parse(text(document), REGISTRY))

    async def route(self, client: Client, data: bytes) -> tuple[str, int]:
        """Send a datagram, have it answered, and tell which gateway got it from which upstream port."""
        assert await client.ask(data) == data
        seen = self.where(data)
        return seen.gateway, seen.upstream


# Sapin


def render(value: Any) -> str:
    """A document as TOML; inner tables in line."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key} = {render(each)}" for key, each in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(render, value)) + "]"
    return json.dumps(value)


def text(document: Document) -> str:
    """A document as TOML."""
    return "\n".join(f"{key} = {render(value)}" for key, value in document.items())


def plane_of(document: Document, seed: int = 1) -> Dataplane:
    """A dataplane that is ready to run."""
    return Dataplane(parse(text(document), REGISTRY), REGISTRY, DESCRIPTORS, Random(seed))


@asynccontextmanager
async def running(document: Document, seed: int = 1) -> AsyncIterator[Dataplane]:
    """A dataplane that runs while the context lasts."""
    plane = plane_of(document, seed)
    async with trio.open_nursery() as nursery:
        await nursery.start(plane.run)
        yield plane
        nursery.cancel_scope.cancel()


class Clock:
    """Wall-clock seconds, put forward at will."""

    def __init__(self) -> None:
        self.ahead = 0

    def __call__(self) -> float:
        return time.time() + self.ahead


async def advance(plane: Dataplane) -> None:
    """What housekeeping does once a second."""
    plane.forwarder.tick()
    await plane._expire(int(plane.clock()))


async def settle() -> None:
    """Until everything that is on its way on loopback has arrived, and every task has nothing to do."""
    await wait_all_tasks_blocked(0.003)


async def eventually(condition: Callable[[], object], patience: float = PATIENCE) -> None:
    """Wait until it is true."""
    with trio.fail_after(patience):
        while not condition():  # noqa: ASYNC110  # what is waited for knows nothing of events
            await trio.sleep(0.005)


@contextmanager
def no_descriptor() -> Iterator[None]:
    """While the context lasts, this process cannot open anything."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with Path("/dev/null").open() as lowest:
        resource.setrlimit(resource.RLIMIT_NOFILE, (lowest.fileno(), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def flow_of(plane: Dataplane, client: Client) -> Flow:
    """The only flow of the client's port."""
    (found,) = [flow for flow in plane.forwarder.flows if peer_address(flow.peer)[1] == client.port]
    return found


@asynccontextmanager
async def gateways(
    state_dir: Path, addresses: Mapping[str, str], *, apart: bool = False
) -> AsyncIterator[Farm]:
    """A farm whose gateways run while the context lasts."""
    async with trio.open_nursery() as nursery:
        farm = Farm(state_dir, nursery, addresses, apart=apart)
        try:
            farm.start()
            yield farm
        finally:
            farm.close()
        nursery.cancel_scope.cancel()


_SCRIPT = """
import ctypes, json, resource, sys
from pathlib import Path
ctypes.CDLL(None).prctl(1, 9)  # PR_SET_PDEATHSIG: it ends with the test, however that ends
options = json.loads(sys.argv[2])
if options["descriptors"]:
    resource.setrlimit(resource.RLIMIT_NOFILE, (options["descriptors"],) * 2)
from sapin.api import daemon
from sapin.core.dataplane import runtime, store
store.COMPACT_AT = options["compact_at"]
runtime.UPSTREAM_PORTS = tuple(options["ports"])
daemon.set_up_logging(json=True, level="info")
try:
    daemon.run(Path(sys.argv[1]))
except daemon.StartError as error:
    sys.exit(str(error))
"""


class Daemon:
    """The daemon in a process of its own.

    Args:
        compact_at: bytes of journal after which a checkpoint is due.
        descriptors: the limit of open files, 0 for that of the test.
    """

    def __init__(self, document: Document, *, compact_at: int = 8 * 2**20, descriptors: int = 0) -> None:
        self.state_dir = Path(document["node"]["state_dir"])
        self.config = self.state_dir.with_suffix(".toml")
        self.configure(document)
        # Below the ephemeral ports: nobody may take one while the daemon is away.
        options = {"compact_at": compact_at, "descriptors": descriptors, "ports": [UPSTREAM_PORTS[0], 32_767]}
        self._argv = [sys.executable, "-c", _SCRIPT, str(self.config), json.dumps(options)]
        self._log = self.state_dir.with_suffix(".log")
        self._read = 0
        self.process: subprocess.Popen[bytes] | None = None

    def configure(self, document: Document) -> None:
        self.config.write_text(text(document))

    def launch(self) -> subprocess.Popen[bytes]:
        """Start it without waiting for it."""
        with self._log.open("ab") as log:
            self._read = log.tell()
            self.process = subprocess.Popen(self._argv, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        return self.process

    async def start(self) -> None:
        """Start it, and wait until it forwards."""
        process = self.launch()
        await eventually(lambda: self.events("forwarding") or process.poll() is not None, 3 * PATIENCE)
        assert process.poll() is None, self.output()

    def output(self) -> str:
        """All that it has written since its start."""
        return self._log.read_bytes()[self._read :].decode()

    def events(self, event: str) -> list[Mapping[str, Any]]:
        """Its log entries of that event since its start."""
        lines = self.output().splitlines()
        entries = [json.loads(line) for line in lines if line.startswith("{")]
        return [entry for entry in entries if entry["event"] == event]

    async def wait(self) -> int:
        """Until it has ended; its exit status."""
        assert self.process is not None
        await eventually(lambda: self.process is None or self.process.poll() is not None, 3 * PATIENCE)
        return self.process.returncode

    async def kill(self) -> None:
        """kill -9."""
        assert self.process is not None
        self.process.kill()
        await self.wait()

    async def call(self, operation: str, **arguments: Any) -> Any:
        """Ask it through its control socket."""
        return await trio.to_thread.run_sync(lambda: client.call(self.state_dir, operation, **arguments))

    def close(self) -> None:
        if self.process is not None and self.process.poll() is None:
            self.process.kill()
            self.process.wait(PATIENCE)
