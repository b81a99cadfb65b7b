"""The daemon: the composition root, the one file that knows everybody."""

from __future__ import annotations

import logging
import signal
import sys
from pathlib import Path

import structlog
import trio

from sapin.api import control
from sapin.api.files import read_config
from sapin.api.operations import Operations
from sapin.api.refused import Refused
from sapin.api.reloading import SECTIONS, use
from sapin.cluster.config import Cluster
from sapin.cluster.node import Node
from sapin.cluster.takeover import guard
from sapin.core.config import parse
from sapin.core.dataplane.limits import raise_descriptor_limit
from sapin.core.dataplane.listeners import ListenError
from sapin.core.dataplane.recovery import StoreError
from sapin.core.dataplane.runtime import Dataplane
from sapin.core.model import Config
from sapin.core.registry import PluginError, Registry

RETRY = (1.0, 60.0)
"""Seconds until a failed control socket is opened again: at first, and at most; as a part of the dataplane is."""

log = structlog.get_logger("sapin.daemon")


class StartError(Exception):
    """The daemon cannot start; the text says why and what to do."""


def load(path: Path, registry: Registry) -> Config:
    """The configuration in a file.

    Raises:
        StartError: it cannot be read.
        ConfigError: it has faults.
    """
    try:
        return parse(read_config(path), registry, SECTIONS)
    except OSError as error:
        raise StartError(f"{path} cannot be read: {error.strerror}") from None


def run(path: Path) -> None:
    """Run the daemon until SIGTERM or SIGINT.

    Raises:
        StartError: it cannot start.
        ConfigError: the configuration has faults.
    """
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # until it means a reload: what is being read is the newest
    registry = Registry()
    config = load(path, registry)
    for conflict in registry.conflicts:
        log.warning("two packages have a plugin of this name", used=conflict)
    descriptors = raise_descriptor_limit()
    try:
        cluster: Cluster | None = config.sections.get("cluster")
        dataplane = Dataplane(config, registry, descriptors, floating=cluster.floating if cluster else None)
        pair = _make_node(cluster, dataplane, registry, path) if cluster else None
    except (StoreError, ListenError, PluginError, OSError, ValueError) as error:
        raise StartError(str(error)) from None
    trio.run(_main, dataplane, Operations(dataplane, registry, path, pair), pair)


def _make_node(cluster: Cluster, dataplane: Dataplane, registry: Registry, path: Path) -> Node:
    text = read_config(path).decode()
    return Node(cluster, dataplane, path, text, lambda new: use(new, dataplane, registry), guard)


async def _main(dataplane: Dataplane, operations: Operations, pair: Node | None) -> None:
    node = dataplane.snapshot.config.node
    with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT, signal.SIGHUP) as signals:
        async with trio.open_nursery() as nursery:
            await nursery.start(dataplane.run)
            nursery.start_soon(_keep_control, node.state_dir, operations)
            if pair is not None:
                nursery.start_soon(pair.run)
            log.info("forwarding", node=node.name, services=len(dataplane.snapshot.services))
            async for number in signals:
                if number != signal.SIGHUP:
                    log.info("stopping", signal=signal.Signals(number).name)
                    if pair is not None:
                        await pair.leave()
                    nursery.cancel_scope.cancel()
                    break
                _reload(operations)


def _reload(operations: Operations) -> None:
    try:
        changes = operations.reload()["changes"]
    except Refused as error:
        log.error("configuration not reloaded", reason=str(error))
    except Exception:
        log.exception("configuration not reloaded, or not as a whole")
    else:
        log.info("configuration reloaded", changes=changes)


async def _keep_control(state_dir: Path, operations: Operations) -> None:
    """Whatever happens to the control socket, forwarding goes on."""
    shortest, longest = RETRY
    pause = shortest
    while True:
        began = trio.current_time()
        try:
            await control.serve(state_dir, operations.table())
        except Exception as error:
            pause = pause if trio.current_time() - began < longest else shortest
            log.error("control socket failed; it will be opened again", reason=repr(error), seconds=pause)
        await trio.sleep(pause)
        pause = min(2 * pause, longest)


def set_up_logging(*, json: bool, level: str) -> None:
    """Log to standard error: for people, or one JSON object a line."""
    renderer = (
        structlog.processors.JSONRenderer()
        if json
        else structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty(), pad_event_to=0)
    )
    structlog.configure(
        processors=[
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=False),
            structlog.processors.format_exc_info,
            renderer,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(logging.getLevelNamesMapping()[level.upper()]),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
    )
