"""Does a plugin keep its contract? A suite to run on one's own plugin, as check_estimator is in scikit-learn.

Once, raising on the first case that fails::

    check_plugin("scheduler", MyScheduler)

or each case as a test of its own::

    @pytest.mark.parametrize("case", cases("scheduler", MyScheduler), ids=str)
    def test_contract(case: Case) -> None:
        case()

A plugin with required options is given them: ``cases("check", MyCheck, {"port": 8080})``. The cases use
made-up servers and clients and a fixed random sequence, so that a failure comes again. Those of health checks
send to closed and to silent ports of the loopback address, and start trio; all others are pure.
"""

from __future__ import annotations

import copy
import inspect
import random
import socket
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from ipaddress import IPv4Address, IPv6Address
from random import Random
from typing import Any, NoReturn

from pydantic import BaseModel, ValidationError

from sapin.core.balancer import MAX_KEY_LENGTH, MAX_KEYS
from sapin.core.contracts import (
    KINDS,
    Candidate,
    CheckResult,
    Client,
    Datagram,
    Following,
    HealthCheck,
    Persistence,
    Request,
    Scheduler,
    Target,
    key,
)
from sapin.core.ike import Kind
from sapin.core.model import (
    AdminState,
    CheckSpec,
    Endpoint,
    Framing,
    IPAddress,
    PluginRef,
    RealServer,
    VirtualService,
)

PICK_LIMIT = 0.000_5
"""Seconds that a pick among 50 candidates may take. The dataplane stands still meanwhile; those that come with
Sapin take 1 to 40 millionths."""
CANCEL_LIMIT = 2.0
"""Seconds that a check may take to end when it is cancelled."""

_METHODS: Mapping[str, Callable[..., object]] = {
    "scheduler": Scheduler.pick,
    "persistence": Persistence.keys,
    "following": Following.endpoint,
    "check": HealthCheck.check,
}
_STEPS = 3_000
_DATAGRAMS = 1_000
_HOST = IPv4Address("127.20.0.1")
"""A loopback address of our own, as a port that is free for TCP on 127.0.0.1 may be taken for UDP."""
_PATIENCE = 0.2
"""Seconds that a check is left to look at a port that is silent."""


class Nonconformity(AssertionError):
    """A plugin breaks its contract; the text names the plugin, the case and what was wrong."""


@dataclass(frozen=True)
class Case:
    """Something that the contract demands of a plugin."""

    plugin: str
    demand: str
    run: Callable[[], None]

    def __str__(self) -> str:
        return self.demand

    def __call__(self) -> None:
        """Try it.

        Raises:
            Nonconformity: the plugin breaks its contract.
        """
        try:
            self.run()
        except Exception as error:
            what = str(error) if isinstance(error, Nonconformity) else f"it raised {error!r}"
            raise Nonconformity(f"{self.plugin}: {self.demand}: {what}") from error


def check_plugin(kind: str, cls: type, options: Mapping[str, Any] | None = None) -> None:
    """Run every case on a plugin class; arguments and errors as for :func:`cases` and :class:`Case`."""
    for case in cases(kind, cls, options):
        case()


def cases(kind: str, cls: type, options: Mapping[str, Any] | None = None) -> Sequence[Case]:
    """The cases for a plugin.

    Args:
        kind: one of :data:`~sapin.core.contracts.KINDS`.
        cls: the plugin's class, as its entry point names it.
        options: for its ``Config``; needed where an option is required.

    Raises:
        ValueError: there is no such kind.
    """
    if kind not in KINDS:
        raise ValueError(f"there is no plugin kind {kind!r}, only {', '.join(KINDS)}")
    make = partial(_make, cls, dict(options or {}))
    found: dict[str, Callable[[], None]] = {
        "has the method of its kind": partial(_has_method, cls, _METHODS[kind]),
        "refuses unknown options": partial(_refuses_unknown_options, cls, dict(options or {})),
        "opens and closes": partial(_opens_and_closes, make),
    }
    found |= {demand: partial(run, make) for demand, run in _CASES[kind].items()}
    return [Case(cls.__qualname__, demand, run) for demand, run in found.items()]


def _fail(message: str) -> NoReturn:
    raise Nonconformity(message)


# Every kind

Make = Callable[[], Any]


