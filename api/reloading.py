"""Bringing the configuration file into force again, by an operator's reload or because the active node has said so."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sapin.api.files import read_config
from sapin.cluster.config import ClusterTable
from sapin.cluster.node import Node
from sapin.core.changes import diff
from sapin.core.config import ConfigError, parse
from sapin.core.dataplane.listeners import ListenError
from sapin.core.dataplane.runtime import Dataplane
from sapin.core.model import Config
from sapin.core.registry import PluginError, Registry

SECTIONS = {"cluster": ClusterTable}
"""Tables of the configuration that are not core's."""


class ReloadError(ValueError):
    """The configuration was not brought into force, or not kept; the text is one sentence for the operator."""


def reload(path: Path, dataplane: Dataplane, registry: Registry, node: Node | None) -> dict[str, Any]:
    """Read the file and make it the running configuration, whole or not at all; what has changed.

    Raises:
        ReloadError: it cannot be read, has faults, or cannot be brought into force.
    """
    try:
        text = read_config(path)
    except OSError as error:
        raise ReloadError(f"{path} cannot be read: {error.strerror}") from None
    try:
        config = parse(text, registry, SECTIONS)
    except ConfigError as error:
        raise ReloadError(f"{path} has faults, nothing was changed:\n{error}") from None
    if node is not None and (reason := node.refuses_reload(text.decode())) is not None:
        raise ReloadError(f"nothing was changed: {reason}")
    changes = bring_into_force(config, dataplane)
    if node is not None:
        node.reloaded(text.decode(), config.sections["cluster"])
    return {"changes": changes}


def use(text: str, dataplane: Dataplane, registry: Registry) -> None:
    """Bring the text of a configuration into force.

    Raises:
        ReloadError: it has faults, or cannot be brought into force; nothing has changed.
    """
    try:
        config = parse(text, registry, SECTIONS)
    except ConfigError as error:
        raise ReloadError(str(error)) from None
    bring_into_force(config, dataplane)


def bring_into_force(config: Config, dataplane: Dataplane) -> list[str]:
    """Make a configuration the running one; what has changed, line by line.

    Raises:
        ReloadError: it cannot be.
    """
    old = dataplane.snapshot.config
    if config.node.state_dir != old.node.state_dir:
        raise ReloadError(
            "node.state_dir cannot be changed by a reload: restart the daemon, nothing was changed"
        )
    _check_cluster(old, config)
    try:
        dataplane.reload(config)
    except (ListenError, PluginError) as error:
        raise ReloadError(f"nothing was changed: {error}") from None
    except OSError as error:
        raise ReloadError(f"it is in force, but admin states could not be saved: {error}") from None
    return list(diff(old, config).lines())


def _check_cluster(old: Config, new: Config) -> None:
    """What the sockets of a running node were made for cannot be changed under them."""
    before, after = old.sections.get("cluster"), new.sections.get("cluster")
    if (before is None) != (after is None):
        raise ReloadError(
            "a node does not come to a cluster, or leave it, by a reload: restart the daemon, nothing was changed"
        )
    if before and after and before.floating != after.floating:
        raise ReloadError(
            'the virtual address with side = "servers" cannot be changed by a reload: restart the daemon, '
            "nothing was changed"
        )
