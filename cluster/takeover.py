"""The daemon's side of the guard: starts it, feeds it, and starts it again when it is gone.

The guard is a process of its own (:mod:`sapin.cluster.guard`). What the daemon says goes through a socket without
waiting: a guard that does not keep up with its food lets go of the addresses, which is what it is for.
"""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from collections import Counter, deque
from collections.abc import Mapping
from contextlib import AsyncExitStack, suppress
from types import TracebackType
from typing import Self

import structlog
import trio

from sapin.cluster.config import Cluster, Takeover
from sapin.cluster.guard import PACKET, Setup
from sapin.cluster.guarding import Answered, Claimed, Farewell, Gained, Lost, Refused, Released, Told
from sapin.cluster.membership import Membership
from sapin.cluster.netlink import Address, AddressError, Addresses

RESTART = (0.02, 2.0)
"""Seconds until a guard that is gone is started again: at first, and at most."""
WAITING = 1_000
"""Things that a guard has told and nobody has asked for, at most; the oldest are forgotten."""
FAREWELL = 1.0
"""Seconds that the end of the daemon waits for its guard to end."""

log = structlog.get_logger("sapin.cluster.guard")


class ProcessGuard:
    """Fulfils :class:`~sapin.cluster.guarding.Guard` by a process. Entered for as long as it is to run.

    Args:
        setup: what it has to know.
    """

    def __init__(self, setup: Setup) -> None:
        self._setup = setup
        self._socket: socket.socket | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._told: deque[Told] = deque(maxlen=WAITING)
        self._something = trio.Event()
        self._holding = setup.holding
        self._stack = AsyncExitStack()
        self.restarts = 0
        """How often the guard was gone."""
        self.strange = 0
        """Datagrams to the beacons that were not the peer's."""
        self.faults: Counter[str] = Counter()
        """What the guard could not do, by what it said."""

    async def __aenter__(self) -> Self:
        await self._stack.__aenter__()
        nursery = await self._stack.enter_async_context(trio.open_nursery())
        await nursery.start(self._run)
        self._stack.callback(nursery.cancel_scope.cancel)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._stack.__aexit__(kind, value, trace)

    # what the daemon says

    def feed(self, epoch: int) -> None:
        """The daemon is well, at each heartbeat."""
        self._say(b"F" + epoch.to_bytes(8, "big"))

    def claim(self, epoch: int) -> None:
        """Add and announce the addresses."""
        self._holding = epoch
        self._say(b"C" + epoch.to_bytes(8, "big"))

    def release(self) -> None:
        """Remove the addresses."""
        self._holding = 0
        self._say(b"R")

    def disown(self) -> int:
        """End without a word and leave the addresses where they are, for another guard; the epoch they are held in, or 0."""
        holding, self._holding = self._holding, 0
        if holding:
            self._say(b"D")
        return holding

    def probe(self) -> None:
        """Ask the peer wherever it may be whether it is alive."""
        self._say(b"P")

    async def told(self) -> Told:
        """What comes next."""
        while not self._told:
            self._something = trio.Event()
            await self._something.wait()
        return self._told.popleft()

    def _say(self, packet: bytes) -> None:
        if self._socket is not None:
            with suppress(OSError):  # it is gone, or does not keep up
                self._socket.send(packet)

    # the process

    async def _run(self, *, task_status: trio.TaskStatus[None]) -> None:
        shortest, longest = RESTART
        pause = shortest
        try:
            while True:
                self._start()
                task_status.started()
                task_status = trio.TASK_STATUS_IGNORED
                began = trio.current_time()
                await self._listen()
                self._reap()
                self.restarts += 1
                pause = shortest if trio.current_time() - began > longest else pause
                log.error("the guard is gone and is started again; the addresses stay", seconds=pause)
                await trio.sleep(pause)
                pause = min(2 * pause, longest)
        finally:
            self._reap()

    def _start(self) -> None:
        ours, its = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with its:
            ours.setblocking(False)
            self._socket = ours
            # Not through its arguments or environment, which others can see.
            ours.send(json.dumps(self._setup._replace(holding=self._holding)._asdict()).encode())
            self._process = subprocess.Popen(
                [sys.executable, "-I", "-m", "sapin.cluster.guard"],
                stdin=its.fileno(),
                start_new_session=True,  # a Ctrl-C is for the daemon, which tells the guard
            )

    def _reap(self) -> None:
        if self._socket is not None:
            self._socket.close()
            self._socket = None
        if self._process is not None:
            try:
                self._process.wait(FAREWELL)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
            self._process = None

    async def _listen(self) -> None:
        """Until the guard is gone."""
        assert self._socket is not None
        while True:
            await trio.lowlevel.wait_readable(self._socket)
            try:
                packet = self._socket.recv(PACKET)
            except BlockingIOError:
                continue
            except OSError:
                return
            if not packet:
                return
            self._hear(packet)

    def _hear(self, packet: bytes) -> None:
        kind, rest = packet[:1], packet[1:]
        if kind == b"s":
            self.strange = int.from_bytes(rest, "big")
        elif kind == b"e":
            self._complain(rest.decode(errors="replace"))
        else:
            self._holding = 0 if kind == b"l" else self._holding
            self._told.append(_meaning(kind, rest))
            self._something.set()

    def _complain(self, text: str) -> None:
        if not self.faults[text]:
            log.error("the guard", says=text)
        if len(self.faults) < WAITING:
            self.faults[text] += 1


def _meaning(kind: bytes, rest: bytes) -> Told:
    """What a packet of the guard says."""
    numbers = (int.from_bytes(rest[:8], "big"), int.from_bytes(rest[8:16], "big"))
    match kind:
        case b"a":
            return Answered(numbers[0], bool(rest[8]))
        case b"f":
            return Farewell(*numbers)
        case _:
            return _PLAIN[kind]


_PLAIN: Mapping[bytes, Told] = {
    b"c": Claimed(),
    b"r": Released(),
    b"x": Refused(),
    b"g": Gained(),
    b"l": Lost(),
}


def addresses(cluster: Cluster) -> list[Address]:
    """The virtual addresses, as the kernel wants them."""
    return [
        Address(str(each.address), each.interface.network.prefixlen, each.device)
        for each in cluster.virtual_addresses
    ]


def guard(
    cluster: Cluster, membership: Membership, secret: bytes, boot: int, holding: int = 0
) -> ProcessGuard:
    """A guard for a node of a pair.

    Args:
        cluster: the ``[cluster]`` table.
        membership: who the node and its peer are.
        secret: what beacons are made and recognised by.
        boot: names this run of the daemon.
        holding: the epoch in which the node has the addresses already; 0 if it does not.
    """
    own, peer = membership.own, membership.peer
    return ProcessGuard(
        Setup(
            node=own.name,
            peer=peer.name if peer else "",
            cluster=membership.cluster,
            secret=secret.hex(),
            boot=boot,
            port=own.port,
            links=[str(link) for link in own.links],
            peer_links=[str(link) for link in peer.links] if peer else [],
            addresses=[list(each) for each in addresses(cluster)],
            moves=cluster.takeover is Takeover.NETLINK,
            holding=holding,
        )
    )


def release(cluster: Cluster) -> None:
    """Remove the virtual addresses, when neither daemon nor guard is there to do it.

    Raises:
        AddressError: one cannot be removed.
        OSError: the kernel cannot be asked.
    """
    if cluster.takeover is Takeover.NETLINK:
        kernel = Addresses()
        found = addresses(cluster)
        try:
            with suppress(AddressError):
                kernel.promote(address.device for address in found)
            kernel.remove(found)
        finally:
            kernel.close()
