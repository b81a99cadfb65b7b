"""The configuration: golden documents with every fault that they have, defaults and bounds."""

from __future__ import annotations

import re
from collections.abc import Sequence
from enum import Enum
from ipaddress import ip_address
from pathlib import Path

import pytest
from pydantic import BaseModel, Field, field_validator

from sapin.core.config import MAX_DEPTH, MAX_SIZE, ConfigError, Fault, parse
from sapin.core.contracts import KINDS
from sapin.core.faults import show
from sapin.core.model import AdminState, CheckSpec, Config, Endpoint, Framing, Node, PluginRef
from sapin.core.registry import Registry
from sapin.core.schema import (
    TABLES,
    CheckTable,
    PersistenceTable,
    parse_address,
    parse_server_address,
)
from sapin.core.units import parse_duration, parse_size

SCENARIOS = sorted((Path(__file__).parents[1] / "scenarios" / "config").glob("*.toml"))
REGISTRY = Registry()

BASE = """
[node]
name = "lb-a"

[[virtual_services]]
name = "ike"
address = "198.18.0.1"
port = 500
real_servers = [{ name = "gw1", address = "10.60.0.11" }]
"""
SERVICE = 'virtual_services[0] "ike"'


def faults(text: str | bytes, plugins: Registry | Catalogue = REGISTRY) -> tuple[Fault, ...]:
    with pytest.raises(ConfigError) as refused:
        parse(text, plugins)
    return refused.value.faults


def base(service_key: str) -> str:
    """The base with one more key in its service."""
    return BASE.replace("port = 500", f"port = 500\n{service_key}")


class Catalogue:
    """Plugins of one kind alone: one name, one Config."""

    def __init__(self, model: type[BaseModel] | Exception | None) -> None:
        self.model = model

    def names(self, kind: str) -> Sequence[str]:
        return ["strange"] if kind == "scheduler" else []

    def config_model(self, kind: str, name: str) -> type[BaseModel] | None:
        if isinstance(self.model, Exception):
            raise self.model
        return self.model


# Golden documents


@pytest.mark.parametrize("document", SCENARIOS, ids=lambda path: path.stem)
def test_a_document_has_exactly_the_faults_beside_it(document: Path) -> None:
    expected = document.with_suffix(".faults")
    if expected.exists():
        assert "\n".join(map(str, faults(document.read_bytes()))) + "\n" == expected.read_text()
    else:
        assert parse(document.read_bytes(), REGISTRY).virtual_services


def test_the_golden_documents_are_there() -> None:
    assert len(SCENARIOS) >= 10
    assert any(not document.with_suffix(".faults").exists() for document in SCENARIOS)


def test_a_fault_holds_the_value_itself() -> None:
    text = BASE.replace('"10.60.0.11"', '"10.60.0.11", weight = -1')
    assert faults(text) == (Fault(f'{SERVICE}.real_servers[0] "gw1".weight', -1, "must be at least 0"),)
    assert (
        str(ConfigError(faults(text))) == f'{SERVICE}.real_servers[0] "gw1".weight = -1: must be at least 0'
    )


# What a valid document means


def scenario(name: str) -> Config:
    (document,) = (path for path in SCENARIOS if path.stem == name)
    return parse(document.read_text(), REGISTRY)


def test_defaults() -> None:
    config = scenario("minimal")
    (service,) = config.virtual_services
    assert config.node == Node("lb-a", Path("/var/lib/sapin"))
    assert service.endpoint == Endpoint(ip_address("198.18.0.1"), 500)
    assert service.framing is Framing.IKE
    assert service.scheduler == PluginRef("least-connections")
    assert service.persistence == PluginRef("source-address")
    assert (service.pin_timeout, service.flow_timeout) == (8 * 3600, 3600)
    assert (service.checks, service.follows, service.protocol, service.source) == ((), None, "udp", "nat")
    (server,) = service.real_servers
    assert (server.port, server.weight, server.state) == (None, 1, AdminState.ENABLED)


