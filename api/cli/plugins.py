"""``sapin plugin``: what is installed, and a new one to start from."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from sapin.api import client
from sapin.api.cli.common import (
    HELP_OPTIONS,
    AsJson,
    ConfigFile,
    ExitCode,
    StateDir,
    end,
    fail,
    print_json,
    show,
    where,
)

app = typer.Typer(
    name="plugin",
    no_args_is_help=True,
    context_settings=HELP_OPTIONS,
    help="List plugins, or start a new one.",
)


@app.command("list")
def list_(as_json: AsJson = False, state_dir: StateDir = None, config: ConfigFile = None) -> None:
    """List the plugins that are installed, and how a running daemon uses them."""
    try:
        rows = client.call(where(state_dir, config), "plugins")
    except client.ControlError as error:
        if error.kind != "down":
            end(error)
        rows = _installed()
    if as_json:
        print_json(rows)
        return
    from sapin.api.cli import render

    show(render.plugins(rows))


def _installed() -> list[dict[str, Any]]:
    """What the daemon would find if one were started."""
    from sapin.core.contracts import KINDS
    from sapin.core.registry import Registry

    registry = Registry()
    return [
        {"kind": kind, "name": name, "origin": registry.origin(kind, name)}
        for kind in KINDS
        for name in registry.names(kind)
    ]


def _kinds() -> list[str]:
    from sapin.core.contracts import KINDS

    return list(KINDS)


@app.command()
def new(
    kind: Annotated[
        str,
        typer.Argument(
            help="scheduler, persistence, following or check.", autocompletion=_kinds, show_default=False
        ),
    ],
    name: Annotated[
        str,
        typer.Argument(help="Its name in a configuration, such as first-fit.", show_default=False),
    ],
    directory: Annotated[
        Path | None, typer.Option(help="Where to write it; sapin-NAME by default.", show_default=False)
    ] = None,
) -> None:
    """Write a package with a new plugin that works, and a test that holds it to its contract."""
    from sapin.api import scaffold

    target = directory or Path(f"sapin-{name}")
    try:
        written = scaffold.new(kind, name, target)
    except FileExistsError:
        fail(f"{target} is there already and not empty: name another with --directory")
    except ValueError as error:
        fail(str(error), ExitCode.USAGE)
    except OSError as error:
        fail(f"{target} cannot be written: {error.strerror}")
    for path in written:
        typer.echo(path)
    typer.echo(
        f"\nNext: pip install -e '{target}[test]', then pytest {target}; docs/plugins.md says what to change."
    )
