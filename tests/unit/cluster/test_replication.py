"""The stream between two nodes: whatever the link does, the standby ends with what the active node has."""

from __future__ import annotations

from collections import deque
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sapin.cluster.replication import Limits, Sink, Source, Sync
from sapin.cluster.wire import Ack, Begin, Delta, End, Hello, Join, Mark, Message, Nak, Resync, decode, encode
from tests.unit.cluster.replicas import MappingReplica

BOOT = 77


class Two:
    """A source and a sink, and what is on its way between them."""

    def __init__(self, limits: Limits | None = None) -> None:
        self.active, self.standby = MappingReplica(), MappingReplica()
        self.source = Source(BOOT, self.active, limits)
        self.sink = Sink(self.standby)
        self.there: deque[Message] = deque()
        self.back: deque[Message] = deque()
        self.now = 0.0

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
            again = decode(encode(message))
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
        return self.source.append(self.active.put(b"k:%d" % number, server), self.now)


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
    two.sink.seen, two.sink.applied = 99, 4
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


@given(
    seed=st.integers(0, 2**32),
    window=st.sampled_from([200, 1_000]),
    ring=st.sampled_from([3_000, 10**6]),
)
def test_any_link_ends_in_agreement_and_nothing_acknowledged_is_missing(
    seed: int, window: int, ring: int
) -> None:
    random = Random(seed)
    two = Two(Limits(window, ring))
    two.connect()
    for _ in range(200):
        match random.randrange(12):
            case 0 | 1 | 2 | 3:
                two.put(random.randrange(30), random.choice(["gw1", "gw2"]))
            case 4:
                two.source.append(two.active.remove(b"k:%d" % random.randrange(30)), two.now)
            case 5 if random.random() < 0.2:
                two.source.append(two.active.clear("gw1"), two.now)
            case 6 if two.there:  # lost
                del two.there[random.randrange(len(two.there))]
            case 7 if two.there:  # twice, and later
                two.there.append(random.choice(two.there))
            case 8 if two.back:
                two.back.popleft()
            case 9 if random.random() < 0.2:
                two.source.disconnect()
                two.connect()
            case _:
                two.send()
                two.deliver()
        if two.source.state is Sync.SYNCED and not two.source.lag:
            assert two.standby.pins == two.active.pins
    two.settle()
    assert two.standby.pins == two.active.pins


@pytest.mark.parametrize("version", [1, 2])
def test_both_versions_of_the_wire_carry_the_same(version: int) -> None:
    two = Two()
    for number in range(20):
        two.put(number, f"gw{number % 3}")
    message = Delta(1, [record for chunk in two.active.walk() for record in chunk])
    assert decode(encode(message, version), version) == message