def test_every_stated_key_arrives() -> None:
    config = scenario("pair_of_services")
    leader, follower = config.virtual_services
    assert config.node == Node("lb-a", Path("/var/lib/sapin"), 500_000, 50_000, 4 * 2**20)
    assert leader.persistence == PluginRef("source-address", {"prefix6": 64})
    assert (leader.pin_timeout, leader.flow_timeout) == (8 * 3600, 7200)
    assert leader.checks == (CheckSpec(PluginRef("ike"), 5.0, 2.0, 2, 3, 0.2),)
    assert [server.weight for server in leader.real_servers] == [2, 1, 0]
    assert [server.state.value for server in leader.real_servers] == ["enabled", "draining", "disabled"]
    assert follower.framing is Framing.NATT
    assert follower.group == "ike"


def test_a_follower_inherits_what_is_its_leaders_and_nothing_else() -> None:
    leader, follower = scenario("pair_of_services").virtual_services
    for key in ("real_servers", "scheduler", "persistence", "pin_timeout"):
        assert getattr(follower, key) == getattr(leader, key), key
    assert follower.checks == ()
    assert follower.flow_timeout == 3600
    assert follower.following == PluginRef("port")


def test_a_follower_may_come_first_and_say_the_same_again() -> None:
    follower, leader = scenario("follower_restates").virtual_services
    assert follower.pin_timeout == leader.pin_timeout == 12 * 3600
    assert {server.name for server in follower.real_servers} == {"gw1", "gw2"}
    assert follower.following == PluginRef("port", {"port": 14500})
    assert follower.checks == (CheckSpec(PluginRef("ike")),)


@pytest.mark.parametrize(
    ("port", "key", "framing"),
    [
        (500, "", Framing.IKE),
        (4500, "", Framing.NATT),
        (1194, "", Framing.OPAQUE),
        (500, 'framing = "opaque"', Framing.OPAQUE),
        (15500, 'framing = "ike"', Framing.IKE),
        (14500, 'framing = "ike-natt"', Framing.NATT),
    ],
)
def test_framing_is_stated_or_that_of_the_assigned_port(port: int, key: str, framing: Framing) -> None:
    text = base(key).replace("port = 500", f"port = {port}")
    assert parse(text, REGISTRY).virtual_services[0].framing is framing


def test_a_balancer_may_have_no_services_yet() -> None:
    assert parse('node = { name = "lb-a" }', REGISTRY).virtual_services == ()


def test_a_byte_order_mark_is_no_fault() -> None:
    assert (
        parse("\ufeff" + BASE, REGISTRY) == parse(BASE.encode("utf-8-sig"), REGISTRY) == parse(BASE, REGISTRY)
    )


# Documents that cannot be read


@pytest.mark.parametrize(
    ("text", "path", "value"),
    [
        ('[node]\nname = "lb-a"\nmax_pins = 1,\n', "line 3, column 13", "max_pins = 1,"),
        ('[node]\nname = "lb-a', "line 2, column 13", 'name = "lb-a'),
        ("[node]\r\nname = \r\n", "line 2, column 8", "name ="),
        ("a = 1\na = 2\n", "line 2, column 6", "a = 2"),
        ("x", "line 1, column 2", "x"),
    ],
)
def test_a_syntax_fault_has_its_place(text: str, path: str, value: str) -> None:
    (fault,) = faults(text)
    assert (fault.path, fault.value) == (path, value)
    assert fault.reason.startswith("is not TOML: ")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (b"\xff", "is not UTF-8 at offset 0: invalid start byte"),
        ("a\ud800", "is not UTF-8 at offset 1: surrogates not allowed"),
        ("#" * (MAX_SIZE + 1), "has 1,048,577 bytes; at most 1,048,576 are read"),
        ("a = " + "1" * 5000, "has a number of too many digits"),
        ("a = " + "[" * 100_000, "is nested too deeply: at most 32 levels are read"),
        (f"a = {'[' * 33}{']' * 33}", "is nested too deeply: at most 32 levels are read"),
        (".".join(["a"] * 400_000) + " = 1", "is nested too deeply: at most 32 levels are read"),
        (
            '"""x""" = 1\n' + " . ".join(['"a\\""'] * 100_000),
            "is nested too deeply: at most 32 levels are read",
        ),
        ("[" + ".".join(["'a'"] * 100_000) + "]", "is nested too deeply: at most 32 levels are read"),
    ],
    ids=["bytes", "surrogate", "size", "digits", "open-lists", "lists", "dotted", "quoted", "header"],
)
def test_a_document_beyond_the_bounds_is_not_read(text: str | bytes, reason: str) -> None:
    assert faults(text) == (Fault("document", None, reason),)


