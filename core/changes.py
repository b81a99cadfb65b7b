"""What a new configuration changes, so that a reload touches nothing else and can say what it did."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, fields
from typing import Any

from sapin.core.model import Config, VirtualService


@dataclass(frozen=True, slots=True)
class ServerChange:
    """What changed in a real server that a service had before and still has."""

    name: str
    keys: tuple[str, ...]
    """The fields of :class:`~sapin.core.model.RealServer` that differ."""


@dataclass(frozen=True, slots=True)
class ServiceChange:
    """What changed in a virtual service that both configurations have."""

    name: str
    keys: tuple[str, ...]
    """The fields of :class:`~sapin.core.model.VirtualService` that differ, ``real_servers`` apart."""
    added: tuple[str, ...]
    """Real servers that only the new configuration has."""
    removed: tuple[str, ...]
    """Real servers that only the old configuration has."""
    changed: tuple[ServerChange, ...]
    """Real servers that both have and that differ."""

    def __bool__(self) -> bool:
        return bool(self.keys or self.added or self.removed or self.changed)


@dataclass(frozen=True, slots=True)
class Changes:
    """What changed between two configurations; false when nothing did."""

    node: tuple[str, ...]
    """The fields of :class:`~sapin.core.model.Node` that differ."""
    added: tuple[str, ...]
    """Virtual services that only the new configuration has."""
    removed: tuple[str, ...]
    """Virtual services that only the old configuration has."""
    changed: tuple[ServiceChange, ...]
    """Virtual services that both have and that differ, in the new configuration's order."""
    sections: tuple[str, ...] = ()
    """Other tables of the file that differ, by name."""

    def __bool__(self) -> bool:
        return bool(self.node or self.added or self.removed or self.changed or self.sections)

    def lines(self) -> Iterator[str]:
        """The changes for an operator, one a line."""
        if self.node:
            yield f"node: {', '.join(self.node)} changed"
        yield from (f"{name} changed" for name in self.sections)
        yield from (f"{name}: removed" for name in self.removed)
        yield from (f"{name}: added" for name in self.added)
        for service in self.changed:
            yield from _service_lines(service)


def diff(old: Config, new: Config) -> Changes:
    """What ``new`` changes in ``old``; the order of services and servers is no change."""
    before = {service.name: service for service in old.virtual_services}
    after = {service.name: service for service in new.virtual_services}
    both = (_service_change(before[name], after[name]) for name in after if name in before)
    return Changes(
        node=_differing(old.node, new.node),
        added=_only(after, before),
        removed=_only(before, after),
        changed=tuple(change for change in both if change),
        sections=tuple(
            name
            for name in dict.fromkeys([*old.sections, *new.sections])
            if old.sections.get(name) != new.sections.get(name)
        ),
    )


def _service_change(old: VirtualService, new: VirtualService) -> ServiceChange:
    before = {server.name: server for server in old.real_servers}
    after = {server.name: server for server in new.real_servers}
    both = (ServerChange(name, _differing(before[name], after[name])) for name in after if name in before)
    return ServiceChange(
        name=new.name,
        keys=tuple(key for key in _differing(old, new) if key != "real_servers"),
        added=_only(after, before),
        removed=_only(before, after),
        changed=tuple(change for change in both if change.keys),
    )


def _only(these: Iterable[str], those: Mapping[str, Any]) -> tuple[str, ...]:
    return tuple(name for name in these if name not in those)


def _differing(old: Any, new: Any) -> tuple[str, ...]:
    return tuple(f.name for f in fields(new) if getattr(old, f.name) != getattr(new, f.name))


def _service_lines(service: ServiceChange) -> Iterator[str]:
    if service.keys:
        yield f"{service.name}: {', '.join(service.keys)} changed"
    yield from (f"{service.name}/{name}: removed" for name in service.removed)
    yield from (f"{service.name}/{name}: added" for name in service.added)
    for server in service.changed:
        yield f"{service.name}/{server.name}: {', '.join(server.keys)} changed"
