"""The configurations to start from are valid, say what the defaults are, and refuse what would not work."""

from __future__ import annotations

import re

import pytest

from sapin.api.templates import ikev2
from sapin.core.config import parse
from sapin.core.model import Framing
from sapin.core.registry import Registry

REGISTRY = Registry()


def test_the_template_is_valid_and_serves_both_ports() -> None:
    config = parse(ikev2(["198.18.0.1"], ["10.60.0.11", "10.60.0.12"]), REGISTRY)
    leader, follower = config.virtual_services
    assert [(s.name, s.port, s.framing) for s in (leader, follower)] == [
        ("ike", 500, Framing.IKE),
        ("ike-natt", 4500, Framing.NATT),
    ]
    assert [str(server.address) for server in follower.real_servers] == ["10.60.0.11", "10.60.0.12"]
    assert follower.follows == "ike"
    assert [check.ref.plugin for check in leader.checks] == ["ike"]


def test_what_the_template_comments_out_is_the_default() -> None:
    text = ikev2(["198.18.0.1"], ["10.60.0.11"])
    stated, keys = re.subn(r"^# (\w+ = .*  # )", r"\1", text, flags=re.MULTILINE)
    assert keys == 5
    assert parse(stated, REGISTRY) == parse(text, REGISTRY)


def test_the_template_makes_a_pair_of_services_for_each_family() -> None:
    config = parse(
        ikev2(["2001:db8::1", "198.18.0.1"], ["10.60.0.11", "2001:db8::11", "10.60.0.12"]), REGISTRY
    )
    assert {s.name: [server.name for server in s.real_servers] for s in config.virtual_services} == {
        "ike6": ["gw2"],
        "ike6-natt": ["gw2"],
        "ike": ["gw1", "gw3"],
        "ike-natt": ["gw1", "gw3"],
    }


def test_the_template_serves_both_families_on_the_dual_stack_wildcard() -> None:
    config = parse(ikev2(["::"], ["10.60.0.11", "2001:db8::11"]), REGISTRY)
    assert [len(service.real_servers) for service in config.virtual_services] == [2, 2]


def test_the_template_says_each_thing_once() -> None:
    text = ikev2(["198.18.0.1", "2001:db8::1"], ["10.60.0.11", "2001:db8::11"])
    comments = [line for line in text.splitlines() if line.startswith("#")]
    assert len(comments) == len(set(comments))
    assert max(map(len, text.splitlines())) <= 110


@pytest.mark.parametrize(
    ("vips", "servers", "why"),
    [
        ([], ["10.60.0.11"], "there is no virtual address"),
        (["198.18.0.1"], [], "virtual address 198.18.0.1 has no server of IPv4"),
        (["198.18.0.1"], ["2001:db8::11"], "virtual address 198.18.0.1 has no server of IPv4"),
        (
            ["198.18.0.1"],
            ["10.60.0.11", "2001:db8::11"],
            "server 2001:db8::11 has no virtual address of IPv6",
        ),
        (["198.18.0.1", "198.18.0.2"], ["10.60.0.11"], "one virtual address of each family"),
        (["::", "198.18.0.1"], ["10.60.0.11"], "one virtual address of each family"),
        (["198.18.0.1"], ["10.60.0.11", "10.60.0.11"], "address 10.60.0.11 is given twice"),
        (["198.18.0.1"], ["198.18.0.1"], "address 198.18.0.1 is given twice"),
        (["vpn.example"], ["10.60.0.11"], "virtual address 'vpn.example' must be an IPv4 or IPv6 address"),
        (["198.18.0.1"], ["0.0.0.0"], "server '0.0.0.0' is the unspecified address"),
    ],
)
def test_the_template_refuses_what_would_not_work(vips: list[str], servers: list[str], why: str) -> None:
    with pytest.raises(ValueError, match=why):
        ikev2(vips, servers)
