"""Ends, pauses, cuts and starts of a pair in conversation: who is active afterwards, and what was told."""

from __future__ import annotations

import pytest

from sapin.cluster.alarms import Name
from sapin.cluster.replication import Sync
from sapin.cluster.role import State, following
from sapin.cluster.settings import Acked, Claim, Event, Persist, Saved
from tests.unit.cluster.couple import Couple, Node


def running(**settings: object) -> Couple:
    couple = Couple(**settings)
    couple.start()
    couple.run(0.5)
    return couple


def names(couple: Couple) -> set[Name]:
    return {alarm.name for node in couple.nodes if node.alive for alarm in node.pair.alarms.standing}


def roles(node: Node) -> list[object]:
    return [each.fields["state"] for each in node.done if isinstance(each, Event) and each.name == "role"]


def test_a_daemon_that_is_told_to_stop_hands_over_first() -> None:
    couple = running()
    couple.a.put(b"k:1", "gw1")
    couple.run(0.05)
    couple.a.pair.stop(couple.now)
    couple.a.carry_out()
    couple.a.put(b"k:2", "gw1")
    couple.run(1)
    assert couple.a.stopped
    assert not couple.a.address
    assert couple.active is couple.b
    assert couple.b.replica.pins == {b"k:1": "gw1", b"k:2": "gw1"}
    assert roles(couple.a)[-5:] == ["handing over", "grace", "releasing", "standby", "stopped"]


def test_a_daemon_without_a_peer_stops_at_once() -> None:
    couple = Couple()
    couple.a.boot()
    couple.run(2)
    assert couple.a.address
    couple.a.pair.stop(couple.now)
    couple.a.carry_out()
    assert couple.a.stopped
    assert not couple.a.address
    assert couple.a.saved.active is False


def test_a_standby_that_is_told_to_stop_stops_at_once() -> None:
    couple = running()
    couple.b.pair.stop(couple.now)
    couple.b.carry_out()
    assert couple.b.stopped
    couple.run(1)
    assert couple.active is couple.a


def test_a_stop_ends_even_if_the_peer_does_not_take_over() -> None:
    couple = running()
    couple.b.held = True
    couple.a.pair.stop(couple.now)
    couple.a.carry_out()
    couple.run(3)
    assert couple.a.stopped
    assert not couple.a.address


def test_a_node_that_is_forced_to_step_down_leaves_the_addresses_to_the_peer_for_a_while() -> None:
    couple = Couple()
    couple.a.boot()
    couple.run(2)
    assert couple.a.pair.step_down(couple.now)
    assert couple.a.pair.step_down(couple.now, force=True) is None
    couple.a.carry_out()
    couple.run(5)
    assert not couple.a.address
    couple.run(6)
    assert couple.a.address  # nobody else came


def test_a_forced_step_down_before_the_peer_is_in_sync_ends_with_the_peer_active_and_an_alarm() -> None:
    couple = running()
    couple.a.pair._stream.source.desync()
    couple.b.pair._peer_synced = False
    couple.a.pair.step_down(couple.now, force=True)
    couple.a.carry_out()
    couple.run(3)
    assert couple.active is couple.b
    assert couple.b.pair.counts["takeovers"] == 1


def test_an_epoch_is_on_disk_before_it_is_claimed() -> None:
    for couple in (running(), Couple()):
        if not couple.a.alive:
            couple.a.boot()
            couple.run(2)
        for node in couple.nodes:
            durable = 0
            for effect in node.done:
                if isinstance(effect, Persist):
                    durable = effect.saved.floor
                if isinstance(effect, Claim):
                    assert durable >= effect.epoch


def test_an_epoch_that_was_reserved_before_a_crash_is_not_used_after_it() -> None:
    couple = Couple()
    couple.a.saved = Saved(floor=8, epoch=6, whole=True)
    couple.a.boot()
    couple.run(2)
    assert couple.a.address
    assert couple.a.pair.epoch > 8


def test_what_was_taken_over_and_has_answered_again_is_in_the_record() -> None:
    couple = running()
    for number in range(5):
        couple.a.put(b"k:%d" % number, "gw1")
    couple.run(0.05)
    couple.kill(couple.a, farewell=True)
    couple.b.pair.survived(4)
    failover = couple.b.pair.status().last_failover
    assert failover is not None
    assert (failover.cause, failover.pins, failover.answered, failover.survival) == ("farewell", 5, 4, 0.8)
    assert failover.synced


