"""Plugins: found by entry points, checked against their contract, configured, and kept in check.

A plugin that raises or answers what its contract does not allow is a *fault*: it is counted, the
caller answers in its place, and after :data:`FAULT_LIMIT` faults in a row the plugin is suspended for
:data:`SUSPENSION` seconds. It never takes the dataplane down, and it never fails unseen.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import EntryPoint, entry_points
from inspect import signature
from typing import Any, Generic, TypeVar

import structlog
from pydantic import BaseModel

from sapin.core.contracts import KINDS
from sapin.core.model import PluginRef

FAULT_LIMIT = 5
"""Faults in a row until a plugin is suspended."""
SUSPENSION = 60.0
"""Seconds that a suspended plugin is left alone before it is tried again."""
TOLD = 200
"""Characters that are kept of what a plugin says."""

_CONTRACTS: Mapping[str, tuple[str, int]] = {
    "scheduler": ("pick", 2),
    "persistence": ("keys", 1),
    "following": ("endpoint", 3),
    "check": ("check", 1),
}

P = TypeVar("P")

log = structlog.get_logger("sapin.plugins")


class PluginError(Exception):
    """A plugin cannot be used; the text names it and says why."""


@dataclass(slots=True)
class Faults:
    """What went wrong in one plugin instance."""

    total: int = 0
    in_a_row: int = 0
    last: str = ""
    suspended_until: float = 0.0


@dataclass(slots=True)
class Hosted(Generic[P]):
    """A configured plugin instance and its faults."""

    kind: str
    name: str
    options: Mapping[str, Any]
    plugin: P
    faults: Faults = field(default_factory=Faults)

    def usable(self, now: float) -> bool:
        """Whether it is to be called; a suspension ends by itself."""
        return now >= self.faults.suspended_until

    def fault(self, error: str, now: float) -> bool:
        """Count a fault; true when it suspends the plugin."""
        faults = self.faults
        faults.total += 1
        faults.in_a_row += 1
        faults.last = error
        if faults.in_a_row < FAULT_LIMIT:
            return False
        faults.in_a_row = 0
        faults.suspended_until = now + SUSPENSION
        return True

    def close(self) -> None:
        """Let it give back what it holds. Whoever closes it goes on if it cannot: that is logged."""
        try:
            _lifecycle(self.plugin, "close")
        except Exception as error:
            log.error("plugin cannot be closed", kind=self.kind, plugin=self.name, error=told(error))


class Registry:
    """The plugins that are installed, by kind and name.

    Args:
        found: entry points to use in place of the installed ones.
    """

    def __init__(self, found: Iterable[EntryPoint] | None = None) -> None:
        kinds = {group: kind for kind, group in KINDS.items()}
        points = found if found is not None else (p for g in kinds for p in entry_points(group=g))
        self._points: dict[str, dict[str, EntryPoint]] = {kind: {} for kind in KINDS}
        self.conflicts: list[str] = []
        """Names that two packages give to plugins of one kind; the first that was found has it."""
        for point in points:
            if point.group in kinds:
                first = self._points[kinds[point.group]].setdefault(point.name, point)
                if first.value != point.value:
                    self.conflicts.append(
                        f"{kinds[point.group]} {point.name}: {first.value}, not {point.value}"
                    )
        self._classes: dict[tuple[str, str], type] = {}

    def names(self, kind: str) -> Sequence[str]:
        """The names of the installed plugins of that kind, sorted."""
        return sorted(self._points[kind])

    def origin(self, kind: str, name: str) -> str:
        """The distribution and version that a plugin comes from."""
        dist = self._points[kind][name].dist
        return f"{dist.name} {dist.version}" if dist else "unknown"

    def load(self, kind: str, name: str) -> type:
        """The plugin's class, its contract checked.

        Raises:
            PluginError: it is unknown, cannot be imported, or does not fulfil its contract.
        """
        if (kind, name) not in self._classes:
            point = self._points[kind].get(name)
            if point is None:
                raise PluginError(f"there is no {kind} plugin {name!r}")
            try:
                cls = point.load()
            except Exception as error:
                raise PluginError(f"{kind} plugin {name!r} cannot be imported: {error!r}") from error
            _check_contract(kind, name, cls)
            self._classes[kind, name] = cls
        return self._classes[kind, name]

    def config_model(self, kind: str, name: str) -> type[BaseModel] | None:
        """The plugin's ``Config``, or ``None`` where it takes no options.

        Raises:
            PluginError: as for :meth:`load`.
        """
        model = getattr(self.load(kind, name), "Config", None)
        return model if isinstance(model, type) and issubclass(model, BaseModel) else None

    def make(self, kind: str, ref: PluginRef) -> Hosted[Any]:
        """A configured and opened instance.

        Raises:
            PluginError: it cannot be loaded, its options are wrong, or it failed to open.
        """
        cls = self.load(kind, ref.plugin)
        model = self.config_model(kind, ref.plugin)
        unusable = f"{kind} plugin {ref.plugin!r} cannot be used"
        if model is None and ref.options:
            raise PluginError(f"{unusable}: it takes no options, but got {', '.join(sorted(ref.options))}")
        try:
            plugin = cls() if model is None else cls(model.model_validate(dict(ref.options)))
            _lifecycle(plugin, "open")
        except Exception as error:
            raise PluginError(f"{unusable}: {told(error)}") from error
        return Hosted(kind, ref.plugin, ref.options, plugin)


def told(error: BaseException) -> str:
    """What an exception of a plugin says, even if it cannot tell itself, in :data:`TOLD` characters at most."""
    try:
        text = str(error)
    except Exception:
        text = "it has no text"
    return f"{type(error).__name__}: {text}"[:TOLD]


def _lifecycle(plugin: object, step: str) -> None:
    method = getattr(plugin, step, None)
    if callable(method):
        method()


def _check_contract(kind: str, name: str, cls: object) -> None:
    """A misspelt method must be found at the start, not silently never be called."""
    method, arity = _CONTRACTS[kind]
    if not isinstance(cls, type):
        raise PluginError(f"{kind} plugin {name!r} is not a class but {cls!r}")
    function = getattr(cls, method, None)
    if not callable(function):
        raise PluginError(f"{kind} plugin {name!r} ({cls.__qualname__}) has no method {method}()")
    try:
        signature(function).bind(*([None] * (arity + 1)))
    except ValueError:
        return  # written in C, without a signature: there is nothing to look at
    except TypeError as error:
        raise PluginError(
            f"{kind} plugin {name!r}: {cls.__qualname__}.{method}() must take {arity} arguments: {error}"
        ) from error
