"""The writer: a change is made whole or not at all, and what it does not concern stays as it is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
from structlog.testing import capture_logs

from sapin.core.affinity import Change, Cleared
from sapin.core.contracts import key
from sapin.core.model import AdminState, Endpoint, Health, PluginRef, RealServer, VirtualService
from sapin.core.registry import PluginError
from sapin.core.snapshot import Group, Member, Snapshot
from sapin.core.writer import Overrides, UnknownObject, Writer, plugins_of
from tests import fakes
from tests.fakes import Lives, config, follower, living, own, servers

ENABLED, DRAINING, DISABLED = AdminState
NOW = 1_000


class Written:
    """A writer, what it fed, and the snapshots that it told."""

    def __init__(self, *services: VirtualService, overrides: Overrides | None = None, **node: Any) -> None:
        self.lives = Lives()
        self.fed: list[Change] = []
        self.told: list[tuple[Snapshot, Snapshot]] = []
        first = config(*services, **node)
        self.writer = Writer(self.lives.registry, self.fed.append, first, overrides)
        self.writer.subscribe(lambda old, new: self.told.append((old, new)))

    @property
    def group(self) -> Group:
        return self.writer.snapshot.groups["ike"]

    def member(self, name: str) -> Member:
        return self.group.members[name]

    def candidates(self, version: int = 4) -> tuple[Member, ...]:
        return self.group.pools[version].candidates

    def load(self, *services: VirtualService) -> None:
        self.writer.load(config(*services))

    def pin(self, name: str, *keys: bytes) -> None:
        self.group.table.put(keys or (b"src:" + name.encode(),), self.member(name), NOW)
        self.fed.clear()

    def health(self, server: str, health: Health, asked: AdminState = ENABLED, share: int = 100) -> None:
        self.writer.set_health("ike", server, health, asked, share)


# The first configuration


def test_the_first_configuration_is_published() -> None:
    service = living()
    written = Written(service, follower(service))
    assert written.writer.snapshot.version == 1
    assert list(written.writer.snapshot.services) == ["ike", "ike-natt"]
    assert written.told == []
    assert len(written.lives.open) == 3


def test_both_families_have_a_scheduler_of_their_own() -> None:
    written = Written(living(*servers("four"), *servers("six", address="2001:db8::1")))
    pools = written.group.pools
    assert {v: [member.name for member in pool.candidates] for v, pool in pools.items()} == {
        4: ["four"],
        6: ["six"],
    }
    assert pools[4].scheduler is not pools[6].scheduler


def test_a_follower_serves_at_the_endpoints_that_its_following_says() -> None:
    service = living(*servers("gw1", port=10_500))
    written = Written(service, follower(service))
    address = servers("gw1")[0].address
    assert written.group.endpoints == {
        "ike": {"gw1": Endpoint(address, 10_500)},
        "ike-natt": {"gw1": Endpoint(address, 4500)},
    }


def test_nothing_stays_open_after_a_first_configuration_that_cannot_be_used() -> None:
    lives = Lives()
    service = living(persistence=own(unopenable=True))
    with pytest.raises(PluginError):
        Writer(lives.registry, lambda change: None, config(service))
    assert lives.open == []


def test_close_closes_every_plugin() -> None:
    service = living(*servers("four"), *servers("six", address="2001:db8::1"))
    written = Written(service, follower(service), living(name="other", port=9))
    assert len(written.lives.open) == 6
    written.writer.close()
    assert written.lives.open == []


# A change that cannot be made

GOOD = living(*servers("gw1", "gw2", "gw3"), scheduler=own(size=1))
REFUSED: dict[str, Sequence[VirtualService]] = {
    "an unknown plugin": [GOOD, living(name="other", port=9, scheduler=PluginRef("maglov"))],
    "an option of the wrong type": [replace(GOOD, persistence=own(size="big"))],
    "an unknown option": [replace(GOOD, persistence=own(sice=1))],
    "a scheduler that cannot be opened": [GOOD, living(name="other", port=9, scheduler=own(unopenable=True))],
    "a persistence that cannot be opened": [replace(GOOD, persistence=own(unopenable=True))],
    "a following that cannot be opened": [GOOD, follower(GOOD, following=own(unopenable=True))],
    "a following that raises": [GOOD, follower(GOOD, following=own(endpoint="raises"))],
    "a following that answers no endpoint": [GOOD, follower(GOOD, following=own(endpoint="nonsense"))],
}


@pytest.mark.parametrize("services", REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_used_changes_nothing(services: Sequence[VirtualService]) -> None:
    written = Written(living(), living(name="gone", port=7))
    written.pin("gw1")
    written.writer.set_admin("ike", "gw2", DRAINING)
    written.told.clear()
    before, open_before = written.writer.snapshot, list(written.lives.open)
    state = [(m.admin, m.weight, m.health, m.pinned) for m in written.group.members.values()]
    moved = [replace(s, pin_timeout=60.0, real_servers=servers("gw1", "gw2", weight=9)) for s in services]
    with pytest.raises(PluginError):
        written.load(*moved)
    assert written.writer.snapshot is before
    assert written.lives.open == open_before
    assert [(m.admin, m.weight, m.health, m.pinned) for m in written.group.members.values()] == state
    assert written.writer.overrides["ike"] == {"gw2": DRAINING}
    assert written.group.table.timeout == 28_800
    assert (written.fed, written.told) == ([], [])


def test_a_table_that_finds_no_memory_changes_nothing() -> None:
    written = Written(living())
    before, open_before = written.writer.snapshot, list(written.lives.open)
    other = living(name="other", port=9)
    with pytest.raises(OSError, match="memory"):
        written.writer.load(
            config(living(*servers("gw1", weight=9), scheduler=own(size=1)), other, max_pins=2**48)
        )
    assert written.writer.snapshot is before
    assert written.lives.open == open_before
    assert written.member("gw1").weight == 1


# Plugins over a reload


def test_a_plugin_whose_options_stay_keeps_its_instance() -> None:
    service = living()
    written = Written(service, follower(service))
    before = list(plugins_of(written.group))
    changed = living(*servers("gw1", "gw2", "gw3"), pin_timeout=60.0)
    written.load(follower(changed), changed)
    assert list(plugins_of(written.group)) == before
    assert written.lives.closed == []


def test_a_plugin_with_other_options_is_another_one() -> None:
    written = Written(living())
    scheduler, persistence = (hosted.plugin for hosted in plugins_of(written.group))
    written.load(living(scheduler=own(size=2)))
    now_scheduler, now_persistence = (hosted.plugin for hosted in plugins_of(written.group))
    assert now_scheduler.config.size == 2
    assert now_persistence is persistence
    assert written.lives.closed == [scheduler]


def test_another_plugin_takes_over() -> None:
    written = Written(living())
    written.load(living(scheduler=PluginRef("first")))
    assert isinstance(written.group.pools[4].scheduler.plugin, fakes.First)
    assert len(written.lives.closed) == 1


def test_the_old_plugin_is_closed_after_the_new_snapshot_is_out() -> None:
    written = Written(living())
    closed_then: list[int] = []
    written.writer.subscribe(lambda old, new: closed_then.append(len(written.lives.closed)))
    written.load(living(scheduler=own(size=2)))
    assert closed_then == [0]
    assert len(written.lives.closed) == 1


def test_plugins_of_what_is_gone_are_closed() -> None:
    service = living(*servers("four"), *servers("six", address="2001:db8::1"))
    written = Written(service, follower(service), living(name="other", port=9))
    written.load(living(*servers("four")))
    assert len(written.lives.open) == 2
    assert len(written.lives.closed) == 4


def test_a_plugin_that_cannot_be_closed_does_not_hold_up_the_change() -> None:
    written = Written(living(scheduler=own(unclosable=True), persistence=own(unclosable=True)))
    with capture_logs() as logs:
        written.load(living())
        written.writer.close()
    assert [entry["kind"] for entry in logs] == ["scheduler", "persistence"]
    assert len(written.told) == 1
    assert written.lives.open == []


# Servers over a reload


def test_a_server_keeps_its_live_state() -> None:
    written = Written(living())
    written.pin("gw1")
    written.health("gw1", Health.HEALTHY, share=50)
    gw1 = written.member("gw1")
    gw1.response_time = 0.01
    written.load(living(*servers("gw1", "gw2", "gw3", weight=5), pin_timeout=60.0))
    assert written.member("gw1") is gw1
    assert (gw1.health, gw1.share, gw1.response_time, gw1.pinned) == (Health.HEALTHY, 50, 0.01, 1)
    assert (gw1.weight, gw1.server.weight) == (5, 5)
    assert written.fed == []


@pytest.mark.parametrize("moved", [servers("gw1", address="10.60.0.99"), servers("gw1", port=501)])
def test_a_server_that_moves_is_another_one(moved: tuple[RealServer, ...]) -> None:
    written = Written(living())
    written.pin("gw1")
    written.health("gw1", Health.HEALTHY)
    gw1 = written.member("gw1")
    written.load(living(*moved, servers("gw1", "gw2")[1]))
    assert written.member("gw1") is not gw1
    assert (written.member("gw1").health, written.member("gw1").pinned, gw1.pinned) == (Health.UNKNOWN, 0, 0)
    assert written.fed == [Cleared("ike", "gw1")]


def test_a_server_that_goes_loses_its_pins() -> None:
    written = Written(living())
    written.pin("gw1")
    written.pin("gw2")
    written.load(living(*servers("gw1")))
    assert written.fed == [Cleared("ike", "gw2")]
    assert written.group.table.counts() == {"gw1": 1}


def test_a_group_that_goes_loses_its_pins() -> None:
    written = Written(living())
    written.pin("gw1")
    written.load(living(name="other"))
    assert written.fed == [Cleared("ike", "gw1")]


def test_a_server_that_the_file_disables_loses_its_pins_and_one_that_it_drains_does_not() -> None:
    written = Written(living())
    written.pin("gw1")
    written.pin("gw2")
    gw1, gw2 = servers("gw1", "gw2")
    written.load(living(replace(gw1, state=DRAINING), replace(gw2, state=DISABLED)))
    assert written.fed == [Cleared("ike", "gw2")]
    assert written.candidates() == ()


def test_pins_last_as_long_as_the_file_says() -> None:
    written = Written(living(pin_timeout=59.2))
    assert written.group.table.timeout == 60
    written.load(living(pin_timeout=7.0))
    assert written.group.table.timeout == 7


def test_the_room_for_pins_is_that_of_the_start() -> None:
    written = Written(living(), max_pins=10)
    table = written.group.table
    written.writer.load(config(living(), living(name="other", port=9), max_pins=20))
    assert written.group.table is table
    assert table.limit == 10
    assert written.writer.snapshot.groups["other"].table.limit == 20


# Candidates


def test_the_candidates_are_the_same_tuple_until_something_about_them_changes() -> None:
    written = Written(living())
    before = written.candidates()
    written.load(living(pin_timeout=60.0))
    written.health("gw1", Health.HEALTHY)
    written.writer.set_admin("ike", "gw1", ENABLED)
    written.load(living(scheduler=own(size=2)))
    assert written.candidates() is before


def test_the_candidates_of_one_family_are_not_touched_by_the_other() -> None:
    written = Written(living(*servers("a", "b"), *servers("c", "d", address="2001:db8::1")))
    four = written.candidates(4)
    written.health("c", Health.UNHEALTHY)
    assert [member.name for member in written.candidates(6)] == ["d"]
    assert written.candidates(4) is four


def test_another_weight_makes_another_tuple() -> None:
    """A scheduler with tables compares by identity; the members are the same objects, with another weight."""
    written = Written(living())
    before = written.candidates()
    written.load(living(*servers("gw1", "gw2", weight=2)))
    assert written.candidates() == before
    assert written.candidates() is not before


def test_another_order_makes_another_tuple() -> None:
    written = Written(living())
    before = written.candidates()
    written.load(living(*servers("gw1", "gw2")[::-1]))
    assert written.candidates() == before[::-1]


@pytest.mark.parametrize("state", [DRAINING, DISABLED])
def test_who_takes_no_new_clients_is_no_candidate(state: AdminState) -> None:
    written = Written(living())
    written.writer.set_admin("ike", "gw1", state)
    assert [member.name for member in written.candidates()] == ["gw2"]
    written.writer.set_admin("ike", "gw1", ENABLED)
    assert [member.name for member in written.candidates()] == ["gw1", "gw2"]


# Admin states that are set at run time


def test_an_admin_state_is_set_through_any_service_of_the_group() -> None:
    service = living()
    written = Written(service, follower(service))
    written.writer.set_admin("ike-natt", "gw1", DRAINING)
    assert written.member("gw1").admin is DRAINING
    assert written.writer.overrides == {"ike": {"gw1": DRAINING}}


def test_an_admin_state_stands_until_the_file_states_another_one() -> None:
    gw1, gw2 = servers("gw1", "gw2")
    written = Written(living(gw1, gw2))
    written.writer.set_admin("ike", "gw1", DRAINING)
    written.load(living(replace(gw1, weight=3), gw2, pin_timeout=60.0))
    assert written.member("gw1").admin is DRAINING
    written.load(living(replace(gw1, state=DISABLED), gw2))
    assert written.member("gw1").admin is DISABLED
    assert written.writer.overrides == {"ike": {}}
    written.load(living(gw1, gw2))
    assert written.member("gw1").admin is ENABLED


def test_an_admin_state_stands_over_the_files_after_a_start() -> None:
    written = Written(
        living(*servers("gw1", "gw2", state=DISABLED)),
        overrides={"ike": {"gw1": ENABLED, "gone": DRAINING}, "gone": {}},
    )
    assert [written.member(name).admin for name in ("gw1", "gw2")] == [ENABLED, DISABLED]
    assert written.writer.overrides == {"ike": {"gw1": ENABLED}}


def test_an_admin_state_goes_with_its_server() -> None:
    gw1, gw2 = servers("gw1", "gw2")
    written = Written(living(gw1, gw2))
    written.writer.set_admin("ike", "gw1", DRAINING)
    written.load(living(gw2))
    written.load(living(gw1, gw2))
    assert written.member("gw1").admin is ENABLED


def test_overrides_are_not_the_callers() -> None:
    given = {"ike": {"gw1": DRAINING}}
    written = Written(living(), overrides=given)
    written.writer.set_admin("ike", "gw1", ENABLED)
    assert given == {"ike": {"gw1": DRAINING}}


def test_what_is_unknown_is_told_with_what_there_is() -> None:
    written = Written(living(), living(name="other", port=9))
    with pytest.raises(UnknownObject, match=r"no virtual service 'iek' \(there is: ike, other\)"):
        written.writer.set_admin("iek", "gw1", DRAINING)
    with pytest.raises(UnknownObject, match=r"'ike' has no real server 'gw9' \(it has: gw1, gw2\)"):
        written.writer.set_admin("ike", "gw9", DRAINING)
    assert written.told == []


# Health


def test_a_failing_server_loses_all_ports_of_its_clients_at_once() -> None:
    service = living()
    written = Written(service, follower(service))
    client = (key("spi", b"12345678"), key("tuple", b"500"), key("tuple", b"4500"))
    written.pin("gw1", *client)
    written.pin("gw2", b"src:other")
    written.health("gw1", Health.UNHEALTHY)
    assert [written.group.table.get(each) for each in client] == [None] * 3
    assert written.fed == [Cleared("ike", "gw1")]
    assert written.group.table.counts() == {"gw2": 1}
    assert written.member("gw1").pinned == 0


def test_a_server_that_recovers_is_a_candidate_again() -> None:
    written = Written(living())
    written.health("gw1", Health.UNHEALTHY)
    assert [member.name for member in written.candidates()] == ["gw2"]
    written.health("gw1", Health.HEALTHY)
    assert [member.name for member in written.candidates()] == ["gw1", "gw2"]


@pytest.mark.parametrize(
    ("health", "asked", "keeps", "takes"),
    [
        (Health.HEALTHY, ENABLED, True, True),
        (Health.HEALTHY, DRAINING, True, False),
        (Health.HEALTHY, DISABLED, False, False),
        (Health.UNHEALTHY, ENABLED, False, False),
    ],
)
def test_what_a_server_asks_for_is_done(health: Health, asked: AdminState, keeps: bool, takes: bool) -> None:
    written = Written(living())
    written.pin("gw1")
    written.health("gw1", health, asked, 30)
    gw1 = written.member("gw1")
    assert (gw1.keeps, gw1.takes, gw1.share, gw1.admin) == (keeps, takes, 30, ENABLED)
    assert gw1.pinned == int(keeps)
    assert (gw1 in written.candidates()) == takes
    assert len(written.told) == int(not takes)


def test_only_what_changes_the_way_of_clients_is_published() -> None:
    written = Written(living())
    written.health("gw1", Health.HEALTHY)
    written.health("gw1", Health.HEALTHY, share=10)
    assert written.told == []
    written.health("gw1", Health.UNHEALTHY)
    written.health("gw1", Health.UNHEALTHY)
    assert len(written.told) == 1


def test_what_a_check_finds_after_its_server_is_gone_is_nothing() -> None:
    written = Written(living())
    written.writer.set_health("gone", "gw1", Health.UNHEALTHY, ENABLED, 100)
    written.health("gone", Health.UNHEALTHY)
    assert written.told == []


# Subscribers


def test_subscribers_are_told_both_snapshots_once_the_new_one_is_in_force() -> None:
    written = Written(living())
    seen: list[bool] = []
    written.writer.subscribe(lambda old, new: seen.append(written.writer.snapshot is new))
    first = written.writer.snapshot
    written.health("gw1", Health.UNHEALTHY)
    written.load(living())
    assert [old.version for old, _ in written.told] == [1, 2]
    assert written.told[0][0] is first
    assert written.told[0][1] is written.told[1][0]
    assert written.told[1][1] is written.writer.snapshot
    assert seen == [True, True]


def test_an_old_snapshot_stays_as_it_was() -> None:
    written = Written(living())
    before = written.writer.snapshot
    candidates = before.groups["ike"].pools[4].candidates
    written.health("gw1", Health.UNHEALTHY)
    written.load(living(*servers("gw2")))
    assert list(before.groups["ike"].members) == ["gw1", "gw2"]
    assert before.groups["ike"].pools[4].candidates is candidates


def test_a_port_that_is_only_spelt_out_moves_nobody() -> None:
    """A real server's port is the virtual service's by default; to write it down changes nothing."""
    service = living(*servers("gw1", "gw2"))
    written = Written(service)
    before = dict(written.group.members)
    spelt = tuple(replace(server, port=service.port) for server in service.real_servers)
    written.load(replace(service, real_servers=spelt))
    assert all(written.member(name) is member for name, member in before.items())
    written.load(replace(service, real_servers=tuple(replace(s, port=service.port + 1) for s in spelt)))
    assert not any(written.member(name) is member for name, member in before.items())
