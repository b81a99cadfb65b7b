"""Every scenario in decisions/ leads to what stands in it. The format is in :mod:`tests.scenarios.replay`.

To write down anew what they lead to, and look at the difference with git:

    UPDATE_SCENARIOS=1 pytest tests/scenarios/test_decisions.py
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.scenarios.replay import ScenarioError, replay, span

SCENARIOS = sorted((Path(__file__).parent / "decisions").glob("*.scenario"))


@pytest.mark.parametrize("path", SCENARIOS, ids=lambda path: path.stem)
def test_decisions(path: Path) -> None:
    text = path.read_text()
    played = replay(text)
    if played != text and os.environ.get("UPDATE_SCENARIOS"):
        path.write_text(played)
        pytest.skip("written anew")
    assert played == text


def test_there_are_scenarios() -> None:
    assert len(SCENARIOS) >= 10


# The player itself

CONFIG = """\
-- sapin.toml --
[node]
name = "lb"
[[virtual_services]]
name = "ike"
address = "198.18.0.1"
port = 500
real_servers = [{ name = "gw1", address = "10.60.0.11" }]
"""


def test_what_is_expected_is_written_below_its_event() -> None:
    events = (
        "-- events --\n# hello\n\n192.0.2.7:500 -> ike IKE_SA_INIT spi=a1\n    nonsense\ngw1 fails\npins\n"
    )
    assert replay(CONFIG + events) == CONFIG + (
        "-- events --\n# hello\n\n192.0.2.7:500 -> ike IKE_SA_INIT spi=a1\n    gw1 at 10.60.0.11:500: scheduled\n"
        "gw1 fails\npins\n    none\n"
    )


@pytest.mark.parametrize(
    "event",
    [
        "gw1 sleeps",
        "gw9 fails",
        "drain",
        "advance soon",
        "reload gone.toml",
        "gw1 asks mercy",
        "192.0.2.7:500 -> ike IKE_SA_INIT",
        "192.0.2.7:500 -> ike IKE_SA_INTI spi=a1",
        "192.0.2.7:500 -> iek IKE_SA_INIT spi=a1",
        "192.0.2.7:500 -> ike IKE_SA_INIT spi=a1 sugar",
    ],
)
def test_a_slip_is_told_with_its_line(event: str) -> None:
    with pytest.raises(ScenarioError, match=f"^line 10: {event}: "):
        replay(CONFIG + "-- events --\n" + event + "\n")


@pytest.mark.parametrize("text", ["", "-- events --\n", CONFIG, "-- events --\n" + CONFIG])
def test_a_scenario_without_its_parts_is_told(text: str) -> None:
    with pytest.raises(ScenarioError, match="a scenario has a file"):
        replay(text)


@pytest.mark.parametrize(
    ("seconds", "shown"), [(0, "0s"), (59, "59s"), (3_600, "1h"), (28_790, "7h 59m 50s"), (90_000, "1d 1h")]
)
def test_spans(seconds: int, shown: str) -> None:
    assert span(seconds) == shown
