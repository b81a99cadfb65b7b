"""The configuration: TOML text to a valid :class:`~sapin.core.model.Config`, or every fault that it has.

Three steps. Each value is held against the schema (:mod:`sapin.core.schema`), and what fails is reported
and taken out. Then what is left is held against its neighbours (:mod:`sapin.core.rules`). Only a document
without a fault becomes a configuration, so none is ever half applied.

Reading the file is the caller's part.
"""

from __future__ import annotations

import copy
import re
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from sapin.core.faults import ConfigError, Fault, Loc, Report, reason, suggest, walk
from sapin.core.model import Config, Framing, Node, VirtualService
from sapin.core.rules import PluginCatalogue, check_services
from sapin.core.schema import (
    DEFAULT_FLOW_TIMEOUT,
    DEFAULT_FOLLOWING,
    Document,
    NodeTable,
    Section,
    ServiceTable,
    Table,
    Tables,
    with_sections,
)

__all__ = ["MAX_DEPTH", "MAX_SIZE", "ConfigError", "Fault", "PluginCatalogue", "parse"]

MAX_SIZE = 2**20
"""Bytes in a configuration, at most."""
MAX_DEPTH = 32
"""Tables and lists inside one another, at most."""

_QUOTED = re.compile(
    r"""
    "{3} (?: \\. | [^"\\] | "(?!"") )*+ (?:"{3,5})?
    | \'{3} (?: [^'] | '(?!\'\') )*+ (?:'{3,5})?
    | " (?: \\. | [^"\\\n] )*+ "?
    | ' [^'\n]*+ '?
    | \# [^\n]*+
    """,
    re.DOTALL | re.VERBOSE,
)
"""A string or comment of TOML, or one that does not end."""
_LONG_KEY = re.compile(rf"(?<![\w-])(?:[\w-]++[ \t]*+\.[ \t]*+){{{MAX_DEPTH}}}", re.ASCII)
_TOO_DEEP = f"is nested too deeply: at most {MAX_DEPTH} levels are read"
_NO_SECTIONS: Mapping[str, type[Section]] = {}
_STATE_DIR = "/var/lib/sapin"
_ASSIGNED = {500: Framing.IKE, 4500: Framing.NATT}


def parse(
    text: str | bytes, plugins: PluginCatalogue, sections: Mapping[str, type[Section]] = _NO_SECTIONS
) -> Config:
    """The configuration that a TOML document describes.

    Args:
        text: the document.
        plugins: those that it may name.
        sections: tables that the document may have besides, by name.

    Raises:
        ConfigError: it has faults; all are listed, in the order of the document.
    """
    tree = _read(text)
    report = Report(tree)
    document = _decode(tree, report, *with_sections(sections))
    _require((), document, report)
    check_services(document.virtual_services or [], plugins, report)
    stated: dict[str, Section] = {name: each for name in sections if (each := getattr(document, name))}
    for name, section in stated.items():
        section.check((name,), document, report)
    if faults := report.faults():
        raise ConfigError(faults)
    return replace(_build(document), sections={name: each.build() for name, each in stated.items()})


def _read(text: str | bytes) -> dict[str, Any]:
    """The document as plain values, of bounded size and depth."""
    try:
        encoded = text if isinstance(text, bytes) else text.encode()
        if len(encoded) > MAX_SIZE:
            raise _unreadable(f"has {len(encoded):,} bytes; at most {MAX_SIZE:,} are read")
        decoded = encoded.decode("utf-8-sig")
    except (UnicodeDecodeError, UnicodeEncodeError) as error:
        raise _unreadable(f"is not UTF-8 at offset {error.start}: {error.reason}") from None
    if _LONG_KEY.search(_QUOTED.sub("q", decoded)):  # tomllib takes memory by the square of a key's parts
        raise _unreadable(_TOO_DEEP)
    try:
        tree = tomllib.loads(decoded)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError([_syntax_fault(str(error), decoded)]) from None
    except ValueError:  # the one that is no TOMLDecodeError (sys.set_int_max_str_digits)
        raise _unreadable("has a number of too many digits") from None
    except RecursionError:
        raise _unreadable(_TOO_DEEP) from None
    if any(len(loc) > MAX_DEPTH for loc, _ in walk(tree)):
        raise _unreadable(_TOO_DEEP)
    return tree


