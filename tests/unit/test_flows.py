"""Flows: how long they live, whose ports they have, and what cannot be opened. Real sockets, and time as numbers."""

from __future__ import annotations

import select
import socket
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from ipaddress import ip_address
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sapin.core.contracts import Client
from sapin.core.dataplane.admission import Admission
from sapin.core.dataplane.batch import peer_of
from sapin.core.dataplane.flows import UNCONFIRMED, Address, Counters, Flow, FlowTable, record
from sapin.core.dataplane.limits import RESERVED
from sapin.core.dataplane.listeners import Listener
from sapin.core.journal import FlowClosed, FlowOpened, Record
from sapin.core.model import AdminState, Framing
from sapin.core.writer import Writer
from tests import fakes

TIMEOUT = 600
LOW, HIGH = 20_000, 20_003
PORTS = set(range(LOW, HIGH + 1))
START = 1_000_000
HOSTS = {4: "127.0.0.1", 6: "::1"}


def client(number: int, version: int = 4) -> Client:
    return Client(ip_address("192.0.2.7" if version == 4 else "2001:db8::7").packed, number)


class Flows:
    """A table of flows from one listener to the server gw1, and its journal."""

    def __init__(self, epoll: select.epoll, version: int, descriptors: int) -> None:
        self.version = version
        self.journal: list[Record] = []
        self.table = FlowTable(epoll, self.journal.append, Random(1), descriptors, [range(LOW, HIGH + 1)])
        self.table.limit = 100
        host = ip_address(HOSTS[version])
        service = fakes.leader(
            *fakes.servers("gw1", "gw2", address=HOSTS[version]),
            address=host,
            port=0,
            framing=Framing.NATT,
            flow_timeout=TIMEOUT,
        )
        self.writer = Writer(fakes.registry(), lambda change: None, fakes.config(service))
        self.listener = Listener(service, host, 4_096, defaultdict(Counters))
        self.member = self.writer.snapshot.groups["ike"].members["gw1"]
        self.endpoint: Address = (HOSTS[version], 9)

    def try_open(
        self, number: int, key: bytes = b"src:1", endpoint: Address | None = None, now: int = START
    ) -> Flow | None:
        who = client(number, self.version)
        return self.table.open(
            self.listener, peer_of(*who), who, self.member, endpoint or self.endpoint, key, now
        )

    def open(self, number: int = 1, key: bytes = b"src:1", endpoint: Address | None = None) -> Flow:
        flow = self.try_open(number, key, endpoint)
        assert flow is not None
        return flow

    def restore(self, old: FlowOpened, now: int = START) -> bool:
        return self.table.restore(self.listener, old, self.member, self.endpoint, now) is not None

    def alive(self, now: int, since: int = START) -> list[Flow]:
        """What is left after housekeeping once a second."""
        for second in range(since, now + 1):
            self.table.expire(second, 100)
        return list(self.table)


@contextmanager
def opened(version: int = 4, descriptors: int = 4_096) -> Iterator[Flows]:
    with select.epoll() as epoll:
        flows = Flows(epoll, version, descriptors)
        try:
            yield flows
        finally:
            flows.table.close_sockets()
            flows.listener.close()


@pytest.fixture(params=HOSTS, ids=lambda version: f"IPv{version}")
def flows(request: pytest.FixtureRequest) -> Iterator[Flows]:
    with opened(request.param) as flows:
        yield flows


# How long they live


def test_a_flow_without_an_answer_goes_after_seconds(flows: Flows) -> None:
    flow = flows.open()
    assert flows.alive(START + UNCONFIRMED - 1) == [flow]
    assert flows.alive(START + UNCONFIRMED) == []


def test_an_answer_alone_is_worth_as_many_seconds_more(flows: Flows) -> None:
    """The first answer comes to whoever was named as the sender."""
    flow = flows.open()
    flow.answers = 1
    assert flows.alive(START + 2 * UNCONFIRMED - 1) == [flow]
    assert flows.alive(START + 2 * UNCONFIRMED) == []


def test_a_confirmed_flow_goes_after_the_services_timeout(flows: Flows) -> None:
    flow = flows.open()
    flow.confirmed = True
    flow.last = START + 10
    assert flows.alive(START + 10 + TIMEOUT - 1) == [flow]
    assert flows.alive(START + 10 + TIMEOUT) == []


