"""Two halves of a pair in conversation, over a link without faults of its own."""

from __future__ import annotations

from sapin.cluster import wire
from sapin.cluster.alarms import Name
from sapin.cluster.replication import Sync
from sapin.cluster.role import State
from sapin.cluster.settings import Claim, Persist, Saved
from tests.unit.cluster.couple import Couple


def running() -> Couple:
    couple = Couple()
    couple.start()
    couple.run(0.5)
    return couple


def names(couple: Couple) -> set[Name]:
    return {alarm.name for node in couple.nodes if node.alive for alarm in node.pair.alarms.standing}


def test_of_two_that_start_together_one_becomes_active_and_the_other_is_in_sync() -> None:
    couple = running()
    assert couple.active is couple.a
    assert couple.a.serving
    assert not couple.b.serving
    assert couple.b.pair.role.state is State.STANDBY
    assert couple.a.pair._stream.source.state is Sync.SYNCED
    assert not names(couple)


def test_the_priority_goes_before_the_name() -> None:
    couple = Couple()
    couple.b.priority = 200
    couple.start()
    couple.run(0.5)
    assert couple.active is couple.b


def test_a_reply_waits_for_the_peer_and_then_goes() -> None:
    couple = running()
    sequence = couple.a.put(b"k:1", "gw1")
    assert sequence
    assert couple.a.acked < sequence
    couple.run(0.01)
    assert couple.a.acked == sequence
    assert couple.b.replica.pins == {b"k:1": "gw1"}


def test_a_reply_that_nobody_acknowledges_goes_after_the_timeout_and_the_peer_is_not_waited_for() -> None:
    couple = running()
    couple.b.inbox.clear()
    sequence = couple.a.put(b"k:1", "gw1")
    couple.b.inbox.clear()  # lost
    couple.run(0.03)
    assert couple.a.acked == sequence
    assert couple.a.pair._stream.source.desyncs == 1
    assert not couple.a.put(b"k:2", "gw1")
    couple.run(0.05)
    assert couple.a.pair._stream.source.state is Sync.SYNCED
    assert couple.b.replica.pins == couple.a.replica.pins


def test_a_farewell_is_followed_by_a_takeover_at_once() -> None:
    couple = running()
    couple.a.put(b"k:1", "gw1")
    couple.run(0.05)
    couple.kill(couple.a, farewell=True)
    assert couple.active is couple.b
    assert couple.b.pair.epoch == couple.a.pair.epoch + 1
    assert couple.b.replica.pins == {b"k:1": "gw1"}
    assert couple.b.pair.last_failover is not None
    assert couple.b.pair.last_failover.duration < 0.03


def test_a_closed_link_and_unanswered_probes_are_followed_by_a_takeover() -> None:
    couple = running()
    couple.kill(couple.a, farewell=False)
    couple.run(0.02)
    assert not couple.b.address
    couple.run(0.03)
    assert couple.active is couple.b


def test_a_silent_machine_is_replaced_after_three_heartbeats() -> None:
    couple = running()
    couple.a.alive = couple.a.address = False
    couple.run(0.045)
    assert not couple.b.address
    couple.run(0.06)
    assert couple.b.address
    assert couple.b.probes >= 2


def test_no_epoch_is_written_on_the_way_of_a_takeover() -> None:
    couple = running()
    couple.b.done.clear()
    couple.kill(couple.a, farewell=True)
    claim = next(n for n, effect in enumerate(couple.b.done) if isinstance(effect, Claim))
    assert not [effect for effect in couple.b.done[:claim] if isinstance(effect, Persist)]


def test_a_cut_link_alone_changes_nothing_but_an_alarm() -> None:
    couple = running()
    couple.cut()
    couple.run(5)
    assert couple.active is couple.a
    assert couple.b.pair.role.state is State.CUT
    assert Name.PEER_LOST in names(couple)
    assert not couple.b.pair.status().synced
    couple.a.put(b"k:1", "gw1")
    couple.join()
    couple.run(1.5)
    assert couple.b.pair.role.state is State.STANDBY
    assert not names(couple)
    assert couple.b.replica.pins == couple.a.replica.pins


