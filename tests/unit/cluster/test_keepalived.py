"""The configuration for keepalived, which keepalived itself has to accept."""

from __future__ import annotations

import subprocess
from dataclasses import replace
from ipaddress import ip_address, ip_interface
from pathlib import Path

import pytest

from sapin.cluster.config import Cluster, Side, Takeover, VirtualAddress
from sapin.cluster.keepalived import keepalived_conf, router_number

CLUSTER = Cluster(
    (ip_address("198.19.0.1"),),
    (
        VirtualAddress(ip_interface("198.18.0.1/24"), "front"),
        VirtualAddress(ip_interface("2001:db8:18::1/64"), "front"),
        VirtualAddress(ip_interface("10.60.0.1/24"), "back", Side.SERVERS),
    ),
    priority=150,
    takeover=Takeover.KEEPALIVED,
)


def made(cluster: Cluster = CLUSTER) -> str:
    return keepalived_conf(cluster, "lb-a", "ab" * 16, "/usr/bin/true", "--state-dir /s")


@pytest.mark.root("a network namespace")
@pytest.mark.programs("keepalived", "unshare", "ip")
@pytest.mark.parametrize("cluster", [CLUSTER, replace(CLUSTER, preempt=True, priority=255)])
def test_keepalived_accepts_it(cluster: Cluster, tmp_path: Path) -> None:
    path = tmp_path / "keepalived.conf"
    path.write_text(made(cluster))
    test = "ip link add front type veth peer name back && exec keepalived --config-test --use-file " + str(
        path
    )
    argv = ["unshare", "--net", "sh", "-c", f"PATH=$PATH:/usr/sbin:/sbin; {test}"]
    done = subprocess.run(argv, capture_output=True, text=True, check=False, timeout=30)
    assert done.returncode == 0, done.stdout + done.stderr + path.read_text()


def test_it_says_what_the_pair_says() -> None:
    text = made()
    assert "priority 150" in text
    assert "nopreempt" in text
    assert "advert_int 0.03" in text or "advert_int 0.02" in text
    assert "interface front" in text
    assert '"/usr/bin/true cluster notify active --state-dir /s"' in text
    both, excluded = text.split("virtual_ipaddress_excluded")
    assert "198.18.0.1/24 dev front" in both
    assert "10.60.0.1/24 dev back" in both
    assert "2001:db8:18::1/64 dev front" in excluded


def test_preemption_is_as_configured() -> None:
    assert "nopreempt" not in made(replace(CLUSTER, preempt=True))


def test_both_nodes_have_the_same_router_number() -> None:
    assert router_number("ab" * 16) == router_number("ab" * 16)
    assert all(1 <= router_number(str(n)) <= 255 for n in range(1_000))
