"""A stand-in for the daemon: keeps a guard, feeds it, and does what the lines of its standard input say.

It prints what the guard tells, with the seconds of the machine's monotonic clock.
"""

from __future__ import annotations

import json
import sys
import time

import trio

from sapin.cluster.guard import Setup
from sapin.cluster.takeover import ProcessGuard


def say(what: object) -> None:
    print(f"{time.monotonic():.6f} {what}", flush=True)


async def listen(guard: ProcessGuard) -> None:
    while True:
        say(await guard.told())


async def feed(guard: ProcessGuard) -> None:
    while True:
        guard.feed(3)
        await trio.sleep(0.025)


async def main() -> None:
    guard = ProcessGuard(Setup(**json.loads(sys.argv[1])))
    lines = trio.wrap_file(sys.stdin)
    async with guard, trio.open_nursery() as nursery:
        nursery.start_soon(listen, guard)
        nursery.start_soon(feed, guard)
        assert guard._process is not None
        say(f"guard {guard._process.pid}")
        async for line in lines:
            match line.strip():
                case "claim":
                    guard.claim(3)
                case "release":
                    guard.release()
                case "probe":
                    guard.probe()
                case "hang":
                    time.sleep(1)  # noqa: ASYNC251  # that is what a loop that hangs does
                case "pid":
                    say(f"guard {guard._process.pid}")
                case "strange":
                    say(f"strange {guard.strange}")
        nursery.cancel_scope.cancel()


trio.run(main)