def _make(cls: type, options: dict[str, Any]) -> Any:
    model = getattr(cls, "Config", None)
    if model is None:
        if options:
            _fail(f"it has no Config, but is given options: {options}")
        return cls()
    if not (isinstance(model, type) and issubclass(model, BaseModel)):
        _fail("its Config is not a pydantic model")
    try:
        config = model.model_validate(options)
    except ValidationError as error:
        _fail(f"its Config refuses the options {options}; give those that it requires: {error}")
    return cls(config)


def _has_method(cls: type, contract: Callable[..., object]) -> None:
    name = contract.__name__
    method = getattr(cls, name, None)
    if not callable(method):
        _fail(f"it has no method {name}()")
    parameters = list(inspect.signature(contract).parameters)
    try:
        inspect.signature(method).bind(*parameters)
    except TypeError as error:
        _fail(f"{name}() must take {', '.join(parameters[1:])}, by position: {error}")
    if inspect.iscoroutinefunction(method) != inspect.iscoroutinefunction(contract):
        _fail(f"{name}() must {'' if inspect.iscoroutinefunction(contract) else 'not '}be async")


def _refuses_unknown_options(cls: type, options: dict[str, Any]) -> None:
    model = getattr(cls, "Config", None)
    if model is None or model.model_config.get("extra") == "allow":
        return
    try:
        model.model_validate({**options, "no_such_option": 1})
    except ValidationError:
        return
    _fail('its Config takes a misspelt option in silence; write class Config(BaseModel, extra="forbid")')


def _opens_and_closes(make: Make) -> None:
    plugin = make()
    for step in ("open", "close"):
        method = getattr(plugin, step, None)
        if callable(method) and inspect.isawaitable(method()):
            _fail(f"{step}() must not be async")


# Schedulers


class _Server:
    """A candidate with made-up figures, which a scheduler cannot change."""

    __slots__ = ("name", "pinned", "response_time", "share", "weight")
    name: str
    weight: int
    pinned: int
    response_time: float | None
    share: int

    def __init__(self, name: str, weight: int, dice: Random) -> None:
        self.move(name=name, weight=weight, pinned=dice.randrange(100))
        self.move(response_time=_response_time(dice), share=dice.choice((0, 50, 100)))

    def move(self, **figures: Any) -> None:
        for figure, value in figures.items():
            object.__setattr__(self, figure, value)

    def __setattr__(self, figure: str, value: object) -> NoReturn:
        _fail(f"it set {figure} of a candidate; candidates are to be looked at only")

    def __repr__(self) -> str:
        return f"<{self.name} weight={self.weight}>"


def _response_time(dice: Random) -> float | None:
    return dice.choice((None, 0.0, dice.random()))


def _pool(dice: Random, size: int) -> tuple[_Server, ...]:
    names = dice.sample(range(60), size)
    return tuple(_Server(f"gw{name}", dice.choice((1, 1, 2, 5, 100)), dice) for name in names)


def _request(dice: Random) -> Request:
    client = _client(dice)
    return Request(client, key("src", client.address), Random(dice.random()))


def _life(seed: int, sizes: Sequence[int], steps: int) -> Iterator[tuple[Request, tuple[_Server, ...]]]:
    """New clients, and the candidates when they come: others every 25 steps, and one less in between."""
    dice = Random(seed)
    pool: tuple[_Server, ...] = ()
    for step in range(steps):
        if step % 25 == 0:
            pool = _pool(dice, dice.choice(sizes))
        elif step % 25 == 10 and len(pool) > 1:
            pool = pool[:-1]
        dice.choice(pool).move(pinned=dice.randrange(100), response_time=_response_time(dice))
        yield _request(dice), pool


def _picks(
    make: Make, sizes: Sequence[int] = range(1, 51), steps: int = _STEPS, prepare: bool = True
) -> list[str]:
    """The names that the scheduler picks over the life of a pool; each is one of its candidates.

    It is prepared rarely: its worker thread is always late.
    """
    scheduler = make()
    names = []
    for step, (request, pool) in enumerate(_life(1, sizes, steps)):
        if prepare and step % 500 == 0 and hasattr(scheduler, "prepare"):
            scheduler.prepare(pool)
        chosen = scheduler.pick(request, pool)
        if not any(chosen is candidate for candidate in pool):
            _fail(f"pick() answered {chosen!r}, which is none of the {len(pool)} candidates {pool!r:.200}")
        chosen.move(pinned=chosen.pinned + 1)
        names.append(chosen.name)
    return names


def _answers_a_candidate(make: Make) -> None:
    _picks(make)


