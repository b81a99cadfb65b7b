"""What ``sapin check`` says of a configuration: what it describes, or what is wrong with it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import RenderableType
from rich.text import Text

from sapin.api.cli.figures import duration
from sapin.api.cli.render import state, table
from sapin.core.faults import Fault, show
from sapin.core.model import AdminState, CheckSpec, Config, Endpoint, PluginRef, VirtualService


def faults(found: Sequence[Fault]) -> Iterator[RenderableType]:
    """Each fault: where it is and what stands there, then the reason."""
    for each in found:
        value = "" if each.value is None else f" = {show(each.value)}"
        yield Text.assemble((each.path, "bold"), value, (f": {each.reason}", "red"))


def fault(found: Fault) -> dict[str, Any]:
    """A fault as plain data."""
    value = found.value if isinstance(found.value, str | int | float | None) else show(found.value)
    return {"path": found.path, "value": value, "reason": found.reason}


def as_data(config: Config) -> dict[str, Any]:
    """A configuration as plain data, with its defaults filled in."""
    return asdict(config)


def summary(path: Path, config: Config) -> Iterator[RenderableType]:
    """What a valid configuration describes."""
    node = config.node
    yield Text.assemble((str(path), "bold"), " is valid.")
    yield f"Node {node.name} keeps up to {node.max_pins:,} pins and {node.max_flows:,} flows in {node.state_dir}."
    for services in config.groups().values():
        yield ""
        leader = services[0]
        listed = table("Service", "Address", "What it does")
        for service in services:
            listed.add_row(service.name, f"{service.endpoint}/{service.protocol}", _about(service))
        yield listed
        made = table("Server", "Address", "Weight", "State", right=["Weight"])
        for server in leader.real_servers:
            at = Endpoint(server.address, server.port or leader.port)
            made.add_row(server.name, str(at), str(server.weight), state(str(server.state)))
        yield made
        if not any(server.state is AdminState.ENABLED and server.weight for server in leader.real_servers):
            yield Text("No server takes new clients: all are draining, disabled or of weight 0.", "yellow")


def _about(service: VirtualService) -> str:
    if service.follows:
        with_ = "" if service.following == PluginRef("port") else f" ({_plugin(service.following)})"
        parts = [f"follows {service.follows}{with_}"]
    else:
        pinned = f"pins for {duration(service.pin_timeout)}"
        parts = [_plugin(service.scheduler), f"{_plugin(service.persistence)}, {pinned}"]
    parts += [_check(spec) for spec in service.checks]
    return "; ".join(parts)


def _plugin(ref: PluginRef) -> str:
    options = ", ".join(f"{key} = {show(value)}" for key, value in ref.options.items())
    return f"{ref.plugin} ({options})" if options else ref.plugin


def _check(spec: CheckSpec) -> str:
    return f"check {_plugin(spec.ref)} every {spec.interval:g} s"