def test_dots_in_strings_and_comments_are_no_nesting() -> None:
    dots = ".".join("a" * (MAX_DEPTH + 8))
    text = f"# {dots}\n" + base(
        f"""scheduler = {{ plugin = '''x\n{dots}''', "{dots}" = "{dots}" }} # {dots}"""
    )
    assert [fault.path for fault in faults(text)] == [f"{SERVICE}.scheduler.plugin"]


def test_the_largest_document_is_read() -> None:
    assert parse(BASE + "#" * (MAX_SIZE - len(BASE)), REGISTRY)


def test_counts_are_bounded() -> None:
    servers = ",".join(f'{{ name = "gw{n}", address = "10.60.{n >> 8}.{n & 255}" }}' for n in range(4097))
    text = BASE.replace('{ name = "gw1", address = "10.60.0.11" }', servers)
    assert [(fault.path, fault.reason) for fault in faults(text)] == [
        (f"{SERVICE}.real_servers", "has too many entries: at most 4096")
    ]
    many = '[node]\nname = "lb-a"\n' + "[[virtual_services]]\n" * 1025
    assert [fault.reason for fault in faults(many)] == ["has too many entries: at most 1024"]


# The reference


REFERENCE = (Path(__file__).parents[2] / "docs" / "configuration.md").read_text()


def test_the_references_example_is_valid() -> None:
    example = REFERENCE[REFERENCE.index("    [node]") : REFERENCE.index("Nothing is guessed")]
    assert len(parse(example, REGISTRY).virtual_services) == 2


def test_the_reference_has_every_key_and_every_option() -> None:
    keys = {key for table in (*TABLES.values(), CheckTable, PersistenceTable) for key in table.model_fields}
    assert [key for key in sorted(keys) if not re.search(rf"`{key}`|\[{key}\]", REFERENCE)] == []
    for kind in KINDS:
        for plugin in REGISTRY.names(kind):
            model = REGISTRY.config_model(kind, plugin)
            for option in model.model_fields if model else ():
                start = REFERENCE.index(f"| {kind} `{plugin}` |")
                assert f"`{option}`" in re.split(r"\n\| \w", REFERENCE[start:])[0], (plugin, option)


# Plugins


class Colour(Enum):
    GREEN = "green"


class Options(BaseModel):
    """What a careless author writes: unknown keys are not refused, types are converted."""

    path: Path = Path("/")
    ports: tuple[int, ...] = ()
    colour: Colour = Colour.GREEN
    ratio: float = Field(default=0.5, gt=0)
    text: str = ""

    @field_validator("text")
    @classmethod
    def _checked(cls, value: str) -> str:
        if value == "bug":
            raise RuntimeError("a bug\nin the plugin")
        if value == "bad":
            raise ValueError("can't be bad")
        return value


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ("ratio = 2", None),
        ('path = "/tmp", ports = [1, 2], colour = "green", ratio = 1', None),
        ("ports = [1, true]", ".ports[1] = true: plugin {}: must be a whole number"),
        ('ratio = "0.5"', '.ratio = "0.5": plugin {}: must be a number'),
        ("ratio = nan", ".ratio = nan: plugin {}: must be more than 0.0"),
        ('colour = "red"', '.colour = "red": plugin {}: must be "green"'),
        ("rato = 1", '.rato = 1: plugin {}: unknown option; did you mean "ratio"?'),
        ('text = "bad"', """.text = "bad": plugin {}: can't be bad"""),
        ('text = "bug"', " = {{…}}: plugin {} failed on its options: RuntimeError: a bug in the plugin"),
    ],
)
def test_options_are_held_strictly_against_the_plugins_config(options: str, expected: str | None) -> None:
    text = base(f'scheduler = {{ plugin = "strange", {options} }}')
    if expected is None:
        assert parse(text, Catalogue(Options)).virtual_services[0].scheduler.plugin == "strange"
    else:
        (fault,) = faults(text, Catalogue(Options))
        assert str(fault) == f"{SERVICE}.scheduler" + expected.format('"strange"')


