"""What each scheduler promises, stated as a theorem or an exact sequence wherever there is one."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from ipaddress import ip_address
from math import sqrt
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from sapin.core.contracts import Client, Request, Scheduler, key
from sapin.core.model import RealServer
from sapin.core.snapshot import Member
from sapin.plugins.schedulers.adaptive import Adaptive
from sapin.plugins.schedulers.fixed_weighting import FixedWeighting
from sapin.plugins.schedulers.least_connections import LeastConnections, WeightedLeastConnections
from sapin.plugins.schedulers.maglev import ENTRIES, Maglev, build
from sapin.plugins.schedulers.power_of_two import PowerOfTwoChoices
from sapin.plugins.schedulers.round_robin import RoundRobin
from sapin.plugins.schedulers.source_hash import SourceHash
from sapin.plugins.schedulers.weighted_response_time import WeightedResponseTime
from sapin.plugins.schedulers.weighted_round_robin import WeightedRoundRobin

Pool = tuple[Member, ...]


def pool(*weights: int) -> Pool:
    """Servers a, b, c, ... of these weights."""
    names = [chr(ord("a") + n) if n < 26 else f"server-{n}" for n in range(len(weights))]
    address = ip_address("10.60.0.1")
    return tuple(
        Member(RealServer(name, address + n, weight=weight))
        for n, (name, weight) in enumerate(zip(names, weights, strict=True))
    )


def request(number: int = 0, random: Random | None = None) -> Request:
    """A new client, the ``number``-th address of 10.0.0.0/8."""
    address = (0x0A000000 + number).to_bytes(4)
    return Request(Client(address, 500), key("src", address), random or Random(number))


def sequence(scheduler: Scheduler, candidates: Pool, count: int) -> str:
    return "".join(scheduler.pick(request(n), candidates).name for n in range(count))


def placed(scheduler: Scheduler, candidates: Pool, clients: Sequence[int]) -> dict[int, str]:
    """Where each client goes."""
    return {n: scheduler.pick(request(n), candidates).name for n in clients}


def without(candidates: Pool, name: str) -> Pool:
    return tuple(candidate for candidate in candidates if candidate.name != name)


# Turns


def test_round_robin_ignores_weights() -> None:
    assert sequence(RoundRobin(), pool(1, 5, 1), 7) == "abcabca"


def test_round_robin_goes_on_when_a_server_goes() -> None:
    scheduler, servers = RoundRobin(), pool(1, 1, 1)
    assert sequence(scheduler, servers, 3) == "abc"
    assert sequence(scheduler, servers[:2], 4) == "baba"


@pytest.mark.parametrize(
    ("weights", "expected"),
    [
        ((5, 1, 1), "aabacaa"),
        ((1, 1, 1), "abc"),
        ((4, 2), "aba" * 2),
        ((3, 2, 1), "abacba"),
        ((2,), "aa"),
    ],
)
def test_weighted_round_robin_is_smooth(weights: tuple[int, ...], expected: str) -> None:
    assert sequence(WeightedRoundRobin(), pool(*weights), 2 * len(expected)) == expected * 2


@given(st.lists(st.integers(1, 30), min_size=1, max_size=8), st.integers(0, 100))
def test_weighted_round_robin_is_exact_in_any_window(weights: list[int], skipped: int) -> None:
    scheduler, servers = WeightedRoundRobin(), pool(*weights)
    sequence(scheduler, servers, skipped)
    counts = Counter(sequence(scheduler, servers, sum(weights)))
    assert [counts[server.name] for server in servers] == weights


def test_weighted_round_robin_keeps_its_place_when_the_pool_changes() -> None:
    """A pool that changes after every pick must not always start with its heaviest server."""
    scheduler = WeightedRoundRobin()
    counts = Counter(scheduler.pick(request(), pool(2, 1, 1)).name for _ in range(400))
    assert counts == {"a": 200, "b": 100, "c": 100}


def test_weighted_round_robin_forgives_a_former_weight() -> None:
    """What a server owed under a huge weight is scaled down with its weight, so that it is not left out."""
    scheduler = WeightedRoundRobin()
    sequence(scheduler, pool(1000, 1, 1), 500)
    counts = Counter(sequence(scheduler, pool(1, 1, 1), 30))
    assert max(counts.values()) - min(counts.values()) <= 1


def test_response_time_shares_by_speed() -> None:
    servers = pool(1, 1, 2)
    for server, time in zip(servers, (0.010, 0.020, 0.040), strict=True):
        server.response_time = time
    counts = Counter(sequence(WeightedResponseTime(), servers, 400))
    assert counts == {"a": 200, "b": 100, "c": 100}


def test_response_time_does_not_herd() -> None:
    """The fastest of three, twice as fast as the others, never gets more than two in a row."""
    servers = pool(1, 1, 1)
    for server, time in zip(servers, (0.010, 0.020, 0.020), strict=True):
        server.response_time = time
    assert "aaa" not in sequence(WeightedResponseTime(), servers, 300)


def test_response_time_takes_the_unknown_for_average() -> None:
    servers = pool(1, 1, 1)
    servers[0].response_time = servers[1].response_time = 0.02
    assert Counter(sequence(WeightedResponseTime(), servers, 300)) == {"a": 100, "b": 100, "c": 100}


def test_response_time_without_any_is_by_weight() -> None:
    assert Counter(sequence(WeightedResponseTime(), pool(3, 1), 400)) == {"a": 300, "b": 100}


def test_response_time_does_not_tell_microseconds_apart() -> None:
    servers = pool(1, 1)
    servers[0].response_time, servers[1].response_time = 0.0, 0.0009
    assert Counter(sequence(WeightedResponseTime(), servers, 100)) == {"a": 50, "b": 50}


def test_response_time_follows_a_change() -> None:
    scheduler, servers = WeightedResponseTime(), pool(1, 1)
    servers[0].response_time = servers[1].response_time = 0.01
    sequence(scheduler, servers, 11)
    servers[1].response_time = 0.09
    counts = Counter(sequence(scheduler, servers, 100))
    assert abs(counts["a"] - 90) <= 1


# Fewest clients


def fill(scheduler: Scheduler, servers: Pool, clients: int, random: Random | None = None) -> None:
    """So many clients come and stay."""
    for n in range(clients):
        chosen = scheduler.pick(request(n, random), servers)
        assert isinstance(chosen, Member)
        chosen.pinned += 1


def spread(servers: Pool) -> int:
    counts = [server.pinned for server in servers]
    return max(counts) - min(counts)


@pytest.mark.parametrize("scheduler", [LeastConnections, WeightedLeastConnections])
def test_least_connections_levels_to_within_one(scheduler: Callable[[], Scheduler]) -> None:
    servers = pool(*[1] * 7)
    one = scheduler()
    for _ in range(100):
        fill(one, servers, 3)
        assert spread(servers) <= 1


@given(st.lists(st.integers(0, 50), min_size=1, max_size=10))
def test_least_connections_takes_a_least(pinned: list[int]) -> None:
    scheduler, servers = LeastConnections(), pool(*[1] * len(pinned))
    for server, count in zip(servers, pinned, strict=True):
        server.pinned = count
    assert all(scheduler.pick(request(), servers).pinned == min(pinned) for _ in range(3))


@given(st.lists(st.tuples(st.integers(0, 50), st.integers(1, 9)), min_size=1, max_size=10))
def test_weighted_least_connections_takes_a_least(loads: list[tuple[int, int]]) -> None:
    scheduler, servers = WeightedLeastConnections(), pool(*[weight for _, weight in loads])
    for server, (count, _) in zip(servers, loads, strict=True):
        server.pinned = count
    for _ in range(3):
        chosen = scheduler.pick(request(), servers)
        assert all(chosen.pinned * s.weight <= s.pinned * chosen.weight for s in servers)


def test_weighted_least_connections_fills_by_weight() -> None:
    servers = pool(5, 3, 2)
    fill(WeightedLeastConnections(), servers, 1000)
    assert [server.pinned for server in servers] == [500, 300, 200]


@pytest.mark.parametrize(
    "scheduler", [LeastConnections(), WeightedLeastConnections(), Adaptive(Adaptive.Config(port=1))]
)
def test_equals_take_turns(scheduler: Scheduler) -> None:
    """Clients that leave at once must not all go to the first server; nor to the one after a busy one."""
    servers = pool(1, 1, 1)
    assert sequence(scheduler, servers, 6) == "abcabc"
    servers[0].pinned = 1
    assert sequence(scheduler, servers, 4) == "bcbc"


def test_fixed_weighting_takes_the_heaviest_that_is_left() -> None:
    scheduler, servers = FixedWeighting(), pool(10, 100, 50)
    assert sequence(scheduler, servers, 3) == "bbb"
    assert sequence(scheduler, without(servers, "b"), 3) == "ccc"


def test_fixed_weighting_takes_the_first_of_equals() -> None:
    assert sequence(FixedWeighting(), pool(1, 2, 2), 2) == "bb"


# What the agents ask for


def test_adaptive_scales_weights_by_shares() -> None:
    servers = pool(2, 1, 1)
    for server, share in zip(servers, (50, 100, 200), strict=True):
        server.share = share
    fill(Adaptive(Adaptive.Config(port=1)), servers, 400)
    assert [server.pinned for server in servers] == [100, 100, 200]


def test_adaptive_gives_nothing_to_a_share_of_zero() -> None:
    servers = pool(9, 1)
    servers[0].share = 0
    servers[1].pinned = 1_000_000
    assert sequence(Adaptive(Adaptive.Config(port=1)), servers, 3) == "bbb"


def test_adaptive_goes_by_weight_when_nobody_wants() -> None:
    servers = pool(3, 1)
    for server in servers:
        server.share = 0
    fill(Adaptive(Adaptive.Config(port=1)), servers, 400)
    assert [server.pinned for server in servers] == [300, 100]


def test_adaptive_brings_its_check() -> None:
    (check,) = Adaptive(Adaptive.Config(port=9707, interval=3)).checks
    assert (check.ref.plugin, check.ref.options, check.interval) == ("agent", {"port": 9707}, 3)


@pytest.mark.parametrize("options", [{}, {"port": 0}, {"port": 1, "interval": 0}, {"port": 1, "prot": 2}])
def test_adaptive_refuses(options: dict[str, int]) -> None:
    with pytest.raises(ValidationError):
        Adaptive.Config.model_validate(options)


# Hashes

CLIENTS = range(4_000)


def assert_proportional(counts: Counter[str], servers: Pool) -> None:
    """Every count within 5 standard deviations of a binomial draw; each fails once in a million."""
    total, weights = sum(counts.values()), sum(server.weight for server in servers)
    for server in servers:
        share = server.weight / weights
        assert abs(counts[server.name] - total * share) <= 5 * sqrt(total * share * (1 - share)), server.name


def maglev(candidates: Pool) -> Maglev:
    scheduler = Maglev()
    scheduler.prepare(candidates)
    return scheduler


@pytest.mark.parametrize("weights", [(1, 1, 1), (4, 2, 1), (1,) * 20, (100, 1, 37)])
def test_hashes_are_proportional(weights: tuple[int, ...]) -> None:
    servers = pool(*weights)
    assert_proportional(Counter(placed(SourceHash(), servers, CLIENTS).values()), servers)
    assert_proportional(Counter(placed(maglev(servers), servers, CLIENTS).values()), servers)


@pytest.mark.parametrize("weights", [(1, 1), (1, 1, 1, 1, 1), (5, 1, 3), (1,) * 20])
def test_source_hash_moves_only_the_clients_of_the_server_that_goes(weights: tuple[int, ...]) -> None:
    scheduler, servers = SourceHash(), pool(*weights)
    rest = without(servers, "a")
    before, during = placed(scheduler, servers, CLIENTS), placed(scheduler, rest, CLIENTS)
    assert {n for n in CLIENTS if before[n] != during[n]} == {n for n in CLIENTS if before[n] == "a"}
    assert placed(scheduler, servers, CLIENTS) == before
    assert_proportional(Counter(during[n] for n in CLIENTS if before[n] == "a"), rest)


def test_source_hash_moves_clients_only_to_the_server_that_gains_weight() -> None:
    before = placed(SourceHash(), pool(1, 1, 1), CLIENTS)
    after = placed(SourceHash(), pool(1, 2, 1), CLIENTS)
    moved = {n for n in CLIENTS if before[n] != after[n]}
    assert moved
    assert {after[n] for n in moved} == {"b"}


def test_source_hash_looks_at_the_address_alone() -> None:
    scheduler, servers = SourceHash(), pool(*[1] * 10)
    address = bytes([192, 0, 2, 1])
    requests = [Request(Client(address, port), key("spi", bytes([port])), Random(port)) for port in range(50)]
    assert len({scheduler.pick(each, servers).name for each in requests}) == 1


@pytest.mark.parametrize("count", [2, 3, 10, 50])
def test_maglev_is_even(count: int) -> None:
    """The fullest server has at most one entry more than the emptiest; 1 % is the paper's worst for this size."""
    shares = Counter(build({f"gw{n}": 1 for n in range(count)}).entries)
    assert len(shares) == count
    assert max(shares.values()) - min(shares.values()) <= 1
    assert max(shares.values()) <= 1.01 * ENTRIES / count


