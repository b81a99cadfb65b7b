"""``sapin cluster``: what it makes on disk, and what it shows of a daemon; a control server that is not one stands in."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import trio
from typer.testing import CliRunner, Result

from sapin.api import control
from sapin.api.cli import app
from sapin.api.refused import Refused
from sapin.cluster.membership import Folder
from sapin.cluster.tokens import Token

NETWORK = f"127.{140 + os.getpid() % 100}"
NOW = time.time()
_ports = count(30_000 + os.getpid() % 1_000, 2)
SYNCED: dict[str, Any] = {
    "enabled": True,
    "cluster": "0" * 32,
    "node": "lb-a",
    "role": "active",
    "state": "active",
    "epoch": 7,
    "peer": {
        "name": "lb-b",
        "connected": True,
        "role": "standby",
        "link": "198.19.0.2",
        "last_heard": 0.012,
    },
    "replication": {
        "state": "in sync",
        "sequence": 12_345,
        "acked": 12_340,
        "lag": 5,
        "ack_p50": 0.00042,
        "digest": "00000000deadbeef",
        "resyncs": 2,
        "divergences": 0,
        "desyncs": 1,
    },
    "last_failover": {
        "cause": "process ended",
        "at": NOW,
        "duration": 0.021,
        "in_sync": True,
        "pins": 1_000,
        "answered": 990,
    },
    "virtual_addresses": [{"address": "198.18.0.1/24", "device": "front", "here": True}],
    "alarms": [],
    "refused": {"handshake": 3, "half-open": 0},
}
EVENTS = [
    {"at": NOW - 1, "name": "peer lost", "fields": {"peer": "lb-b"}},
    {"at": NOW, "name": "takeover", "fields": {"epoch": 7, "cause": "process ended"}},
]


@pytest.fixture
def folder() -> Iterator[Path]:
    with TemporaryDirectory(prefix="sapin-") as name:
        yield Path(name)


@contextmanager
def daemon(folder: Path, calls: Mapping[str, Any]) -> Iterator[None]:
    """Answers on the control socket of a state directory."""
    ready, scope = threading.Event(), trio.CancelScope()
    token: list[trio.lowlevel.TrioToken] = []

    async def main() -> None:
        token.append(trio.lowlevel.current_trio_token())
        with scope:
            async with trio.open_nursery() as nursery:
                await nursery.start(control.serve, folder, calls)
                ready.set()

    thread = threading.Thread(target=trio.run, args=(main,))
    thread.start()
    try:
        assert ready.wait(10)
        yield
    finally:
        token[0].run_sync_soon(scope.cancel)
        thread.join(10)


def sapin(state_dir: Path, *arguments: object, code: int = 0, stdin: str | None = None) -> Result:
    given = ["cluster", *map(str, arguments), "--state-dir", str(state_dir)]
    result = CliRunner().invoke(app, given, prog_name="sapin", input=stdin)
    assert result.exit_code == code, result.output
    return result


def init(place: Path, *more: str, code: int = 0) -> Result:
    port = next(_ports)
    return sapin(
        place, "init", "--node", "lb-a", "--link", f"{NETWORK}.0.1", "--port", port, *more, code=code
    )


# making one


def test_init_prints_the_token_alone_on_standard_output(folder: Path) -> None:
    result = init(folder)
    token = Token.decode(result.stdout)
    own = Folder(folder).membership().own
    assert token.port == own.port + 1
    assert [str(link) for link in token.links] == [f"{NETWORK}.0.1"]
    assert "sapin cluster join --node NAME" in result.stderr
    for path in Folder(folder).path.iterdir():
        assert stat.S_IMODE(path.stat().st_mode) == 0o600, path


def test_init_twice_changes_nothing(folder: Path) -> None:
    init(folder)
    secret = Folder(folder).secret()
    assert "belongs to a cluster already" in init(folder, code=1).stderr
    assert Folder(folder).secret() == secret


@pytest.mark.parametrize(("node", "link"), [("a b", "127.0.0.1"), ("lb", "nowhere")])
def test_what_no_node_is(folder: Path, node: str, link: str) -> None:
    result = sapin(folder, "init", "--node", node, "--link", link, code=2)
    assert "a node is called like a host" in result.stderr


@contextmanager
def waiting(place: Path) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """``sapin cluster init --wait`` as a process of its own, and the token that it printed."""
    options = ["--node", "lb-a", "--link", f"{NETWORK}.0.1", "--port", str(next(_ports)), "--wait"]
    command = [sys.executable, "-m", "sapin.api.cli", "cluster", "init", *options, "--state-dir", str(place)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            assert process.stderr is not None
            token = process.stdout.readline()
            while "Waiting" not in process.stderr.readline():
                pass
            yield process, token
        finally:
            process.kill()


def join(place: Path, given: object, stdin: str | None = None, code: int = 0) -> Result:
    """Retried, because the other node may have just begun to listen."""
    arguments = ("join", "--node", "lb-b", "--link", f"{NETWORK}.0.2", "--token", given)
    command = ["cluster", *map(str, arguments), "--state-dir", str(place)]
    until = time.monotonic() + 10
    result = CliRunner().invoke(app, command, input=stdin)
    while "does not answer" in result.stderr and time.monotonic() < until:
        time.sleep(0.1)
        result = CliRunner().invoke(app, command, input=stdin)
    assert result.exit_code == code, result.output
    return result


@pytest.mark.parametrize("way", ["argument", "file", "standard input"])
def test_two_nodes_make_a_cluster(folder: Path, way: str) -> None:
    a, b = folder / "a", folder / "b"
    with waiting(a) as (process, text):
        given = {"argument": text.strip(), "file": folder / "token", "standard input": "-"}[way]
        (folder / "token").write_text(text)
        result = join(b, given, text if way == "standard input" else None)
        assert "lb-b and lb-a are a cluster" in result.stdout
        assert process.wait(10) == 0
        assert process.stderr is not None
        assert "lb-b has joined" in process.stderr.read()
    assert Folder(a).membership().members == Folder(b).membership().members

    failed = sapin(b, "leave", code=1)
    assert "does not answer" in failed.stderr
    assert Folder(b).is_member()
    left = sapin(b, "leave", "--force")
    assert "Run `sapin cluster forget lb-b` on lb-a" in left.stderr
    assert list(Folder(b).path.iterdir()) == []
    assert "has two nodes" in sapin(a, "token", code=1).stderr
    sapin(a, "forget", "lb-b")
    assert Folder(a).membership().peer is None
    Token.decode(sapin(a, "token").stdout)


def test_what_is_no_token_is_told(folder: Path) -> None:
    assert "this is no token" in join(folder, "rubbish", code=1).stderr
    assert "this is no token" in join(folder, "-", "", code=1).stderr
    assert not Folder(folder).is_member()


def test_certificates_are_rotated(folder: Path) -> None:
    assert "belongs to no cluster" in sapin(folder, "rotate-certificates", code=1).stderr
    init(folder)
    before = Folder(folder).credentials()
    assert "is valid until" in sapin(folder, "rotate-certificates").stdout
    after = Folder(folder).credentials()
    assert after.ca == before.ca
    assert after.certificate != before.certificate


def test_a_node_whose_daemon_runs_does_not_leave_by_mistake(folder: Path) -> None:
    init(folder)
    with daemon(folder, {"cluster-status": lambda: SYNCED}):
        assert "stop it" in sapin(folder, "leave", code=1).stderr
    assert Folder(folder).is_member()
    sapin(folder, "leave")
    assert not Folder(folder).is_member()


# a running pair


def shown(folder: Path, answer: Mapping[str, Any], code: int = 0) -> str:
    with daemon(folder, {"cluster-status": lambda: answer}):
        return str(sapin(folder, "status", code=code).stdout)


def test_status_of_a_pair_in_sync(folder: Path) -> None:
    out = shown(folder, SYNCED)
    rows = [line.split() for line in out.splitlines()]
    assert ["lb-a", "(this", "one)", "active", "active", "7"] in rows
    assert ["lb-b", "standby", "connected", "198.19.0.2", "12", "ms", "ago"] in rows
    assert ["198.18.0.1/24", "front", "yes"] in rows
    assert "Replication: in sync, sequence 12,345, acked 12,340, lag 5, ack p50 0.42 ms" in out
    assert "digest 00000000deadbeef; resyncs 2, desyncs 1" in out
    assert "took 21 ms; 990 of 1,000 pins answered again (99.0%)" in out
    assert "Refused on the link since the start: handshake 3\n" in out
    assert "ALARM" not in out


def test_status_of_a_pair_in_trouble(folder: Path) -> None:
    lost = {
        "name": "peer-lost",
        "since": NOW,
        "text": "lb-b is silent on the link and answers on the network",
    }
    peer = {"name": "lb-b", "connected": False, "role": None, "link": None, "last_heard": None}
    out = shown(folder, {**SYNCED, "alarms": [lost], "peer": peer, "last_failover": None}, code=1)
    assert out.startswith("ALARM peer-lost since ")
    assert "lb-b is silent on the link" in out
    assert ["lb-b", "unknown", "not", "connected", "-", "never"] in [
        line.split() for line in out.splitlines()
    ]
    assert "has taken nothing over" in out


def test_status_of_a_node_alone(folder: Path) -> None:
    out = shown(folder, {"enabled": False, "why": "the configuration has no [cluster] table"})
    assert out == "This node is not one of a pair: the configuration has no [cluster] table\n"


def test_status_and_events_as_json(folder: Path) -> None:
    with daemon(folder, {"cluster-status": lambda: SYNCED, "cluster-events": lambda limit: EVENTS[-limit:]}):
        assert json.loads(sapin(folder, "status", "--json").stdout) == SYNCED
        assert json.loads(sapin(folder, "events", "--json", "--limit", 1).stdout) == EVENTS[-1:]


def test_events(folder: Path) -> None:
    with daemon(folder, {"cluster-events": lambda limit: EVENTS[-limit:]}):
        lines = sapin(folder, "events").stdout.splitlines()
    assert lines[0].split() == ["Time", "Event"]
    assert lines[1].split()[-3:] == ["peer", "lost", "peer=lb-b"]
    assert "takeover" in lines[2]
    assert "epoch=7 cause=process ended" in lines[2]


def test_step_down(folder: Path) -> None:
    asked = []

    def step_down(force: bool = False) -> dict[str, bool]:
        asked.append(force)
        if not force:
            raise Refused("this node does not step down: lb-b is not in sync")
        return {"stepping_down": True}

    with daemon(folder, {"cluster-step-down": step_down}):
        assert "lb-b is not in sync" in sapin(folder, "step-down", code=1).stderr
        assert "the standby takes over" in sapin(folder, "step-down", "--force").stdout
    assert asked == [False, True]


@pytest.mark.parametrize("command", ["status", "step-down", "events"])
def test_without_a_daemon(folder: Path, command: str) -> None:
    assert "no daemon is running" in sapin(folder, command, code=3).stderr
