"""The markers of conftest.py, tried in runs of their own under our conftest and our settings."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

pytest_plugins = ["pytester"]
pytestmark = pytest.mark.programs("ip", "unshare")

ROOT = Path(__file__).parents[2]

EXAMPLES = """
import pytest

@pytest.mark.programs("sh")
def test_present(): pass

@pytest.mark.programs("sh", "no-such-program")
def test_missing(): pass

@pytest.mark.root("network namespaces")
def test_root(): pass
"""


def run(pytester: pytest.Pytester) -> tuple[str, dict[str, int]]:
    """The output and the outcomes of EXAMPLES."""
    pytester.mkdir("tests").joinpath("test_examples.py").write_text(EXAMPLES)
    for name in ["pyproject.toml", "tests/conftest.py"]:
        pytester.path.joinpath(name).write_text((ROOT / name).read_text())
    result = pytester.runpytest_subprocess()
    return result.stdout.str(), result.parseoutcomes()


def namespaces_allowed() -> bool:
    """Asked of the kernel, where conftest.py reads the process's capabilities."""
    command = ["unshare", "--net", "ip", "link", "set", "lo", "up"]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


def test_what_the_machine_lacks_is_skipped_with_the_reason(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CI", raising=False)
    output, outcomes = run(pytester)
    assert "needs the program no-such-program" in output
    assert outcomes == ({"passed": 2, "skipped": 1} if namespaces_allowed() else {"passed": 1, "skipped": 2})


def test_what_ci_lacks_is_an_error(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CI", "true")
    output, outcomes = run(pytester)
    assert "CI lacks what this test needs: needs the program no-such-program" in output
    assert outcomes.get("skipped") is None
    assert outcomes["errors"] == (1 if namespaces_allowed() else 2)