@settings(max_examples=8, deadline=None)
@given(st.dictionaries(st.text(min_size=1, max_size=8), st.integers(1, 1000), min_size=1, max_size=6))
def test_maglev_shares_are_the_weights(weights: dict[str, int]) -> None:
    table = build(weights)
    shares = Counter(table.names[entry] for entry in table.entries)
    total = sum(weights.values())
    for name, weight in weights.items():
        assert abs(shares[name] - ENTRIES * weight / total) <= len(weights)


def owners(names: Sequence[str]) -> list[str]:
    table = build(dict.fromkeys(names, 1))
    return [table.names[entry] for entry in table.entries]


@pytest.mark.parametrize("count", [3, 10, 50])
def test_maglev_removal_moves_less_than_1_percent_of_the_others(count: int) -> None:
    """Measured: 0.2, 0.3 and 0.6 % of all entries; a table by modulo would move (count - 2) / (count - 1)."""
    names = [f"gw{n}" for n in range(count)]
    before, after = owners(names), owners(names[1:])
    others = [(old, new) for old, new in zip(before, after, strict=True) if old != names[0]]
    assert sum(old != new for old, new in others) < 0.01 * len(others)


def test_maglev_table_ignores_order_and_past() -> None:
    weights = {"gw1": 3, "gw2": 1, "gw3": 2}
    assert build(weights).entries == build(dict(reversed(weights.items()))).entries
    servers = pool(1, 2, 3)
    aged = maglev(pool(5, 5, 5, 5))
    aged.prepare(servers)
    assert placed(aged, servers, CLIENTS[:500]) == placed(maglev(servers), servers, CLIENTS[:500])


