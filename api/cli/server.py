"""``sapin server``: what the operator wants of a real server."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sapin.api.cli.common import (
    HELP_OPTIONS,
    AsJson,
    ConfigFile,
    Service,
    StateDir,
    ask,
    complete_server,
    print_json,
    where,
)

app = typer.Typer(
    name="server",
    no_args_is_help=True,
    context_settings=HELP_OPTIONS,
    help="Drain, disable or enable a real server.",
)

Name = Annotated[
    str, typer.Argument(help="The real server's name.", autocompletion=complete_server, show_default=False)
]


@app.command()
def drain(
    name: Name,
    service: Service = None,
    as_json: AsJson = False,
    state_dir: StateDir = None,
    config: ConfigFile = None,
) -> None:
    """Let a server keep its clients and give it no new ones."""
    _set(name, "draining", service, as_json, where(state_dir, config))


@app.command()
def disable(
    name: Name,
    service: Service = None,
    as_json: AsJson = False,
    state_dir: StateDir = None,
    config: ConfigFile = None,
) -> None:
    """Take a server's clients away and give it no new ones."""
    _set(name, "disabled", service, as_json, where(state_dir, config))


@app.command()
def enable(
    name: Name,
    service: Service = None,
    as_json: AsJson = False,
    state_dir: StateDir = None,
    config: ConfigFile = None,
) -> None:
    """Give a server new clients again."""
    _set(name, "enabled", service, as_json, where(state_dir, config))


def _set(name: str, state: str, service: str | None, as_json: bool, place: Path) -> None:
    answer = ask(place, "set-state", server=name, state=state, service=service)
    if as_json:
        print_json(answer)
        return
    what = {
        "draining": f"it keeps the clients that are pinned to it ({answer['pinned']:,}) and gets no new ones",
        "disabled": "its clients will come back elsewhere, and it gets no new ones",
        "enabled": "it gets new clients while its checks find it healthy",
    }[state]
    typer.echo(f"{name} is {state} on {', '.join(answer['services'])}: {what}.")
