"""Any document gives a configuration that keeps its promises, or faults that an operator can read."""

from __future__ import annotations

import string
from collections.abc import Sequence
from typing import Any

from hypothesis import event, example, given, settings
from hypothesis import strategies as st

from sapin.api.templates import ikev2
from sapin.cluster.config import ClusterTable, Takeover
from sapin.core.config import ConfigError, Fault, parse
from sapin.core.model import Config, VirtualService
from sapin.core.registry import Registry
from sapin.core.schema import families

REGISTRY = Registry()
SECTIONS = {"cluster": ClusterTable}
VALID = ikev2(["198.18.0.1", "2001:db8::1"], ["10.60.0.11", "10.60.0.12", "2001:db8::11", "2001:db8::12"])
VALID += """
[cluster]
links = ["198.19.0.1"]
takeover = "netlink"
virtual_addresses = [
    { address = "198.18.0.1/24", device = "front" },
    { address = "2001:db8::1/64", device = "front" },
    { address = "10.60.0.1/24", device = "back", side = "servers" },
    { address = "2001:db8::9/64", device = "back", side = "servers" },
]
"""


def outcome(text: str | bytes) -> Config | None:
    """The configuration, or ``None`` for a document with faults; both are looked at."""
    try:
        config = parse(text, REGISTRY, SECTIONS)
    except ConfigError as error:
        check_faults(error.faults)
        event("refused")
        return None
    event("accepted")
    check_promises(config)
    return config


def check_faults(faults: Sequence[Fault]) -> None:
    assert faults
    assert len(set(map(str, faults))) == len(faults)
    for fault in faults:
        assert fault.path
        assert fault.reason
        assert str(fault).isprintable()
        assert len(str(fault)) < 4_000


def check_promises(config: Config) -> None:
    services = config.virtual_services
    assert len({service.name for service in services}) == len(services)
    assert len({service.endpoint for service in services}) == len(services)
    assert 1 <= config.node.max_pins <= 10_000_000
    assert config.node.state_dir.is_absolute()
    check_cluster(config)
    for service in services:
        check_service(service)
        leader = config.service(service.group)
        assert leader.follows is None
        assert (leader.scheduler, leader.persistence) == (service.scheduler, service.persistence)
        assert leader.pin_timeout == service.pin_timeout
        assert set(leader.real_servers) == set(service.real_servers)


def check_cluster(config: Config) -> None:
    cluster = config.sections.get("cluster")
    if cluster is None:
        return
    virtual = {each.address for each in cluster.virtual_addresses}
    assert len(virtual) == len(cluster.virtual_addresses)
    assert cluster.links
    assert virtual.isdisjoint(cluster.links)
    assert 0.01 <= cluster.heartbeat <= 10
    assert 2 <= cluster.missed <= 100
    for service in config.virtual_services:
        moved = service.address.is_unspecified or service.address in virtual
        assert moved or cluster.takeover is not Takeover.NETLINK
        assert {server.address.version for server in service.real_servers} <= cluster.floating.keys()


def check_service(service: VirtualService) -> None:
    servers = service.real_servers
    assert servers
    assert len({server.name for server in servers}) == len(servers)
    assert 1 <= service.port <= 65_535
    assert 0 < service.pin_timeout <= 30 * 86_400
    assert 60 <= service.flow_timeout <= 30 * 86_400
    for server in servers:
        assert server.address.version in families(service.address)
        assert 0 <= server.weight <= 65_535
        assert server.port is None or 1 <= server.port <= 65_535
    for check in service.checks:
        assert 0.1 <= check.interval <= 30 * 86_400
        assert 0 < check.timeout <= 30 * 86_400
        assert min(check.rise, check.fall) >= 1
        assert 0 <= check.jitter <= 0.5
        REGISTRY.make("check", check.ref).close()
    for kind in ("scheduler", "persistence", "following"):
        REGISTRY.make(kind, getattr(service, kind)).close()


# Documents as tables