def test_a_plugin_may_ask_for_unknown_options() -> None:
    class Open(BaseModel, extra="allow"):
        pass

    text = base('scheduler = { plugin = "strange", anything = 1 }')
    assert parse(text, Catalogue(Open)).virtual_services[0].scheduler.options == {"anything": 1}


def test_a_plugin_that_cannot_be_loaded_is_a_fault() -> None:
    (fault,) = faults(base('scheduler = "strange"'), Catalogue(ImportError("No module named 'numpy'")))
    assert str(fault) == f"""{SERVICE}.scheduler = "strange": No module named 'numpy'"""


def test_a_kind_without_plugins_says_so() -> None:
    (fault,) = faults(base('checks = ["ike"]'), Catalogue(None))
    assert fault.reason == "there is no check plugin of that name; none is known"


# Values


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("500ms", 0.5),
        ("5s", 5),
        ("2m", 120),
        ("8h", 28_800),
        ("30d", 2_592_000),
        ("1.5h", 5_400),
        (7, 7),
        (0.25, 0.25),
    ],
)
def test_durations(text: object, seconds: float) -> None:
    assert parse_duration(text) == pytest.approx(seconds)


@pytest.mark.parametrize(
    "value",
    [
        "",
        "5",
        "s",
        "-5s",
        "5 s",
        "5S",
        "5sec",
        "1h30m",
        "\u0665s",
        "0s",
        "31d",
        0,
        -1,
        0.0,
        10**400,
        float("nan"),
        float("inf"),
        float("-inf"),
        True,
        None,
        [],
        "9" * 400 + "s",
    ],
)
def test_no_durations(value: object) -> None:
    with pytest.raises(ValueError, match="must be"):
        parse_duration(value)


def test_sizes() -> None:
    assert [parse_size(value) for value in ("4KiB", "8MiB", "1GiB", 4096)] == [2**12, 2**23, 2**30, 4096]
    for value in ("8MB", "8 MiB", "MiB", "-1KiB", 1.5, True, None):
        with pytest.raises(ValueError, match="must be a size"):
            parse_size(value)


@pytest.mark.parametrize("text", ["10.0.0.1", "127.0.0.1", "169.254.0.1", "2001:db8::1", "::1", "fd00::1"])
def test_addresses(text: str) -> None:
    assert parse_address(text) == parse_server_address(text) == ip_address(text)


@pytest.mark.parametrize(
    "value",
    [
        "",
        "10.0.0",
        "10.0.0.256",
        "010.0.0.1",
        " 10.0.0.1",
        "10.0.0.1/24",
        "fe80::1%eth0",
        "fe80::1",
        "ff02::1",
        "239.1.2.3",
        "255.255.255.255",
        "::ffff:10.0.0.1",
        "vpn.example",
        1,
        None,
        b"\x0a\0\0\1",
    ],
)
def test_no_addresses(value: object) -> None:
    with pytest.raises(ValueError, match=r"^(must be|is) an?|^is the"):
        parse_address(value)


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (True, "true"),
        ("x" * 100, '"' + "x" * 63 + '…"'),
        ("\x1b[2J\u202e", r'"\u001b[2J\u202e"'),
        ("zürich", '"zürich"'),
        (2**70, "a number of more than 64 bits"),
        ([], "[]"),
        ({"a": 1}, "{…}"),
        (None, "none"),
    ],
)
def test_values_are_shown_short_and_safe(value: object, shown: str) -> None:
    assert show(value) == shown