def test_both_start_without_a_link_and_one_becomes_active() -> None:
    couple = Couple()
    for node in couple.nodes:
        node.boot()
    couple.run(2)
    assert couple.active is couple.a
    couple.run(5)
    assert couple.active is couple.a
    assert not couple.b.address


def test_an_active_node_that_restarts_while_the_link_is_cut_leaves_nobody_active_only_for_the_waits() -> None:
    couple = running()
    couple.cut()
    couple.run(1)
    couple.a.die()
    couple.a.boot()
    couple.run(11)
    assert couple.active is couple.a


def test_a_paused_active_node_yields_when_it_runs_again_and_its_own_changes_are_undone() -> None:
    couple = running()
    couple.a.put(b"k:1", "gw1")
    couple.run(0.05)
    couple.a.alive = False
    couple.run(0.5)
    assert couple.b.address
    couple.b.put(b"k:2", "gw2")
    couple.a.alive = True
    couple.cut()
    couple.a.put(b"k:1", "gw9")  # nobody acknowledges it
    couple.join()
    couple.run(1)
    assert couple.active is couple.b
    assert couple.a.replica.pins == couple.b.replica.pins == {b"k:1": "gw1", b"k:2": "gw2"}
    assert Name.TWO_ACTIVES in names(couple)
    couple.run(12)
    assert not names(couple)


def test_a_cut_link_is_found_to_be_split_by_probes_alone_and_one_yields() -> None:
    couple = running()
    couple.cut()
    couple.service = False
    couple.run(3)
    assert couple.a.address
    assert couple.b.address
    couple.service = True
    couple.run(0.5)
    assert couple.active is couple.b


def test_a_role_that_is_asked_for_back_does_not_swing() -> None:
    couple = Couple(preempt=True)
    couple.b.priority = 200
    couple.a.boot()
    couple.run(2)
    couple.b.boot()
    couple.join()
    couple.run(20)
    assert couple.active is couple.b
    assert couple.b.pair.counts["takeovers"] == 1
    assert couple.a.pair.counts["takeovers"] == 1


@pytest.mark.parametrize("older", ["a", "b"])
def test_a_node_of_the_older_version_and_one_of_the_newer_are_a_pair(older: str) -> None:
    couple = Couple()
    getattr(couple, older).versions = (1, 1)
    couple.start()
    couple.run(0.3)
    for number in range(20):
        couple.a.put(b"k:%d" % number, "gw1")
    couple.run(0.1)
    couple.kill(couple.a, farewell=True)
    couple.a.boot()
    couple.join()
    couple.run(1)
    assert couple.a.replica.pins == couple.b.replica.pins
    assert len(couple.a.replica.pins) == 20
    assert couple.b.pair._stream.source.state is Sync.SYNCED


def test_addresses_that_cannot_be_had_are_tried_again_and_not_all_the_time() -> None:
    couple = Couple()
    couple.a.held = True
    couple.a.boot()
    for _ in range(50):
        couple.run(0.1)
        if couple.a.pair.role.state is State.CLAIMING:
            couple.a.pair.address_lost(couple.now)
            couple.a.carry_out()
    assert 2 <= len([effect for effect in couple.a.done if isinstance(effect, Claim)]) <= 6


def test_a_wait_for_addresses_that_a_late_answer_ends_does_not_bring_back_what_was_given_up() -> None:
    couple = running()
    couple.b.held = True
    couple.kill(couple.a, farewell=True)
    assert couple.b.pair.role.state is State.CLAIMING
    epoch = following(following(couple.b.pair.epoch, "a", "b"), "a", "b")
    couple.b.pair.answered(epoch, True, couple.now)
    couple.b.carry_out()
    assert couple.b.pair.role.state is State.STANDBY
    couple.b.pair.claimed(couple.now)
    couple.b.carry_out()
    assert not couple.b.pair.active
    assert not couple.b.serving


def test_a_peer_that_is_connected_and_says_nothing_is_connected_to_anew() -> None:
    couple = running()
    couple.b.alive = False
    couple.run(1)
    assert not couple.link
    assert couple.active is couple.a
    assert Name.PEER_LOST in names(couple)


