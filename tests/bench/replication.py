"""Replication over TLS on loopback between two processes: how long a full resync takes, how long it holds the loop, how long an
acknowledgement takes.

    python -m tests.bench.replication [PINS]

The loop's longest turn is told twice: as the clock saw it, and as the time that the loop's thread used, which a busy
machine does not lengthen.
"""

from __future__ import annotations

import json
import os
import secrets
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import structlog
import trio

from tests.cluster.nodes import Couple, Half
from tests.dataplane.farm import IKE, NATT, Document, free_ports

PINS = 1_000_000
ASKED = 400
"""Acknowledgements that are waited for."""
SERVERS = 4


async def until(true: Callable[[], bool], pause: float = 0.005) -> None:
    while not true():  # noqa: ASYNC110  # what is waited for tells nobody
        await trio.sleep(pause)


class Plan:
    """A configuration, for servers that need not be there."""

    def __init__(self, state_dir: Path, pins: int) -> None:
        self._ports = free_ports(2)
        self._state_dir, self._pins = state_dir, pins

    def document(self, *, vip: str, **leader: Any) -> Document:
        servers = [{"name": f"gw{n}", "address": f"127.9.1.{n}"} for n in range(1, SERVERS + 1)]
        first = {"name": IKE, "address": vip, "port": self._ports[0], "framing": IKE, "real_servers": servers}
        second = {"name": NATT, "address": vip, "port": self._ports[1], "framing": NATT, "follows": IKE}
        node = {"name": "lb", "state_dir": str(self._state_dir), "max_pins": self._pins + 10_000}
        return {"node": node, "virtual_services": [{**first, **leader}, second]}


class Turns:
    """The longest turn of the loop since it was asked last."""

    def __init__(self) -> None:
        self.seen: list[tuple[float, float]] = []

    async def watch(self) -> None:
        while True:
            wall, cpu = time.perf_counter(), time.thread_time()
            await trio.sleep(
                0.0005
            )  # the wait is of no interest below: a loop that spins would be a load of its own
            self.seen.append((time.thread_time() - cpu, time.perf_counter() - wall))

    def take(self) -> dict[str, float]:
        seen, self.seen = self.seen or [(0.0, 0.0)], []
        cpu, wall = sorted(each[0] for each in seen), sorted(each[1] for each in seen)
        at = len(cpu) * 999 // 1000
        return {
            "longest_cpu_ms": 1000 * cpu[-1],
            "p999_cpu_ms": 1000 * cpu[at],
            "longest_wall_ms": 1000 * wall[-1],
            "p999_wall_ms": 1000 * wall[at],
        }


def fill(half: Half, pins: int) -> None:
    group = half.plane.snapshot.groups[IKE]
    members = list(group.members.values())
    half.plane.deactivate()
    for number in range(pins):
        key = b"\x01" + number.to_bytes(8, "big")
        group.table.put((key,), members[number % SERVERS], int(half.plane.clock()))
        if number % 5_000 == 0:
            half.plane._flush()
    half.plane._flush()


async def active(half: Half, pins: int, go: int) -> dict[str, Any]:
    found: dict[str, Any] = {}
    turns = Turns()
    async with trio.open_nursery() as nursery:
        await nursery.start(half.run)
        fill(half, pins)
        await until(lambda: half.role == "active")
        os.write(go, b"x")
        nursery.start_soon(turns.watch)
        await trio.sleep(0.5)
        found["idle"] = turns.take()
        await until(lambda: half.status["peer"]["connected"], 0.001)
        began, used = time.perf_counter(), time.thread_time()
        await until(lambda: half.in_sync)
        found["resync_s"] = time.perf_counter() - began
        found["resync_cpu_s"] = time.thread_time() - used
        found["active_turns"] = turns.take()
        found["acks"] = await acknowledgements(half)
        found["ack_turns"] = turns.take()
        status = half.status
        found["slowest"] = status["slowest"]
        found["replication"] = {
            k: status["replication"][k] for k in ("desyncs", "resyncs", "ack_p50", "counts")
        }
        nursery.cancel_scope.cancel()
    return found


async def acknowledgements(half: Half) -> dict[str, float]:
    group = half.plane.snapshot.groups[IKE]
    member = next(iter(group.members.values()))
    outlet = half.plane.pairing.outlet  # type: ignore[union-attr]
    waits, release = [], outlet.release
    acked = trio.Event()

    def released(sequence: int) -> None:
        release(sequence)
        acked.set()

    outlet.release = released  # type: ignore[method-assign]
    for _ in range(ASKED):
        acked = trio.Event()
        began = time.perf_counter()
        group.table.put((b"\x02" + secrets.token_bytes(8),), member, int(half.plane.clock()))
        half.plane._flush()
        with trio.move_on_after(1):
            await acked.wait()
        waits.append(time.perf_counter() - began)
        await trio.sleep(0.002)
    waits.sort()
    return {f"p{p}_ms": 1000 * waits[len(waits) * p // 100] for p in (50, 90, 99)}


async def standby(half: Half, pins: int, done: int) -> dict[str, Any]:
    turns = Turns()
    async with trio.open_nursery() as nursery:
        await nursery.start(half.run)
        await until(lambda: half.status.get("peer", {}).get("connected") is True, 0.001)
        nursery.start_soon(turns.watch)
        used = time.thread_time()
        table = half.plane.snapshot.groups[IKE].table
        await until(lambda: len(table) >= pins and half.in_sync)
        found: dict[str, Any] = {"standby_turns": turns.take(), "slowest": half.status["slowest"]}
        found["resync_cpu_s"] = time.thread_time() - used
        await trio.lowlevel.wait_readable(done)
        nursery.cancel_scope.cancel()
    return found


def main() -> None:
    pins = int(sys.argv[1]) if len(sys.argv) > 1 else PINS
    structlog.configure(logger_factory=structlog.PrintLoggerFactory(sys.stderr))
    with tempfile.TemporaryDirectory() as folder:
        couple = Couple(Plan(Path(folder) / "state", pins), Path(folder))  # type: ignore[arg-type]
        one, other = couple.halves
        (go, going), (done, finished), (told, telling) = os.pipe(), os.pipe(), os.pipe()
        child = os.fork()
        if child == 0:
            os.close(finished)
            os.read(go, 1)
            os.write(telling, json.dumps(trio.run(standby, other, pins, done)).encode())
            os._exit(0)
        found = {"pins": pins, **trio.run(active, one, pins, going)}
        os.close(finished)
        os.waitpid(child, 0)
        print(json.dumps({"active": found, "standby": json.loads(os.read(told, 65_536))}, indent=2))


if __name__ == "__main__":
    main()
