"""The table of roles: what every row leads to, and that there are no others."""

from __future__ import annotations

import pytest

from sapin.cluster.role import (
    FOLLOWING,
    HOLDING,
    LEAVING,
    SAID,
    TABLE,
    Act,
    Merit,
    Role,
    RoleError,
    Signal,
    State,
    following,
    rank,
)

ROWS = """
    starting       found      standby
    starting       passed     standby
    starting       elected    claiming       claim
    starting       gone       claiming       claim
    starting       gained     active         adopt, announce
    starting       stop       stopped        finish

    standby        found      standby
    standby        passed     standby
    standby        elected    claiming       claim
    standby        gone       claiming       claim
    standby        gained     active         adopt, announce
    standby        stop       stopped        finish
    standby        silent     suspecting
    standby        asked      claiming       claim

    suspecting     found      standby
    suspecting     passed     standby
    suspecting     elected    claiming       claim
    suspecting     gone       claiming       claim
    suspecting     gained     active         adopt, announce
    suspecting     stop       stopped        finish
    suspecting     heard      standby
    suspecting     answered   cut

    cut            found      standby
    cut            passed     standby
    cut            elected    claiming       claim
    cut            gone       claiming       claim
    cut            gained     active         adopt, announce
    cut            stop       stopped        finish
    cut            heard      standby

    claiming       claimed    active         announce
    claiming       lost       standby        drop, drain
    claiming       found      releasing      yield
    claiming       rival      claiming
    claiming       stop       releasing      give up

    active         found      releasing      yield
    active         rival      active         insist
    active         step-down  handing over   hand over
    active         leave      releasing      give up
    active         lost       standby        drop, drain
    active         stop       releasing      give up

    handing over   found      grace
    handing over   rival      handing over   insist
    handing over   timeout    active         keep
    handing over   leave      releasing      give up
    handing over   lost       standby        drop, drain

    grace          found      grace
    grace          timeout    releasing      give up
    grace          lost       standby        drop, drain

    releasing      found      releasing
    releasing      rival      releasing
    releasing      claimed    releasing
    releasing      released   standby        drain
    releasing      lost       standby        drain
"""


def rows() -> list[tuple[State, Signal, State, tuple[Act, ...]]]:
    found = []
    for line in filter(str.strip, ROWS.splitlines()):
        cells = [line[4:19], line[19:30], line[30:45], line[45:]]
        before, signal, after, acts = map(str.strip, cells)
        made = tuple(Act(act) for act in acts.split(", ") if act)
        found.append((State(before), Signal(signal), State(after), made))
    return found


@pytest.mark.parametrize(("before", "signal", "after", "acts"), rows())
def test_a_row(before: State, signal: Signal, after: State, acts: tuple[Act, ...]) -> None:
    role = Role()
    role.state = before
    assert role.signal(signal) == acts
    assert role.state is after


def test_whatever_is_in_no_row_is_a_fault_and_changes_nothing() -> None:
    known = {(before, signal) for before, signal, _, _ in rows()}
    assert len(known) == len(rows())
    for before in State:
        for signal in Signal:
            role = Role()
            role.state = before
            assert role.knows(signal) == ((before, signal) in known)
            if (before, signal) not in known:
                with pytest.raises(RoleError):
                    role.signal(signal)
                assert role.state is before


def test_every_state_but_the_first_is_reached_and_every_one_but_the_last_is_left() -> None:
    reached = {row.state for table in TABLE.values() for row in table.values()}
    assert reached == set(State) - {State.STARTING}
    assert {state for state in State if not TABLE[state]} == {State.STOPPED}


def test_each_state_is_of_one_kind_and_says_one_word() -> None:
    assert not FOLLOWING & HOLDING
    assert not HOLDING & LEAVING
    assert FOLLOWING | HOLDING | LEAVING | {State.STOPPED} == set(State)
    assert SAID.keys() == set(State)


def test_the_addresses_are_taken_and_given_up_by_acts_alone() -> None:
    """Who comes to hold has claimed or adopted; who ceases to hold has released, or has lost what it had."""
    for before, table in TABLE.items():
        for after, acts in table.values():
            if before in FOLLOWING and after in HOLDING:
                assert Act.CLAIM in acts or Act.ADOPT in acts
            if before in HOLDING and after is State.RELEASING:
                assert Act.YIELD in acts or Act.GIVE_UP in acts
            if before in HOLDING | LEAVING and after is State.STANDBY:
                assert Act.DRAIN in acts


def test_two_nodes_never_take_the_same_epoch() -> None:
    a = {following(epoch, "lb-a", "lb-b") for epoch in range(100)}
    b = {following(epoch, "lb-b", "lb-a") for epoch in range(100)}
    assert not a & b
    for epoch in range(100):
        assert epoch < following(epoch, "lb-a", "lb-b") <= epoch + 2


def test_better_data_go_before_priority_and_priority_before_the_name() -> None:
    assert Merit(5, 1, "b").beats(Merit(4, 200, "a"))
    assert Merit(5, 200, "b").beats(Merit(5, 100, "a"))
    assert Merit(5, 100, "a").beats(Merit(5, 100, "b"))
    assert not Merit(5, 100, "b").beats(Merit(5, 100, "a"))


def test_a_later_epoch_goes_before_having_been_active_and_that_before_having_everything() -> None:
    ordered = [
        rank(6, active=True, whole=True),
        rank(6, active=False, whole=True),
        rank(6, active=False, whole=False),
        rank(5, active=True, whole=True),
    ]
    assert ordered == sorted(ordered, reverse=True)
    assert len(set(ordered)) == 4