def _takes_the_only_candidate(make: Make) -> None:
    _picks(make, sizes=[1], steps=100)


def _answers_before_prepare(make: Make) -> None:
    _picks(make, prepare=False)


def _leaves_global_random_alone(make: Make) -> None:
    before = random.getstate()
    _picks(make, steps=500)
    if random.getstate() != before:
        _fail("it used the module random; request.random is the only source of randomness")


def _repeats_itself(make: Make) -> None:
    if _picks(make, steps=1_000) != _picks(make, steps=1_000):
        _fail("two instances with the same past and the same request.random picked differently")


def _can_be_copied(make: Make) -> None:
    """``sapin explain`` asks a copy, so that asking leaves no trace."""
    scheduler, pool = make(), _pool(Random(1), 20)
    _ask(scheduler, pool)
    copied = copy.deepcopy(scheduler, {id(thing): thing for thing in (pool, *pool)})
    if _ask(copied, pool) != _ask(scheduler, pool):
        _fail("copy.deepcopy() of it picked differently from the original")


def _ask(scheduler: Scheduler, pool: Sequence[Candidate]) -> list[str]:
    dice = Random(4)
    return [scheduler.pick(_request(dice), pool).name for _ in range(50)]


def _is_quick(make: Make) -> None:
    dice = Random(1)
    scheduler, pool = make(), _pool(dice, 50)
    requests = [_request(dice) for _ in range(100)]
    if hasattr(scheduler, "prepare"):
        scheduler.prepare(pool)
    taken = min(_time(scheduler, requests, pool) for _ in range(5)) / len(requests)
    if taken > PICK_LIMIT:
        _fail(
            f"a pick among {len(pool)} candidates took {taken * 1e6:.0f} µs, more than {PICK_LIMIT * 1e6:.0f}"
        )


def _time(scheduler: Scheduler, requests: Sequence[Request], pool: Sequence[Candidate]) -> float:
    started = time.perf_counter()
    for request in requests:
        scheduler.pick(request, pool)
    return time.perf_counter() - started


def _asks_for_checks(make: Make) -> None:
    for spec in getattr(make(), "checks", ()):
        if not isinstance(spec, CheckSpec):
            _fail(f"checks holds {spec!r}, which is not a CheckSpec")


# Persistence


def _client(dice: Random) -> Client:
    return Client(dice.randbytes(dice.choice((4, 16))), dice.randrange(65_536))


def _datagrams() -> Iterator[Datagram]:
    dice = Random(2)
    for _ in range(_DATAGRAMS):
        kind = dice.choice(list(Kind))
        spi_i, spi_r = (dice.choice((bytes(8), dice.randbytes(8))) for _ in range(2))
        spis = (spi_i, spi_r) if kind is Kind.IKE else (b"", b"")
        yield Datagram(_client(dice), dice.choice((500, 4500, 65_535)), kind, *spis)


def _makes_keys(make: Make) -> None:
    plugin = make()
    for datagram in _datagrams():
        keys = plugin.keys(datagram)
        if not isinstance(keys, Sequence) or len(keys) > MAX_KEYS or len(set(keys)) != len(keys):
            _fail(f"keys() must answer a sequence of at most {MAX_KEYS} different keys, not {keys!r}")
        for each in keys:
            _check_key(each)


def _check_key(made: object) -> None:
    if type(made) is not bytes or len(made) > MAX_KEY_LENGTH:
        _fail(f"a key must be bytes, at most {MAX_KEY_LENGTH} of them, not {made!r:.200}")
    kind, _, value = made.partition(b":")
    if not (kind.replace(b"-", b"").isalnum() and value):
        _fail(f"a key must be made by key(kind, value), such as key('src', address), not {made!r}")


def _recognises_the_same(make: Make) -> None:
    datagrams = list(_datagrams())
    forwards, backwards = make(), make()
    first = [list(forwards.keys(datagram)) for datagram in datagrams]
    again = [list(backwards.keys(datagram)) for datagram in reversed(datagrams)]
    if first != list(reversed(again)):
        _fail("keys() answered the same datagram differently; it must look at nothing but the datagram")


# Following


def _service(name: str, address: IPAddress, port: int, follows: str | None = None) -> VirtualService:
    plugin = PluginRef("round-robin")
    return VirtualService(
        name, address, port, Framing.OPAQUE, (), plugin, plugin, 60.0, 60.0, follows=follows
    )


