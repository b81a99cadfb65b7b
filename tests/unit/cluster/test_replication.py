"""The stream between two nodes: whatever the link does, the standby ends with what the active node has."""

from __future__ import annotations

from collections import deque
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sapin.cluster.replication import Limits, Sink, Source, Sync
from sapin.cluster.wire import (
    NEWEST,
    OLDEST,
    Ack,
    Begin,
    Delta,
    End,
    Hello,
    Join,
    Mark,
    Message,
    Nak,
    Resync,
    decode,
    encode,
)
from sapin.core.pins import Put
from tests.unit.cluster.replicas import MappingReplica

BOOT = 77


class Two:
    """A source and a sink, and what is on its way between them."""

    def __init__(self, limits: Limits | None = None, version: int = NEWEST, chunk: int = 3) -> None:
        self.version = version
        self.active, self.standby = MappingReplica(chunk), MappingReplica()
        self.source = Source(BOOT, self.active, limits)
        self.sink = Sink(self.standby)
        self.there: deque[Message] = deque()
        self.back: deque[Message] = deque()
        self.now = 0.0
        self.changed: dict[bytes, int] = {}
        """The sequence of the last change of each key."""
        self.promised: set[bytes] = set()
        """Keys whose last change was acknowledged."""

    def connect(self) -> None:
        self.there.clear()
        self.back.clear()
        self.sink.connect(BOOT)
        self.source.connect(self.hello())

    def hello(self) -> Hello:
        sink = self.sink
        return Hello(
            oldest=1,
            newest=2,
            cluster="c",
            node="lb-b",
            boot=5,
            beat=1,
            epoch=1,
            role="standby",
            priority=100,
            rank=0,
            seen=sink.seen,
            applied=sink.applied,
            whole=sink.whole,
            digest=self.standby.digest(),
            clock=0.0,
        )

    def send(self) -> None:
        for message in self.source.messages():
            again = decode(encode(message, self.version), self.version)
            assert again == message
            self.there.append(again)

    def deliver(self) -> None:
        """The next message of each way, and a step of whatever is left to do."""
        self.now += 0.01
        if self.there:
            message = self.there.popleft()
            assert isinstance(message, Delta | Begin | End | Mark | Join)
            self.answer(self.sink.received(message, True, self.now))
        self.answer(self.sink.step())
        if self.back:
            match self.back.popleft():
                case Ack() as ack:
                    self.source.acknowledged(ack)
                case Nak() as nak:
                    self.source.missing(nak)
                case Resync():
                    self.source.resync()

    def answer(self, answer: Message | None) -> None:
        if answer is not None:
            self.back.append(answer)

    def settle(self) -> None:
        """Until all is quiet, as heartbeats would bring about."""
        for _ in range(10_000):
            self.send()
            if not self.there and not self.back and not self.sink.busy:
                if self.source.state is Sync.SYNCED and not self.source.lag:
                    return
                if self.sink.lost:
                    self.source.resync()
                self.source.repeat()
                self.answer(Ack(self.sink.applied, self.sink.whole))
            self.deliver()
        raise AssertionError("does not settle")

    def put(self, number: int, server: str = "gw1") -> int:
        key = b"k:%d" % number
        self.promised.discard(key)
        self.changed[key] = self.source.append(self.active.put(key, server), self.now)
        return self.changed[key]

    def remove(self, number: int) -> None:
        key = b"k:%d" % number
        self.promised.discard(key)
        self.changed[key] = self.source.append(self.active.remove(key), self.now)

    def clear(self, server: str) -> None:
        sequence = self.source.append(self.active.clear(server), self.now)
        self.promised.clear()
        self.changed = dict.fromkeys(self.changed, sequence)

    def check(self) -> None:
        """What was acknowledged while in sync is there, whatever came since; what is said to be in sync is the same."""
        if self.source.state is Sync.SYNCED:
            self.promised |= {key for key, sequence in self.changed.items() if sequence <= self.source.acked}
            if not self.source.lag:
                assert self.standby.pins == self.active.pins
        for key in self.promised:
            assert self.standby.pins.get(key) == self.active.pins.get(key)

    def cut(self, restart: bool) -> None:
        """The connection is made anew; of a standby that restarts, only what is on its disk is left."""
        self.source.disconnect()
        if restart:
            whole = self.sink.whole
            self.sink = Sink(self.standby)
            self.sink.whole = whole
        self.connect()


def test_the_first_connection_takes_a_snapshot_and_then_the_changes() -> None:
    two = Two()
    for number in range(10):
        two.put(number)
    two.connect()
    two.settle()
    assert two.standby.pins == two.active.pins
    assert two.source.snapshots == 1
    two.put(11, "gw2")
    two.settle()
    assert two.standby.pins[b"k:11"] == "gw2"
    assert two.source.snapshots == 1


