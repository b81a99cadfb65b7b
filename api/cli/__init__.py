"""The command line: ``sapin``.

Commands that talk to a daemon do so through its control socket (:mod:`sapin.api.client`). What is slow to import,
the daemon and its plugins, is imported by the commands that need it, so that the others answer at once.

Exit codes are :class:`~sapin.api.cli.common.ExitCode`.
"""

from __future__ import annotations

from typing import Annotated

import typer

from sapin.api.cli import addresses, files, node, pins, plugins, server
from sapin.api.cli.common import HELP_OPTIONS

__all__ = ["app", "main"]

app = typer.Typer(
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    context_settings=HELP_OPTIONS,
    help="Sapin, a load balancer for VPN gateways.",
    epilog="Exit codes: 0 done, 1 refused or faulty, 2 wrong usage, 3 no daemon, 4 not allowed, 5 no answer.",
)

_FILE, _NODE = "A configuration", "A running daemon"
app.command(rich_help_panel=_FILE)(files.run)
app.command(rich_help_panel=_FILE)(files.check)
app.add_typer(files.init, rich_help_panel=_FILE)
app.command(rich_help_panel=_NODE)(node.status)
app.command(rich_help_panel=_NODE)(node.top)
app.command(rich_help_panel=_NODE)(node.explain)
app.add_typer(pins.app, rich_help_panel=_NODE)
app.add_typer(server.app, rich_help_panel=_NODE)
app.command(rich_help_panel=_NODE)(node.reload)
app.add_typer(addresses.app, rich_help_panel="The pair")
app.add_typer(plugins.app, rich_help_panel="More")
app.command(rich_help_panel="More")(files.demo)


def _version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        typer.echo(f"sapin {version('sapin')}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    pass


def main() -> None:
    """The entry point."""
    app(prog_name="sapin")