def test_expiry_looks_at_no_more_than_it_may(flows: Flows) -> None:
    for number in range(1, 4):
        flows.open(number)
    now = START + UNCONFIRMED
    assert flows.table.expire(now, 2)
    assert len(flows.table) == 1
    assert not flows.table.expire(now, 2)
    assert len(flows.table) == 0


ACTS = st.sampled_from(["esp", "ike", "answer", "nothing"])
WAITS = st.sampled_from([0, 1, UNCONFIRMED - 1, UNCONFIRMED, 100, TIMEOUT - 1, TIMEOUT])
DATA = {"esp": memoryview(bytes(range(1, 40))), "ike": memoryview(bytes(4) + fakes.ike_header(b"12345678"))}


@dataclass
class Heard:
    """What is known of a flow by the rules alone."""

    flow: Flow
    last: int
    answered: bool = False
    confirmed: bool = False


def step(flows: Flows, admission: Admission, act: str, known: Heard | None, now: int) -> Heard | None:
    """The client sends, or the server does; as the forwarder does it, and by the rules."""
    peer = peer_of(*client(1))
    if act == "answer" and known is not None:
        known.flow.answers += 1
        known.answered, known.last = True, now
    elif act in DATA:
        flow = flows.listener.flows.get(peer)
        if flow is None or flow.tick != admission.tick or act == "ike":
            flow = admission.admit(flows.listener, peer, flow, DATA[act])
        assert flow is not None
        if known is None:
            return Heard(flow, now)
        assert flow is known.flow
        known.confirmed, known.last = known.confirmed or (act == "ike" and known.answered), now
    return known


@settings(max_examples=80)
@given(st.lists(st.tuples(ACTS, WAITS), max_size=25))
def test_a_flow_lives_as_long_as_it_is_used(script: Sequence[tuple[str, int]]) -> None:
    """Never less than its time after the last datagram, and never more than twice that, as it is looked at lazily."""
    with opened() as flows:
        admission = Admission(flows.table, lambda group, server: None, Random(1), START)
        admission.apply(flows.writer.snapshot)
        known, now = None, START
        for act, wait in script:
            known = step(flows, admission, act, known, now)
            if wait:
                flows.alive(now + wait, now)
                now += wait
                admission.advance(now)
            if known is None:
                continue
            known.confirmed = known.confirmed or known.flow.confirmed
            time = TIMEOUT if known.confirmed else UNCONFIRMED
            alive = flows.table.by_fd.get(known.flow.fd) is known.flow
            assert alive or now >= known.last + time
            assert not alive or now < known.last + 2 * time
            assert known.flow.confirmed == known.confirmed
            assert not known.confirmed or known.answered
            known = known if alive else None


# Their ports


def test_each_endpoint_has_all_ports_to_itself(flows: Flows) -> None:
    for port in (9, 10):
        found = {
            flows.open(n, endpoint=(flows.endpoint[0], port)).port for n in range(port * 100, port * 100 + 4)
        }
        assert found == PORTS
    assert flows.try_open(99) is None
    assert flows.table.refusals == {"no-upstream-port": 1}


def test_a_port_that_was_given_back_is_used_again(flows: Flows) -> None:
    first, *_ = [flows.open(number) for number in range(1, 5)]
    flows.table.close(first)
    assert flows.open(6).port == first.port


def test_a_port_that_another_program_has_is_left_to_it(flows: Flows) -> None:
    with socket.socket(flows.listener.family, socket.SOCK_DGRAM) as other:
        other.bind(("", LOW + 2))
        assert {flows.open(number).port for number in range(1, 4)} == PORTS - {LOW + 2}
        assert flows.try_open(4) is None
    assert flows.table.refusals == {"no-upstream-port": 1}
    assert flows.open(5).port == LOW + 2


def test_a_server_that_cannot_be_reached_costs_no_port() -> None:
    with opened() as flows:
        for number in range(1, 10):
            with pytest.raises(OSError, match="Permission denied"):
                flows.open(number, endpoint=("255.255.255.255", 9))
        assert (len(flows.table), flows.journal) == (0, [])


def test_a_full_table_refuses(flows: Flows) -> None:
    flows.table.limit = 1
    flow = flows.open(1)
    assert flows.try_open(2) is None
    assert flows.table.refusals == {"flow-table-full": 1}
    flows.table.close(flow)
    assert flows.try_open(2) is not None


def test_the_last_descriptors_are_not_for_flows() -> None:
    with opened(descriptors=RESERVED + 4) as flows:
        assert flows.try_open(1) is None
        assert flows.table.refusals == {"no-file-descriptor": 1}