def test_maglev_builds_only_for_new_names_or_weights() -> None:
    servers = pool(1, 2)
    scheduler = maglev(servers)
    table = scheduler._table
    scheduler.prepare(tuple(reversed(servers)))
    assert scheduler._table is table
    scheduler.prepare(pool(1, 3))
    assert scheduler._table is not table


def test_maglev_with_a_stale_table_moves_only_the_clients_of_the_server_that_went() -> None:
    servers = pool(1, 1, 1, 1)
    scheduler = maglev(servers)
    before = placed(scheduler, servers, CLIENTS)
    during = placed(scheduler, without(servers, "a"), CLIENTS)
    assert {n for n in CLIENTS if before[n] != during[n]} == {n for n in CLIENTS if before[n] == "a"}
    assert_proportional(Counter(during[n] for n in CLIENTS if before[n] == "a"), without(servers, "a"))


@pytest.mark.parametrize("prepared", [False, True])
def test_maglev_without_a_table_for_these_candidates_spreads_all_the_same(prepared: bool) -> None:
    scheduler = maglev(pool(1)) if prepared else Maglev()
    strangers = pool(1, 1, 1, 1)[1:]
    assert_proportional(Counter(placed(scheduler, strangers, CLIENTS).values()), strangers)


def test_maglev_spreads_the_clients_of_one_address_by_their_spi() -> None:
    servers = pool(1, 1, 1)
    client = Client(bytes(4), 500)
    scheduler = maglev(servers)
    requests = [Request(client, key("spi", n.to_bytes(8)), Random(n)) for n in range(300)]
    assert_proportional(Counter(scheduler.pick(each, servers).name for each in requests), servers)


