"""Commands that take a configuration: run, check, init; and the demonstration, which needs none."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sapin.api.cli.common import (
    HELP_OPTIONS,
    AsJson,
    ExitCode,
    config_path,
    fail,
    print_json,
    show,
)

if TYPE_CHECKING:
    from sapin.core.faults import Fault


class LogFormat(StrEnum):
    """How log lines look."""

    CONSOLE = "console"
    JSON = "json"


class LogLevel(StrEnum):
    """What is logged, and what is more severe."""

    DEBUG = "debug"
    INFO = "info"
    WARNING = "warning"
    ERROR = "error"


File = Annotated[
    Path | None,
    typer.Argument(
        help="The configuration; SAPIN_CONFIG in the environment, or /etc/sapin/sapin.toml.",
        show_default=False,
    ),
]


def run(
    config: File = None,
    log_format: Annotated[
        LogFormat, typer.Option(help="For people, or one JSON object a line.")
    ] = LogFormat.CONSOLE,
    log_level: Annotated[LogLevel, typer.Option(help="The least severe that is logged.")] = LogLevel.INFO,
) -> None:
    """Run the daemon in the foreground, until SIGTERM or ctrl-c."""
    from sapin.api import daemon
    from sapin.core.config import ConfigError

    path = config_path(config)
    daemon.set_up_logging(json=log_format is LogFormat.JSON, level=log_level)
    try:
        daemon.run(path)
    except daemon.StartError as error:
        fail(_remedied(error, path))
    except ConfigError as error:
        typer.echo(error, err=True)
        fail(_refusal(path, error.faults))


def check(file: File = None, as_json: AsJson = False) -> None:
    """Check a configuration with the daemon's own parser, and list every fault."""
    from sapin.api import daemon
    from sapin.api.cli import describe
    from sapin.core.config import ConfigError
    from sapin.core.registry import Registry

    path = config_path(file)
    try:
        config = daemon.load(path, Registry())
    except daemon.StartError as error:
        fail(_remedied(error, path))
    except ConfigError as error:
        if as_json:
            print_json({"valid": False, "faults": [describe.fault(fault) for fault in error.faults]})
        else:
            show(*describe.faults(error.faults))
        fail(_refusal(path, error.faults))
    if as_json:
        print_json({"valid": True, **describe.as_data(config)})
    else:
        show(*describe.summary(path, config))


def _remedied(error: Exception, path: Path) -> str:
    return str(error) if path.exists() else f"{error}; `sapin init ikev2` writes one to start from"


def _refusal(path: Path, faults: tuple[Fault, ...]) -> str:
    count = "1 fault" if len(faults) == 1 else f"{len(faults)} faults"
    return f"{path} has {count}; none of it is used until that is mended"


init = typer.Typer(
    name="init",
    no_args_is_help=True,
    context_settings=HELP_OPTIONS,
    help="Write a configuration to start from.",
)


@init.callback()
def _init() -> None:
    pass


@init.command()
def ikev2(
    vip: Annotated[
        list[str],
        typer.Option(
            help="The address that clients connect to; once for each address family.", show_default=False
        ),
    ],
    server: Annotated[
        list[str], typer.Option(help="The address of a gateway; once for each.", show_default=False)
    ],
    output: Annotated[
        Path | None, typer.Option(help="The file to write; standard output by default.", show_default=False)
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace the file if it is there.")] = False,
) -> None:
    """IKEv2 clients over several gateways, on UDP 500 and 4500."""
    from sapin.api.templates import ikev2 as template

    try:
        text = template(vip, server)
    except ValueError as error:
        fail(str(error), ExitCode.USAGE)
    if output is None:
        typer.echo(text, nl=False)
        return
    try:
        with output.open("w" if force else "x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError:
        fail(f"{output} is there already: give another --output, or --force to replace it")
    except OSError as error:
        fail(f"{output} cannot be written: {error.strerror}")
    typer.echo(f"Wrote {output}. Next: edit it, then `sapin check {output}` and `sapin run {output}`.")


def demo(
    keep: Annotated[bool, typer.Option("--keep", help="Go on after the summary, until ctrl-c.")] = False,
    fast: Annotated[bool, typer.Option("--fast", help="Without the pauses that let one follow it.")] = False,
) -> None:
    """Show Sapin at work on loopback: clients, gateways, a failure. Needs no root; takes about a minute."""
    from sapin.api.demo import run

    raise typer.Exit(run(keep=keep, fast=fast))