def toml(value: Any) -> str:
    """A value in TOML, on one line."""
    match value:
        case bool():
            return str(value).lower()
        case int() | float():
            return repr(value)
        case str():
            plain = string.ascii_letters + string.digits + " .:-_/"
            return '"' + "".join(c if c in plain else f"\\U{ord(c):08x}" for c in value) + '"'
        case list():
            return "[" + ", ".join(map(toml, value)) + "]"
        case dict():
            return "{" + ", ".join(f"{toml(key)} = {toml(inner)}" for key, inner in value.items()) + "}"
    raise TypeError(value)


def document(tables: dict[str, Any]) -> str:
    return "\n".join(f"{toml(key)} = {toml(value)}" for key, value in tables.items())


text = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
scalars = st.one_of(st.booleans(), st.integers(), st.integers(-1, 70_000), st.floats(), text)
junk = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(text, inner, max_size=3),
    max_leaves=8,
)
ADDRESSES = [
    "198.18.0.1",
    "198.18.0.2",
    "10.60.0.11",
    "10.60.0.12",
    "127.0.0.1",
    "0.0.0.0",
    "::",
    "::1",
    "2001:db8::1",
    "2001:db8::2",
    "::ffff:10.0.0.1",
    "fe80::1%eth0",
    "224.0.0.1",
    "vpn",
]
PLUGINS = [
    name for kind in ("scheduler", "persistence", "following", "check") for name in REGISTRY.names(kind)
]

names = st.sampled_from(["ike", "ike-natt", "gw1", "gw2", "gw3", "a b", ""])
addresses = st.sampled_from(ADDRESSES)
ports = st.sampled_from([0, 1, 500, 501, 4500, 65_535, 65_536])
durations = st.sampled_from(["0s", "100ms", "5s", "2m", "8h", "31d", "5", 0, 1, 60, 3600, -1, 0.5])
plugins = st.sampled_from(PLUGINS)

SHAPES: dict[str, dict[str, st.SearchStrategy[Any]]] = {
    "document": {
        "node": st.deferred(lambda: table("node")),
        "virtual_services": st.lists(st.deferred(lambda: table("service")), max_size=4),
        "cluster": st.deferred(lambda: table("cluster")),
    },
    "cluster": {
        "links": st.lists(addresses | scalars, max_size=3),
        "port": ports,
        "priority": st.integers(-1, 300),
        "preempt": st.booleans(),
        "heartbeat": durations,
        "missed": st.integers(0, 101),
        "sync_timeout": durations,
        "takeover": st.sampled_from(["netlink", "keepalived", "none", "vrrp"]),
        "virtual_addresses": st.lists(st.deferred(lambda: table("virtual address")), max_size=3),
    },
    "virtual address": {
        "address": st.sampled_from([f"{address}/{bits}" for address in ADDRESSES for bits in (24, 64)]),
        "device": st.sampled_from(["front", "eth0:1", "", "a" * 16]),
        "side": st.sampled_from(["clients", "servers", "both"]),
    },
    "node": {
        "name": names,
        "state_dir": st.sampled_from(["/var/lib/sapin", "sapin", "/" + "x" * 200]),
        "max_pins": st.integers(-1, 2**40),
        "max_flows": st.integers(-1, 2**40),
        "receive_buffer": st.sampled_from(["8MiB", "8MB", 65_536, 1]),
    },
    "service": {
        "name": names,
        "address": addresses,
        "port": ports,
        "protocol": st.sampled_from(["udp", "tcp"]),
        "framing": st.sampled_from(["ike", "ike-natt", "opaque", "esp"]),
        "source": st.sampled_from(["nat", "transparent"]),
        "scheduler": st.deferred(lambda: plugins | table("plugin")),
        "persistence": st.deferred(lambda: plugins | table("plugin")),
        "checks": st.lists(st.deferred(lambda: plugins | table("check")), max_size=2),
        "flow_timeout": durations,
        "follows": names,
        "following": st.deferred(lambda: plugins | table("plugin")),
        "real_servers": st.lists(st.deferred(lambda: table("server")), max_size=3),
    },
    "plugin": {"plugin": plugins, "timeout": durations, "prefix4": st.integers(0, 40), "port": ports},
    "check": {
        "plugin": plugins,
        "interval": durations,
        "timeout": durations,
        "rise": st.integers(0, 3),
        "fall": st.integers(0, 3),
        "jitter": st.floats(0, 1),
    },
    "server": {
        "name": names,
        "address": addresses,
        "port": ports,
        "weight": st.integers(-1, 70_000),
        "state": st.sampled_from(["enabled", "draining", "disabled", "off"]),
    },
}