def test_an_active_node_that_dies_after_the_link_was_cut_is_replaced_by_one_that_says_it_is_stale() -> None:
    couple = running()
    couple.cut()
    couple.run(2)
    couple.a.put(b"k:1", "gw1")
    couple.a.alive = couple.a.address = False
    couple.run(0.5)
    assert not couple.b.address
    couple.run(4)
    assert couple.b.address
    assert Name.UNSYNCED_TAKEOVER in names(couple)


def test_a_farewell_after_the_link_was_cut_is_followed_by_a_takeover_at_once() -> None:
    couple = running()
    couple.cut()
    couple.run(0.3)
    assert couple.b.pair.role.state is State.CUT
    couple.kill(couple.a, farewell=True)
    couple.run(0.03)
    assert couple.active is couple.b
    assert couple.b.pair.last_failover is not None
    assert not couple.b.pair.last_failover.synced


def test_a_split_of_every_network_ends_with_one_active() -> None:
    couple = running()
    couple.cut()
    couple.service = False
    couple.run(2)
    assert couple.a.address
    assert couple.b.address
    couple.service = True
    couple.join()
    couple.run(0.5)
    assert couple.active is couple.b  # the higher epoch
    assert couple.a.pair.role.state is State.STANDBY
    assert couple.b.pair._stream.source.state is Sync.SYNCED


def test_a_node_that_comes_back_follows_and_does_not_pre_empt() -> None:
    couple = running()
    couple.a.put(b"k:1", "gw1")
    couple.run(0.1)
    couple.kill(couple.a, farewell=True)
    couple.b.put(b"k:2", "gw2")
    couple.a.boot()
    couple.join()
    couple.run(1)
    assert couple.active is couple.b
    assert couple.a.replica.pins == {b"k:1": "gw1", b"k:2": "gw2"}
    assert couple.b.pair._stream.source.state is Sync.SYNCED


def test_a_step_down_hands_over_and_both_have_the_addresses_for_a_moment_only() -> None:
    couple = running()
    couple.a.put(b"k:1", "gw1")
    couple.run(0.05)
    assert couple.a.pair.step_down(couple.now) is None
    couple.a.carry_out()
    couple.run(0.05)
    assert couple.a.address
    assert couple.b.address
    couple.a.put(b"k:2", "gw1")  # late, on the node that leaves
    couple.b.put(b"k:3", "gw2")
    couple.run(1)
    assert couple.active is couple.b
    assert couple.a.replica.pins == couple.b.replica.pins
    assert len(couple.b.replica.pins) == 3
    assert couple.b.pair._stream.source.state is Sync.SYNCED
    assert couple.b.pair._stream.source.snapshots == 0
    assert not names(couple)


def test_a_step_down_without_a_peer_in_sync_is_refused() -> None:
    couple = running()
    couple.cut()
    assert "not there" in (couple.a.pair.step_down(couple.now) or "")
    assert "not active" in (couple.b.pair.step_down(couple.now) or "")


def test_a_step_down_that_the_peer_does_not_take_is_taken_back() -> None:
    couple = running()
    couple.a.pair.step_down(couple.now)
    couple.a.carry_out()
    couple.kill(couple.b, farewell=False)
    couple.run(2)
    assert couple.active is couple.a
    assert couple.a.pair.role.state is State.ACTIVE


def test_the_higher_priority_gets_its_role_back_where_that_is_wanted() -> None:
    couple = Couple(preempt=True)
    couple.b.priority = 200
    couple.a.boot()
    couple.run(11)
    assert couple.active is couple.a
    couple.b.boot()
    couple.join()
    couple.run(1.5)
    assert couple.active is couple.a
    couple.run(2)
    assert couple.active is couple.b


