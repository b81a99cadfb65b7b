"""Every registered plugin keeps its contract, and the suite finds those that do not."""

from __future__ import annotations

import copy
import itertools
import random
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pytest
import trio
from pydantic import BaseModel

from sapin.core.conformance import CANCEL_LIMIT, Case, Nonconformity, cases, check_plugin
from sapin.core.contracts import (
    KINDS,
    Candidate,
    CheckResult,
    Datagram,
    Key,
    Request,
    Target,
    key,
)
from sapin.core.model import Endpoint, RealServer, VirtualService
from sapin.core.registry import Registry

REQUIRED: Mapping[tuple[str, str], Mapping[str, Any]] = {
    ("scheduler", "adaptive"): {"port": 1},
    ("check", "agent"): {"port": 1},
    ("check", "exec"): {"command": [sys.executable, "-c", "import time; time.sleep(5)"]},
}
"""Options of plugins that do not go without."""


def _registered() -> Iterator[Any]:
    registry = Registry()
    for kind in KINDS:
        for name in registry.names(kind):
            for case in cases(kind, registry.load(kind, name), REQUIRED.get((kind, name))):
                yield pytest.param(case, id=f"{kind} {name}: {case}")


@pytest.mark.parametrize("case", list(_registered()))
def test_registered_plugin(case: Case) -> None:
    case()


# A suite that passes everything proves nothing: each of these breaks its contract in one way.


class RaisesAlways:
    def pick(self, request: Request, candidates: Sequence[Candidate]) -> Candidate:
        raise RuntimeError("no idea")


class AnswersNone:
    def pick(self, request: Request, candidates: Sequence[Candidate]) -> Candidate | None:
        return None


class AnswersOldCandidates:
    """Keeps what it saw first."""

    def __init__(self) -> None:
        self._first: Candidate | None = None

    def pick(self, request: Request, candidates: Sequence[Candidate]) -> Candidate:
        self._first = self._first or candidates[0]
        return self._first


class OutOfRange:
    """Remembers an index while the pool shrinks."""

    def __init__(self) -> None:
        self._next = 0

    def pick(self, request: Request, candidates: Sequence[Candidate]) -> Candidate:
        self._next += 1
        if self._next > 50:
            self._next = 0
        return candidates[self._next]


class NeedsTwo:
    def pick(self, request: Request, candidates: Sequence[Candidate]) -> Candidate:
        return min(request.random.sample(list(candidates), 2), key=lambda c: c.pinned)


class NeedsPrepare:
    def prepare(self, candidates: Sequence[Candidate]) -> None:
        self.table = list(candidates)

    def pick(self, request: Request, candidates: Sequence[Candidate]) -> Candidate:
        return next(c for c in self.table if c in candidates)


class Changes:
    def pick(self, request: Request, candidates: Sequence[Candidate]) -> Candidate:
        candidates[0].pinned += 1  # type: ignore[misc]
        return candidates[0]


class UsesGlobalRandom:
    def pick(self, request: Request, candidates: Sequence[Candidate]) -> Candidate:
        return random.choice(candidates)


class UsesRandomOfItsOwn:
    def __init__(self) -> None:
        self._random = random.Random()

    def pick(self, request: Request, candidates: Sequence[Candidate]) -> Candidate:
        return self._random.choice(candidates)


class CannotBeCopied:
    def __init__(self) -> None:
        self._turns = itertools.count()
        self._lock = threading.Lock()

    def pick(self, request: Request, candidates: Sequence[Candidate]) -> Candidate:
        return candidates[next(self._turns) % len(candidates)]


class SharesWithItsCopy:
    def __init__(self) -> None:
        self._turns = itertools.count()

    def __deepcopy__(self, memo: object) -> SharesWithItsCopy:
        return copy.copy(self)

    def pick(self, request: Request, candidates: Sequence[Candidate]) -> Candidate:
        return candidates[next(self._turns) % len(candidates)]


class Sleeps:
    def pick(self, request: Request, candidates: Sequence[Candidate]) -> Candidate:
        if len(candidates) == 50:
            time.sleep(0.001)
        return candidates[0]


class Misspelt:
    def pikc(self, request: Request, candidates: Sequence[Candidate]) -> Candidate:
        return candidates[0]


class TakesTooMuch:
    def pick(self, request: Request, candidates: Sequence[Candidate], now: float) -> Candidate:
        return candidates[0]


class IsAsync:
    async def pick(self, request: Request, candidates: Sequence[Candidate]) -> Candidate:
        return candidates[0]


class TakesAnyOption:
    class Config(BaseModel):
        stride: int = 1

    def __init__(self, config: Config) -> None:
        pass

    def pick(self, request: Request, candidates: Sequence[Candidate]) -> Candidate:
        return candidates[0]


class OpensAsync:
    async def open(self) -> None:
        pass

    def pick(self, request: Request, candidates: Sequence[Candidate]) -> Candidate:
        return candidates[0]


class AsksByName:
    checks = ("agent",)

    def pick(self, request: Request, candidates: Sequence[Candidate]) -> Candidate:
        return candidates[0]


class TextKeys:
    def keys(self, datagram: Datagram) -> Sequence[Any]:
        return ("src:" + datagram.client.address.hex(),)


class BareKeys:
    def keys(self, datagram: Datagram) -> Sequence[Key]:
        return (datagram.client.address,)


class LongKeys:
    def keys(self, datagram: Datagram) -> Sequence[Key]:
        return (key("src", datagram.client.address * 20),)


