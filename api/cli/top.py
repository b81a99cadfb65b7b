"""``sapin top``: the status, drawn anew until q or ctrl-c."""

from __future__ import annotations

import os
import select
import signal
import sys
import termios
import tty
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.text import Text

from sapin.api import client
from sapin.api.cli import render
from sapin.api.cli.figures import with_rates

_QUIT = b"qQ\x1b\x03\x04"


def watch(place: Path, interval: float, console: Console) -> None:
    """Draw until the user has enough of it; the terminal is as it was afterwards, after SIGTERM too."""
    look = _Look(place)
    signal.signal(signal.SIGTERM, _leave)
    try:
        with _keys() as keys, Live(console=console, screen=True, auto_refresh=False) as live:
            while True:
                live.update(Group(Text(f"every {interval:g} s, q ends", "dim"), "", look.now()), refresh=True)
                if _pressed(keys, interval):
                    return
    except KeyboardInterrupt:
        return


class _Look:
    """Asks for the status, and knows the one before it."""

    def __init__(self, place: Path) -> None:
        self._place = place
        self._before: dict[str, Any] | None = None

    def now(self) -> RenderableType:
        try:
            answer: dict[str, Any] = client.call(self._place, "status")
        except client.ControlError as error:
            self._before = None
            return Text(f"{error}.", "red")
        before, self._before = self._before or answer, answer
        return render.status(with_rates(before, answer))


def _leave(number: int, _frame: FrameType | None) -> NoReturn:
    sys.exit(128 + number)


@contextmanager
def _keys() -> Iterator[int | None]:
    """Where single keys can be read from, without an echo; ``None`` where there is no keyboard."""
    if not sys.stdin.isatty():
        yield None
        return
    fd = sys.stdin.fileno()
    before = termios.tcgetattr(fd)
    try:
        tty.setcbreak(fd)
        yield fd
    finally:
        termios.tcsetattr(fd, termios.TCSADRAIN, before)


def _pressed(keys: int | None, seconds: float) -> bool:
    """Wait that long; whether a key to end it was pressed meanwhile."""
    ready, _, _ = select.select([] if keys is None else [keys], [], [], seconds)
    return bool(ready and keys is not None and any(byte in _QUIT for byte in os.read(keys, 64) or b"q"))