def test_a_snapshot_forgets_no_deletion() -> None:
    two = Two()
    two.standby.put(b"k:old", "gw1")
    for number in range(20):
        two.put(number)
    two.connect()
    two.send()
    for _ in range(4):
        two.deliver()
    two.source.append(two.active.remove(b"k:1"), 0)
    two.source.append(two.active.remove(b"k:19"), 0)
    two.settle()
    assert two.standby.pins == two.active.pins


def test_a_sink_in_a_snapshot_is_not_whole_and_a_snapshot_cut_off_begins_anew() -> None:
    two = Two(Limits(window=400))
    for number in range(30):
        two.put(number)
    two.connect()
    two.send()
    two.deliver()
    assert not two.sink.whole
    assert two.source.state is Sync.RESYNC
    two.source.disconnect()
    two.connect()
    two.settle()
    assert two.source.snapshots == 2
    assert two.standby.pins == two.active.pins


def test_a_short_cut_is_gone_on_from_without_a_snapshot() -> None:
    two = Two()
    two.connect()
    two.put(1)
    two.settle()
    snapshots, applied = two.source.snapshots, two.standby.applied
    two.source.disconnect()
    two.put(2)
    two.connect()
    two.settle()
    assert two.source.snapshots == snapshots
    assert two.standby.applied == applied + 1
    assert two.standby.pins == two.active.pins


def test_a_standby_that_restarted_with_all_pins_needs_no_snapshot() -> None:
    two = Two()
    two.connect()
    for number in range(10):
        two.put(number)
    two.settle()
    snapshots = two.source.snapshots
    two.source.disconnect()
    two.sink = Sink(two.standby)
    two.sink.whole = True  # what its disk told it
    hello = two.hello()
    two.sink.connect(BOOT)
    two.source.connect(hello)
    two.settle()
    assert two.source.snapshots == snapshots
    two.put(12)
    two.settle()
    assert two.standby.pins == two.active.pins


def test_a_difference_that_nobody_knows_of_is_found_repaired_and_counted() -> None:
    two = Two()
    two.connect()
    for number in range(10):
        two.put(number)
    two.settle()
    del two.standby.pins[b"k:3"]
    two.now += 5
    two.put(20)
    two.settle()
    assert two.sink.divergences == 1
    assert two.standby.pins == two.active.pins


def test_what_waits_is_bounded_and_a_snapshot_replaces_it() -> None:
    two = Two(Limits(window=500, ring=5_000))
    two.connect()
    two.settle()
    for number in range(1_000):
        two.put(number)
        assert two.source.weight <= 5_000 + 500
    assert two.source.overflows
    assert two.source.state is Sync.RESYNC
    two.settle()
    assert two.standby.pins == two.active.pins


def test_a_peer_that_is_slow_is_not_waited_for_until_it_has_everything_again() -> None:
    two = Two()
    two.connect()
    two.settle()
    two.put(1)
    two.source.desync()
    assert two.source.state is Sync.RESYNC
    assert two.source.desyncs == 1
    two.settle()
    assert two.source.state is Sync.SYNCED


def test_an_acknowledgement_of_what_was_not_sent_is_ignored() -> None:
    two = Two()
    two.connect()
    two.settle()
    two.put(1)
    two.source.acknowledged(Ack(10**6, True))
    assert two.source.acked < two.source.sequence


def test_a_snapshot_that_the_standby_never_saw_begin_is_not_gone_on_with_in_its_middle() -> None:
    two = Two(Limits(window=400))
    two.connect()
    for number in range(30):
        two.put(number)
    two.settle()
    two.source.resync()
    two.send()
    two.there.clear()
    two.cut(restart=False)
    two.settle()
    assert two.standby.pins == two.active.pins


def test_the_beginning_of_a_snapshot_that_comes_late_needs_no_other_snapshot() -> None:
    two = Two()
    for number in range(30):
        two.put(number)
    two.connect()
    two.send()
    two.there.rotate(-1)
    two.settle()
    assert two.source.snapshots == 1
    assert two.sink.gaps


def test_a_standby_that_was_active_meanwhile_is_not_gone_on_with_where_it_was() -> None:
    two = Two()
    two.connect()
    two.put(1)
    two.settle()
    two.source.disconnect()
    two.sink.taken_over()
    two.standby.put(b"k:of its own", "gw2")
    two.standby.remove(b"k:1")
    two.connect()
    two.settle()
    assert two.source.snapshots == 2
    assert two.standby.pins == two.active.pins == {b"k:1": "gw1"}


def test_a_stream_that_goes_on_as_if_nothing_had_been_ends_in_a_snapshot() -> None:
    """The standby thought that it was alone, was active for a moment, and yielded; the link was whole all the time."""
    two = Two()
    two.connect()
    two.put(1)
    two.settle()
    two.sink.taken_over()
    two.standby.remove(b"k:1")
    two.put(2)
    two.settle()
    assert two.source.snapshots == 2
    assert two.standby.pins == two.active.pins