_PLACE = """
from types import SimpleNamespace
from sapin.core.contracts import Client, Request
from sapin.plugins.schedulers.maglev import Maglev
from sapin.plugins.schedulers.source_hash import SourceHash

servers = tuple(SimpleNamespace(name=name, weight=1) for name in "abc")
maglev = Maglev()
maglev.prepare(servers)
for scheduler in (SourceHash(), maglev):
    requests = (Request(Client(bytes([10, 0, 0, n]), 500), bytes([n]), None) for n in range(64))
    print("".join(scheduler.pick(request, servers).name for request in requests))
"""


def test_hashes_agree_over_processes() -> None:
    """Two balancers, or one before and after a restart, whatever the salt of Python's own hash."""
    salted = [
        subprocess.run(
            [sys.executable, "-c", _PLACE],
            env={"PYTHONHASHSEED": salt},
            capture_output=True,
            check=True,
            text=True,
            timeout=60,
        ).stdout
        for salt in ("1", "2")
    ]
    assert salted[0] == salted[1]
    assert all(set(line) == {"a", "b", "c"} for line in salted[0].split())


# Chance


@pytest.mark.parametrize("weights", [(1, 1), (3, 1), (1,) * 10, (10, 1, 5)])
def test_two_choices_fill_by_weight(weights: tuple[int, ...]) -> None:
    """Over the average by O(log log n), far below the standard deviation of single draws, 200 clients here."""
    servers, random = pool(*weights), Random(7)
    clients = 40_000
    fill(PowerOfTwoChoices(), servers, clients, random)
    for server in servers:
        assert abs(server.pinned - clients * server.weight / sum(weights)) < 8


