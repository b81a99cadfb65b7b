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


def _command(verb: str, state: str, help_text: str) -> None:
    """Add the command that puts a server into a state."""

    @app.command(verb, help=help_text)
    def command(
        name: Name,
        service: Service = None,
        as_json: AsJson = False,
        state_dir: StateDir = None,
        config: ConfigFile = None,
    ) -> None:
        _set(name, state, service, as_json, where(state_dir, config))


_command("drain", "draining", "Let a server keep its clients and give it no new ones.")
_command("disable", "disabled", "Take a server's clients away and give it no new ones.")
_command("enable", "enabled", "Give a server new clients again.")


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
