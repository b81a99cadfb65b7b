"""The command line and a daemon that runs: a process of its own, with real clients that send to it."""

from __future__ import annotations

import json
import os
import pty
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from sapin.api import client
from sapin.api.cli import app
from sapin.api.cli.common import complete_server, complete_service

NETWORK = f"127.{28 + os.getpid() % 100}"  # so that two runs at a time do not meet
BALANCER, ALICE, BOB, NOBODY = f"{NETWORK}.0.1", f"{NETWORK}.9.1", f"{NETWORK}.9.2", f"{NETWORK}.9.3"
SERVERS = ("gw1", f"{NETWORK}.1.1"), ("gw2", f"{NETWORK}.1.2")
PATIENCE = 30.0


class Daemon:
    """``sapin run`` and its clients."""

    def __init__(self, folder: Path, stack: ExitStack, *options: str, address: str = BALANCER) -> None:
        self.folder = folder
        self.address = address
        self.config = folder / "sapin.toml"
        self.log = folder / "log"
        self._stack = stack
        self.configure(*(name for name, _ in SERVERS))
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "sapin.api.cli", "run", str(self.config), *options], stderr=log
            )
        stack.callback(self.end)
        self.wait(lambda: self.answers() or self.process.poll() is not None)
        assert self.process.poll() is None, self.log.read_text()

    def configure(self, *servers: str) -> None:
        listed = ", ".join(
            f'{{ name = "{name}", address = "{address}" }}' for name, address in SERVERS if name in servers
        )
        self.config.write_text(f"""
            [node]
            name = "lb"
            state_dir = "{self.folder}"
            max_flows = 100
            receive_buffer = "64KiB"

            [[virtual_services]]
            name = "ike"
            address = "{self.address}"
            port = 10500
            framing = "ike"
            real_servers = [{listed}]

            [[virtual_services]]
            name = "ike-natt"
            address = "{self.address}"
            port = 14500
            framing = "ike-natt"
            follows = "ike"
        """)

    def answers(self) -> bool:
        try:
            client.call(self.folder, "status")
        except client.ControlError:
            return False
        return True

    def visit(self, address: str, *ports: int) -> None:
        wanted = client.call(self.folder, "status")["flows"] + len(ports)
        for port in ports:
            sock = self._stack.enter_context(socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
            sock.bind((address, 0))
            sock.sendto(b"hello", (self.address, port))
        self.wait(lambda: client.call(self.folder, "status")["flows"] == wanted)

    def end(self) -> int:
        self.process.terminate()
        try:
            return self.process.wait(PATIENCE)
        finally:
            self.process.kill()

    def sapin(self, *arguments: object, code: int = 0) -> Result:
        given = [str(argument) for argument in arguments]
        result = CliRunner().invoke(app, given, prog_name="sapin", env={"SAPIN_STATE_DIR": str(self.folder)})
        assert result.exit_code == code, result.output
        return result

    def json(self, *arguments: object) -> Any:
        return json.loads(self.sapin(*arguments, "--json").stdout)

    def server_of(self, address: str) -> str:
        (pin,) = self.json("pins", "--client", address)["pins"]
        return str(pin["server"])

    @staticmethod
    def wait(true: Any) -> None:
        until = time.monotonic() + PATIENCE
        while not true():
            assert time.monotonic() < until, "it did not happen"
            time.sleep(0.02)


@pytest.fixture(scope="module")
def farm() -> Iterator[Daemon]:
    """One daemon for all tests of this file, with a sink where each server is."""
    with TemporaryDirectory(prefix="sapin-") as folder, ExitStack() as stack:
        for _, address in SERVERS:
            for port in (10500, 14500):
                sock = stack.enter_context(socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
                sock.bind((address, port))
        yield Daemon(Path(folder), stack, "--log-format", "json")


@pytest.fixture
def daemon(farm: Daemon) -> Iterator[Daemon]:
    """The daemon without pins and flows, all servers enabled."""
    yield farm
    for name, _ in SERVERS:
        client.call(farm.folder, "set-state", server=name, state="enabled")
    client.call(farm.folder, "delete-pins", service="ike")
    farm.wait(lambda: client.call(farm.folder, "status")["flows"] == 0)


def test_status(daemon: Daemon) -> None:
    daemon.visit(ALICE, 10500, 14500)
    out = daemon.sapin("status", "--interval", "0.1").stdout
    assert f"{BALANCER}:14500/udp  ike" in out
    assert "least-connections, source-address, 1 of 1,000,000 pins" in out
    assert "Rates are those of the last 0." in out
    rows = {row[0]: row for line in out.splitlines() if (row := line.split())}
    server = daemon.server_of(ALICE)
    assert rows[server][:6] == [server, "unknown", "enabled", "1", "1", "2"]


def test_status_as_json_has_rates_when_they_were_asked_for(daemon: Daemon) -> None:
    plain = daemon.json("status", "--interval", "0")
    assert "rates" not in plain["groups"][0]["servers"][0]
    rated = daemon.json("status", "--interval", "0.1")
    assert rated["groups"][0]["servers"][0]["rates"].keys() == {
        "packets_in",
        "packets_out",
        "bytes_in",
        "bytes_out",
    }


def test_output_that_is_no_terminal_is_plain_and_whole(daemon: Daemon) -> None:
    environment = {**os.environ, "COLUMNS": "30", "SAPIN_STATE_DIR": str(daemon.folder)}
    done = subprocess.run(
        [sys.executable, "-m", "sapin.api.cli", "status", "--interval", "0"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=True,
    )
    assert "\x1b" not in done.stdout
    assert f"ike-natt  {BALANCER}:14500/udp  ike" in done.stdout
    assert all(line == line.rstrip() for line in done.stdout.splitlines())


def test_explain(daemon: Daemon) -> None:
    daemon.visit(ALICE, 10500, 14500)
    first, *rest = daemon.sapin("explain", ALICE).stdout.splitlines()
    server = daemon.server_of(ALICE)
    assert first.startswith(f"{ALICE} is on {server} because key src:{ALICE} is pinned there since ")
    assert [line.split()[0] for line in rest if line] == ["Service", "ike", "ike-natt"]
    assert "has neither a pin nor a flow" in daemon.sapin("explain", NOBODY).stdout
    assert "picked by least-connections" in daemon.sapin("explain", NOBODY).stdout
    assert daemon.json("explain", ALICE)["flows"][0]["server"] == server


def test_explain_refuses_what_makes_no_sense(daemon: Daemon) -> None:
    assert "is not an IPv4 or IPv6 address" in daemon.sapin("explain", "gw1", code=1).stderr
    assert (
        "there is no virtual service 'x'" in daemon.sapin("explain", ALICE, "--service", "x", code=1).stderr
    )
    daemon.sapin("explain", ALICE, "--port", "0", code=2)


def test_pins_are_listed_and_deleted(daemon: Daemon) -> None:
    daemon.visit(ALICE, 10500, 14500)
    daemon.visit(BOB, 10500)
    assert {pin["server"] for pin in daemon.json("pins")["pins"]} == {"gw1", "gw2"}
    header, *lines = daemon.sapin("pins", "--client", ALICE).stdout.splitlines()
    assert header.split() == ["Service", "Server", "Since", "Expires", "in", "Keys"]
    assert [line.split()[-1] for line in lines] == [f"src:{ALICE}"]
    limited = daemon.sapin("pins", "--limit", "1")
    assert len(limited.stdout.splitlines()) == 2
    assert "more than these 1" in limited.stderr
    assert daemon.json("pins", "--limit", "1")["more"] is True
    assert daemon.sapin("pins", "delete", "--key", f"src:{BOB}").stdout == "1 pin deleted\n"
    assert daemon.json("pins", "delete", "--server", daemon.server_of(ALICE)) == {"deleted": 1}
    assert daemon.json("pins")["pins"] == []


def test_a_server_is_drained_disabled_and_enabled(daemon: Daemon) -> None:
    daemon.visit(ALICE, 10500)
    drained = daemon.server_of(ALICE)
    other = next(name for name, _ in SERVERS if name != drained)
    out = daemon.sapin("server", "drain", drained).stdout
    assert out.startswith(
        f"{drained} is draining on ike, ike-natt: it keeps the clients that are pinned to it (1)"
    )
    daemon.visit(BOB, 10500)
    assert (daemon.server_of(ALICE), daemon.server_of(BOB)) == (drained, other)
    assert f"{other} is disabled" in daemon.sapin("server", "disable", other, "--service", "ike").stdout
    assert daemon.server_of(ALICE) == drained
    told = daemon.sapin("explain", NOBODY).stdout
    assert "would get no server (" in told
    assert f"{drained} is draining" in told
    assert f"{other} is disabled" in told
    assert daemon.json("server", "enable", "gw1")["state"] == "enabled"
    assert "there is: gw1, gw2" in daemon.sapin("server", "drain", "gw3", code=1).stderr


def test_reload(daemon: Daemon) -> None:
    assert daemon.sapin("reload").stdout == "nothing has changed\n"
    daemon.configure("gw1")
    assert daemon.json("reload")["changes"] == ["ike/gw2: removed", "ike-natt/gw2: removed"]
    daemon.configure("gw1", "gw2")
    assert daemon.sapin("reload").stdout.splitlines() == ["ike/gw2: added", "ike-natt/gw2: added"]
    daemon.config.write_text("[node]\nnam = 1")
    refused = daemon.sapin("reload", code=1).stderr
    assert 'node.nam = 1: unknown key; did you mean "name"?' in refused
    daemon.configure("gw1", "gw2")


def test_a_signal_reloads_too(daemon: Daemon) -> None:
    daemon.configure("gw2")
    daemon.process.send_signal(signal.SIGHUP)
    daemon.wait(lambda: len(daemon.json("status", "--interval", "0")["groups"][0]["servers"]) == 1)
    daemon.config.write_text("rubbish")
    daemon.process.send_signal(signal.SIGHUP)
    daemon.wait(lambda: "configuration not reloaded" in daemon.log.read_text())
    daemon.configure("gw1", "gw2")
    daemon.sapin("reload")


def test_plugins_are_listed_with_their_use(daemon: Daemon) -> None:
    used = {row["name"] for row in daemon.json("plugin", "list") if row["instances"]}
    assert used == {"least-connections", "source-address", "port"}
    assert "least-connections" in daemon.sapin("plugin", "list").stdout


class _Context:
    params: dict[str, Any]

    def __init__(self, **params: Any) -> None:
        self.params = params


def test_names_are_completed(daemon: Daemon, tmp_path: Path) -> None:
    here: Any = _Context(state_dir=daemon.folder)
    assert complete_server(here, "") == ["gw1", "gw2"]
    assert complete_server(here, "gw2") == ["gw2"]
    assert complete_service(here, "ike-") == ["ike-natt"]
    nowhere: Any = _Context(state_dir=tmp_path)
    assert complete_server(nowhere, "") == []


def test_top_draws_until_q_and_leaves_the_terminal_as_it_was(daemon: Daemon) -> None:
    parent, child = pty.openpty()
    try:
        command = [sys.executable, "-m", "sapin.api.cli", "top", "--state-dir", str(daemon.folder)]
        process = subprocess.Popen(
            command, stdin=child, stdout=child, stderr=child, env={**os.environ, "TERM": "xterm"}
        )
        try:
            drawn = _read_until(parent, "q ends")
            assert "\x1b[?1049h" in drawn, "the alternate screen"
            os.write(parent, b"x")
            os.write(parent, b"q")
            left = _read_until(parent, "\x1b[?1049l")
            assert "\x1b[?25h" in left, "the cursor is shown again"
            assert process.wait(PATIENCE) == 0
        finally:
            process.kill()
            process.wait()
    finally:
        os.close(parent)
        os.close(child)


def _read_until(fd: int, text: str) -> str:
    seen = ""
    until = time.monotonic() + PATIENCE
    while text not in seen:
        ready, _, _ = select.select([fd], [], [], max(0.0, until - time.monotonic()))
        assert ready, f"{text!r} did not appear in {seen!r}"
        seen += os.read(fd, 65_536).decode(errors="replace")
    return seen


def test_it_logs_as_asked_and_ends_when_asked() -> None:
    with TemporaryDirectory(prefix="sapin-") as folder, ExitStack() as stack:
        options = ("--log-format", "json", "--log-level", "warning")
        daemon = Daemon(Path(folder), stack, *options, address=f"{NETWORK}.0.2")
        assert daemon.end() == 0
        lines = [json.loads(line) for line in daemon.log.read_text().splitlines()]
        assert all(line["level"] in ("warning", "error") for line in lines)
        assert not client.socket_path(daemon.folder).exists()