def test_two_choices_are_much_more_even_than_one() -> None:
    """With 50 servers and 1,000 clients each, one choice leaves a gap of about 2.3 * sqrt(1000) = 70; two, some 4."""
    count, random = 50, Random(11)
    servers = pool(*[1] * count)
    fill(PowerOfTwoChoices(), servers, 1000 * count, random)
    single = Counter(random.randrange(count) for _ in range(1000 * count))
    assert max(single.values()) - 1000 > 40
    assert max(server.pinned for server in servers) - 1000 < 8


def test_two_choices_of_two_servers_see_both() -> None:
    servers, random = pool(1, 9), Random(3)
    servers[0].pinned, servers[1].pinned = 0, 1
    assert all(PowerOfTwoChoices().pick(request(n, random), servers) is servers[0] for n in range(200))


def test_two_choices_draw_by_weight() -> None:
    """Of equals the first drawn is taken, so an idle pool shows the chances of the first draw."""
    servers, random = pool(5, 3, 2), Random(5)
    scheduler = PowerOfTwoChoices()
    counts = Counter(scheduler.pick(request(n, random), servers).name for n in range(20_000))
    assert_proportional(counts, servers)


def test_two_choices_draw_different_servers() -> None:
    """Drawn with replacement, the fullest of three would get 1 in 9."""
    servers, random = pool(1, 1, 1), Random(9)
    servers[0].pinned = 1
    assert "a" not in {PowerOfTwoChoices().pick(request(n, random), servers).name for n in range(500)}
