"""Alarms: raised when something holds, cleared when it does not, each for long enough."""

from __future__ import annotations

import pytest

from sapin.cluster.alarms import HOLD, Alarms, Failover, Name


def changes(alarms: Alarms, now: float) -> list[tuple[Name, bool]]:
    return [(change.alarm.name, change.raised) for change in alarms.changes(now)]


@pytest.mark.parametrize("name", Name)
def test_an_alarm_is_raised_and_cleared_after_its_times(name: Name) -> None:
    alarms = Alarms()
    raise_after, clear_after = HOLD[name]
    alarms.set(name, True, "it is so", 10.0)
    if raise_after:
        assert not changes(alarms, 10.0 + raise_after - 0.01)
    assert changes(alarms, 10.0 + raise_after) == [(name, True)]
    assert [(alarm.name, alarm.since, alarm.text) for alarm in alarms.standing] == [(name, 10.0, "it is so")]
    assert not changes(alarms, 20.0)
    alarms.set(name, False, "", 30.0)
    if clear_after:
        assert not changes(alarms, 30.0 + clear_after - 0.01)
    assert changes(alarms, 30.0 + clear_after) == [(name, False)]
    assert not alarms.standing
    assert alarms.raised[name] == 1


def test_what_comes_and_goes_is_one_alarm() -> None:
    alarms = Alarms()
    told = []
    for tick in range(100):
        alarms.set(Name.TWO_ACTIVES, tick % 2 == 0, "two", float(tick))
        told += changes(alarms, float(tick))
    assert told == [(Name.TWO_ACTIVES, True)]


def test_what_holds_for_a_moment_only_is_none() -> None:
    alarms = Alarms()
    for tick in range(100):
        alarms.set(Name.CLOCK_SKEW, tick % 2 == 0, "skewed", float(tick))
        assert not changes(alarms, float(tick))


def test_a_standing_alarm_gets_the_text_of_now() -> None:
    alarms = Alarms()
    alarms.set(Name.CONFIG_CONFLICT, True, "first", 1.0)
    changes(alarms, 1.0)
    alarms.set(Name.CONFIG_CONFLICT, True, "second", 2.0)
    changes(alarms, 2.0)
    assert [alarm.text for alarm in alarms.standing] == ["second"]


def test_the_survival_of_a_failover_is_what_answered_of_what_was_taken_over() -> None:
    failover = Failover("silence", 3, 10.0, 0.08, synced=True, pins=200, answered=150)
    assert failover.survival == 0.75
    assert Failover("silence", 3, 10.0, 0.08, synced=True).survival == 1.0
