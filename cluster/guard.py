"""The guard: a small process that holds the virtual addresses for the daemon, and lets go when the daemon does.

The daemon starts it (:mod:`sapin.cluster.takeover`), with a socket as standard input: one packet a command, one packet an answer. It is fed with each
heartbeat. When the daemon dies its socket closes, at once; when it hangs, no food comes. In both cases the guard removes the addresses and
says farewell to the peer. It answers the peer's probes for as long as it is fed, from a process of its own and with precedence,
so that a busy node does not look dead.

It uses the standard library alone, and has no other privileges than it needs once it is ready.
"""

from __future__ import annotations

import ctypes
import json
import os
import select
import signal
import socket
import sys
from collections import deque
from contextlib import suppress
from time import monotonic
from typing import Any, NamedTuple

from sapin.cluster.beacon import NONCE, SIZE, Beacon, Codec, Kind
from sapin.cluster.netlink import Address, AddressError, Addresses, Announcer, monitor

STARVED = 0.25
"""Seconds without food after which the guard lets go."""
AGAIN = (0.05, 0.2, 1.0, 5.0)
"""Seconds after a claim at which the addresses are announced again."""
REPAIR = 0.5
"""Seconds between two attempts to put back an address that somebody else removed."""
ANSWERS = 2_000
"""Probes that are answered in a second, at most: more than a peer asks, each 10 ms at each of its targets."""
PROBED = 4
"""Virtual addresses that are probed, at most: the first of each device and address family."""
PACKET = 65_536
_NONCES = 256
_SOURCES = 8
_NO_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
_FREEBIND = {
    socket.AF_INET: (socket.IPPROTO_IP, 15),
    socket.AF_INET6: (socket.IPPROTO_IPV6, 78),
}
"""IP_FREEBIND and IPV6_FREEBIND (linux/in.h, linux/in6.h)."""
_TRANSPARENT = {
    socket.AF_INET: (socket.IPPROTO_IP, 19),
    socket.AF_INET6: (socket.IPPROTO_IPV6, 75),
}
"""IP_TRANSPARENT and IPV6_TRANSPARENT: a farewell leaves from the virtual address, which is removed already."""
_NET_ADMIN, _NET_RAW = 12, 13


class Setup(NamedTuple):
    """What the daemon tells the guard first."""

    node: str
    peer: str
    cluster: str
    secret: str
    """Hexadecimal."""
    boot: int
    port: int
    links: list[str]
    peer_links: list[str]
    addresses: list[list[Any]]
    """Address, length of the prefix, device."""
    moves: bool
    """Whether the guard moves the addresses, or watches who does."""
    holding: int
    """The epoch in which the daemon has the addresses already; 0 if it does not."""