def _unreadable(why: str) -> ConfigError:
    return ConfigError([Fault("document", None, why)])


def _syntax_fault(message: str, text: str) -> Fault:
    lines = text.split("\n")
    if place := re.search(r" \(at line (\d+), column (\d+)\)$", message):
        line, column = int(place[1]), int(place[2])
        message = message[: place.start()]
    else:
        line, column = len(lines), len(lines[-1]) + 1
        message = message.removesuffix(" (at end of document)")
    return Fault(f"line {line}, column {column}", lines[line - 1].strip(), f"is not TOML: {message}")


def _decode(tree: dict[str, Any], report: Report, model: type[Document], tables: Tables) -> Document:
    """The tables of the document, without what fails by itself, which is reported."""
    rest = copy.deepcopy(tree)
    emptied: set[Loc] = set()
    while True:
        try:
            return model.model_validate(rest)
        except ValidationError as failure:
            for error in failure.errors(include_url=False, include_input=False):
                loc = error["loc"]
                if loc in emptied:  # an entry of a list of plain values: the list has to go as a whole
                    _take_out(rest, loc[:-1])
                    continue
                unknown = error["type"] == "extra_forbidden"
                report.add(loc, _unknown_key(loc, tables) if unknown else reason(error))
                _take_out(rest, loc)
                emptied.add(loc)


def _unknown_key(loc: Loc, tables: Tables) -> str:
    table = tables[tuple(part for part in loc[:-1] if isinstance(part, str))]
    return f"unknown key; {suggest(str(loc[-1]), list(table.model_fields))}"


def _take_out(tree: dict[str, Any], loc: Loc) -> None:
    """Remove what stands at ``loc``, if it is there; an entry of a list leaves an empty table, so that indices hold."""
    *outer, last = loc
    here: Any = tree
    for part in outer:
        here = here.get(part, {}) if isinstance(here, dict) else here[part]
    if isinstance(last, int):
        here[last] = {}
    else:
        here.pop(last, None)


def _require(loc: Loc, table: Table, report: Report) -> None:
    for key in table.required:
        place = (*loc, key)
        if getattr(table, key) is None and not (report.blames(place) or report.blames_inside(place)):
            report.add(place, "is missing")
    for inner, value in _tables(loc, table):
        _require(inner, value, report)


def _tables(loc: Loc, table: Table) -> Iterator[tuple[Loc, Table]]:
    for key in type(table).model_fields:
        value = getattr(table, key)
        if isinstance(value, Table):
            yield (*loc, key), value
        elif isinstance(value, list):
            yield from (((*loc, key, n), entry) for n, entry in enumerate(value) if isinstance(entry, Table))


def _build(document: Document) -> Config:
    tables = document.virtual_services or []
    services = {table.name: _leader(table) for table in tables if table.follows is None}
    services |= {table.name: _follower(table, services[table.follows]) for table in tables if table.follows}
    return Config(_node(document.node), tuple(services[table.name] for table in tables))


def _node(table: NodeTable | None) -> Node:
    assert table is not None
    assert table.name is not None
    limits = table.stated("max_pins", "max_flows", "receive_buffer")
    return Node(table.name, Path(table.state_dir or _STATE_DIR), **limits)


def _leader(table: ServiceTable) -> VirtualService:
    return VirtualService(
        real_servers=tuple(server.server() for server in table.real_servers or []),
        scheduler=table.scheduler_ref(),
        persistence=table.persistence_ref(),
        pin_timeout=table.pin_timeout(),
        **_own(table),
    )


def _follower(table: ServiceTable, leader: VirtualService) -> VirtualService:
    """A service with all of its leader's that it does not have of its own."""
    following = table.following.ref() if table.following else DEFAULT_FOLLOWING
    return replace(leader, follows=leader.name, following=following, **_own(table))


def _own(table: ServiceTable) -> dict[str, Any]:
    """What a service never has from its leader."""
    assert table.name is not None
    assert table.address is not None
    assert table.port is not None
    return {
        "name": table.name,
        "address": table.address,
        "port": table.port,
        "framing": table.framing or _ASSIGNED.get(table.port, Framing.OPAQUE),
        "flow_timeout": DEFAULT_FLOW_TIMEOUT if table.flow_timeout is None else table.flow_timeout,
        "checks": tuple(check.spec() for check in table.checks or []),
    }
