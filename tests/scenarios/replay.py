"""Scenarios of decisions: what happens, and below each event what Sapin does, as an operator would tell it.

A scenario begins with what it is about. Then come its files, as in Go's txtar, each after a line ``-- NAME --``: the
configuration ``sapin.toml``, perhaps others that are reloaded later, and last the ``events``, one a line. The
indented lines below an event are what it leads to; they are the expectation of the test, and are written by
the update mode of :mod:`tests.scenarios.test_decisions`. Blank lines and those that begin with # are for the reader.

    192.0.2.7:500 -> ike IKE_SA_INIT spi=a1     a client's datagram; also IKE_AUTH and so on, ESP, keepalive
    gw1 fails, gw1 recovers                     what the checks find
    gw1 asks draining, gw1 asks 50%             what the server's agent wants
    drain gw1, disable gw1, enable gw1          what the operator wants
    advance 8h                                  time passes
    reload later.toml                           another configuration
    pins, servers, changes                      what there is now; what went to the disk since it was last asked

Pure: writer, affinity tables and balancer run as in the daemon, without sockets, and time is a number.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from ipaddress import ip_address
from random import Random

from sapin.api.keys import show_key
from sapin.core import ike
from sapin.core.affinity import Change, Put, Removed
from sapin.core.balancer import Reason, decide
from sapin.core.config import parse
from sapin.core.contracts import Client, Datagram
from sapin.core.model import AdminState, Framing, Health
from sapin.core.registry import Registry
from sapin.core.snapshot import Group
from sapin.core.units import parse_duration
from sapin.core.writer import Writer

START = 1_000_000
CONFIG, EVENTS = "sapin.toml", "events"
INDENT = "    "
SENT = re.compile(r"(\S+):(\d+) -> (\S+) (\S+)(?: spi=([0-9a-f]{1,16}))?( cookie)?")
ADMIN = {"drain": AdminState.DRAINING, "disable": AdminState.DISABLED, "enable": AdminState.ENABLED}
HEALTH = {"fails": Health.UNHEALTHY, "recovers": Health.HEALTHY}
UNITS = (("d", 86_400), ("h", 3_600), ("m", 60), ("s", 1))
BULK = {"ESP": bytes.fromhex("c0ffee00 00000001") + bytes(56), "keepalive": ike.KEEPALIVE}


class ScenarioError(Exception):
    """A scenario cannot be played; the text says where and why."""


def replay(text: str) -> str:
    """The scenario with what its events lead to.

    Raises:
        ScenarioError: it cannot be read.
    """
    files = dict(sections(text))
    if CONFIG not in files or list(files)[-1] != EVENTS:
        raise ScenarioError(f"a scenario has a file {CONFIG}, and {EVENTS} come last")
    world = World(files)
    head = text[: len(text) - len(files[EVENTS])]
    played: list[str] = []
    for number, line in enumerate(files[EVENTS].splitlines(), head.count("\n") + 1):
        if line.startswith(INDENT):
            continue
        played.append(line)
        if line and not line.startswith("#"):
            try:
                played += [INDENT + result for result in world.play(line)]
            except Exception as error:
                raise ScenarioError(f"line {number}: {line}: {error}") from error
    return head + "".join(line + "\n" for line in played)


def sections(text: str) -> Iterator[tuple[str, str]]:
    """The files in a scenario, by name."""
    _, *parts = re.split(r"^-- (\S+) --\n", text, flags=re.MULTILINE)
    yield from zip(parts[::2], parts[1::2], strict=True)


class World:
    """One node's decisions, and the clock."""

    def __init__(self, files: dict[str, str]) -> None:
        self.files = files
        self.now = START
        self.random = Random(1)
        self.registry = Registry()
        self.fed: list[Change] = []
        self.writer = Writer(self.registry, self.fed.append, parse(files[CONFIG], self.registry))

    @property
    def groups(self) -> Sequence[Group]:
        return list(self.writer.snapshot.groups.values())

    def play(self, event: str) -> Iterator[str]:
        """What the event leads to."""
        if sent := SENT.fullmatch(event):
            yield from self.send(*sent.groups())
        elif event in ("pins", "servers", "changes"):
            yield from self.show(event)
        else:
            self.happen(event.split())

    def show(self, what: str) -> Iterator[str]:
        """What there is now."""
        if what == "pins":
            yield from table(("group", "server", "since", "expires in", "keys"), self.pins())
        elif what == "servers":
            header = ("group", "server", "state", "health", "weight", "pinned", "new clients")
            yield from table(header, self.servers())
        else:
            yield from map(told, self.fed)
            self.fed.clear()

    def happen(self, words: list[str]) -> None:
        match words:
            case ["advance", duration]:
                self.advance(int(parse_duration(duration)))
            case ["reload", name]:
                self.writer.load(parse(self.files[name], self.registry))
            case [verb, server] if verb in ADMIN:
                self.writer.set_admin(self.home(server).name, server, ADMIN[verb])
            case [server, verb] if verb in HEALTH:
                self.check(server, health=HEALTH[verb])
            case [server, "asks", wish] if wish.endswith("%"):
                self.check(server, share=int(wish[:-1]))
            case [server, "asks", wish]:
                self.check(server, asked=AdminState(wish))
            case _:
                raise ValueError("nothing that can happen")

    def send(
        self, address: str, port: str, service: str, what: str, spi: str | None, cookie: str | None
    ) -> Iterator[str]:
        """A client's datagram, decided and pinned as admission does it."""
        view = self.writer.snapshot.services[service]
        data = payload(what, spi, cookie is not None, view.service.framing)
        kind, at = ike.classify(data, view.service.framing)
        spis = (data[at : at + 8], data[at + 8 : at + 16]) if kind is ike.Kind.IKE else (b"", b"")
        client = Client(ip_address(address.strip("[]")).packed, int(port))
        decision = decide(view.group, Datagram(client, view.service.port, kind, *spis), self.random, self.now)
        if decision.member is None:
            yield f"dropped: {decision.reason}"
            return
        if decision.keys:
            view.group.table.put(decision.keys, decision.member, self.now)
        endpoint = view.endpoints[decision.member.name]
        matched = (
            f" by {show_key(decision.matched)}"
            if decision.reason is Reason.PINNED and decision.matched
            else ""
        )
        yield f"{decision.member.name} at {endpoint}: {decision.reason}{matched}"

    def advance(self, seconds: int) -> None:
        self.now += seconds
        for group in self.groups:
            while group.table.expire(self.now, 1_000) or group.table.sweep(1_000):
                pass

    def home(self, server: str) -> Group:
        """The first group that has the server."""
        return next(group for group in self.groups if server in group.members)

    def check(
        self,
        server: str,
        health: Health | None = None,
        asked: AdminState | None = None,
        share: int | None = None,
    ) -> None:
        """One thing that the checks say of a server changes."""
        group = self.home(server)
        member = group.members[server]
        self.writer.set_health(
            group.name,
            server,
            health or member.health,
            asked or member.asked,
            member.share if share is None else share,
        )

    def pins(self) -> Iterator[Sequence[object]]:
        for group in self.groups:
            for pin in group.table.pins(limit=1_000).pins:
                keys = "  ".join(map(show_key, pin.keys))
                yield group.name, pin.server, span(pin.since - START), span(pin.due - self.now), keys

    def servers(self) -> Iterator[Sequence[object]]:
        for group in self.groups:
            for m in group.members.values():
                state = str(m.admin) + ("" if m.asked is AdminState.ENABLED else f", asks {m.asked}")
                weight = m.weight if m.share == 100 else f"{m.weight}, asks {m.share}%"
                yield group.name, m.name, state, m.health, weight, m.pinned, "yes" if m.takes else "no"


