"""Network namespaces, wires between them, and daemons inside them.

All names start with a prefix that carries the process id of the run that made them, so that a later run can tell
what a killed one left behind. Daemons die with the run, however it ends.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from itertools import count
from pathlib import Path
from signal import SIGKILL, Signals

import trio

NETNS = Path("/run/netns")
FAMILY = "sapin-ike-"
"""What the names of all our namespaces start with."""


class LabError(Exception):
    """A part of the lab did not do what it was told."""


class Namespace:
    """A network namespace, and ways to run things in it."""

    def __init__(self, name: str) -> None:
        self.name = f"{FAMILY}{os.getpid()}-{name}"
        _call("ip", "netns", "add", self.name)
        self.ip("link set lo up")
        # A new address is used at once, rather than a second later when nobody else claimed it.
        self.sysctl("net.ipv6.conf.default.accept_dad", 0)

    def ip(self, *commands: str) -> None:
        """Run ``ip`` commands."""
        _call("ip", "-n", self.name, "-batch", "-", text="\n".join(commands))

    def nft(self, rules: str) -> None:
        """Load nftables rules."""
        _call(*self.inside("nft", "-f", "-"), text=rules)

    def sysctl(self, key: str, value: int) -> None:
        """Set a kernel parameter of the network."""
        _call(*self.inside("sysctl", "-q", "-w", f"{key}={value}"))

    def inside(self, *argv: str) -> list[str]:
        """The command line that runs a program here."""
        # Not "ip netns exec": that gives the program a /sys of its own.
        return ["nsenter", f"--net={NETNS / self.name}", "--", *argv]

    async def run(
        self, *argv: str, patience: float = 20, env: Mapping[str, str] | None = None
    ) -> subprocess.CompletedProcess[str]:
        """Run a program to its end; see :func:`run`."""
        return await run(*self.inside(*argv), patience=patience, env=env)

    def kill(self) -> None:
        """End every program that runs here, as a crash of the machine would."""
        for pid in self.pids():
            with suppress(ProcessLookupError):
                os.kill(pid, SIGKILL)

    def pids(self) -> list[int]:
        """The processes that run here."""
        return [int(pid) for pid in _call("ip", "netns", "pids", self.name).split()]


class Wire:
    """An Ethernet segment, as a bridge in one of the namespaces."""

    def __init__(self, namespace: Namespace, name: str) -> None:
        self.name = name
        self._namespace = namespace
        self._ports = count(1)
        # Snooping would drop neighbour solicitations until the bridge has learnt who listens.
        namespace.ip(f"link add {name} type bridge mcast_snooping 0", f"link set {name} up")

    def attach(self, namespace: Namespace, device: str, *addresses: str) -> Port:
        """Give a namespace a device on this wire, with these addresses in CIDR notation."""
        number = next(self._ports)
        port = f"{self.name}{number}"
        self._namespace.ip(
            f"link add {port} type veth peer name {device} netns {namespace.name}",
            f"link set {port} master {self.name} up",
        )
        # The same at every run: neighbours that remember each other are never wrong.
        namespace.ip(
            f"link set {device} address 02:00:00:00:00:{number:02x} up",
            *(f"address add {each} dev {device}" for each in addresses),
        )
        return Port(self._namespace, port)


class Port:
    """Where a device is plugged into a wire."""

    def __init__(self, namespace: Namespace, name: str) -> None:
        self._namespace = namespace
        self._name = name

    @staticmethod
    def unplug_all(ports: Sequence[Port]) -> None:
        """Take several cables out, whose wires are in one namespace, as close together as can be."""
        ports[0]._namespace.ip(*(f"link set {port._name} down" for port in ports))

    def unplug(self) -> None:
        """Take the cable out: what is sent gets lost, and nobody is told."""
        self._namespace.ip(f"link set {self._name} down")

    def plug(self) -> None:
        """Put the cable back."""
        self._namespace.ip(f"link set {self._name} up")


class Daemon:
    """A long-running program in a namespace; its output goes to a file."""

    def __init__(self, namespace: Namespace, argv: list[str], log: Path, env: Mapping[str, str]) -> None:
        self.log = log
        self._argv = ["setpriv", "--pdeathsig", "KILL", *namespace.inside(*argv)]
        self._env = {**os.environ, **env}
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def running(self) -> bool:
        """Whether it was started and has not ended."""
        return self._process is not None and self._process.poll() is None

    def signal(self, number: Signals) -> None:
        """Send a signal to the program itself, not to what it started."""
        if self._process is not None:
            self._process.send_signal(number)

    def start(self) -> None:
        """Start it. Only from the main thread: the kernel ends it with the thread that started it."""
        if self.running:
            raise LabError(f"{self._argv[-1]} runs already")
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                self._argv, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=self._env
            )

    def kill(self) -> None:
        """End it as a crash would (SIGKILL)."""
        if self._process is not None:
            self._process.kill()
            self._process.wait(5)
            self._process = None

    def stop(self, patience: float = 5) -> int | None:
        """Ask it to end (SIGTERM), and kill it if it does not within ``patience`` seconds; its exit status."""
        if self._process is None:
            return None
        self._process.terminate()
        try:
            return self._process.wait(patience)
        except subprocess.TimeoutExpired:
            return None
        finally:
            self.kill()


async def run(
    *argv: str, patience: float = 20, env: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run a program to its end, whatever its exit status; its standard error is part of its output.

    Raises:
        LabError: it ran longer than ``patience`` seconds.
    """
    environment = {**os.environ, **(env or {})}
    with trio.move_on_after(patience):
        done = await trio.run_process(
            argv, capture_stdout=True, stderr=subprocess.STDOUT, check=False, env=environment
        )
        return subprocess.CompletedProcess(argv, done.returncode, done.stdout.decode(errors="replace"))
    raise LabError(f"{' '.join(argv)} ran longer than {patience} s")


async def until(condition: Callable[[], Awaitable[object]], what: str, patience: float = 10) -> None:
    """Wait until a condition holds.

    Raises:
        LabError: it did not within ``patience`` seconds.
    """
    deadline = trio.current_time() + patience
    while not await condition():
        if trio.current_time() > deadline:
            raise LabError(f"waited {patience} s in vain: {what}")
        await trio.sleep(0.05)


def sweep() -> None:
    """Take away the namespaces of runs that are no more, and what still runs in them."""
    for path in NETNS.glob(f"{FAMILY}*"):
        owner = path.name.removeprefix(FAMILY).split("-")[0]
        if not Path("/proc", owner).exists():
            _delete(path.name)


def clear(label: str = "") -> None:
    """Take away the namespaces of this run whose names start with a label, and what still runs in them."""
    for path in NETNS.glob(f"{FAMILY}{os.getpid()}-{label}*"):
        _delete(path.name)


def _delete(name: str) -> None:
    for pid in _call("ip", "netns", "pids", name).split():
        with suppress(ProcessLookupError):
            os.kill(int(pid), SIGKILL)
    _call("ip", "netns", "del", name)


def _call(*argv: str, text: str | None = None) -> str:
    done = subprocess.run(argv, input=text, capture_output=True, text=True, timeout=20, check=False)
    if done.returncode:
        raise LabError(f"{' '.join(argv)}: {done.stderr.strip()}\n{text or ''}")
    return done.stdout
