"""Asks a program of the operator's own, as Nagios and keepalived do: exit status 0 means healthy.

The program gets ``SAPIN_SERVER`` (the real server's name), ``SAPIN_ADDRESS`` and ``SAPIN_PORT`` besides
the daemon's environment, no input, and no shell in between. The first line of its output is the reason.
When its time is over, it and all the processes of its group are killed.
"""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import Annotated

import trio
from pydantic import BaseModel, Field

from sapin.core.contracts import CheckResult, Target
from sapin.plugins.checks.common import first_line

_MAX_OUTPUT = 4_096
_READ_ON = 0.2  # seconds: a background child may hold the pipe open for ever
_REAP = 1.0  # seconds: a process in an uninterruptible system call outlives SIGKILL


class ExecCheck:
    """Healthy: the program ended with status 0."""

    class Config(BaseModel, extra="forbid"):
        """Options of the check."""

        command: list[Annotated[str, Field(min_length=1)]] = Field(min_length=1)
        """The program and its arguments."""

    def __init__(self, config: Config) -> None:
        self._command = config.command

    async def check(self, target: Target) -> CheckResult:
        """Run the program and read its verdict.

        Raises:
            RuntimeError: it cannot be started, which says nothing about the server.
        """
        output = bytearray()
        async with self._process(target) as process, trio.open_nursery() as nursery:
            nursery.start_soon(_collect, process, output)
            status = await process.wait()
            nursery.cancel_scope.deadline = trio.current_time() + _READ_ON
        return CheckResult(status == 0, _reason(status, first_line(bytes(output))))

    @asynccontextmanager
    async def _process(self, target: Target) -> AsyncIterator[trio.Process]:
        try:
            process = await trio.lowlevel.open_process(
                self._command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                env=os.environ | _environment(target),
                start_new_session=True,
            )
        except OSError as error:
            raise RuntimeError(f"cannot run {self._command[0]}: {error.strerror}") from error
        try:
            yield process
        finally:
            await _end(process)


def _environment(target: Target) -> dict[str, str]:
    return {
        "SAPIN_SERVER": target.server,
        "SAPIN_ADDRESS": str(target.endpoint.address),
        "SAPIN_PORT": str(target.endpoint.port),
    }


async def _collect(process: trio.Process, output: bytearray) -> None:
    # Reads to the end, so that the program never blocks on a full pipe, but keeps only the beginning.
    assert process.stdout is not None
    async for chunk in process.stdout:
        output += chunk[: _MAX_OUTPUT - len(output)]


async def _end(process: trio.Process) -> None:
    # Not reaped yet, so its number is still its own and that of its group.
    if process.returncode is None:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    with trio.move_on_after(_REAP, shield=True):
        await process.wait()
    if process.stdout is not None:
        with trio.CancelScope(shield=True):
            await process.stdout.aclose()


def _reason(status: int, line: str) -> str:
    if status == 0:
        return line or "exit status 0"
    how = f"ended by signal {-status}" if status < 0 else f"exit status {status}"
    return f"{how}: {line}" if line else how
