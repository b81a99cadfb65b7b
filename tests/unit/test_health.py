"""Rise and fall against a model that looks at the whole history, and the verdict over several checks."""

from __future__ import annotations

from itertools import permutations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sapin.core.health import CheckState, combine
from sapin.core.model import Health

HEALTHY, UNHEALTHY, UNKNOWN = Health.HEALTHY, Health.UNHEALTHY, Health.UNKNOWN


def after(results: str, rise: int = 2, fall: int = 3) -> list[Health]:
    """The health after each result: + is a success, - a failure."""
    state, found = CheckState(rise, fall), []
    for result in results:
        state = state.after(result == "+")
        found.append(state.health)
    return found


def by_history(results: str, rise: int, fall: int) -> list[Health]:
    """The same by looking back: the last results that are all alike and enough decide, else nothing changes."""
    found: list[Health] = []
    for end in range(1, len(results) + 1):
        before = found[-1] if found else UNKNOWN
        seen = results[:end]
        if before is not HEALTHY and seen.endswith("+" if before is UNKNOWN else "+" * rise):
            found.append(HEALTHY)
        elif before is not UNHEALTHY and seen.endswith("-" * fall):
            found.append(UNHEALTHY)
        else:
            found.append(before)
    return found


@pytest.mark.parametrize(
    ("results", "expected"),
    [
        ("+", [HEALTHY]),
        ("-", [UNKNOWN]),
        ("---", [UNKNOWN, UNKNOWN, UNHEALTHY]),
        ("--+", [UNKNOWN, UNKNOWN, HEALTHY]),
        ("+--+--", [HEALTHY] * 6),
        ("+---", [HEALTHY, HEALTHY, HEALTHY, UNHEALTHY]),
        ("---+-+", [UNKNOWN, UNKNOWN, UNHEALTHY, UNHEALTHY, UNHEALTHY, UNHEALTHY]),
        ("---++", [UNKNOWN, UNKNOWN, UNHEALTHY, UNHEALTHY, HEALTHY]),
    ],
)
def test_rise_and_fall(results: str, expected: list[Health]) -> None:
    assert after(results) == expected


@given(st.text("+-", max_size=60), st.integers(1, 5), st.integers(1, 5))
def test_rise_and_fall_are_as_the_history_says(results: str, rise: int, fall: int) -> None:
    assert after(results, rise, fall) == by_history(results, rise, fall)


@given(st.text("+-", max_size=60), st.integers(1, 5), st.integers(1, 5))
def test_the_streak_never_reaches_what_changes_the_health(results: str, rise: int, fall: int) -> None:
    state = CheckState(rise, fall)
    for result in results:
        state = state.after(result == "+")
        assert 0 <= state.streak < (rise if state.health is UNHEALTHY else fall)


def test_a_state_is_a_value() -> None:
    state = CheckState(2, 3)
    state.after(False)
    assert state == CheckState(2, 3)


@pytest.mark.parametrize(
    ("states", "expected"),
    [
        ((), UNKNOWN),
        ((HEALTHY,), HEALTHY),
        ((HEALTHY, HEALTHY), HEALTHY),
        ((HEALTHY, UNKNOWN), UNKNOWN),
        ((HEALTHY, UNHEALTHY), UNHEALTHY),
        ((UNKNOWN, UNHEALTHY), UNHEALTHY),
        ((HEALTHY, UNKNOWN, UNHEALTHY), UNHEALTHY),
    ],
)
def test_the_worst_check_decides(states: tuple[Health, ...], expected: Health) -> None:
    assert {combine(order) for order in permutations(states)} == {expected}
