"""The markers of conftest.py, tried on small test files in runs of their own."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

pytest_plugins = ["pytester"]

ROOT = Path(__file__).parents[2]
MISSING = "@pytest.mark.programs('sh', 'no-such-program')"

Run = Callable[..., pytest.RunResult]


@pytest.fixture
def run(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Runs one test with a decorator, under our conftest and our settings."""
    tests = pytester.mkdir("tests")
    for name in ["pyproject.toml", "tests/conftest.py"]:
        pytester.path.joinpath(name).write_text((ROOT / name).read_text())

    def go(decorator: str, *, ci: bool = False) -> pytest.RunResult:
        monkeypatch.setenv("CI", "true" if ci else "")
        tests.joinpath("test_it.py").write_text(f"import pytest\n{decorator}\ndef test_it(): pass\n")
        return pytester.runpytest_subprocess()

    return go


def test_missing_program_skips_and_says_which(run: Run):
    result = run(MISSING)
    result.assert_outcomes(skipped=1)
    result.stdout.fnmatch_lines("SKIPPED*needs the program no-such-program*")


def test_missing_program_fails_in_ci(run: Run):
    result = run(MISSING, ci=True)
    result.assert_outcomes(errors=1)
    result.stdout.fnmatch_lines("CI lacks what this test needs: needs the program no-such-program*")


@pytest.mark.parametrize("ci", [False, True])
def test_present_program_runs(run: Run, ci: bool):
    run("@pytest.mark.programs('sh')", ci=ci).assert_outcomes(passed=1)


def test_root_means_that_the_kernel_gives_a_network_namespace(run: Run):
    allowed = subprocess.run(["unshare", "--net", "true"], capture_output=True, check=False).returncode == 0
    run("@pytest.mark.root").assert_outcomes(passed=int(allowed), skipped=int(not allowed))


def test_misspelt_marker_is_refused(run: Run):
    assert run("@pytest.mark.rooot").ret is pytest.ExitCode.INTERRUPTED