# Restored


def test_a_restored_flow_is_the_one_that_it_was(flows: Flows) -> None:
    before = flows.open()
    (told,) = flows.journal
    assert isinstance(told, FlowOpened)
    flows.table.close_sockets()
    with opened(flows.version) as after:
        assert after.restore(told, START + 50)
        (flow,) = after.table
        assert (flow.port, flow.key, flow.opened, flow.peer) == (before.port, before.key, START, before.peer)
        assert record(flow, *client(1, flows.version)) == told
        assert flow.sock.getsockname()[1] == told.upstream_port
        assert after.journal == []
        assert after.alive(START + 50 + TIMEOUT - 1) == [flow], "it was confirmed, for all we know"


def test_the_port_of_a_restored_flow_is_not_given_twice(flows: Flows) -> None:
    old = record(flows.open(), *client(1, flows.version))
    flows.table.close_sockets()
    with opened(flows.version) as after:
        assert after.restore(old)
        (restored,) = after.table
        assert {after.open(number).port for number in range(2, 5)} == PORTS - {restored.port}
        assert after.try_open(5) is None
        after.table.close(restored)
        assert after.open(6).port == restored.port


def test_a_flow_that_is_closed_before_anything_new_gives_its_port_back(flows: Flows) -> None:
    old = record(flows.open(), *client(1, flows.version))
    flows.table.close_sockets()
    with opened(flows.version) as after:
        after.restore(old)
        after.table.close(*after.table)
        assert {after.open(number).port for number in range(1, 5)} == PORTS


def test_a_flow_whose_port_is_taken_is_not_restored(flows: Flows) -> None:
    old = record(flows.open(), *client(1, flows.version))
    flows.table.close_sockets()
    with opened(flows.version) as after, socket.socket(flows.listener.family, socket.SOCK_DGRAM) as other:
        other.bind(("", old.upstream_port))
        assert not after.restore(old)
        assert len(after.table) == 0


# What they count and tell


def test_a_flow_counts_while_it_is_open(flows: Flows) -> None:
    pinned, unpinned = flows.open(1), flows.open(2, key=b"")
    assert (flows.listener.counters["gw1"].flows, flows.member.pinned) == (2, 1)
    flows.table.close(pinned)
    flows.table.close(unpinned)
    assert (flows.listener.counters["gw1"].flows, flows.member.pinned) == (0, 0)
    assert flows.listener.flows == {}
    assert flows.alive(START + UNCONFIRMED) == []
    assert flows.journal[2:] == [FlowClosed("ike", *client(n, flows.version), b"") for n in (1, 2)]


def test_a_flow_that_was_replaced_does_not_take_its_successor_along(flows: Flows) -> None:
    old, new = flows.open(1), flows.open(1)
    flows.table.close(old)
    assert list(flows.listener.flows.values()) == [new]


def test_the_flows_of_deleted_pins_are_closed_in_their_group_alone(flows: Flows) -> None:
    one, other = flows.open(1, b"src:1"), flows.open(2, b"src:2")
    flows.table.forget("other", {b"src:1", b"src:2"})
    assert list(flows.table) == [one, other]
    flows.table.forget("ike", {b"src:1"})
    assert list(flows.table) == [other]


def test_only_what_is_still_open_is_closed(flows: Flows) -> None:
    """Between two steps of a long clean-up, a flow may go, and another one get its descriptor."""
    gone = flows.open(1)
    fd = gone.fd
    flows.table.close(gone)
    heir, kept = flows.open(2), flows.open(3)
    assert heir.fd == fd
    flows.table.close_some([gone, heir, kept], lambda flow: flow is kept)
    assert list(flows.table) == [kept]


def test_a_flow_follows_its_pin(flows: Flows) -> None:
    """The first ESP of a tick is held against the pin: its client has moved with all that it has."""
    with opened() as own:
        admission = Admission(own.table, lambda group, server: None, Random(1), START)
        admission.apply(own.writer.snapshot)
        peer = peer_of(*client(1))
        first = admission.admit(own.listener, peer, None, DATA["esp"])
        assert first is not None
        assert first.member.name == "gw1"
        own.writer.set_admin("ike", "gw1", AdminState.DISABLED)
        admission.apply(own.writer.snapshot)
        second = admission.admit(own.listener, peer, first, DATA["esp"])
        assert second is not None
        assert second.member.name == "gw2"
        assert list(own.table) == [second]
