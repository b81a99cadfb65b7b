from __future__ import annotations

import os
import sys
from ipaddress import ip_address
from pathlib import Path

import pytest
import trio
from pydantic import ValidationError

from sapin.core.contracts import CheckResult, HealthCheck, Target
from sapin.core.model import Endpoint, Framing
from sapin.plugins.checks.exec import ExecCheck

TARGET = Target("gw1", Endpoint(ip_address("2001:db8::1"), 4500), Framing.NATT)


def check(*command: str) -> ExecCheck:
    return ExecCheck(ExecCheck.Config(command=list(command)))


def shell(script: str) -> ExecCheck:
    return check("/bin/sh", "-c", script)


async def found(probe: ExecCheck) -> CheckResult:
    with trio.fail_after(10):
        return await probe.check(TARGET)


async def ended(pid: int) -> None:
    """Returns when the process is dead, reaped or not."""
    try:
        descriptor = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    try:
        with trio.fail_after(5):
            await trio.lowlevel.wait_readable(descriptor)
    finally:
        os.close(descriptor)


def descriptors() -> int:
    return sum(1 for _ in Path("/proc/self/fd").iterdir())


@pytest.mark.parametrize(
    ("script", "healthy", "reason"),
    [
        ("exit 0", True, "exit status 0"),
        ("echo; echo ' load 0.3 '; echo more", True, "load 0.3"),
        ("exit 3", False, "exit status 3"),
        ("echo overloaded >&2; exit 1", False, "exit status 1: overloaded"),
        ("kill -9 $$", False, "ended by signal 9"),
        (r"printf 'red \033[31m \377'", True, "red ?[31m \N{REPLACEMENT CHARACTER}"),
    ],
)
async def test_exit_status_and_first_line(script: str, healthy: bool, reason: str) -> None:
    assert await found(shell(script)) == CheckResult(healthy, reason)


async def test_the_target_is_in_the_environment_and_input_is_empty() -> None:
    result = await found(shell('echo "$SAPIN_SERVER $SAPIN_ADDRESS $SAPIN_PORT $(cat)."'))
    assert result.reason == "gw1 2001:db8::1 4500 ."


async def test_arguments_meet_no_shell() -> None:
    assert (await found(check("/bin/echo", "$HOME; exit 1"))).reason == "$HOME; exit 1"


async def test_output_is_drained_and_bounded() -> None:
    script = "import sys; sys.stdout.write('x' * 5_000_000); sys.exit(7)"
    result = await found(check(sys.executable, "-c", script))
    assert result.reason == "exit status 7: " + "x" * 120


async def test_a_timeout_kills_the_whole_group(tmp_path: Path) -> None:
    pids = tmp_path / "pids"
    with pytest.raises(trio.TooSlowError), trio.fail_after(1):
        await shell(f"sleep 60 & echo $$ $! > {pids}; wait").check(TARGET)
    for pid in pids.read_text().split():
        await ended(int(pid))


async def test_a_background_child_does_not_hold_the_verdict(tmp_path: Path) -> None:
    pid = tmp_path / "pid"
    started = trio.current_time()
    result = await found(shell(f"sleep 60 & echo $! > {pid}; echo fine"))
    try:
        assert result == CheckResult(True, "fine")
        assert trio.current_time() - started < 3
    finally:
        os.kill(int(pid.read_text()), 9)


async def test_many_runs_leave_no_descriptor_behind() -> None:
    await found(shell("exit 0"))
    before = descriptors()
    for _ in range(5):
        await found(shell("exit 0"))
    assert descriptors() <= before


async def test_a_missing_program_says_nothing_about_the_server() -> None:
    with pytest.raises(RuntimeError, match=r"cannot run /nonexistent/program: No such file"):
        await found(check("/nonexistent/program"))


@pytest.mark.parametrize(
    "options", [{}, {"command": []}, {"command": "true"}, {"command": [""]}, {"cmd": ["true"]}]
)
def test_its_options_are_strict(options: dict[str, object]) -> None:
    assert isinstance(check("true"), HealthCheck)
    with pytest.raises(ValidationError):
        ExecCheck.Config.model_validate(options)
