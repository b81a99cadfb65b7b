"""What the demonstration shows: lines that stay, and below them, on a terminal, the gateways as they are now."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.padding import Padding
from rich.rule import Rule
from rich.table import Table
from rich.text import Text

from sapin.api.cli.render import state, table

_DOTS = 24
_INDENT = 3


@dataclass(frozen=True, slots=True)
class GatewayView:
    """A gateway as Sapin and its clients see it."""

    name: str
    health: str
    state: str
    pinned: int
    tunnels: int
    rate: float
    """Datagrams in a second, both ways."""


@dataclass(frozen=True, slots=True)
class Result:
    """What an act has shown."""

    what: str
    found: str
    ok: bool
    """It is as it should be."""
    warns: bool = False
    """What should be is a failure: the example of how not to do it."""

    @property
    def style(self) -> str:
        """The colour of what was found."""
        if not self.ok:
            return "bold red"
        return "red" if self.warns else "green"


class Screen:
    """Standard output. On a terminal it draws; elsewhere it prints lines, each as long as it is."""

    def __init__(self) -> None:
        self._console = Console(highlight=False, markup=False)
        self._started = time.monotonic()
        self._act = "starting"
        self._live = Live(console=self._console, auto_refresh=False, transient=True)
        terminal = self._console.is_terminal
        self._dot = "●" if terminal and self._console.encoding.startswith("utf") else "*"

    def __enter__(self) -> Self:
        if self._console.is_terminal:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._live.stop()

    def act(self, title: str, *sentences: str) -> None:
        """A new act: its title, and what is going to happen."""
        self._act = f"act {title.partition(' ')[0]}"
        self._print("")
        self._print(Text(title, "bold"))
        for sentence in sentences:
            self._print(self._indented(Text(sentence)))

    def event(self, text: str, style: str = "") -> None:
        """Something happened."""
        self._print(self._timed(Text(text, style)))

    def result(self, result: Result) -> None:
        """What an act has shown."""
        self._print(self._timed(Text(result.found, result.style)))

    def summary(self, results: Sequence[Result]) -> None:
        """What all acts have shown."""
        self._print("")
        self._print(Text("Summary", "bold"))
        width = max(len(result.what) for result in results) + 2
        for result in results:
            what = Text(f"{'':{_INDENT}}{result.what:{width}}")
            self._print(self._beside(what, Text(result.found, result.style), len(what)))

    def say(self, text: str) -> None:
        """A line."""
        self._print(Text(text))

    def draw(self, gateways: Iterable[GatewayView], clients: str) -> None:
        """The gateways as they are now; nothing where lines are printed."""
        if self._live.is_started:
            self._live.update(self._view(gateways, clients), refresh=True)

    def _view(self, gateways: Iterable[GatewayView], clients: str) -> RenderableType:
        made = table("Gateway", "Health", "State", "Pins", "Rate", "Tunnels", right=("Pins", "Rate"))
        for row in gateways:
            dots = self._dot * min(row.tunnels, _DOTS) + ("…" if row.tunnels > _DOTS else "")
            tunnels = Text.assemble(f"{row.tunnels:>2} ", (dots, "green"))
            made.add_row(
                row.name, state(row.health), state(row.state), str(row.pinned), f"{row.rate:.0f}/s", tunnels
            )
        foot = Table.grid(expand=True)
        foot.add_column()
        foot.add_column(justify="right")
        foot.add_row(Text(clients), Text(f"{self._act}  {self._elapsed()}", "dim"))
        return Group("", Rule(Text("The gateways now", "dim"), style="dim", align="left"), made, "", foot)

    def _elapsed(self) -> str:
        minutes, seconds = divmod(int(time.monotonic() - self._started), 60)
        return f"{minutes}:{seconds:02}"

    def _timed(self, text: Text) -> RenderableType:
        at = Text(f"{self._elapsed():>7}  ", "dim")
        return self._beside(at, text, len(at))

    def _beside(self, left: Text, right: Text, width: int) -> RenderableType:
        """Two texts on a line; what is folded of the right one stays on the right."""
        if not self._live.is_started:
            return left + right
        line = Table.grid()
        line.add_column(width=width)
        line.add_column()
        line.add_row(left, right)
        return line

    def _indented(self, text: Text, by: int = _INDENT) -> RenderableType:
        if not self._live.is_started:
            return Text.assemble(" " * by, text)
        return Padding(text, (0, 0, 0, by))

    def _print(self, what: RenderableType) -> None:
        self._console.print(what, soft_wrap=not self._live.is_started)