def payload(what: str, spi: str | None, cookie: bool, framing: Framing) -> bytes:
    """The bytes of a datagram."""
    if what in BULK:
        return BULK[what]
    if spi is None:
        raise ValueError("an IKE message needs spi=")
    payloads = [ike.notify(ike.Notify.COOKIE, b"cookie")] if cookie else []
    header = ike.Header(bytes.fromhex(spi.ljust(16, "0")), exchange=ike.Exchange[what])
    return (ike.NON_ESP_MARKER if framing is Framing.NATT else b"") + ike.message(header, payloads)


def told(change: Change) -> str:
    """A change of an affinity table, as it goes to the disk and to a peer."""
    if isinstance(change, Put):
        return f"{change.group}: {', '.join(map(show_key, change.keys))} pinned to {change.server}"
    if isinstance(change, Removed):
        keys = ", ".join(map(show_key, change.keys))
        return f"{change.group}: {keys} no longer pinned to {change.server}: {change.cause}"
    return f"{change.group}: {change.server} has lost its pins"


def span(seconds: int) -> str:
    """Seconds as people say them: ``8h``, ``7h 59m 50s``."""
    parts: list[str] = []
    for unit, length in UNITS:
        count, seconds = divmod(seconds, length)
        if count:
            parts.append(f"{count}{unit}")
    return " ".join(parts) or "0s"


def table(header: Sequence[str], rows: Iterator[Sequence[object]]) -> Iterator[str]:
    """Aligned columns; the first is left out where all rows have the same in it."""
    cells = [[str(cell) for cell in row] for row in rows]
    if not cells:
        yield "none"
        return
    if len({row[0] for row in cells}) == 1:
        header, cells = header[1:], [row[1:] for row in cells]
    lines = [list(header), *cells]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    pad: Callable[[str, int], str] = str.ljust
    for line in lines:
        yield "  ".join(map(pad, line, widths)).rstrip()
