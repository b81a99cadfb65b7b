"""Where a datagram goes and why: the order of the reasons, and what plugins at fault cannot do."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from random import Random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sapin.core import balancer
from sapin.core.balancer import MAX_KEY_LENGTH, MAX_KEYS, Decision, Reason, decide
from sapin.core.contracts import Candidate, Datagram, Key, Request, key
from sapin.core.model import AdminState, Health, PluginRef, RealServer
from sapin.core.registry import FAULT_LIMIT, SUSPENSION, Faults
from sapin.core.snapshot import Group, Member
from sapin.core.writer import Writer
from tests import fakes
from tests.fakes import datagram

NOW = 1_000
ADDRESS = datagram().client.address
CLIENT_KEY = key("client", ADDRESS)
SOURCE_KEY = key("src", ADDRESS)


class Balancer:
    """A group of servers gw1, gw2, … and the act of deciding in it."""

    def __init__(
        self,
        *servers: RealServer,
        pick: Callable[[Request, Sequence[Candidate]], Any] | None = None,
        keys: Callable[[Datagram], Any] | None = None,
    ) -> None:
        schedulers = {"own": fakes.scheduler(pick)} if pick else {}
        persistences = {"own": fakes.persistence(keys)} if keys else {}
        service = fakes.leader(
            *(servers or fakes.servers("gw1", "gw2", "gw3")),
            scheduler=PluginRef("own" if pick else "first"),
            persistence=PluginRef("own" if keys else "source"),
        )
        registry = fakes.registry(scheduler=schedulers, persistence=persistences)
        self.writer = Writer(registry, lambda change: None, fakes.config(service))
        self.random = Random(1)

    @property
    def group(self) -> Group:
        return self.writer.snapshot.groups["ike"]

    def member(self, name: str) -> Member:
        return self.group.members[name]

    def faults(self, kind: str) -> Faults:
        return (self.group.persistence if kind == "persistence" else self.group.pools[4].scheduler).faults

    def decide(self, what: Datagram | None = None, now: float = NOW) -> Decision:
        """The decision, carried out as its caller has to."""
        decision = decide(self.group, what or datagram(), self.random, now)
        if decision.member is not None and decision.keys:
            self.group.table.put(decision.keys, decision.member, int(now))
        return decision

    def goes(self, what: Datagram | None = None, now: float = NOW) -> tuple[str | None, Reason]:
        decision = self.decide(what, now)
        return decision.member.name if decision.member else None, decision.reason

    def health(self, server: str, health: Health) -> None:
        self.writer.set_health("ike", server, health, AdminState.ENABLED, 100)

    def admin(self, server: str, state: AdminState) -> None:
        self.writer.set_admin("ike", server, state)


# The order


def test_a_new_client_is_scheduled_and_then_pinned() -> None:
    lb = Balancer(pick=lambda request, candidates: candidates[-1])
    first = lb.decide()
    assert (first.member, first.reason, first.matched) == (lb.member("gw3"), Reason.SCHEDULED, None)
    assert list(first.keys) == [SOURCE_KEY]
    second = lb.decide(datagram(port=4500))
    assert (second.member, second.reason, second.matched) == (lb.member("gw3"), Reason.PINNED, SOURCE_KEY)


def test_a_pinned_client_costs_the_scheduler_nothing() -> None:
    asked: list[Request] = []

    def pick(request: Request, candidates: Sequence[Candidate]) -> Candidate:
        asked.append(request)
        return candidates[0]

    lb = Balancer(pick=pick)
    for _ in range(3):
        lb.decide()
    assert len(asked) == 1


def test_the_scheduler_sees_the_client_its_first_key_and_the_given_randomness() -> None:
    asked: list[Request] = []

    def pick(request: Request, candidates: Sequence[Candidate]) -> Candidate:
        asked.append(request)
        return candidates[0]

    lb = Balancer(pick=pick, keys=lambda d: [b"b:1", b"a:2"] if d.spi_i else ())
    lb.decide(datagram(spi=b"12345678"))
    lb.decide(datagram())
    assert [request.key for request in asked] == [b"b:1", CLIENT_KEY]
    assert all(request.client == datagram().client for request in asked)
    assert all(request.random is lb.random for request in asked)


def test_the_first_key_that_is_pinned_decides() -> None:
    lb = Balancer(keys=lambda d: [b"a:1", b"a:2", b"a:3"])
    lb.group.table.put([b"a:2"], lb.member("gw2"), NOW)
    lb.group.table.put([b"a:3"], lb.member("gw3"), NOW)
    assert lb.decide()[:2] == (lb.member("gw2"), Reason.PINNED)


def test_without_keys_every_datagram_is_scheduled() -> None:
    lb = Balancer(keys=lambda d: ())
    assert [lb.decide()[:3] for _ in range(2)] == [(lb.member("gw1"), Reason.SCHEDULED, ())] * 2
    assert len(lb.group.table) == 0


def test_without_candidates_nobody_takes_it() -> None:
    lb = Balancer()
    for name in lb.group.members:
        lb.health(name, Health.UNHEALTHY)
    decision = lb.decide()
    assert (decision.member, decision.reason) == (None, Reason.NO_SERVER)
    assert list(decision.keys) == [SOURCE_KEY]


# States of servers


@pytest.mark.parametrize(
    ("admin", "health", "weight", "keeps", "takes"),
    [
        (AdminState.ENABLED, Health.UNKNOWN, 1, True, True),
        (AdminState.ENABLED, Health.HEALTHY, 1, True, True),
        (AdminState.ENABLED, Health.HEALTHY, 0, True, False),
        (AdminState.ENABLED, Health.UNHEALTHY, 1, False, False),
        (AdminState.DRAINING, Health.HEALTHY, 1, True, False),
        (AdminState.DRAINING, Health.UNHEALTHY, 1, False, False),
        (AdminState.DISABLED, Health.HEALTHY, 1, False, False),
    ],
)
def test_who_keeps_and_who_takes(
    admin: AdminState, health: Health, weight: int, keeps: bool, takes: bool
) -> None:
    pinned, fresh = datagram("192.0.2.1"), datagram("192.0.2.2")
    gw1, gw2 = fakes.servers("gw1", "gw2")
    lb = Balancer(gw1, gw2)
    assert lb.goes(pinned) == ("gw1", Reason.SCHEDULED)
    gw1 = RealServer("gw1", gw1.address, weight=weight)
    lb.writer.load(fakes.config(fakes.leader(gw1, gw2)))
    lb.admin("gw1", admin)
    lb.health("gw1", health)
    assert lb.goes(pinned) == (("gw1", Reason.PINNED) if keeps else ("gw2", Reason.SCHEDULED))
    assert lb.goes(fresh) == ("gw1" if takes else "gw2", Reason.SCHEDULED)


def test_a_pin_to_a_server_that_does_not_keep_its_clients_does_not_count() -> None:
    """Such a pin may come from disk or from a peer; the next datagram moves it."""
    lb = Balancer()
    lb.admin("gw2", AdminState.DISABLED)
    lb.group.table.put([SOURCE_KEY], lb.member("gw2"), NOW)
    assert lb.goes() == ("gw1", Reason.SCHEDULED)
    assert lb.goes() == ("gw1", Reason.PINNED)


# Address families


def dual_stack() -> Balancer:
    return Balancer(*fakes.servers("four"), *fakes.servers("six", address="2001:db8::1"))


def test_a_client_gets_a_server_of_its_family() -> None:
    lb = dual_stack()
    assert lb.goes(datagram("192.0.2.1"))[0] == "four"
    assert lb.goes(datagram("2001:db8:1::1"))[0] == "six"


def test_a_family_without_servers_has_none() -> None:
    assert Balancer().goes(datagram("2001:db8:1::1")) == (None, Reason.NO_SERVER)


def test_a_pin_of_the_other_family_does_not_count() -> None:
    """A client that is known by its SPI may come back over the other family; its server cannot be reached there."""
    lb = dual_stack()
    lb.group.table.put([key("src", datagram("2001:db8:1::1").client.address)], lb.member("four"), NOW)
    assert lb.goes(datagram("2001:db8:1::1")) == ("six", Reason.SCHEDULED)


# Schedulers at fault


class Broken(Exception):
    """An exception that cannot even tell itself."""

    def __str__(self) -> str:
        raise RuntimeError("broken")


def raises(error: BaseException) -> Callable[..., Any]:
    def call(*args: object) -> Any:
        raise error

    return call


class Chameleon:
    """Equal to everybody, and nobody."""

    def __eq__(self, other: object) -> bool:
        return True

    __hash__ = None  # type: ignore[assignment]


STRANGERS: dict[str, Callable[..., Any]] = {
    "raises": raises(ZeroDivisionError("by zero")),
    "raises what has no text": raises(Broken()),
    "nobody": lambda request, candidates: None,
    "a name": lambda request, candidates: candidates[0].name,
    "a stranger": lambda request, candidates: Member(RealServer("gw1", fakes.servers("gw1")[0].address)),
    "what equals a candidate": lambda request, candidates: Chameleon(),
    "the list": lambda request, candidates: candidates,
}


@pytest.mark.parametrize("pick", STRANGERS.values(), ids=STRANGERS)
def test_a_scheduler_at_fault_is_answered_by_the_fallback(pick: Callable[..., Any]) -> None:
    lb = Balancer(pick=pick)
    lb.member("gw1").pinned = 1
    assert lb.goes() == ("gw2", Reason.FALLBACK)
    assert lb.faults("scheduler").total == 1
    assert lb.faults("scheduler").last


def test_a_server_that_is_not_a_candidate_now_is_a_stranger() -> None:
    """A scheduler that goes by the candidates of a while ago."""
    kept: list[Candidate] = []

    def pick(request: Request, candidates: Sequence[Candidate]) -> Candidate:
        kept.extend(candidates)
        return kept[0]

    lb = Balancer(pick=pick, keys=lambda d: ())
    assert lb.goes() == ("gw1", Reason.SCHEDULED)
    lb.admin("gw1", AdminState.DRAINING)
    assert lb.goes() == ("gw2", Reason.FALLBACK)
    assert "gw1" in lb.faults("scheduler").last


def test_the_fallback_takes_the_fewest_clients() -> None:
    lb = Balancer(pick=raises(OSError()))
    for name, pinned in (("gw1", 2), ("gw2", 1), ("gw3", 3)):
        lb.member(name).pinned = pinned
    assert balancer.fallback(lb.group.pools[4]) is lb.member("gw2")


def test_a_scheduler_is_suspended_after_faults_in_a_row_and_comes_back() -> None:
    calls = 0
    broken = True

    def pick(request: Request, candidates: Sequence[Candidate]) -> Candidate:
        nonlocal calls
        calls += 1
        if broken:
            raise ValueError("no")
        return candidates[0]

    lb = Balancer(pick=pick, keys=lambda d: ())
    for _ in range(FAULT_LIMIT + 10):
        assert lb.goes()[1] is Reason.FALLBACK
    assert calls == lb.faults("scheduler").total == FAULT_LIMIT
    broken = False
    assert lb.goes(now=NOW + SUSPENSION - 0.001)[1] is Reason.FALLBACK
    assert lb.goes(now=NOW + SUSPENSION)[1] is Reason.SCHEDULED
    assert calls == FAULT_LIMIT + 1


def test_faults_with_successes_between_do_not_suspend() -> None:
    answers = iter(([ValueError] * (FAULT_LIMIT - 1) + [None]) * 3)

    def pick(request: Request, candidates: Sequence[Candidate]) -> Candidate:
        error = next(answers)
        if error:
            raise error
        return candidates[0]

    lb = Balancer(pick=pick, keys=lambda d: ())
    reasons = [lb.goes()[1] for _ in range(3 * FAULT_LIMIT)]
    assert reasons == ([Reason.FALLBACK] * (FAULT_LIMIT - 1) + [Reason.SCHEDULED]) * 3
    assert lb.faults("scheduler").total == 3 * (FAULT_LIMIT - 1)


def test_an_interrupt_is_nobodys_fault() -> None:
    lb = Balancer(pick=raises(KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        lb.goes()


# Persistences at fault

NONSENSE: dict[str, Callable[[Datagram], Any]] = {
    "raises": raises(IndexError("out of range")),
    "raises what has no text": raises(Broken()),
    "nothing": lambda d: None,
    "one key, not in a sequence": lambda d: b"src:1",
    "text": lambda d: ["src:1"],
    "text, not in a sequence": lambda d: "",
    "a set": lambda d: {b"src:1", b"src:2"},
    "a mapping": lambda d: {b"src:1": 1},
    "a generator": lambda d: (b"src:%d" % n for n in range(2)),
    "an empty key": lambda d: [b"src:1", b""],
    "a key that changes": lambda d: [bytearray(b"src:1")],
    "a long key": lambda d: [bytes(MAX_KEY_LENGTH + 1)],
    "many keys": lambda d: [b"src:%d" % n for n in range(MAX_KEYS + 1)],
    "numbers": lambda d: [1, 2],
}


@pytest.mark.parametrize("keys", NONSENSE.values(), ids=NONSENSE)
def test_a_persistence_at_fault_is_answered_by_the_clients_address(keys: Callable[[Datagram], Any]) -> None:
    lb = Balancer(keys=keys)
    decision = lb.decide()
    assert (decision.member, decision.reason) == (lb.member("gw1"), Reason.SCHEDULED)
    assert list(decision.keys) == [CLIENT_KEY]
    assert lb.faults("persistence").total == 1
    assert lb.faults("persistence").last
    lb.member("gw1").pinned = 50
    again = lb.decide(datagram(port=4500))
    assert (again.member, again.reason, again.matched) == (lb.member("gw1"), Reason.PINNED, CLIENT_KEY)


def test_the_most_and_longest_keys_are_fine() -> None:
    keys = [bytes([n]) * MAX_KEY_LENGTH for n in range(MAX_KEYS)]
    lb = Balancer(keys=lambda d: keys)
    assert lb.decide().keys == keys
    assert lb.faults("persistence").total == 0


def test_a_persistence_is_suspended_after_faults_in_a_row_and_comes_back() -> None:
    calls = 0

    def keys(datagram: Datagram) -> Sequence[Key]:
        nonlocal calls
        calls += 1
        if calls <= FAULT_LIMIT:
            raise ValueError("no")
        return (b"own:1",)

    lb = Balancer(keys=keys)
    used = [list(lb.decide().keys) for _ in range(FAULT_LIMIT + 3)]
    assert used == [[CLIENT_KEY]] * (FAULT_LIMIT + 3)
    assert calls == FAULT_LIMIT
    assert list(lb.decide(now=NOW + SUSPENSION).keys) == [b"own:1"]


def test_faults_of_a_persistence_with_successes_between_do_not_suspend() -> None:
    answers = iter(([None] * (FAULT_LIMIT - 1) + [[b"own:1"]]) * 3)
    lb = Balancer(keys=lambda d: next(answers))
    used = [list(lb.decide().keys) for _ in range(3 * FAULT_LIMIT)]
    assert used == ([[CLIENT_KEY]] * (FAULT_LIMIT - 1) + [[b"own:1"]]) * 3


def test_a_fault_does_not_grow_with_what_the_plugin_says() -> None:
    lb = Balancer(pick=raises(ValueError("x" * 100_000)), keys=lambda d: [b"x" * 100_000])
    lb.decide()
    assert len(lb.faults("scheduler").last) < 1_000
    assert len(lb.faults("persistence").last) < 1_000


ANSWERS = st.one_of(
    st.none(),
    st.integers(),
    st.binary(max_size=80),
    st.lists(st.binary(max_size=80), max_size=6),
    st.lists(st.one_of(st.binary(max_size=4), st.text(max_size=4)), max_size=4),
    st.tuples(st.binary(min_size=1, max_size=4)),
    st.dictionaries(st.binary(min_size=1, max_size=4), st.none(), max_size=3),
    st.frozensets(st.binary(min_size=1, max_size=4), max_size=3),
)


@given(st.lists(st.tuples(ANSWERS, st.sampled_from([0, 1, 2, 3, None, "gw1"])), max_size=12))
def test_whatever_plugins_answer_a_client_gets_a_candidate(script: list[tuple[Any, Any]]) -> None:
    answers = iter(script)
    picked: Any = None

    def keys(datagram: Datagram) -> Any:
        nonlocal picked
        said, picked = next(answers)
        return said

    lb = Balancer(keys=keys, pick=lambda request, candidates: candidates[picked])
    for step, _ in enumerate(script):
        decision = lb.decide(now=NOW + step * SUSPENSION)
        assert decision.member in lb.group.pools[4].candidates
        assert len(decision.keys) <= MAX_KEYS
        assert all(type(k) is bytes and 0 < len(k) <= MAX_KEY_LENGTH for k in decision.keys)