def test_late_changes_of_a_node_that_hands_over_are_applied_and_take_nothing_away() -> None:
    two = Two()
    two.connect()
    two.put(1)
    two.settle()
    two.sink.taken_over()
    two.standby.put(b"k:new", "gw2")
    two.put(2)
    two.source.resync()
    two.send()
    for message in list(two.there):
        assert isinstance(message, Delta | Begin | End | Mark)
        answer = two.sink.received(message, False, two.now)
        assert isinstance(answer, Ack | None)
    assert not two.sink.busy
    assert two.standby.pins == {b"k:1": "gw1", b"k:2": "gw1", b"k:new": "gw2"}


def test_after_a_handover_the_stream_of_the_other_one_is_gone_on_from_where_both_agree() -> None:
    two = Two()
    base = two.put(1)
    two.standby.put(b"k:1", "gw1")
    two.sink.taken_over()  # it was active, and hands over to the source's node
    two.sink.connect(BOOT)
    two.put(2)
    two.source.go_on(base)
    two.settle()
    assert two.source.snapshots == 0
    assert two.standby.pins == two.active.pins
    two.there.append(Join(base, 0))  # again, and late: it changes nothing
    two.deliver()
    assert two.sink.applied == two.source.sequence


def test_a_join_that_comes_in_the_middle_of_a_snapshot_does_not_end_it() -> None:
    two = Two()
    two.sink.connect(BOOT)
    assert two.sink.received(Begin(5), True, 0.0) == Ack(5, False)
    assert two.sink.received(Join(7, 0), True, 0.0) == Ack(5, False)
    assert not two.sink.whole


def test_digests_are_compared_when_nothing_changes_too() -> None:
    two = Two()
    two.connect()
    two.put(1)
    two.settle()
    del two.standby.pins[b"k:1"]
    two.source.tick(two.now + 10)
    two.settle()
    assert two.sink.divergences == 1
    assert two.standby.pins == two.active.pins


def test_a_difference_that_no_snapshot_repairs_is_not_repaired_all_the_time() -> None:
    two = Two()
    two.connect()
    for second in range(200):
        two.put(1, f"gw{second}")
        two.settle()
        two.standby.pins[b"k:never goes"] = "gw9"
        two.now = float(second)
    assert 4 <= two.source.snapshots <= 9
    del two.standby.pins[b"k:never goes"]
    two.source.mark(two.now)
    two.settle()
    two.standby.pins[b"k:new"] = "gw9"
    two.source.tick(two.now + 1.5)
    two.settle()
    assert two.standby.pins == two.active.pins


def changes(two: Two, random: Random) -> None:
    """Something changes on the active node."""
    match random.randrange(10):
        case 0:
            two.clear("gw1")
        case 1 | 2 | 3:
            two.remove(random.randrange(30))
        case _:
            two.put(random.randrange(30), random.choice(["gw1", "gw2"]))


def mishap(two: Two, random: Random) -> None:
    """Something goes wrong, mostly on the way."""
    way = random.choice([two.there, two.back])
    match random.randrange(10):
        case 0 if random.random() < 0.5:
            two.cut(restart=random.random() < 0.5)
        case 1 if random.random() < 0.2:
            two.source.resync()
        case 2 if way:
            way.append(random.choice(way))
        case 3 if way:
            way.rotate(-1)
        case 4 if way:
            del way[random.randrange(len(way))]
        case _:
            progress(two, random)


def progress(two: Two, random: Random) -> None:
    """Nothing goes wrong for a while."""
    for _ in range(random.randrange(4)):
        two.send()
        two.deliver()


@given(
    seed=st.integers(0, 2**32),
    window=st.sampled_from([200, 1_000]),
    ring=st.sampled_from([3_000, 10**6]),
    version=st.integers(OLDEST, NEWEST),
)
def test_any_link_ends_in_agreement_and_nothing_acknowledged_is_missing(
    seed: int, window: int, ring: int, version: int
) -> None:
    random = Random(seed)
    two = Two(Limits(window, ring), version)
    two.connect()
    for _ in range(250):
        random.choice([changes, changes, mishap, mishap, progress])(two, random)
        two.check()
    two.settle()
    assert two.standby.pins == two.active.pins


@pytest.mark.parametrize("version", range(OLDEST, NEWEST + 1))
def test_a_snapshot_says_the_pins_of_a_server_together(version: int) -> None:
    two = Two(version=version, chunk=12)
    for number in range(12):
        two.put(number, f"gw{number % 3}")
    two.connect()
    two.send()
    (chunk,) = (message for message in two.there if isinstance(message, Delta))
    assert [record.server for record in chunk.records if isinstance(record, Put)] == sorted(
        f"gw{number % 3}" for number in range(12)
    )
    two.settle()
    assert two.standby.pins == two.active.pins