class TooManyKeys:
    def keys(self, datagram: Datagram) -> Sequence[Key]:
        return [key("src", bytes([n])) for n in range(5)]


class RaisesWithoutSpi:
    def keys(self, datagram: Datagram) -> Sequence[Key]:
        return (key("spi", bytes([datagram.spi_i[0]])),)


class Counts:
    """A key that depends on what came before."""

    def __init__(self) -> None:
        self._count = 0

    def keys(self, datagram: Datagram) -> Sequence[Key]:
        self._count += 1
        return (key("count", self._count.to_bytes(8)),)


class AnotherHost:
    def endpoint(self, server: RealServer, leader: VirtualService, follower: VirtualService) -> Endpoint:
        return Endpoint(follower.address, follower.port)


class NoPort:
    def endpoint(self, server: RealServer, leader: VirtualService, follower: VirtualService) -> Endpoint:
        return Endpoint(server.address, 0)


class Tuple:
    def endpoint(self, server: RealServer, leader: VirtualService, follower: VirtualService) -> Any:
        return (server.address, follower.port)


class Drifts:
    count = 0

    def endpoint(self, server: RealServer, leader: VirtualService, follower: VirtualService) -> Endpoint:
        Drifts.count = Drifts.count % 60_000 + 1
        return Endpoint(server.address, Drifts.count)


class NotAsync:
    def check(self, target: Target) -> CheckResult:
        return CheckResult(True, "sure")


class NoReason:
    async def check(self, target: Target) -> CheckResult:
        return CheckResult(True, "")


class Boolean:
    async def check(self, target: Target) -> bool:
        return True


class Stumbles:
    async def check(self, target: Target) -> CheckResult:
        raise KeyError(target.server)


class HoldsOut:
    async def check(self, target: Target) -> CheckResult:
        with trio.CancelScope(shield=True):
            await trio.sleep(CANCEL_LIMIT + 0.2)
        return CheckResult(True, "at last")


BROKEN = [
    ("scheduler", RaisesAlways, "answers one of the candidates"),
    ("scheduler", AnswersNone, "answers one of the candidates"),
    ("scheduler", AnswersOldCandidates, "answers one of the candidates"),
    ("scheduler", OutOfRange, "answers one of the candidates"),
    ("scheduler", NeedsTwo, "takes the only candidate"),
    ("scheduler", NeedsPrepare, "answers before it is prepared"),
    ("scheduler", Changes, "answers one of the candidates"),
    ("scheduler", UsesGlobalRandom, "leaves the module random alone"),
    ("scheduler", UsesRandomOfItsOwn, "repeats itself"),
    ("scheduler", CannotBeCopied, "can be copied"),
    ("scheduler", SharesWithItsCopy, "can be copied"),
    ("scheduler", Sleeps, "is quick"),
    ("scheduler", Misspelt, "has the method of its kind"),
    ("scheduler", TakesTooMuch, "has the method of its kind"),
    ("scheduler", IsAsync, "has the method of its kind"),
    ("scheduler", TakesAnyOption, "refuses unknown options"),
    ("scheduler", OpensAsync, "opens and closes"),
    ("scheduler", AsksByName, "asks for checks by their specification"),
    ("persistence", TextKeys, "makes keys of any datagram"),
    ("persistence", BareKeys, "makes keys of any datagram"),
    ("persistence", LongKeys, "makes keys of any datagram"),
    ("persistence", TooManyKeys, "makes keys of any datagram"),
    ("persistence", RaisesWithoutSpi, "makes keys of any datagram"),
    ("persistence", Counts, "makes the same keys of the same datagram"),
    ("following", AnotherHost, "answers an endpoint of the server"),
    ("following", NoPort, "answers an endpoint of the server"),
    ("following", Tuple, "answers an endpoint of the server"),
    ("following", Drifts, "answers the same endpoint"),
    ("check", NotAsync, "has the method of its kind"),
    ("check", NoReason, "finds something"),
    ("check", Boolean, "finds something"),
    ("check", Stumbles, "finds something"),
    ("check", HoldsOut, "can be cancelled"),
]


@pytest.mark.filterwarnings("ignore:coroutine .* was never awaited")
@pytest.mark.parametrize(("kind", "cls", "demand"), BROKEN)
def test_broken_plugin_is_found(kind: str, cls: type, demand: str) -> None:
    (case,) = [case for case in cases(kind, cls) if str(case) == demand]
    with pytest.raises(Nonconformity, match=f"{cls.__qualname__}: {demand}: "):
        case()


def test_check_plugin_names_plugin_demand_and_reason() -> None:
    with pytest.raises(
        Nonconformity, match=r"^AnswersNone: answers one of the candidates: .* None, which is none of"
    ):
        check_plugin("scheduler", AnswersNone)


def test_missing_options_are_asked_for() -> None:
    with pytest.raises(Nonconformity, match=r"give those that it requires: .*\n?port"):
        check_plugin("scheduler", Registry().load("scheduler", "adaptive"))


def test_options_without_a_config_are_refused() -> None:
    with pytest.raises(Nonconformity, match="it has no Config"):
        check_plugin("scheduler", Registry().load("scheduler", "round-robin"), {"stride": 2})


def test_unknown_kind() -> None:
    with pytest.raises(ValueError, match="no plugin kind 'schedular', only scheduler, persistence"):
        cases("schedular", AnswersNone)
