"""The command line by itself: what needs no daemon, and what happens where there is none."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from typer.testing import CliRunner, Result

from sapin.api.cli import app, common
from sapin.api.client import ControlError

VALID = """
[node]
name = "lb"
state_dir = "{state_dir}"

[[virtual_services]]
name = "ike"
address = "127.0.0.1"
port = 500
scheduler = {{ plugin = "maglev" }}
checks = ["ike"]
real_servers = [{{ name = "gw1", address = "127.0.1.1" }}, {{ name = "gw2", address = "127.0.1.2", weight = 0 }}]

[[virtual_services]]
name = "ike-natt"
address = "127.0.0.1"
port = 4500
follows = "ike"
"""
FAULTY = """
[node]
name = "lb"
state_dir = "{state_dir}"
rubbish = [1]

[[virtual_services]]
name = "ike"
address = "127.0.0.1"
port = 500
persistence = {{ plugin = "source-adress", timeout = 0 }}
real_servers = [{{ name = "gw1", address = "127.0.1.1", weight = -1 }}]
"""


@pytest.fixture(autouse=True)
def _no_environment(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    monkeypatch.delenv("SAPIN_CONFIG", raising=False)
    monkeypatch.delenv("SAPIN_STATE_DIR", raising=False)
    monkeypatch.setattr(common, "DEFAULT_CONFIG", folder / "etc" / "sapin.toml")
    monkeypatch.setattr(common, "DEFAULT_STATE_DIR", folder / "var")


@pytest.fixture
def folder() -> Iterator[Path]:
    with TemporaryDirectory(prefix="sapin-") as name:
        yield Path(name)


@pytest.fixture
def valid(folder: Path) -> Path:
    path = folder / "valid.toml"
    path.write_text(VALID.format(state_dir=folder))
    return path


@pytest.fixture
def faulty(folder: Path) -> Path:
    path = folder / "faulty.toml"
    path.write_text(FAULTY.format(state_dir=folder))
    return path


def sapin(*arguments: object, code: int = 0) -> Result:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments], prog_name="sapin")
    assert result.exit_code == code, result.output
    return result


# check


def test_a_valid_file_is_summed_up(valid: Path) -> None:
    out = sapin("check", valid).stdout
    assert out.startswith(f"{valid} is valid.\n")
    for text in ("127.0.0.1:500/udp", "maglev", "source-address, pins for 8 h", "check ike every 5 s"):
        assert text in out
    assert "127.0.1.2:500       0  enabled" in out
    assert "follows ike" in out


def test_every_fault_is_listed(faulty: Path) -> None:
    result = sapin("check", faulty, code=1)
    lines = result.stdout.splitlines()
    assert len(lines) == 4
    assert (
        lines[0]
        == "node.rubbish = […]: unknown key; known are name, state_dir, max_pins, max_flows, receive_buffer"
    )
    assert 'did you mean "source-address"?' in result.stdout
    assert result.stderr == f"sapin: {faulty} has 4 faults; none of it is used until that is mended\n"


def test_check_prints_json(valid: Path, faulty: Path) -> None:
    good = json.loads(sapin("check", valid, "--json").stdout)
    assert good["valid"] is True
    assert good["virtual_services"][0]["scheduler"]["plugin"] == "maglev"
    bad = json.loads(sapin("check", faulty, "--json", code=1).stdout)
    assert bad["valid"] is False
    assert [fault.keys() for fault in bad["faults"]] == [{"path", "value", "reason"}] * 4


def test_the_file_that_is_checked_may_come_from_the_environment(
    valid: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SAPIN_CONFIG", str(valid))
    assert "is valid" in sapin("check").stdout


def test_a_file_that_is_not_there(folder: Path) -> None:
    result = sapin("check", folder / "none.toml", code=1)
    assert result.stderr == (
        f"sapin: {folder / 'none.toml'} cannot be read: No such file or directory; "
        "`sapin init ikev2` writes one to start from\n"
    )
    assert str(common.DEFAULT_CONFIG) in sapin("check", code=1).stderr


def test_it_says_that_nobody_takes_clients(folder: Path) -> None:
    path = folder / "idle.toml"
    path.write_text(VALID.format(state_dir=folder).replace('"127.0.1.1"', '"127.0.1.1", state = "draining"'))
    assert "No server takes new clients" in sapin("check", path).stdout


# init


def test_init_writes_what_check_finds_valid(folder: Path) -> None:
    path = folder / "new.toml"
    servers = ("--server", "198.51.100.1", "--server", "198.51.100.2")
    out = sapin("init", "ikev2", "--vip", "192.0.2.1", *servers, "--output", path).stdout
    assert out == f"Wrote {path}. Next: edit it, then `sapin check {path}` and `sapin run {path}`.\n"
    assert "198.51.100.2:500" in sapin("check", path).stdout


def test_init_prints_by_default(folder: Path) -> None:
    path = folder / "piped.toml"
    path.write_text(sapin("init", "ikev2", "--vip", "192.0.2.1", "--server", "198.51.100.1").stdout)
    sapin("check", path)


def test_init_replaces_nothing_unasked(valid: Path) -> None:
    before = valid.read_text()
    arguments = ("init", "ikev2", "--vip", "192.0.2.1", "--server", "198.51.100.1", "--output", valid)
    assert "--force" in sapin(*arguments, code=1).stderr
    assert valid.read_text() == before
    sapin(*arguments, "--force")
    assert valid.read_text() != before


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--vip", "192.0.2.x", "--server", "198.51.100.1"), "virtual address '192.0.2.x' must be an IPv4"),
        (("--vip", "192.0.2.1", "--server", "192.0.2.1"), "is given twice"),
        (("--vip", "192.0.2.1"), "--server"),
        ((), "--vip"),
    ],
)
def test_init_says_what_is_wrong(arguments: tuple[str, ...], says: str) -> None:
    assert says in sapin("init", "ikev2", *arguments, code=2).stderr


# plugin


def test_installed_plugins_are_listed_without_a_daemon() -> None:
    rows = json.loads(sapin("plugin", "list", "--json").stdout)
    assert {"kind": "scheduler", "name": "maglev"}.items() <= rows[3].items()
    assert "weighted-response-time" in sapin("plugin", "list").stdout


def test_a_new_plugin_is_written(folder: Path) -> None:
    out = sapin("plugin", "new", "scheduler", "first-fit", "--directory", folder / "new").stdout
    assert (folder / "new" / "pyproject.toml").exists()
    assert "pip install" in out
    assert (
        "--directory"
        in sapin("plugin", "new", "scheduler", "other", "--directory", folder / "new", code=1).stderr
    )
    assert "schedule" in sapin("plugin", "new", "schedule", "other", code=2).stderr


# no daemon


@pytest.mark.parametrize(
    "command",
    [
        "status",
        "explain 192.0.2.1",
        "pins",
        "pins delete --server gw1",
        "server drain gw1",
        "server disable gw1",
        "server enable gw1",
        "reload",
    ],
)
def test_without_a_daemon_a_command_says_what_to_do(command: str, folder: Path) -> None:
    result = sapin(*command.split(), "--state-dir", folder, code=3)
    assert result.stdout == ""
    assert result.stderr == (
        f"sapin: no daemon is running with state directory {folder}: start `sapin run`, "
        "or name another with --state-dir or --config\n"
    )


@pytest.mark.parametrize(
    ("kind", "code"),
    [("refused", 1), ("unknown", 1), ("down", 3), ("denied", 4), ("silent", 5), ("fault", 5), ("busy", 5)],
)
def test_each_failure_has_its_exit_code(kind: str, code: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise ControlError(kind, "it did not work")

    monkeypatch.setattr("sapin.api.client.call", fail)
    assert sapin("status", code=code).stderr == "sapin: it did not work\n"


def test_wrong_usage_has_its_exit_code() -> None:
    for arguments in (["nonsense"], ["status", "--nonsense"], ["explain"], ["status", "--interval", "-1"]):
        sapin(*arguments, code=2)
    assert "give --service" in sapin("pins", "delete", code=2).stderr
    assert "options go after" in sapin("pins", "--server", "gw1", "delete", code=2).stderr
    assert "is none" in sapin("top", code=2).stderr


# where the daemon is


def test_the_daemon_is_found_by_what_was_said_nearest(
    folder: Path, monkeypatch: pytest.MonkeyPatch, valid: Path
) -> None:
    given, named, usual = folder / "given", folder / "named", folder / "usual"
    assert common.find_daemon(None, None) == common.DEFAULT_STATE_DIR
    common.DEFAULT_CONFIG.parent.mkdir()
    common.DEFAULT_CONFIG.write_text(f'[node]\nstate_dir = "{usual}"\nfaulty = true')
    assert common.find_daemon(None, None) == usual
    monkeypatch.setenv("SAPIN_CONFIG", str(valid))
    assert common.find_daemon(None, None) == folder
    monkeypatch.setenv("SAPIN_STATE_DIR", str(named))
    assert common.find_daemon(None, None) == named
    assert common.find_daemon(None, valid) == folder
    assert common.find_daemon(given, valid) == given


@pytest.mark.parametrize("text", ["", "node = []", "[node]\nstate_dir = 1"])
def test_a_configuration_that_names_no_directory_means_the_usual_one(text: str, folder: Path) -> None:
    path = folder / "odd.toml"
    path.write_text(text)
    assert common.find_daemon(None, path) == common.DEFAULT_STATE_DIR


@pytest.mark.parametrize("content", [b"name = ", b"\x00", b"\xff", None])
def test_a_configuration_that_cannot_be_read_is_told(content: bytes | None, folder: Path) -> None:
    path = folder / "odd.toml"
    if content is not None:
        path.write_bytes(content)
    assert "name the daemon's directory with --state-dir" in sapin("status", "--config", path, code=1).stderr


# run


def test_run_refuses_a_faulty_configuration(faulty: Path) -> None:
    result = sapin("run", faulty, code=1)
    assert "node.rubbish" in result.stderr
    assert result.stderr.endswith(f"sapin: {faulty} has 4 faults; none of it is used until that is mended\n")


def test_run_says_why_it_cannot_start(valid: Path) -> None:
    valid.write_text(valid.read_text().replace('address = "127.0.0.1"', 'address = "192.0.2.1"'))
    assert "cannot listen on UDP 192.0.2.1:500" in sapin("run", valid, code=1).stderr


# the program


COMMANDS = (
    "run check init status top explain reload pins server plugin demo",
    "init ikev2",
    "pins delete",
    "server drain disable enable",
    "plugin list new",
)


def test_every_command_has_help() -> None:
    out = sapin("--help").stdout
    assert "Exit codes" in out
    top, *nested = (line.split() for line in COMMANDS)
    for command in [[name] for name in top] + [[group, name] for group, *names in nested for name in names]:
        assert command[0] in out
        assert "Usage" in sapin(*command, "-h").stdout


def test_the_version_is_told() -> None:
    assert sapin("--version").stdout.startswith("sapin 0.")


def run_program(code: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env={**os.environ, **environment},
    )
    assert done.stderr == ""
    return done.stdout


def test_a_command_that_asks_the_daemon_imports_nothing_slow() -> None:
    slow = ("pydantic", "rich.console", "sapin.core", "structlog", "trio")
    loaded = run_program(
        f"import sys, sapin.api.cli; print([name for name in {slow} if name in sys.modules])"
    )
    assert loaded == "[]\n"


def test_commands_are_completed() -> None:
    completed = run_program(
        "from sapin.api.cli import main; main()",
        _SAPIN_COMPLETE="complete_bash",
        COMP_WORDS="sapin server d",
        COMP_CWORD="2",
    )
    assert completed.split() == ["drain", "disable"]


def test_the_completion_can_be_installed() -> None:
    script = run_program("from sapin.api.cli import main; main()", _SAPIN_COMPLETE="source_bash")
    assert "complete" in script
    assert "_SAPIN_COMPLETE=complete_bash" in script