@st.composite
def table(draw: st.DrawFn, shape: str) -> dict[str, Any]:
    """Some keys of a table, now and then with junk, or with a key that nobody knows."""
    keys = draw(st.lists(st.sampled_from(sorted(SHAPES[shape])), unique=True))
    found = {key: draw(junk if draw(st.integers(0, 15)) == 0 else SHAPES[shape][key]) for key in keys}
    if draw(st.integers(0, 7)) == 0:
        found |= draw(st.dictionaries(text, junk, max_size=2))
    return found


@given(table("document"))
def test_tables_with_junk_in_the_right_places(tables: dict[str, Any]) -> None:
    outcome(document(tables))


@given(st.dictionaries(text, junk, max_size=4))
def test_tables_of_junk(tables: dict[str, Any]) -> None:
    assert outcome(document(tables)) is None


@st.composite
def plausible(draw: st.DrawFn) -> dict[str, Any]:
    """A service that is good by itself, out of so few words that it may clash with another."""
    found = {
        "name": draw(st.sampled_from("abcd")),
        "address": draw(st.sampled_from(["198.18.0.1", "198.18.0.2", "::", "2001:db8::1"])),
        "port": draw(st.sampled_from([500, 4500, 4501])),
    }
    if draw(st.booleans()):
        found["follows"] = draw(st.sampled_from("abcd"))
    else:
        hosts = draw(
            st.lists(st.sampled_from(["10.60.0.11", "10.60.0.12", "2001:db8::11"]), min_size=1, max_size=2)
        )
        found["real_servers"] = [{"name": f"gw{n}", "address": host} for n, host in enumerate(hosts)]
    if draw(st.integers(0, 3)) == 0:
        found["persistence"] = {
            "plugin": draw(st.sampled_from(["source-address", "ike-spi"])),
            "timeout": "8h",
        }
    return found


@given(st.lists(plausible(), max_size=3))
def test_services_that_may_fit_together(tables: list[dict[str, Any]]) -> None:
    outcome(document({"node": {"name": "lb-a"}, "virtual_services": tables}))


# Documents that were valid


pieces = st.sampled_from(
    sorted({*VALID.split(), "[", "]", "{", "}", '"', "=", "\n", ",", "#", "-1", "''' ", "\0"})
)


@given(st.lists(st.tuples(st.integers(0, len(VALID)), st.integers(0, 40), pieces), max_size=3))
@example([])
def test_a_valid_document_with_pieces_replaced(edits: list[tuple[int, int, str]]) -> None:
    changed = VALID
    for start, length, piece in edits:
        changed = changed[:start] + piece + changed[start + length :]
    config = outcome(changed)
    assert edits or config is not None


@given(st.data())
def test_a_valid_document_with_lines_left_out_or_doubled(data: st.DataObject) -> None:
    lines = [line for line in VALID.splitlines() if line and not line.startswith("#")]
    counts = data.draw(
        st.lists(st.sampled_from([1, 1, 1, 1, 0, 2]), min_size=len(lines), max_size=len(lines))
    )
    outcome("\n".join(line for line, count in zip(lines, counts, strict=True) for _ in range(count)))


# Anything


@given(st.text(max_size=200))
def test_any_text(anything: str) -> None:
    outcome(anything)


@given(st.binary(max_size=200))
def test_any_bytes(anything: bytes) -> None:
    outcome(anything)


@given(st.text(alphabet="abx01.,=#-_ \n\t\r\"'\\[]{}:", max_size=60))
@settings(max_examples=300)
def test_any_text_of_the_characters_that_toml_gives_a_meaning(anything: str) -> None:
    outcome(anything)
