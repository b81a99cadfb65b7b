"""A plugin that was just scaffolded is found and keeps its contract, before its author has changed a line."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from sapin.api.scaffold import new
from sapin.core.contracts import KINDS


def run(directory: Path, *command: str, path: str = "") -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": path, "PYTHONDONTWRITEBYTECODE": "1"}
    return subprocess.run(
        [sys.executable, "-m", *command],
        cwd=directory,
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_its_own_test_passes(tmp_path: Path) -> None:
    for kind in KINDS:
        new(kind, f"my-{kind}", tmp_path / kind)
    path = os.pathsep.join(str(tmp_path / kind) for kind in KINDS)
    done = run(tmp_path, "pytest", "-q", "-p", "no:cacheprovider", path=path)
    assert done.returncode == 0, done.stdout
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed
    assert int(passed[1]) > 5 * len(KINDS)


def test_the_guides_example_passes_its_own_tests(tmp_path: Path, pytestconfig: pytest.Config) -> None:
    guide = (pytestconfig.rootpath / "docs" / "plugins.md").read_text()
    plugin, tests, *_ = re.findall(r"^```python\n(.*?)^```", guide, re.DOTALL | re.MULTILINE)
    new("scheduler", "first-fit", tmp_path)
    (tmp_path / "sapin_first_fit.py").write_text(plugin)
    (tmp_path / "tests" / "test_sapin_first_fit.py").write_text(tests)
    done = run(tmp_path, "pytest", "-q", "-p", "no:cacheprovider", path=str(tmp_path))
    assert done.returncode == 0, done.stdout
    assert " passed" in done.stdout


@pytest.mark.parametrize("kind", KINDS)
def test_its_entry_point_is_registered_under_its_kind(kind: str, tmp_path: Path) -> None:
    new(kind, "first-fit", tmp_path)
    project = tomllib.loads((tmp_path / "pyproject.toml").read_text())
    assert project["project"]["entry-points"] == {KINDS[kind]: {"first-fit": "sapin_first_fit:FirstFit"}}
    assert project["tool"]["setuptools"]["py-modules"] == ["sapin_first_fit"]
    assert "class FirstFit:" in (tmp_path / "sapin_first_fit.py").read_text()


def test_it_is_tidy(tmp_path: Path) -> None:
    pytest.importorskip("ruff", reason="ruff is a tool of the developers")
    for kind in KINDS:
        new(kind, "first-fit", tmp_path / kind)
    rules = [
        "--select",
        "E,F,UP,B,D,SIM,RUF",
        "--ignore",
        "D107",
        "--config",
        "lint.pydocstyle.convention='google'",
    ]
    for command in (["check", *rules], ["format", "--check"]):
        done = run(tmp_path, "ruff", *command, "--line-length", "110", "--no-cache", ".")
        assert done.returncode == 0, done.stdout


def test_it_says_what_it_wrote(tmp_path: Path) -> None:
    written = new("check", "sstp", tmp_path / "somewhere" / "new")
    assert [path.relative_to(tmp_path / "somewhere" / "new").as_posix() for path in written] == [
        "pyproject.toml",
        "sapin_sstp.py",
        "tests/test_sapin_sstp.py",
    ]
    assert all(path.is_file() for path in written)


@pytest.mark.parametrize(
    "name", ["", "First", "first_fit", "-fit", "fit-", "a--b", "1st", "../fit", "a" * 41, "a\n"]
)
def test_bad_names_are_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="lower case words joined by hyphens"):
        new("scheduler", name, tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_unknown_kinds_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no plugin kind 'offload', only scheduler"):
        new("offload", "first-fit", tmp_path)


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    (tmp_path / "notes").write_text("mine")
    with pytest.raises(FileExistsError, match="is not empty"):
        new("scheduler", "first-fit", tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["notes"]
