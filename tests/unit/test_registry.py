"""Plugins: found, checked against their contract, configured, opened, suspended, closed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel, Field
from structlog.testing import capture_logs

from sapin.core.contracts import KINDS, Candidate, Request
from sapin.core.model import PluginRef
from sapin.core.registry import FAULT_LIMIT, SUSPENSION, TOLD, Faults, Hosted, PluginError, Registry, told
from tests import fakes
from tests.fakes import First, Point


def hosted(plugin: object) -> Hosted[Any]:
    return Hosted("scheduler", "own", {}, plugin)


def loaded(kind: str, plugin: object) -> type:
    return Registry([Point(kind, "own", plugin)]).load(kind, "own")


def refusal(kind: str, plugin: object) -> str:
    with pytest.raises(PluginError) as caught:
        loaded(kind, plugin)
    return str(caught.value)


# Found


def test_the_installed_plugins_are_found() -> None:
    registry = Registry()
    assert "maglev" in registry.names("scheduler")
    assert registry.conflicts == []
    for kind in KINDS:
        names = registry.names(kind)
        assert names == sorted(names)
        for name in names:
            assert isinstance(registry.load(kind, name), type)
            assert registry.origin(kind, name).startswith("sapin ")


def test_entry_points_of_others_are_ignored() -> None:
    stranger = Point("scheduler", "own", First)
    vars(stranger)["group"] = "console_scripts"
    assert Registry([stranger]).names("scheduler") == []


def test_kinds_have_names_of_their_own() -> None:
    registry = Registry([Point("scheduler", "own", First), Point("persistence", "own", fakes.Source)])
    assert registry.load("scheduler", "own") is First
    assert registry.load("persistence", "own") is fakes.Source


def test_of_two_packages_with_one_name_the_first_has_it_and_that_is_told() -> None:
    registry = Registry([Point("scheduler", "own", First, "a:A"), Point("scheduler", "own", object, "b:B")])
    assert registry.load("scheduler", "own") is First
    assert registry.conflicts == ["scheduler own: a:A, not b:B"]


def test_the_same_entry_point_found_twice_is_no_conflict() -> None:
    """A path that is listed twice, or an editable install over another."""
    assert Registry([Point("scheduler", "own", First)] * 2).conflicts == []


def test_a_plugin_without_a_distribution_has_an_origin_all_the_same() -> None:
    assert Registry([Point("scheduler", "own", First)]).origin("scheduler", "own") == "unknown"


def test_an_unknown_plugin_is_named() -> None:
    with pytest.raises(PluginError, match="there is no scheduler plugin 'maglov'"):
        fakes.registry().load("scheduler", "maglov")


@pytest.mark.parametrize(
    "error", [ImportError("no module"), AttributeError("no class"), RuntimeError("at import")]
)
def test_a_plugin_that_cannot_be_imported_is_named_with_the_cause(error: Exception) -> None:
    said = refusal("scheduler", error)
    assert "scheduler plugin 'own' cannot be imported" in said
    assert repr(error) in said


# The contract


class Misspelt:
    def pik(self, request: Request, candidates: Sequence[Candidate]) -> Candidate:
        return candidates[0]


class TooFew:
    def pick(self, request: Request) -> None: ...


class TooMany:
    def pick(self, request: Request, candidates: Sequence[Candidate], now: float) -> None: ...


class KeywordOnly:
    def pick(self, request: Request, *, candidates: Sequence[Candidate]) -> None: ...


class Attribute:
    pick = "first"


class Generous:
    def pick(self, request: Request, candidates: Sequence[Candidate], now: float = 0.0) -> Candidate:
        return candidates[0]


class Anything:
    def pick(self, *args: Any, **kwargs: Any) -> Any:
        return args[1][0]


class BuiltIn:
    """A method without a signature to look at, as one that is written in C may be."""

    pick = staticmethod(max)


@pytest.mark.parametrize(
    ("plugin", "says"),
    [
        (Misspelt, "(Misspelt) has no method pick()"),
        (Attribute, "(Attribute) has no method pick()"),
        (TooFew, "TooFew.pick() must take 2 arguments"),
        (TooMany, "TooMany.pick() must take 2 arguments"),
        (KeywordOnly, "KeywordOnly.pick() must take 2 arguments"),
        (First(), "is not a class"),
        (lambda request, candidates: candidates[0], "is not a class"),
        (fakes, "is not a class"),
        (None, "is not a class"),
    ],
)
def test_what_breaks_the_contract_is_refused_at_once(plugin: object, says: str) -> None:
    said = refusal("scheduler", plugin)
    assert says in said
    assert "'own'" in said


@pytest.mark.parametrize("plugin", [First, Generous, Anything, BuiltIn])
def test_what_can_be_called_as_the_contract_says_is_taken(plugin: type) -> None:
    assert loaded("scheduler", plugin) is plugin


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_has_a_contract(kind: str) -> None:
    assert "has no method" in refusal(kind, object)


# Made


class Sized(First):
    class Config(BaseModel, extra="forbid"):
        size: int = Field(default=3, ge=1)

    def __init__(self, config: Config) -> None:
        self.size = config.size


class OddConfig(First):
    Config = dict


def made(plugin: type, **options: Any) -> Hosted[Any]:
    return Registry([Point("scheduler", "own", plugin)]).make("scheduler", PluginRef("own", options))


def test_options_are_validated_by_the_plugins_config() -> None:
    assert made(Sized).plugin.size == 3
    assert made(Sized, size=7).plugin.size == 7


@pytest.mark.parametrize(
    ("plugin", "options", "says"),
    [
        (Sized, {"size": 0}, "size"),
        (Sized, {"sice": 3}, "sice"),
        (First, {"size": 3}, "it takes no options, but got size"),
        (OddConfig, {"size": 3, "a": 1}, "it takes no options, but got a, size"),
    ],
)
def test_wrong_options_are_refused_by_name(plugin: type, options: dict[str, Any], says: str) -> None:
    with pytest.raises(PluginError, match="scheduler plugin 'own' cannot be used") as caught:
        made(plugin, **options)
    assert says in str(caught.value)


def test_the_config_model_is_there_to_be_read() -> None:
    registry = fakes.registry(scheduler={"sized": Sized, "odd": OddConfig})
    assert registry.config_model("scheduler", "sized") is Sized.Config
    assert registry.config_model("scheduler", "odd") is None
    assert registry.config_model("scheduler", "first") is None


def test_two_services_have_instances_of_their_own() -> None:
    registry = fakes.registry()
    one, other = (registry.make("scheduler", PluginRef("first")) for _ in range(2))
    assert one.plugin is not other.plugin
    assert one.faults is not other.faults


class Recording(First):
    def __init__(self) -> None:
        self.steps = ["made"]

    def open(self) -> None:
        self.steps.append("open")

    def close(self) -> None:
        self.steps.append("close")


class Unopenable(First):
    def open(self) -> None:
        raise OSError("no such file")


class Unmakeable(First):
    def __init__(self) -> None:
        raise KeyError("size")


class NoText(Exception):
    def __str__(self) -> str:
        raise RuntimeError("no")


class Unspeakable(First):
    def open(self) -> None:
        raise NoText


def test_open_and_close_are_called_once_each() -> None:
    one = made(Recording)
    assert one.plugin.steps == ["made", "open"]
    one.close()
    assert one.plugin.steps == ["made", "open", "close"]


def test_open_and_close_may_be_missing() -> None:
    made(First).close()


@pytest.mark.parametrize("plugin", [Unopenable, Unmakeable, Unspeakable])
def test_a_plugin_that_cannot_be_made_or_opened_is_named(plugin: type) -> None:
    with pytest.raises(PluginError, match="scheduler plugin 'own' cannot be used"):
        made(plugin)


class Unclosable(First):
    def close(self) -> None:
        raise OSError("busy")


def test_a_plugin_that_cannot_be_closed_holds_up_nobody_and_is_told() -> None:
    with capture_logs() as logs:
        made(Unclosable).close()
    (entry,) = logs
    assert (entry["log_level"], entry["kind"], entry["plugin"]) == ("error", "scheduler", "own")
    assert entry["error"] == "OSError: busy"


# Suspended


def test_faults_in_a_row_suspend_for_a_while() -> None:
    one = hosted(First())
    suspended = [one.fault(f"fault {n}", 100.0) for n in range(FAULT_LIMIT)]
    assert suspended == [False] * (FAULT_LIMIT - 1) + [True]
    assert one.faults == Faults(FAULT_LIMIT, 0, f"fault {FAULT_LIMIT - 1}", 100.0 + SUSPENSION)
    assert not one.usable(100.0)
    assert not one.usable(100.0 + SUSPENSION - 0.001)
    assert one.usable(100.0 + SUSPENSION)


@given(st.lists(st.tuples(st.booleans(), st.floats(0, 2 * SUSPENSION)), max_size=60))
def test_suspension_follows_its_rule(script: list[tuple[bool, float]]) -> None:
    """The rule, told by the whole history: as many faults as the limit, without a success or a suspension between."""
    one, now = hosted(First()), 0.0
    until, run, total = 0.0, 0, 0
    for good, wait in script:
        now += wait
        assert one.usable(now) == (now >= until)
        if now < until:
            continue
        if good:
            one.faults.in_a_row = run = 0
            continue
        run, total = run + 1, total + 1
        if run == FAULT_LIMIT:
            run, until = 0, now + SUSPENSION
        assert one.fault("no", now) == (until > now)
        assert one.faults.total == total


@given(st.text() | st.text(min_size=TOLD))
def test_what_an_exception_says_is_bounded(text: str) -> None:
    said = told(ValueError(text))
    assert said == f"ValueError: {text}"[:TOLD]


def test_an_exception_that_cannot_tell_itself_is_told() -> None:
    assert told(NoText()) == "NoText: it has no text"
