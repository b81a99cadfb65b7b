"""Commands that ask a running node: status, top, explain, reload."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Any

import typer

from sapin.api.cli.common import (
    AsJson,
    ConfigFile,
    ExitCode,
    Service,
    StateDir,
    ask,
    ask_pages,
    fail,
    print_json,
    show,
    where,
)
from sapin.api.cli.figures import with_rates

MAX_INTERVAL = 60.0


def status(
    interval: Annotated[
        float,
        typer.Option(min=0, max=MAX_INTERVAL, help="Seconds over which rates are taken; 0 leaves them out."),
    ] = 1.0,
    as_json: AsJson = False,
    state_dir: StateDir = None,
    config: ConfigFile = None,
) -> None:
    """Show services, servers, their health, pins and rates.

    Rates come from asking twice.
    """
    answer = observe(where(state_dir, config), interval)
    if as_json:
        print_json(answer)
        return
    from sapin.api.cli import render

    show(render.status(answer))


def observe(place: Path, interval: float) -> dict[str, Any]:
    """The status, with rates over the interval unless that is 0."""
    first: dict[str, Any] = ask(place, "status")
    if not interval:
        return first
    time.sleep(interval)
    return with_rates(first, ask(place, "status"))


def top(
    interval: Annotated[
        float, typer.Option(min=0.2, max=MAX_INTERVAL, help="Seconds between two looks.")
    ] = 1.0,
    state_dir: StateDir = None,
    config: ConfigFile = None,
) -> None:
    """Show the status live; q ends it."""
    from rich.console import Console

    place = where(state_dir, config)
    console = Console(highlight=False, markup=False)
    if not console.is_terminal:
        fail("top draws on a terminal, and this is none: use `sapin status --json`", ExitCode.USAGE)
    ask(place, "status")
    from sapin.api.cli.top import watch

    watch(place, interval, console)


def explain(
    client: Annotated[str, typer.Argument(help="The client's IPv4 or IPv6 address.", show_default=False)],
    port: Annotated[
        int | None, typer.Option(min=1, max=65_535, help="Its source port.", show_default=False)
    ] = None,
    service: Service = None,
    as_json: AsJson = False,
    state_dir: StateDir = None,
    config: ConfigFile = None,
) -> None:
    """Say which server a client is on and why, or what a new client would get."""
    place = where(state_dir, config)
    answer = ask(place, "explain", client=client, port=port, service=service)
    known = answer["flows"] or any(row["reason"] == "pinned" for row in answer["services"])
    pins = [] if known or port is not None else _pins_of(place, answer["client"], service)
    if as_json:
        print_json({**answer, "pins": pins})
        return
    from sapin.api.cli import render
    from sapin.api.cli.explain import sentences

    now = time.time()
    for sentence in sentences(answer, pins, now):
        typer.echo(sentence)
    if answer["flows"]:
        show("", render.flows(answer, now))


def _pins_of(place: Path, client: str, service: str | None) -> list[dict[str, Any]]:
    """The client's pins that were found first; all of a page, so that it is never a long list."""
    for page in ask_pages(place, "pins", client=client, service=service):
        if page["pins"]:
            return list(page["pins"])
    return []


def reload(as_json: AsJson = False, state_dir: StateDir = None, config: ConfigFile = None) -> None:
    """Have the daemon read its configuration again.

    A file with a fault changes nothing.
    """
    answer = ask(where(state_dir, config), "reload")
    if as_json:
        print_json(answer)
        return
    for line in answer["changes"] or ["nothing has changed"]:
        typer.echo(line)
