"""What is compared: how each forwarder is configured and started, and what its processes use.

All of them listen on the virtual address, UDP 500 and 4500, and spread clients over the same three servers
with one worker on one CPU. They are not alike otherwise: only Sapin keeps a client's two ports together
by what it knows of IKE. The comparison is of speed only.
"""

from __future__ import annotations

import ctypes
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, NamedTuple

from lab import Lab

HERE = Path(__file__).parent
NGINX_STREAM = Path("/usr/lib/nginx/modules/ngx_stream_module.so")
START_TIMEOUT = 10.0
STOP_TIMEOUT = 5.0
PR_SET_PDEATHSIG = 1
PAGE = os.sysconf("SC_PAGE_SIZE")
CONNECTIONS = 32_768
"""Room for sessions in forwarders that ask; each session of nginx takes two."""

_libc = ctypes.CDLL(None)


class ForwarderError(Exception):
    """A forwarder did not start, or ended."""


@dataclass(frozen=True)
class Forwarder:
    """One of the compared programs."""

    name: str
    remark: str
    commands: Callable[[Lab, Path], Sequence[Sequence[str]]]
    """Writes what configuration it needs into a folder, and gives the commands to run."""
    missing: Callable[[], str | None] = lambda: None
    """Why it cannot run here; ``None`` when it can."""


class Usage(NamedTuple):
    """Seconds that threads ran, and that they waited for a CPU which another program held."""

    cpu: float
    waited: float

    def __sub__(self, other: Usage) -> Usage:
        return Usage(self.cpu - other.cpu, self.waited - other.waited)


class Running:
    """The processes of a started forwarder; none for the direct path."""

    def __init__(self, processes: Sequence[subprocess.Popen[bytes]]) -> None:
        self._processes = processes

    def usage(self) -> Usage:
        """What all processes and their threads used so far, the kernel's work for them included."""
        each = [_schedstat(task) for pid in self._tree() for task in _tasks(pid)]
        return Usage(sum(usage.cpu for usage in each), sum(usage.waited for usage in each))

    def memory(self) -> int:
        """Resident bytes of all processes."""
        return sum(_resident(pid) for pid in self._tree())

    def check(self) -> None:
        """Raises:
        ForwarderError: a process ended.
        """
        for process in self._processes:
            if process.poll() is not None:
                raise ForwarderError(f"{Path(process.args[0]).name} ended with {process.returncode}")  # type: ignore[index,arg-type]

    def _tree(self) -> list[int]:
        children: dict[int, list[int]] = {}
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit() and (parent := _parent(int(entry.name))):
                children.setdefault(parent, []).append(int(entry.name))
        found = [process.pid for process in self._processes]
        for pid in found:
            found.extend(children.get(pid, ()))
        return found


@contextmanager
def started(forwarder: Forwarder, lab: Lab, folder: Path, cpu: int | None) -> Iterator[Running]:
    """Run a forwarder in the balancer's namespace, pinned to a CPU, and stop it afterwards.

    Raises:
        ForwarderError: it does not listen on both ports in time; the message ends with its output.
    """
    folder.mkdir(parents=True)
    processes: list[subprocess.Popen[bytes]] = []
    log = folder / "output"
    try:
        with log.open("wb") as output, lab.inside("balancer"):
            processes.extend(_start(command, output, cpu) for command in forwarder.commands(lab, folder))
            running = Running(processes)
            if processes:
                _wait_until_listening(running, lab, log)
        yield running
    except ForwarderError as error:
        tail = log.read_text(errors="replace")[-2000:] if log.exists() else ""
        raise ForwarderError(f"{forwarder.name}: {error}\n{tail}".rstrip()) from None
    finally:
        _stop(processes)


def _start(command: Sequence[str], output: IO[bytes], cpu: int | None) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=output,
        preexec_fn=lambda: _prepare(cpu),  # noqa: PLW1509 -- the benchmark has no threads
    )


def _prepare(cpu: int | None) -> None:
    """In the child: die with the benchmark, keep to one CPU, have the file descriptors that there are."""
    _libc.prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    if cpu is not None:
        os.sched_setaffinity(0, {cpu})
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def _wait_until_listening(running: Running, lab: Lab, log: Path) -> None:
    wanted = {lab.service.ike, lab.service.natt}
    deadline = time.monotonic() + START_TIMEOUT
    while not wanted <= _bound_ports(lab.vip):
        running.check()
        if time.monotonic() > deadline:
            raise ForwarderError(f"not listening after {START_TIMEOUT:.0f} s")
        time.sleep(0.05)
    time.sleep(0.2)


def _bound_ports(address: str) -> set[int]:
    """UDP ports that are bound to an address in this network namespace."""
    raw = "".join(f"{int(part):02X}" for part in reversed(address.split(".")))
    locals_ = (line.split()[1] for line in Path("/proc/thread-self/net/udp").read_text().splitlines()[1:])
    return {
        int(port, 16) for host, port in (each.split(":") for each in locals_) if host in (raw, "00000000")
    }


