"""The difference of two configurations."""

from __future__ import annotations

from dataclasses import replace

from sapin.api.templates import ikev2
from sapin.core.changes import diff
from sapin.core.config import parse
from sapin.core.model import AdminState, PluginRef
from sapin.core.registry import Registry

OLD = parse(ikev2(["198.18.0.1"], ["10.60.0.11", "10.60.0.12", "10.60.0.13"]), Registry())


def test_the_same_configuration_is_no_change() -> None:
    reordered = replace(OLD, virtual_services=OLD.virtual_services[::-1])
    assert not diff(OLD, OLD)
    assert not diff(OLD, reordered)
    assert list(diff(OLD, OLD).lines()) == []


def test_a_change_is_told_by_service_and_server() -> None:
    leader, follower = OLD.virtual_services
    gw1, gw2, gw3 = leader.real_servers
    servers = (replace(gw3, name="gw4"), replace(gw2, weight=5, state=AdminState.DRAINING), gw1)
    new = replace(
        OLD,
        node=replace(OLD.node, max_pins=7),
        virtual_services=(
            replace(leader, real_servers=servers, pin_timeout=60.0, scheduler=PluginRef("maglev")),
            replace(follower, name="natt"),
        ),
    )
    changes = diff(OLD, new)
    assert changes.node == ("max_pins",)
    assert (changes.added, changes.removed) == (("natt",), ("ike-natt",))
    (service,) = changes.changed
    assert (service.name, service.keys) == ("ike", ("scheduler", "pin_timeout"))
    assert (service.added, service.removed) == (("gw4",), ("gw3",))
    assert [(server.name, server.keys) for server in service.changed] == [("gw2", ("weight", "state"))]
    assert list(changes.lines()) == [
        "node: max_pins changed",
        "ike-natt: removed",
        "natt: added",
        "ike: scheduler, pin_timeout changed",
        "ike/gw3: removed",
        "ike/gw4: added",
        "ike/gw2: weight, state changed",
    ]


def test_a_plugins_option_is_a_change() -> None:
    leader, follower = OLD.virtual_services
    prefixed = replace(leader, persistence=PluginRef("source-address", {"prefix4": 24}))
    (service,) = diff(OLD, replace(OLD, virtual_services=(prefixed, follower))).changed
    assert (service.keys, service.added, service.removed, service.changed) == (("persistence",), (), (), ())
