"""Sapin as a child of the demonstration: the daemon itself, asked through its control socket.

Run as a program, this module is that child: the daemon, which ends when its standard input does, so that it never
outlives the demonstration, however that ends.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import trio

from sapin.api import client, daemon

START = 30.0
"""Seconds that a start may take, on a machine that is busy otherwise."""
STOP = 5.0
MAX_LINE = 16 * 1024
_KEPT = 20

Log = Mapping[str, Any]


class DemoError(Exception):
    """The demonstration cannot go on; the text says why."""


class Balancer:
    """The daemon as a process.

    Args:
        folder: where its configuration and its state go.
        heed: gets each line of its log.
    """

    def __init__(self, folder: Path, heed: Callable[[Log], None]) -> None:
        self.config = folder / "sapin.toml"
        self.state_dir = folder / "state"
        self._heed = heed
        self._process: trio.Process | None = None
        self._last: deque[str] = deque(maxlen=_KEPT)

    async def start(self, nursery: trio.Nursery) -> None:
        """Start it, and wait until it answers.

        Raises:
            DemoError: it does not.
        """
        self.state_dir.mkdir(exist_ok=True)
        process = await trio.lowlevel.open_process(
            [sys.executable, "-m", __name__, str(self.config)], stdin=subprocess.PIPE, stderr=subprocess.PIPE
        )
        self._process = process
        nursery.start_soon(self._read, process)
        with trio.move_on_after(START):
            while process.poll() is None:
                await trio.sleep(0.02)
                try:
                    await self.call("status")
                except client.ControlError:
                    continue
                return
        raise DemoError("Sapin does not start:\n" + "\n".join(self._last))

    async def call(self, name: str, **arguments: Any) -> Any:
        """An operation.

        Raises:
            ControlError: it is not done.
        """
        ask = partial(client.call, self.state_dir, name, **arguments)
        return await trio.to_thread.run_sync(ask, abandon_on_cancel=True)

    async def kill(self) -> None:
        """End it in the middle of whatever it does."""
        if self._process is not None:
            self._process.kill()
            await self._process.wait()

    async def stop(self) -> None:
        """Ask it to end, and see to it."""
        if self._process is not None:
            self._process.terminate()
            with trio.move_on_after(STOP, shield=True):
                await self._process.wait()
            with trio.CancelScope(shield=True):
                await self.kill()

    async def _read(self, process: trio.Process) -> None:
        assert process.stderr is not None
        rest = b""
        async for chunk in process.stderr:
            *lines, rest = (rest + chunk).split(b"\n")
            rest = rest[:MAX_LINE]
            for line in lines:
                self._take(line.decode(errors="replace"))

    def _take(self, line: str) -> None:
        self._last.append(line)
        try:
            told = json.loads(line)
        except ValueError:
            return  # a traceback: it is in the log that is shown if this ends badly
        self._heed(told)


def _end_with_parent() -> None:
    sys.stdin.buffer.read()
    os.kill(os.getpid(), signal.SIGTERM)


def main() -> None:
    """Be the daemon."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    daemon.set_up_logging(json=True, level="info")
    daemon.run(Path(sys.argv[1]))


if __name__ == "__main__":
    main()
