"""``sapin pins``: which clients are pinned where."""

from __future__ import annotations

import time
from collections.abc import Iterator
from itertools import islice
from typing import Annotated, Any

import typer

from sapin.api.cli.common import (
    HELP_OPTIONS,
    AsJson,
    ConfigFile,
    ExitCode,
    Service,
    StateDir,
    ask_pages,
    complete_server,
    fail,
    print_json,
    show,
    where,
)

app = typer.Typer(
    name="pins", invoke_without_command=True, context_settings=HELP_OPTIONS, help="List or delete pins."
)

Server = Annotated[
    str | None,
    typer.Option(help="Those of this real server.", autocompletion=complete_server, show_default=False),
]
Client = Annotated[
    str | None,
    typer.Option(help="Those of this client: its address, or a key as listed.", show_default=False),
]


@app.callback()
def pins(
    ctx: typer.Context,
    service: Service = None,
    server: Server = None,
    client: Client = None,
    limit: Annotated[int, typer.Option(min=0, help="How many to list at most; 0 for all.")] = 1000,
    as_json: AsJson = False,
    state_dir: StateDir = None,
    config: ConfigFile = None,
) -> None:
    """List pins, or delete them.

    What is listed may change meanwhile: a pin that is there all the time is listed once.
    """
    if ctx.invoked_subcommand is not None:
        if any((service, server, client, state_dir, config)):
            ctx.fail(f"options go after {ctx.invoked_subcommand!r}, not before")
        return
    found = _listed(
        ask_pages(where(state_dir, config), "pins", service=service, server=server, client=client)
    )
    rows = list(islice(found, limit or None))
    more = next(found, None) is not None
    if as_json:
        print_json({"pins": rows, "more": more})
        return
    from sapin.api.cli import render

    show(render.pins(rows, time.time()))
    if more:
        typer.echo(
            f"\nThere are more than these {limit:,}: narrow the list, or give a larger --limit.", err=True
        )


def _listed(pages: Iterator[Any]) -> Iterator[dict[str, Any]]:
    return (pin for page in pages for pin in page["pins"])


@app.command()
def delete(
    service: Service = None,
    server: Server = None,
    client: Client = None,
    key: Annotated[
        str | None, typer.Option(help="The one with this key, such as src:192.0.2.1.", show_default=False)
    ] = None,
    as_json: AsJson = False,
    state_dir: StateDir = None,
    config: ConfigFile = None,
) -> None:
    """Delete the pins that match all that is given, and close their flows.

    Their clients are new ones from then on; their tunnels break unless they get the same server again.
    """
    if not any((service, server, client, key)):
        fail("say which pins to delete: give --service, --server, --client or --key", ExitCode.USAGE)
    pages = ask_pages(
        where(state_dir, config), "delete-pins", service=service, server=server, client=client, key=key
    )
    deleted = sum(page["deleted"] for page in pages)
    if as_json:
        print_json({"deleted": deleted})
    else:
        typer.echo(f"{deleted:,} {'pin' if deleted == 1 else 'pins'} deleted")