def _endpoints(plugin: Following) -> Iterator[tuple[RealServer, object]]:
    dice = Random(3)
    for number in range(200):
        of = IPv4Address if number % 2 else IPv6Address
        leader = _service("leader", of(1), dice.randrange(1, 65_536))
        follower = _service("follower", of(1), dice.randrange(1, 65_536), follows="leader")
        server = RealServer(f"gw{number}", of(dice.randrange(2, 2**32)), dice.choice((None, 500)))
        yield server, plugin.endpoint(server, leader, follower)


def _answers_an_endpoint(make: Make) -> None:
    for server, found in _endpoints(make()):
        if not isinstance(found, Endpoint):
            _fail(f"endpoint() answered {found!r}, which is not an Endpoint")
        if found.address != server.address:
            _fail(
                f"endpoint() answered {found} for a server at {server.address}; it must be on the same host"
            )
        if found.port not in range(1, 65_536):
            _fail(f"endpoint() answered port {found.port!r}")


def _answers_the_same_endpoint(make: Make) -> None:
    if list(_endpoints(make())) != list(_endpoints(make())):
        _fail("endpoint() answered the same services and server differently")


# Health checks


@contextmanager
def _silent_port() -> Iterator[int]:
    """A port that takes datagrams and connections and never answers."""
    with socket.create_server((str(_HOST), 0)) as tcp, socket.socket(type=socket.SOCK_DGRAM) as udp:
        udp.bind(tcp.getsockname())
        yield tcp.getsockname()[1]


def _look(make: Make, port: int, patience: float) -> tuple[object, float]:
    """What the check answers or raises, ``None`` if it ran out of time, and how many seconds late it ended."""
    import trio  # noqa: PLC0415 - the other kinds do without it

    check: HealthCheck = make()
    target = Target("gw1", Endpoint(_HOST, port), Framing.IKE)

    async def look() -> tuple[object, float]:
        answer: object = None
        with trio.move_on_after(patience) as scope:
            try:
                answer = await check.check(target)
            except Exception as error:
                answer = None if isinstance(error, trio.TooSlowError) else error
        return answer, trio.current_time() - scope.deadline

    return trio.run(look)


def _finds_something(make: Make) -> None:
    with _silent_port() as port:
        _check_finding(_look(make, port, _PATIENCE)[0])
    _check_finding(_look(make, port, 5 * _PATIENCE)[0])  # closed by now


def _check_finding(found: object) -> None:
    if found is None or isinstance(found, OSError) or type(found) is RuntimeError:
        return  # over its time; a failure; or "I cannot look", which it may say by a RuntimeError
    if isinstance(found, Exception):
        raise found
    if not isinstance(found, CheckResult):
        _fail(f"check() answered {found!r}, which is not a CheckResult")
    if found.healthy not in (True, False) or not found.reason:
        _fail(f"it must be healthy or not, for a reason that the operator can read: {found!r}")
    if found.round_trip is not None and found.round_trip < 0:
        _fail(f"the round trip is in seconds, not {found.round_trip!r}")
    if found.share is not None and found.share < 0:
        _fail(f"the share is in percent, not {found.share!r}")
    if found.state is not None and not isinstance(found.state, AdminState):
        _fail(f"the state is an AdminState, not {found.state!r}")


def _can_be_cancelled(make: Make) -> None:
    with _silent_port() as port:
        for patience in (0.0, _PATIENCE / 4):
            _, late = _look(make, port, patience)
            if late > CANCEL_LIMIT:
                _fail(f"check() ended {late:.1f} s after it was cancelled, more than {CANCEL_LIMIT:g}")


_CASES: Mapping[str, Mapping[str, Callable[[Make], None]]] = {
    "scheduler": {
        "answers one of the candidates": _answers_a_candidate,
        "takes the only candidate": _takes_the_only_candidate,
        "answers before it is prepared": _answers_before_prepare,
        "leaves the module random alone": _leaves_global_random_alone,
        "repeats itself": _repeats_itself,
        "can be copied": _can_be_copied,
        "is quick": _is_quick,
        "asks for checks by their specification": _asks_for_checks,
    },
    "persistence": {
        "makes keys of any datagram": _makes_keys,
        "makes the same keys of the same datagram": _recognises_the_same,
    },
    "following": {
        "answers an endpoint of the server": _answers_an_endpoint,
        "answers the same endpoint": _answers_the_same_endpoint,
    },
    "check": {
        "finds something": _finds_something,
        "can be cancelled": _can_be_cancelled,
    },
}
