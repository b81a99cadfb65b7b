"""The command line."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from sapin.api import daemon
from sapin.core.config import ConfigError

app = typer.Typer(no_args_is_help=True, add_completion=True, pretty_exceptions_enable=False)


@app.command()
def run(config: Annotated[Path, typer.Argument()]) -> None:
    """Run the daemon in the foreground."""
    daemon.set_up_logging(json=False, level="info")
    try:
        daemon.run(config)
    except (daemon.StartError, ConfigError) as error:
        print(error, file=sys.stderr)
        raise typer.Exit(1) from None


@app.callback()
def _main() -> None:
    """Sapin."""


def main() -> None:
    """The entry point."""
    app()


if __name__ == "__main__":
    main()
