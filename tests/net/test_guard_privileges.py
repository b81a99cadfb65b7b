"""What the guard may do: what the addresses need, and nothing else; without that it says so."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.net.namespaces import Namespace, Wire, clear, sweep
from tests.net.test_guard import Stand, until

pytestmark = [
    pytest.mark.root("network namespaces"),
    pytest.mark.programs("ip", "nsenter", "setpriv"),
    pytest.mark.net,
]

NET_ADMIN, NET_RAW = 12, 13


class Place(Namespace):
    """A namespace whose programs may lack privileges."""

    before: tuple[str, ...] = ()
    """What starts them."""

    def inside(self, *argv: str) -> list[str]:
        """The command line that runs a program here."""
        return super().inside(*self.before, *argv)


@pytest.fixture
def place() -> Iterator[Place]:
    sweep()
    try:
        made = Place("priv")
        devices = (("front", "198.18.0.2/24"), ("back", "10.60.0.2/24"), ("cluster", "198.19.0.1/24"))
        for number, (device, own) in enumerate(devices):
            Wire(made, f"wire{number}").attach(made, device, own)
        yield made
    finally:
        clear()


def _capabilities(pid: int) -> dict[str, int]:
    status = Path(f"/proc/{pid}/status").read_text()
    return {name: int(value, 16) for name, value in re.findall(r"Cap(Eff|Prm|Inh|Amb):\s*(\w+)", status)}


def test_the_guard_keeps_what_it_needs_and_nothing_else(place: Place) -> None:
    stand = Stand(place, 0)
    try:
        wanted = 1 << NET_ADMIN | 1 << NET_RAW
        until(lambda: _capabilities(stand.guard)["Eff"] == wanted)
        assert _capabilities(stand.guard) == {"Eff": wanted, "Prm": wanted, "Inh": 0, "Amb": 0}
        stand.claim()
    finally:
        stand.end()


def test_a_guard_without_privileges_says_what_it_lacks(place: Place) -> None:
    place.before = ("setpriv", "--bounding-set=-net_admin", "--inh-caps=-net_admin")
    stand = Stand(place, 0)
    try:
        stand.say("claim")
        stand.wait_for("Lost")
        stand.wait_for("CAP_NET_ADMIN")
        assert not stand.holds()
    finally:
        stand.end()