class Guard:
    """The guard's state and sockets."""

    def __init__(self, control: socket.socket, setup: Setup) -> None:
        self._control = control
        self._setup = setup
        self._addresses = [Address(*each) for each in setup.addresses]
        self._codec = Codec(setup.cluster, bytes.fromhex(setup.secret), setup.peer)
        self._netlink = Addresses()
        self._announcer = Announcer()
        self._holding = False
        self._disowned = False
        """Another guard has the addresses now; they are not removed here."""
        self._here: bool | None = None
        self._epoch = setup.holding
        self._fed = monotonic()
        self._again: deque[float] = deque()
        self._repaired = 0.0
        self._poll = select.poll()
        self._beacons: dict[int, socket.socket] = {}
        self._asking: dict[str, socket.socket] = {}
        """Connected sockets for probes, by their target."""
        each = {(address.device, address.family): address.address for address in reversed(self._addresses)}
        self._probed = list(each.values())[::-1][:PROBED]
        self._seen: dict[bytes, None] = {}
        """Nonces of probes that were answered: who repeats one does not use up what the peer may ask."""
        self._nonces: dict[bytes, None] = {}
        """Of probes without an answer yet, the oldest first. An answer counts once."""
        self._sources: dict[Any, socket.socket] = {}
        """Where probes came from lately, and on which socket: farewells go there too."""
        self._answered = (0.0, 0)
        self._strange = self._strange_told = 0
        """Datagrams that were no beacons of the peer."""
        self._counted = 0.0
        self._monitor = monitor()
        self._poll.register(control, select.POLLIN)
        self._poll.register(self._monitor, select.POLLIN)
        self._open_beacons()

    def begin(self) -> None:
        """Take over what is there, or clear it away."""
        if not self._setup.moves:
            self._look()
            return
        try:
            self._netlink.promote(address.device for address in self._addresses)
        except (AddressError, OSError) as error:
            self._tell(b"e" + str(error).encode()[:1000])
        if self._setup.holding:
            self._claim(self._setup.holding)
        else:
            with suppress(AddressError):
                self._netlink.remove(self._addresses)
            for address in self._addresses:
                with suppress(OSError):
                    self._announcer.open(address.device)

    def run(self) -> None:
        """Until the daemon is gone."""
        while True:
            patience = self._patience()
            began = monotonic()
            ready = dict(self._poll.poll(patience))
            if self._holding and monotonic() - began > patience / 1000 + STARVED:
                # This process was away, and the machine too perhaps: the peer may have the addresses by now,
                # and what the daemon says next it says without knowing.
                self._hunger()
            # The daemon first: food may have waited while this process was away.
            if self._control.fileno() in ready and not self._commands():
                self._let_go()
                return
            for descriptor in ready:
                if descriptor in self._beacons:
                    self._heard(self._beacons[descriptor])
            if self._monitor.fileno() in ready:
                self._moved()
            self._due()

    def _hunger(self) -> None:
        self._let_go()
        self._tell(b"l")

    def _patience(self) -> float:
        """Milliseconds until something is due."""
        due = [1.0]
        now = monotonic()
        if self._holding:
            due.append(self._fed + STARVED - now)
        if self._again:
            due.append(self._again[0] - now)
        return max(min(due), 0) * 1000 + 0.5

    def _due(self) -> None:
        now = monotonic()
        if self._holding and now - self._fed > STARVED:
            self._hunger()
        while self._again and self._again[0] <= now:
            self._again.popleft()
            self._announce()
        if self._strange > self._strange_told and now - self._counted >= 1.0:
            self._counted, self._strange_told = now, self._strange
            self._tell(b"s" + self._strange.to_bytes(8, "big"))

    # the daemon

    def _commands(self) -> bool:
        """Do what the daemon asks for; false when it is gone."""
        while True:
            try:
                packet = self._control.recv(PACKET)
            except BlockingIOError:
                return True
            except OSError:
                return False
            if not packet:
                return False
            self._command(packet[:1], int.from_bytes(packet[1:9], "big"))

    def _command(self, command: bytes, number: int) -> None:
        match command:
            case b"F":
                self._fed, self._epoch = monotonic(), number
            case b"C":
                self._fed, self._epoch = monotonic(), number
                self._claim(number)
            case b"R":
                self._release()
                self._tell(b"r")
            case b"P":
                self._ask()
            case b"D":
                self._holding = False
                self._disowned = True
                self._again.clear()

    def _tell(self, packet: bytes) -> None:
        with suppress(OSError):
            self._control.send(packet)

    # the addresses

    def _claim(self, epoch: int) -> None:
        if self._setup.moves:
            try:
                self._netlink.add(self._addresses)
            except (AddressError, OSError) as error:
                self._tell(b"e" + str(error).encode()[:1000])
                self._release()
                self._tell(b"l")
                return
            self._announce()
            now = monotonic()
            self._again = deque(now + each for each in AGAIN)
        self._holding = True
        self._tell(b"c" + epoch.to_bytes(8, "big"))

    def _announce(self) -> None:
        for address in self._addresses:
            with suppress(OSError):
                self._announcer.announce(address)

    def _release(self) -> None:
        self._holding = False
        self._again.clear()
        if self._setup.moves:
            try:
                self._netlink.remove(self._addresses)
            except (AddressError, OSError) as error:
                self._tell(b"e" + str(error).encode()[:1000])

    def _let_go(self) -> None:
        """The daemon is gone, or as good as gone."""
        if self._disowned:
            return
        held = self._holding
        self._release()
        if held:
            self._say_farewell()

    def _moved(self) -> None:
        """Somebody has moved addresses, perhaps this guard."""
        with suppress(BlockingIOError, OSError):
            while self._monitor.recv(PACKET):
                pass
        if not self._setup.moves:
            self._look()
        elif self._holding and monotonic() - self._repaired > REPAIR:
            there = self._netlink.there()
            missing = [a for a in self._addresses if (a.device, a.packed) not in there]
            if missing:
                self._repaired = monotonic()
                self._tell(b"e" + f"somebody removed {missing[0].address}: it is put back".encode())
                with suppress(AddressError):
                    self._netlink.add(missing)
                self._announce()

    def _look(self) -> None:
        """Tell the daemon whether the addresses are here, when that has changed."""
        there = self._netlink.there()
        here = all((address.device, address.packed) in there for address in self._addresses)
        if here is not self._here:
            self._here = self._holding = here
            self._tell(b"g" if here else b"l")

    # the beacons

    def _open_beacons(self) -> None:
        places = dict.fromkeys((*self._setup.links, *(address.address for address in self._addresses)))
        for place in places:
            family = socket.AF_INET6 if ":" in place else socket.AF_INET
            sock = socket.socket(family, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
            try:
                sock.setsockopt(*_FREEBIND[family], 1)
                with suppress(PermissionError):  # a guard that only watches may have no privilege
                    sock.setsockopt(*_TRANSPARENT[family], 1)
                sock.bind((place, self._setup.port))
            except OSError as error:
                sock.close()
                self._tell(b"e" + f"no beacon at {place} port {self._setup.port}: {error.strerror}".encode())
                continue
            self._beacons[sock.fileno()] = sock
            self._poll.register(sock, select.POLLIN)

    def _heard(self, sock: socket.socket) -> None:
        for _ in range(64):
            try:
                data, source = sock.recvfrom(SIZE + 1)
            except ConnectionRefusedError:
                self._tell(b"x")
                continue
            except OSError:
                return
            beacon = self._codec.decode(data)
            if beacon is None:
                self._strange += 1
            else:
                self._understood(beacon, sock, source)

    def _understood(self, beacon: Beacon, sock: socket.socket, source: Any) -> None:
        match beacon.kind:
            case Kind.PROBE if beacon.nonce in self._seen:
                self._strange += 1
            case Kind.PROBE:
                self._seen[beacon.nonce] = None
                _keep(self._seen, 4 * _NONCES)
                self._remember(source, sock)
                if monotonic() - self._fed <= STARVED and self._may_answer():
                    self._say(Kind.ANSWER, sock, source, beacon.nonce)
            case Kind.ANSWER if beacon.nonce in self._nonces:
                del self._nonces[beacon.nonce]
                self._tell(b"a" + beacon.epoch.to_bytes(8, "big") + bytes([beacon.active]))
            case Kind.ANSWER:  # to no probe of ours, or to one that is answered
                self._strange += 1
            case Kind.FAREWELL:
                self._tell(b"f" + beacon.boot.to_bytes(8, "big") + beacon.epoch.to_bytes(8, "big"))

    def _may_answer(self) -> bool:
        second, count = self._answered
        now = monotonic()
        if now - second >= 1.0:
            second, count = now, 0
        self._answered = (second, count + 1)
        return count < ANSWERS

    def _remember(self, source: Any, sock: socket.socket) -> None:
        self._sources.pop(source, None)
        self._sources[source] = sock
        if len(self._sources) > _SOURCES:
            del self._sources[next(iter(self._sources))]

    def _say(self, kind: Kind, sock: socket.socket, target: Any, nonce: bytes) -> None:
        beacon = Beacon(kind, self._holding, self._setup.node, self._setup.boot, self._epoch, nonce)
        with suppress(OSError):
            sock.sendto(self._codec.encode(beacon), target)

    def _say_farewell(self) -> None:
        nonce = os.urandom(NONCE)
        links = [self._beacons[each] for each in self._beacons]
        for place in self._setup.peer_links:
            family = socket.AF_INET6 if ":" in place else socket.AF_INET
            for sock in [each for each in links if each.family == family][:4]:
                self._say(Kind.FAREWELL, sock, (place, self._setup.port), nonce)
        for source, sock in self._sources.items():
            self._say(Kind.FAREWELL, sock, source, nonce)

    def _ask(self) -> None:
        """Probe the peer wherever it may be."""
        # Who has the virtual addresses would only hear itself there.
        virtual = () if self._holding else self._probed
        for target in (*self._setup.peer_links, *virtual):
            nonce = os.urandom(NONCE)
            self._nonces[nonce] = None
            _keep(self._nonces, _NONCES)
            beacon = Beacon(Kind.PROBE, self._holding, self._setup.node, self._setup.boot, self._epoch, nonce)
            self._ask_at(target, self._codec.encode(beacon))

    def _ask_at(self, target: str, data: bytes) -> None:
        """One probe, from a connected socket, so that a refusal is heard of."""
        for _ in range(2):  # the first failure may be of the probe before
            try:
                sock = self._asking.get(target) or self._connected(target)
                sock.send(data)
            except ConnectionRefusedError:
                self._tell(b"x")
            except OSError:
                self._forget(target)
                return
            else:
                return

    def _connected(self, target: str) -> socket.socket:
        family = socket.AF_INET6 if ":" in target else socket.AF_INET
        sock = socket.socket(family, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
        try:
            sock.connect((target, self._setup.port))
        except OSError:
            sock.close()
            raise
        self._asking[target] = sock
        self._beacons[sock.fileno()] = sock
        self._poll.register(sock, select.POLLIN)
        return sock

    def _forget(self, target: str) -> None:
        """The route may have changed: the next probe begins anew."""
        sock = self._asking.pop(target, None)
        if sock is not None:
            self._poll.unregister(sock)
            del self._beacons[sock.fileno()]
            sock.close()


def _keep(these: dict[bytes, None], number: int) -> None:
    """Forget the oldest of them when there are more."""
    if len(these) > number:
        del these[next(iter(these))]


def _privileged() -> bool:
    """Whether addresses can be moved."""
    with open("/proc/self/status", encoding="ascii") as status:  # noqa: PTH123  # pathlib takes its time to import
        line = next(line for line in status if line.startswith("CapEff:"))
    wanted = 1 << _NET_ADMIN | 1 << _NET_RAW
    return int(line.split()[1], 16) & wanted == wanted


def _go_first() -> None:
    """Come before other processes, where that is allowed."""
    with suppress(OSError):
        os.sched_setscheduler(0, os.SCHED_RR, os.sched_param(1))
        return
    with suppress(OSError):
        os.nice(-10)


def _drop_privileges() -> None:
    """Keep what the addresses need (capabilities(7), capset(2)) and nothing else, for this process and what it might start."""
    libc = ctypes.CDLL(None, use_errno=True)
    no_new_privileges = 38
    libc.prctl(no_new_privileges, 1, 0, 0, 0)
    version_3 = 0x20080522
    kept = 1 << _NET_ADMIN | 1 << _NET_RAW
    header = (ctypes.c_uint32 * 2)(version_3, 0)
    data = (ctypes.c_uint32 * 6)(kept, kept, 0, 0, 0, 0)
    libc.capset(header, data)


def main() -> None:
    """Run until the daemon is gone. Whatever fails, the addresses do not stay."""
    for number in _NO_SIGNALS:
        signal.signal(number, signal.SIG_IGN)  # the daemon decides, or its death
    control = socket.socket(fileno=os.dup(0))
    try:
        setup = Setup(**json.loads(control.recv(PACKET)))
    except (ValueError, TypeError, OSError) as error:
        sys.exit(f"the guard is started by the daemon, not by hand: {error}")
    if setup.moves and not _privileged():
        control.send(
            b"e" + b"virtual addresses cannot be moved: the daemon needs CAP_NET_ADMIN and CAP_NET_RAW"
        )
    control.setblocking(False)
    _go_first()
    guard = Guard(control, setup)
    try:
        guard.begin()
        if setup.moves:
            _drop_privileges()
        guard.run()
    except BaseException:
        guard._let_go()  # noqa: SLF001  # the last thing that it does
        raise


if __name__ == "__main__":
    main()