def _stop(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    for process in processes:
        process.terminate()
    for process in processes:
        try:
            process.wait(STOP_TIMEOUT)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _parent(pid: int) -> int | None:
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except (FileNotFoundError, ProcessLookupError):
        return None


def _tasks(pid: int) -> list[Path]:
    try:
        return list(Path(f"/proc/{pid}/task").iterdir())
    except (FileNotFoundError, ProcessLookupError):
        return []


def _schedstat(task: Path) -> Usage:
    try:
        cpu, waited, _ = (task / "schedstat").read_text().split()
    except (FileNotFoundError, ProcessLookupError):
        return Usage(0.0, 0.0)
    return Usage(int(cpu) / 1e9, int(waited) / 1e9)


def _resident(pid: int) -> int:
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * PAGE
    except (FileNotFoundError, ProcessLookupError):
        return 0


def _no_commands(lab: Lab, folder: Path) -> Sequence[Sequence[str]]:
    return ()


def _nginx(lab: Lab, folder: Path) -> Sequence[Sequence[str]]:
    def service(name: str, port: int) -> str:
        servers = "".join(f"    server {server}:{port};\n" for server in lab.servers)
        return (
            f"  upstream {name} {{\n    hash $remote_addr;\n{servers}  }}\n"
            f"  server {{ listen {lab.vip}:{port} udp rcvbuf=8m; proxy_pass {name}; proxy_timeout 600s; }}\n"
        )

    config = folder / "nginx.conf"
    config.write_text(
        f"load_module {NGINX_STREAM};\ndaemon off;\nworker_processes 1;\n"
        f"pid {folder}/nginx.pid;\nerror_log stderr error;\n{'user root;' if os.geteuid() == 0 else ''}\n"
        f"events {{ worker_connections {CONNECTIONS}; }}\n"
        f"stream {{\n{service('ike', lab.service.ike)}{service('natt', lab.service.natt)}}}\n"
    )
    return [["nginx", "-e", "stderr", "-p", str(folder), "-c", str(config)]]


def _nginx_missing() -> str | None:
    if not shutil.which("nginx"):
        return "nginx is not installed"
    return None if NGINX_STREAM.exists() else "libnginx-mod-stream is not installed"


def _pen(lab: Lab, folder: Path) -> Sequence[Sequence[str]]:
    # Its table of clients stays at the default of 2,048: a larger one is scanned for each new client,
    # which halves its speed at 10,000.
    options = ["-U", "-f", "-x", str(CONNECTIONS // 2)]
    return [
        ["pen", *options, f"{lab.vip}:{port}", *(f"{server}:{port}" for server in lab.servers)]
        for port in (lab.service.ike, lab.service.natt)
    ]


def _older(way: str) -> Callable[[Lab, Path], Sequence[Sequence[str]]]:
    def commands(lab: Lab, folder: Path) -> Sequence[Sequence[str]]:
        ports = (str(lab.service.ike), str(lab.service.natt))
        return [[sys.executable, str(HERE / "naive.py"), way, lab.vip, ",".join(ports), *lab.servers]]

    return commands


def _sapin(lab: Lab, folder: Path) -> Sequence[Sequence[str]]:
    servers = ",\n".join(
        f'  {{ name = "gw{number}", address = "{address}" }}' for number, address in enumerate(lab.servers, 1)
    )
    config = folder / "sapin.toml"
    config.write_text(
        f"""\
[node]
name = "bench"
state_dir = "{folder}/state"

[[virtual_services]]
name = "ike"
address = "{lab.vip}"
port = {lab.service.ike}
protocol = "udp"
framing = "ike"
scheduler = "least-connections"
persistence = {{ plugin = "source-address", timeout = "8h" }}
source = "nat"
real_servers = [
{servers},
]

[[virtual_services]]
name = "ike-natt"
address = "{lab.vip}"
port = {lab.service.natt}
protocol = "udp"
framing = "ike-natt"
follows = "ike"
"""
    )
    return [[sys.executable, "-m", "sapin.api.cli", "run", str(config)]]


FORWARDERS = (
    Forwarder("direct", "routed by the balancer's kernel, no forwarder", _no_commands),
    Forwarder("nginx", "stream module, one worker", _nginx, _nginx_missing),
    Forwarder(
        "pen",
        "one process per port; memory for its sessions is taken at the start",
        _pen,
        lambda: None if shutil.which("pen") else "pen is not installed",
    ),
    Forwarder("naive", "trio, one await per datagram, one task per flow", _older("naive")),
    Forwarder("drain", "trio, one wait per batch, then recvfrom and send", _older("drain")),
    Forwarder("sapin", "userspace forwarding, source = nat, pins and journal", _sapin),
)
