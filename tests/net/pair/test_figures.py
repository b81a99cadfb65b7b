"""What the measurement makes of what it saw."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.net.pair.probes import longest_gap, shares
from tests.net.pair.results import Results, aims, markdown, outages, quantile, quote
from tests.net.pair.scenarios import Round


def played(**changes: object) -> Round:
    fields = {
        "scenario": "power",
        "active": "lb-a",
        "successor": "lb-b",
        "outages": {"c01": 0.08, "c02": 0.05},
        "before": 0.012,
        "kept": ["c01", "c02"],
        "pins": 2,
        "lost": [],
        "nobody": 0.07,
        "both": 0.0,
        "late": 0.0,
    }
    return Round(**(fields | changes))  # type: ignore[arg-type]


def verdicts(*rounds: Round) -> dict[str, bool]:
    results = Results({})
    for each in rounds:
        results.add("sapin", each)
    return {aim: met for aim, met, _ in aims(results)}


def test_a_gap_that_began_before_the_failure_counts_whole() -> None:
    assert longest_gap([1.0, 1.5, 2.0, 2.3, 2.4], since=1.9, until=2.5) == pytest.approx(0.5)


def test_a_gap_that_ended_before_the_failure_does_not_count() -> None:
    assert longest_gap([1.0, 1.8, 1.9, 2.0, 2.1], since=1.95, until=2.2) == pytest.approx(0.1)


def test_a_tunnel_that_stays_silent_is_out_until_the_end() -> None:
    assert longest_gap([1.0, 1.1], since=1.2, until=5.0) == pytest.approx(3.9)


def test_a_tunnel_that_never_spoke_is_out_all_the_time() -> None:
    assert longest_gap([], since=1.2, until=5.0) == pytest.approx(3.8)
    assert longest_gap([4.0], since=1.2, until=5.0) == pytest.approx(3.8)


def test_time_without_and_with_two_holders() -> None:
    held = [
        (0.0, "lb-a", "vip", True),
        (0.5, "lb-a", "other", False),
        (2.0, "lb-a", "vip", False),
        (2.25, "lb-b", "vip", True),
        (3.0, "lb-a", "vip", True),
        (3.0, "lb-a", "vip", True),
        (3.5, "lb-a", "vip", False),
    ]
    none, both = shares(held, "vip", since=1.0, until=4.0)
    assert (none, both) == pytest.approx((0.25, 0.5))
    assert shares(held, "vip", since=3.25, until=4.0)[1] == pytest.approx(0.25)


def test_an_address_that_stays_on_both_is_there_until_the_end() -> None:
    held = [(0.0, "lb-a", "vip", True), (1.0, "lb-b", "vip", True)]
    assert shares(held, "vip", since=0.5, until=4.0) == pytest.approx((0.0, 3.0))


def test_quantiles_are_values_that_were_seen() -> None:
    ordered = [float(n) for n in range(1, 101)]
    assert [quantile(ordered, share) for share in (0.5, 0.99, 1.0)] == [50.0, 99.0, 100.0]
    assert quantile([7.0], 0.99) == 7.0


def test_aims_are_met_by_a_good_round_and_missed_by_each_fault() -> None:
    assert all(verdicts(played()).values())
    faults = {
        "power loss: p99 at most 100 ms": played(outages={"c01": 0.2, "c02": 0.01}),
        "no pin is lost": played(lost=["spi:1"]),
        "every tunnel goes on with its IKE_SA": played(kept=["c01"]),
        "an address is on both nodes for at most 500 ms": played(both=0.6),
    }
    for aim, fault in faults.items():
        assert [name for name, met in verdicts(played(), fault).items() if not met] == [aim]


def test_outages_are_those_of_every_tunnel_in_every_round() -> None:
    assert outages([played(), played(outages={"c01": 0.06})]) == [0.05, 0.06, 0.08]


def test_a_run_is_quoted_between_the_marks(tmp_path: Path) -> None:
    results = Results({"cpus": "2"})
    results.add("sapin", played())
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- run -->\nold\n<!-- end of run -->\nafter\n")
    quote(results, page)
    assert page.read_text() == f"before\n<!-- run -->\n{markdown(results)}\n<!-- end of run -->\nafter\n"
    page.write_text("no place")
    with pytest.raises(ValueError, match="no place for a run"):
        quote(results, page)
