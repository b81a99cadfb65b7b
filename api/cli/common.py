"""What all commands share: exit codes, where the daemon is, how to ask it, and how to print.

On a terminal output is coloured and fits it. Elsewhere it is plain, and lines are as long as they need to be: a script
never meets a cell that was cut.
"""

from __future__ import annotations

import json
import os
import tomllib
from collections.abc import Callable, Iterator, Mapping
from enum import IntEnum
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from sapin.api import client

if TYPE_CHECKING:
    from rich.console import RenderableType

DEFAULT_CONFIG = Path("/etc/sapin/sapin.toml")
DEFAULT_STATE_DIR = Path("/var/lib/sapin")
HELP_OPTIONS = {"help_option_names": ["-h", "--help"]}
_PLAIN_WIDTH = 10_000

Row = dict[str, Any]


class ExitCode(IntEnum):
    """What a command ends with, 0 if all is well."""

    REFUSED = 1
    """The daemon refused, or a configuration has faults, or the daemon cannot start."""
    USAGE = 2
    """The command was given wrongly; click's own code."""
    NO_DAEMON = 3
    """No daemon is running there."""
    DENIED = 4
    """The daemon belongs to another user."""
    NO_ANSWER = 5
    """The daemon is there and does not answer, or failed at answering."""


_CODES: Mapping[str, ExitCode] = {
    "refused": ExitCode.REFUSED,
    "unknown": ExitCode.REFUSED,
    "down": ExitCode.NO_DAEMON,
    "denied": ExitCode.DENIED,
}
"""Exit codes by the kind of a :class:`~sapin.api.client.ControlError`; the others are no answer."""


# options

StateDir = Annotated[
    Path | None,
    typer.Option(
        "--state-dir",
        help="State directory of the daemon; SAPIN_STATE_DIR in the environment.",
        show_default=False,
    ),
]
ConfigFile = Annotated[
    Path | None,
    typer.Option(
        "--config",
        help="Its configuration, which names that directory; SAPIN_CONFIG in the environment.",
        show_default=False,
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON, for scripts.")]


def config_path(given: Path | None) -> Path:
    """The configuration that is meant: the given one, that of the environment, or the usual one."""
    return given or _from_environment("SAPIN_CONFIG") or DEFAULT_CONFIG


def find_daemon(state_dir: Path | None, config: Path | None) -> Path:
    """The state directory that is meant: what was given goes over the environment, and that over what is usual.

    Raises:
        ValueError: it cannot be told; the text says why and what to do.
    """
    if state_dir is not None:
        return state_dir
    if config is not None:
        return _state_dir_in(config)
    if (named := _from_environment("SAPIN_STATE_DIR")) is not None:
        return named
    path = config_path(None)
    return _state_dir_in(path) if path != DEFAULT_CONFIG or path.exists() else DEFAULT_STATE_DIR


def _from_environment(name: str) -> Path | None:
    value = os.environ.get(name)
    return Path(value) if value else None


def _state_dir_in(config: Path) -> Path:
    """What the file says, even if it has faults elsewhere: a daemon may run with what stood there before."""
    remedy = "name the daemon's directory with --state-dir"
    try:
        node = tomllib.loads(config.read_text()).get("node")
    except OSError as error:
        raise ValueError(f"{config} cannot be read: {error.strerror}; {remedy}") from None
    except ValueError as error:
        raise ValueError(f"{config} is not TOML: {error}; {remedy}") from None
    named = node.get("state_dir") if isinstance(node, dict) else None
    return Path(named) if isinstance(named, str) else DEFAULT_STATE_DIR


# asking


def fail(text: str, code: ExitCode = ExitCode.REFUSED) -> NoReturn:
    """End with a sentence on standard error."""
    typer.echo(f"sapin: {text}", err=True)
    raise typer.Exit(code)


def end(error: client.ControlError) -> NoReturn:
    """End as a failed call asks for."""
    fail(str(error), _CODES.get(error.kind, ExitCode.NO_ANSWER))


def where(state_dir: Path | None, config: Path | None) -> Path:
    """:func:`find_daemon`, or the end of the command."""
    try:
        return find_daemon(state_dir, config)
    except ValueError as error:
        fail(str(error))


def ask(state_dir: Path, name: str, **arguments: Any) -> Any:
    """An operation's answer; without one the command ends."""
    try:
        return client.call(state_dir, name, **arguments)
    except client.ControlError as error:
        end(error)


def ask_pages(state_dir: Path, name: str, **arguments: Any) -> Iterator[Any]:
    """The answers of a paged operation; without one the command ends."""
    try:
        yield from client.pages(state_dir, name, **arguments)
    except client.ControlError as error:
        end(error)


def _complete(what: Callable[[Row], Iterator[str]]) -> Callable[[typer.Context, str], list[str]]:
    """Completes a name that the daemon's status has; without a daemon there is nothing to offer."""

    def names(ctx: typer.Context, incomplete: str) -> list[str]:
        try:
            place = find_daemon(ctx.params.get("state_dir"), ctx.params.get("config"))
            status = client.call(place, "status")
        except (client.ControlError, ValueError):
            return []
        return sorted({name for name in what(status) if name.startswith(incomplete)})

    return names


def _servers(status: Row) -> Iterator[str]:
    return (server["name"] for group in status["groups"] for server in group["servers"])


def _services(status: Row) -> Iterator[str]:
    return (service["name"] for group in status["groups"] for service in group["services"])


complete_server, complete_service = _complete(_servers), _complete(_services)

Service = Annotated[
    str | None,
    typer.Option(
        help="One virtual service and what follows it.", autocompletion=complete_service, show_default=False
    ),
]


# printing


def print_json(value: Any) -> None:
    """A value as JSON; what JSON does not know, as text."""
    typer.echo(json.dumps(value, indent=2, default=str))


def show(*renderables: RenderableType) -> None:
    """Print tables and texts: as wide as the terminal, or else plain and as wide as they are."""
    from rich.console import Console

    out = Console(highlight=False, markup=False)
    if out.is_terminal:
        for each in renderables:
            out.print(each)
        return
    text = StringIO()
    out = Console(highlight=False, markup=False, no_color=True, width=_PLAIN_WIDTH, file=text)
    for each in renderables:
        out.print(each)
    for line in text.getvalue().splitlines():
        typer.echo(line.rstrip())
