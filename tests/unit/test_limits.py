"""File descriptors: the soft limit is raised as far as may be, and what fits is told."""

from __future__ import annotations

import resource
import subprocess
import sys

import pytest

from sapin.core.dataplane import limits
from sapin.core.dataplane.limits import CEILING, RESERVED, flows_that_fit

PROGRAM = """
import resource
from sapin.core.dataplane.limits import raise_descriptor_limit
resource.setrlimit(resource.RLIMIT_NOFILE, ({soft}, {hard}))
print(raise_descriptor_limit(), *resource.getrlimit(resource.RLIMIT_NOFILE))
"""


def raised(soft: int, hard: int) -> list[int]:
    """The limit that is told, and those in force, in a process that began with these."""
    program = PROGRAM.format(soft=soft, hard=hard)
    return [int(n) for n in subprocess.check_output([sys.executable, "-I", "-c", program]).split()]


def test_the_soft_limit_is_raised_to_the_hard_one() -> None:
    assert raised(100, 400) == [400, 400, 400]


def test_a_soft_limit_that_is_there_stays() -> None:
    assert raised(400, 400) == [400, 400, 400]


@pytest.mark.parametrize(
    ("soft", "hard", "told"),
    [
        (1_024, 2_000_000, CEILING),
        (1_024, resource.RLIM_INFINITY, CEILING),
        (resource.RLIM_INFINITY, resource.RLIM_INFINITY, CEILING),
        (2_000_000, 4_000_000, CEILING),
        (1_024, 524_288, 524_288),
    ],
)
def test_what_is_told_has_a_ceiling(monkeypatch: pytest.MonkeyPatch, soft: int, hard: int, told: int) -> None:
    """Limits that a test cannot have for real."""
    state = [(soft, hard)]
    monkeypatch.setattr(resource, "getrlimit", lambda what: state[-1])
    monkeypatch.setattr(resource, "setrlimit", lambda what, wanted: state.append(wanted))
    assert limits.raise_descriptor_limit() == told
    assert state[-1][1] == hard
    assert state[-1][0] >= told or state[-1][0] == resource.RLIM_INFINITY


@pytest.mark.parametrize(
    "error", [ValueError("not allowed to raise maximum limit"), OSError(1, "not permitted")]
)
def test_a_limit_that_may_not_be_raised_is_the_one_in_force(
    monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    """The kernel refuses any change if fs.nr_open was lowered below the hard limit (setrlimit(2), EPERM)."""

    def refuse(what: int, wanted: tuple[int, int]) -> None:
        raise error

    monkeypatch.setattr(resource, "getrlimit", lambda what: (1_024, 2_000_000))
    monkeypatch.setattr(resource, "setrlimit", refuse)
    assert limits.raise_descriptor_limit() == 1_024


@pytest.mark.parametrize(
    ("descriptors", "listeners", "flows"),
    [(1_024, 2, 1_024 - RESERVED - 2), (RESERVED + 2, 2, 0), (10, 2, 0)],
)
def test_flows_that_fit(descriptors: int, listeners: int, flows: int) -> None:
    assert flows_that_fit(descriptors, listeners) == flows
