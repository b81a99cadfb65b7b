"""What a server's states add up to, and the views of a snapshot."""

from __future__ import annotations

from dataclasses import FrozenInstanceError, fields
from itertools import product

import pytest

from sapin.core.contracts import Candidate
from sapin.core.model import AdminState, Endpoint, Health
from sapin.core.snapshot import Member, Snapshot
from sapin.core.writer import Writer
from tests import fakes


def snapshot() -> Snapshot:
    service = fakes.leader(*fakes.servers("gw1", "gw2"))
    config = fakes.config(
        fakes.follower(service), service, fakes.leader(*fakes.servers("gw9"), name="other", port=9)
    )
    return Writer(fakes.registry(), lambda change: None, config).snapshot


@pytest.mark.parametrize(("admin", "asked"), list(product(AdminState, AdminState)))
@pytest.mark.parametrize("health", Health)
@pytest.mark.parametrize("weight", [0, 1])
def test_the_strictest_of_all_states_counts(
    admin: AdminState, asked: AdminState, health: Health, weight: int
) -> None:
    member = Member(fakes.servers("gw1", weight=weight)[0])
    member.admin, member.asked, member.health = admin, asked, health
    member.settle()
    assert member.keeps == (health is not Health.UNHEALTHY and AdminState.DISABLED not in (admin, asked))
    assert member.takes == (member.keeps and weight == 1 and AdminState.DRAINING not in (admin, asked))


def test_a_server_that_is_not_checked_yet_is_used() -> None:
    member = Member(fakes.servers("gw1")[0])
    assert (member.health, member.keeps, member.takes) == (Health.UNKNOWN, True, True)


def test_a_server_starts_with_its_configured_state() -> None:
    member = Member(fakes.servers("gw1", state=AdminState.DRAINING, weight=7)[0])
    assert (member.admin, member.keeps, member.takes, member.weight) == (AdminState.DRAINING, True, False, 7)


def test_a_member_is_what_schedulers_are_promised() -> None:
    candidate: Candidate = Member(fakes.servers("gw1")[0])
    assert (candidate.name, candidate.weight, candidate.pinned) == ("gw1", 1, 0)
    assert (candidate.response_time, candidate.share) == (None, 100)


@pytest.mark.parametrize(("address", "version"), [("10.60.0.11", 4), ("2001:db8::1", 6)])
def test_the_family_of_a_server(address: str, version: int) -> None:
    assert Member(fakes.servers("gw1", address=address)[0]).version == version


def test_a_member_shows_itself() -> None:
    assert repr(Member(fakes.servers("gw1")[0])) == "<Member gw1 enabled unknown pinned=0>"


def test_a_group_is_named_after_its_leader_wherever_that_stands_in_the_file() -> None:
    groups = snapshot().groups
    assert list(groups) == ["ike", "other"]
    assert [service.name for service in groups["ike"].services] == ["ike", "ike-natt"]
    assert groups["ike"].name == groups["ike"].leader.name == "ike"


def test_a_service_sees_its_group_and_its_own_endpoints() -> None:
    views = snapshot().services
    assert views["ike"].group is views["ike-natt"].group
    gw1, gw2 = (server.address for server in fakes.servers("gw1", "gw2"))
    assert views["ike"].endpoints == {"gw1": Endpoint(gw1, 500), "gw2": Endpoint(gw2, 500)}
    assert views["ike-natt"].endpoints == {"gw1": Endpoint(gw1, 4500), "gw2": Endpoint(gw2, 4500)}


def test_a_snapshot_is_not_changed_but_replaced() -> None:
    view = snapshot()
    for frozen in (view, view.groups["ike"], view.groups["ike"].pools[4], view.services["ike"]):
        for field in fields(frozen):
            with pytest.raises(FrozenInstanceError):
                setattr(frozen, field.name, None)
