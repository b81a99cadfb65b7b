"""What is wrong with a configuration: each fault with its path, the value, and the reason.

A configuration is refused whole, and an operator repairs it in one round, so everything that looks at a
document adds to one :class:`Report`, which keeps the order of the document.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

from pydantic_core import ErrorDetails

Loc = tuple[str | int, ...]
"""Where something stands in a document: keys of tables and indices of lists, from the outside in."""

_BARE_KEY = re.compile(r"[A-Za-z0-9_-]{1,64}")
_SHOWN = 64
"""Characters of a value that are shown, at most."""
_LISTED = 16
"""Known words that are listed, at most."""

_REASONS = {
    "missing": "is missing",
    "string_type": "must be a string",
    "bool_type": "must be true or false",
    "int_type": "must be a whole number",
    "int_from_float": "must be a whole number",
    "float_type": "must be a number",
    "finite_number": "must be a finite number",
    "list_type": "must be a list",
    "tuple_type": "must be a list",
    "dict_type": "must be a table",
    "model_type": "must be a table",
    "model_attributes_type": "must be a table",
    "greater_than": "must be more than {gt}",
    "greater_than_equal": "must be at least {ge}",
    "less_than": "must be less than {lt}",
    "less_than_equal": "must be at most {le}",
    "too_long": "has too many entries: at most {max_length}",
    "too_short": "has too few entries: at least {min_length}",
    "string_too_long": "must have at most {max_length} characters",
    "string_too_short": "must have at least {min_length} characters",
    "enum": "must be {expected}",
    "literal_error": "must be {expected}",
    "value_error": "{error}",
    "extra_forbidden": "unknown key",
}


@dataclass(frozen=True, slots=True)
class Fault:
    """One thing that is wrong with a configuration."""

    path: str
    """Where, as an operator reads it: ``virtual_services[0] "ike".real_servers[1] "gw2".weight``."""
    value: Any
    """What stands there, as TOML decodes it; ``None`` where nothing does."""
    reason: str
    """Why it is refused."""

    def __str__(self) -> str:
        shown = "" if self.value is None else f" = {show(self.value)}"
        return f"{self.path}{shown}: {self.reason}"


class ConfigError(Exception):
    """A configuration that was refused, with every fault that it has."""

    def __init__(self, faults: Iterable[Fault]) -> None:
        self.faults = tuple(faults)
        super().__init__("\n".join(map(str, self.faults)))


class Report:
    """Collects the faults of one document and tells each by its path."""

    def __init__(self, document: Mapping[str, Any]) -> None:
        self._document = document
        self._position = {loc: number for number, (loc, _) in enumerate(walk(document))}
        self._found: dict[Loc, list[str]] = {}

    def add(self, loc: Loc, reason: str) -> None:
        """Add a fault of what stands at ``loc``; below a plain value, the fault is that value's."""
        reason = " ".join(reason.split())
        reasons = self._found.setdefault(self._clip(loc), [])
        if reason not in reasons:
            reasons.append(reason)

    def blames(self, loc: Loc) -> bool:
        """Whether what stands at ``loc``, or something around it, has a fault already."""
        clipped = self._clip(loc)
        return any(clipped[:depth] in self._found for depth in range(len(clipped) + 1))

    def blames_inside(self, loc: Loc) -> bool:
        """Whether something inside of what stands at ``loc`` has a fault already."""
        return any(found[: len(loc)] == loc for found in self._found)

    def faults(self) -> tuple[Fault, ...]:
        """The faults in the order of the document; of what is absent, at the table it is missed in."""
        located = sorted(self._found.items(), key=lambda item: self._order(item[0]))
        return tuple(
            Fault(self._path(loc), self._value(loc), reason) for loc, reasons in located for reason in reasons
        )

    def _clip(self, loc: Loc) -> Loc:
        here: Any = self._document
        for depth, part in enumerate(loc):
            if not _holds(here, part):
                return loc[: depth + 1] if isinstance(here, dict | list) else loc[:depth]
            here = here[part]
        return loc

    def _order(self, loc: Loc) -> int:
        return self._position.get(loc, self._position.get(loc[:-1], -1))

    def _value(self, loc: Loc) -> Any:
        here: Any = self._document
        for part in loc:
            if not _holds(here, part):
                return None
            here = here[part]
        return here

    def _path(self, loc: Loc) -> str:
        path = ""
        here: Any = self._document
        for part in loc:
            here = here[part] if _holds(here, part) else None
            if isinstance(part, int):
                path += f"[{part}]{_label(here)}"
            else:
                path += ("." if path else "") + (part if _BARE_KEY.fullmatch(part) else show(part))
        return path


def walk(document: Mapping[str, Any]) -> Iterable[tuple[Loc, Any]]:
    """Everything in a document with its place, outer before inner, in the document's order."""
    pending: list[tuple[Loc, Any]] = [((), document)]
    while pending:
        loc, value = pending.pop()
        yield loc, value
        if isinstance(value, dict):
            pending.extend(((*loc, key), value[key]) for key in reversed(value))
        elif isinstance(value, list):
            pending.extend(((*loc, index), value[index]) for index in reversed(range(len(value))))


def reason(error: ErrorDetails) -> str:
    """A pydantic error in the words of an operator."""
    template = _REASONS.get(error["type"])
    if template is None:
        return error["msg"][:1].lower() + error["msg"][1:]
    context = error.get("ctx", {})
    if "expected" in context:
        context["expected"] = str(context["expected"]).replace("'", '"')
    return template.format(**context)


def suggest(word: str, known: Sequence[str]) -> str:
    """The nearest known word as a question, or all that are known."""
    nearest = get_close_matches(word[:_SHOWN], known, n=1)
    if nearest:
        return f"did you mean {show(nearest[0])}?"
    listed = [*known[:_LISTED], *(["…"] if len(known) > _LISTED else [])]
    return f"known are {', '.join(listed)}" if listed else "none is known"


def show(value: Any) -> str:
    """A value about as TOML writes it, on one line, of bounded length and safe to print."""
    match value:
        case None:
            return "none"
        case bool():
            return str(value).lower()
        case str():
            shown = value if len(value) <= _SHOWN else value[: _SHOWN - 1] + "…"
            return json.dumps(shown, ensure_ascii=not shown.isprintable())
        case int():
            return str(value) if value.bit_length() <= 64 else "a number of more than 64 bits"
        case list():
            return "[…]" if value else "[]"
        case dict():
            return "{…}" if value else "{}"
    return str(value)


def _holds(container: Any, part: str | int) -> bool:
    if isinstance(container, dict):
        return part in container
    return isinstance(container, list) and isinstance(part, int) and part < len(container)


def _label(entry: Any) -> str:
    """What tells a list's entry from its neighbours: its name, or its plugin's."""
    if not isinstance(entry, dict):
        return ""
    name = entry.get("name", entry.get("plugin"))
    return f" {show(name)}" if isinstance(name, str) else ""