def test_epochs_are_never_used_twice_over_restarts() -> None:
    couple = running()
    epochs = [couple.a.pair.epoch]
    for _ in range(4):
        couple.kill(couple.active, farewell=True)
        couple.run(0.1)
        epochs.append(couple.active.pair.epoch)
        for node in couple.nodes:
            if not node.alive:
                node.boot()
        couple.join()
        couple.run(0.5)
    assert epochs == sorted(set(epochs))


def test_after_both_were_lost_the_better_data_win() -> None:
    couple = running()
    couple.kill(couple.b, farewell=True)
    couple.a.put(b"k:1", "gw1")
    couple.run(0.3)
    couple.kill(couple.a, farewell=False)
    for node in (couple.b, couple.a):
        node.boot()
    couple.join()
    couple.run(0.5)
    assert couple.active is couple.a
    assert couple.b.replica.pins == {b"k:1": "gw1"}


def test_a_standby_that_was_paused_does_not_hold_its_own_silence_against_the_peer() -> None:
    couple = running()
    couple.b.alive = False  # it does not run; the link holds what comes
    couple.run(0.4)
    couple.b.alive = True
    couple.b.inbox.clear()
    couple.b.pair.wake(couple.now)
    couple.b.carry_out()
    assert not couple.b.address
    couple.run(1)
    assert couple.active is couple.a


def test_where_something_else_moves_the_addresses_the_nodes_follow() -> None:
    couple = Couple(moves=False)
    couple.start()
    couple.run(3)
    assert couple.a.pair.role.state is State.STARTING
    couple.b.pair.address_gained(couple.now)
    couple.b.carry_out()
    couple.run(0.3)
    assert couple.b.pair.role.state is State.ACTIVE
    assert couple.a.pair.role.state is State.STANDBY
    couple.b.pair.address_lost(couple.now)
    couple.a.pair.address_gained(couple.now)
    couple.a.carry_out()
    couple.b.carry_out()
    couple.run(0.5)
    assert (couple.a.pair.role.state, couple.b.pair.role.state) == (State.ACTIVE, State.STANDBY)
    assert couple.a.pair.epoch > 1


def test_strange_bytes_close_the_link_and_are_counted() -> None:
    couple = running()
    couple.a.pair.received(b"\xff\xff", couple.now)
    couple.a.carry_out()
    assert not couple.link
    assert sum(couple.a.pair.refused_messages.values()) == 1


def test_a_hello_of_another_cluster_or_version_is_refused() -> None:
    for change in ({"cluster": "other"}, {"node": "x"}, {"oldest": 3, "newest": 9}, {"role": "king"}):
        couple = running()
        hello = wire.Hello(1, 2, "c", "b", 5, 10**6, 1, "standby", 100, 0, 0, 0, False, 0, couple.now)
        couple.a.pair.received(wire.encode(hello._replace(**change)), couple.now)
        couple.a.carry_out()
        assert not couple.link


def test_a_clock_that_differs_is_told() -> None:
    couple = running()
    couple.b.pair.wall = 60
    couple.run(2.1)
    assert Name.CLOCK_SKEW in names(couple)
    couple.b.pair.wall = 0
    couple.run(10.1)
    assert not names(couple)


def test_a_farewell_of_another_run_means_nothing() -> None:
    couple = running()
    couple.b.pair.farewell(1, 99, couple.now)
    couple.b.carry_out()
    assert not couple.b.address
    assert couple.b.pair.role.state is State.STANDBY


def test_a_node_that_never_was_in_sync_waits_longer_at_its_start() -> None:
    couple = Couple()
    couple.b.saved = Saved(epoch=4)
    couple.a.alive = False
    couple.b.boot()
    couple.run(5)
    assert not couple.b.address
    couple.run(6)
    assert couple.b.address
    assert Name.UNSYNCED_TAKEOVER in names(couple)