def test_a_full_link_gets_no_more_than_its_room() -> None:
    couple = running()
    couple.a.pair._stream.room = 0
    before = len(couple.b.inbox)
    couple.a.put(b"k:1", "gw1")
    assert len(couple.b.inbox) == before
    couple.a.pair.writable(couple.now)
    couple.a.carry_out()
    assert len(couple.b.inbox) > before


def test_a_busy_standby_that_acknowledges_late_costs_synchrony_for_a_moment_only() -> None:
    couple = running()
    couple.b.alive = False
    couple.a.put(b"k:1", "gw1")
    couple.run(0.06)
    assert couple.a.pair._stream.source.state is Sync.RESYNC
    couple.b.alive = True
    couple.run(0.1)
    assert couple.a.pair._stream.source.state is Sync.SYNCED
    assert couple.active is couple.a
    assert not couple.b.address


@pytest.mark.parametrize("busy", [0.02, 0.06, 0.2])
@pytest.mark.parametrize("who", ["a", "b", "ab"])
def test_nodes_that_are_busy_make_no_failover(busy: float, who: str) -> None:
    """Their guards answer probes meanwhile."""
    couple = running()
    for name in who:
        getattr(couple, name).busy = busy
    couple.run(30)
    assert couple.active is couple.a
    assert couple.b.pair.counts["takeovers"] == 0
    couple.a.busy = couple.b.busy = 0.0
    couple.run(2)
    assert couple.a.pair.in_sync
    couple.kill(couple.a, farewell=False)
    couple.run(0.2)
    assert couple.active is couple.b


def test_a_node_that_is_late_all_the_time_still_takes_over() -> None:
    couple = running()
    couple.b.busy = 0.2
    couple.run(1)
    couple.kill(couple.a, farewell=False)
    couple.run(4)
    assert couple.active is couple.b


def test_a_stop_during_a_handover_waits_for_it() -> None:
    couple = running()
    assert couple.a.pair.step_down(couple.now) is None
    couple.a.pair.stop(couple.now)
    couple.a.carry_out()
    assert couple.a.address
    couple.run(1)
    assert couple.a.stopped
    assert couple.active is couple.b
    assert not any(isinstance(effect, Acked) and not effect.held for effect in couple.a.done)


def test_replies_that_nobody_waits_for_any_more_are_told_from_those_that_the_peer_has() -> None:
    couple = running()
    couple.a.put(b"k:1", "gw1")
    couple.run(0.01)
    couple.a.put(b"k:2", "gw1")
    couple.cut()
    assert [effect.held for effect in couple.a.done if isinstance(effect, Acked)] == [True, False]


def test_whatever_comes_after_the_end_changes_nothing() -> None:
    couple = running()
    pair = couple.b.pair
    pair.stop(couple.now)
    couple.b.carry_out()
    couple.b.done.clear()
    pair.answered(99, True, couple.now)
    pair.farewell(couple.a.pair.boot, 99, couple.now)
    pair.refused(couple.now)
    pair.address_gained(couple.now)
    pair.address_lost(couple.now)
    pair.claimed(couple.now)
    pair.released(couple.now)
    pair.disconnected(couple.now)
    pair.connected(couple.now)
    pair.writable(couple.now)
    pair.wake(couple.now + 1)
    pair.stop(couple.now + 1)
    assert pair.step_down(couple.now + 1, force=True)
    assert not pair.changed([], couple.now + 1)
    couple.b.carry_out()
    assert not couple.b.done
    assert pair.role.state is State.STOPPED


def test_a_farewell_of_a_rival_is_forgotten_by_the_time_of_a_step_down() -> None:
    couple = running()
    couple.cut()
    couple.service = False
    couple.run(2)
    assert couple.a.address
    assert couple.b.address
    couple.b.pair._peer_role = "active"
    couple.b.pair.farewell(couple.a.pair.boot, couple.a.pair.epoch, couple.now)
    couple.service = True
    couple.join()
    couple.run(1)
    assert couple.active is couple.b
    assert couple.b.pair.step_down(couple.now) is None
    couple.b.carry_out()
    while couple.b.pair.role.state is not State.STANDBY:
        couple.run(0.001)
    couple.b.pair.wake(couple.now)  # before anything else is heard of the new active node
    couple.b.carry_out()
    couple.run(1)
    assert couple.active is couple.a
    assert couple.b.pair.counts["takeovers"] == 1
