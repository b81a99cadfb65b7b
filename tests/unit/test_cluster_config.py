"""The [cluster] table: what it may hold, what it means, and how sections of a file are kept apart from the rest."""

from __future__ import annotations

from ipaddress import ip_address, ip_interface
from pathlib import Path

import pytest

from sapin.cluster.config import Cluster, ClusterTable, Side, Takeover, VirtualAddress
from sapin.core.changes import diff
from sapin.core.config import ConfigError, parse
from sapin.core.model import Config
from sapin.core.registry import Registry

SCENARIOS = sorted((Path(__file__).parents[1] / "scenarios" / "cluster").glob("*.toml"))
REGISTRY = Registry()
SECTIONS = {"cluster": ClusterTable}


def read(text: str | bytes) -> Config:
    return parse(text, REGISTRY, SECTIONS)


def scenario(name: str) -> str:
    (document,) = (path for path in SCENARIOS if path.stem == name)
    return document.read_text()


def cluster(name: str) -> Cluster:
    found = read(scenario(name)).sections["cluster"]
    assert isinstance(found, Cluster)
    return found


@pytest.mark.parametrize("document", SCENARIOS, ids=lambda path: path.stem)
def test_a_document_has_exactly_the_faults_beside_it(document: Path) -> None:
    expected = document.with_suffix(".faults")
    if expected.exists():
        with pytest.raises(ConfigError) as refused:
            read(document.read_bytes())
        assert f"{refused.value}\n" == expected.read_text()
    else:
        assert read(document.read_bytes()).sections


def test_defaults() -> None:
    assert cluster("pair") == Cluster(
        links=(ip_address("198.19.0.1"),),
        virtual_addresses=(
            VirtualAddress(ip_interface("198.18.0.1/24"), "front", Side.CLIENTS),
            VirtualAddress(ip_interface("10.60.0.1/24"), "back", Side.SERVERS),
        ),
        port=4510,
        priority=100,
        preempt=False,
        heartbeat=0.025,
        missed=3,
        sync_timeout=0.02,
        takeover=Takeover.NETLINK,
    )
    assert cluster("pair").floating == {4: ip_address("10.60.0.1")}


def test_every_stated_key_arrives() -> None:
    found = cluster("every_key")
    assert found.links == (ip_address("198.19.0.1"), ip_address("2001:db8:19::1"))
    assert (found.port, found.priority, found.preempt) == (4600, 200, True)
    assert (found.heartbeat, found.missed, found.sync_timeout) == (0.05, 4, 0.01)
    assert found.takeover is Takeover.KEEPALIVED
    assert found.floating == {4: ip_address("10.60.0.1"), 6: ip_address("2001:db8:60::1")}
    assert found.virtual_addresses[0].address == ip_address("198.18.0.1")


def test_the_first_address_of_a_family_is_the_source() -> None:
    more = '"back", side = "servers" },\n    { address = "10.60.0.2/24", device = "back", side = "servers" },'
    text = scenario("pair").replace('"back", side = "servers" },', more)
    found = read(text).sections["cluster"]
    assert found.floating == {4: ip_address("10.60.0.1")}


def test_a_wildcard_service_is_at_every_virtual_address() -> None:
    text = scenario("pair").replace('address = "198.18.0.1"\n', 'address = "0.0.0.0"\n')
    assert read(text).sections["cluster"] == cluster("pair")


@pytest.mark.parametrize("device", ["eth0", "bond0.100", "a", "ens1f0np0-very_"])
def test_devices(device: str) -> None:
    assert (
        read(scenario("pair").replace("front", device)).sections["cluster"].virtual_addresses[0].device
        == device
    )


@pytest.mark.parametrize("device", ["", ".", "..", "a/b", "eth0:0", "a b", "x" * 16, "a\\nb", "a\\u0000"])
def test_what_is_no_device(device: str) -> None:
    with pytest.raises(ConfigError, match="must be the name of a network device"):
        read(scenario("pair").replace("front", device))


@pytest.mark.parametrize(
    ("line", "fine"),
    [
        ('heartbeat = "10ms"', True),
        ("heartbeat = 10", True),
        ('heartbeat = "9ms"', False),
        ("heartbeat = 10.1", False),
        ("missed = 2", True),
        ("missed = 100", True),
        ('sync_timeout = "1ms"', True),
        ("sync_timeout = 1", True),
        ("sync_timeout = 0.0009", False),
        ("priority = 1", True),
        ("priority = 255", True),
        ("port = 65535", True),
        ("missed = 3.0", False),
        ("preempt = 1", False),
    ],
)
def test_bounds(line: str, fine: bool) -> None:
    text = scenario("pair") + line
    if fine:
        assert read(text).sections["cluster"] != cluster("pair")
        return
    with pytest.raises(ConfigError) as refused:
        read(text)
    (fault,) = refused.value.faults
    assert fault.path == f"cluster.{line.split(maxsplit=1)[0]}"


def test_without_the_table_there_is_no_section() -> None:
    text = scenario("pair").partition("[cluster]")[0]
    assert read(text).sections == {}
    assert read(text) == parse(text, REGISTRY)


def test_who_does_not_know_the_section_refuses_it() -> None:
    with pytest.raises(ConfigError, match=r"cluster = {…}: unknown key"):
        parse(scenario("pair"), REGISTRY)


def test_a_section_is_suggested_where_it_is_known() -> None:
    with pytest.raises(ConfigError, match=r"unknown key; did you mean .cluster."):
        read(scenario("pair").replace("[cluster]", "[clustre]"))


def test_a_section_that_is_no_table_is_a_fault_like_another() -> None:
    with pytest.raises(ConfigError, match="cluster = 5: must be a table"):
        read("cluster = 5\n" + scenario("pair").partition("[cluster]")[0])


def test_a_change_of_the_section_is_told() -> None:
    old, new = read(scenario("pair")), read(scenario("pair") + "priority = 50")
    assert list(diff(old, new).lines()) == ["cluster changed"]
    without = read(scenario("pair").partition("[cluster]")[0])
    assert diff(old, without).sections == diff(without, old).sections == ("cluster",)
    assert not diff(old, old)
