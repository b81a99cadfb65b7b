"""Health checks over reloads: what is started, what is stopped, and what stands."""

from __future__ import annotations

import pytest
import trio
from structlog.testing import capture_logs
from trio.testing import MockClock

from sapin.core.contracts import CheckResult
from sapin.core.dataplane.prober import SPREAD
from sapin.core.model import AdminState, Health
from tests import fakes
from tests.sim.probing import DOWN, UP, Lab, Step, always, pauses, service, spec

HEALTHY, UNHEALTHY, UNKNOWN = Health.HEALTHY, Health.UNHEALTHY, Health.UNKNOWN

# Reloads


async def test_a_reload_starts_and_stops_just_what_it_changes(autojump_clock: MockClock) -> None:
    lab = Lab(fakes.config(service("gw1", "gw2", "gw3")))
    async with lab.probing() as nursery:
        await trio.sleep(1)
        gw1, gw2, gw3 = (lab.of(server)[0].check for server in ("gw1", "gw2", "gw3"))
        kept, moved = fakes.servers("gw1", "gw2")
        moved = fakes.servers("gw2", address="10.60.0.99")[0]
        new = fakes.servers("gw4", address="10.60.0.14")[0]
        lab.load(fakes.leader(kept, moved, new, checks=(spec(),)))
        await trio.sleep(1)
        assert lab.tasks(nursery) == 3
        assert gw1 in lab.open
        assert gw2 not in lab.open
        assert gw3 not in lab.open
        assert [run.target.server for run in lab.runs[3:]] in (["gw2", "gw4"], ["gw4", "gw2"])
        assert str(lab.of("gw2")[1].target.endpoint) == "10.60.0.99:500"
        await trio.sleep(10)
        assert pauses(lab.of("gw1")) == [10.0]


async def test_a_reload_that_changes_no_check_does_not_touch_one(autojump_clock: MockClock) -> None:
    lab = Lab(fakes.config(service()))
    async with lab.probing():
        for _ in range(10):
            lab.load(service(pin_timeout=60.0))
            await trio.sleep(3)
        assert len(lab.open) == 2
    assert pauses(lab.of("gw1")) == pytest.approx([10.0, 10.0])


async def test_reloads_leave_no_task_behind(autojump_clock: MockClock) -> None:
    lab = Lab(fakes.config(service()))
    async with lab.probing() as nursery:
        for n in range(50):
            lab.load(
                service(*("gw1", "gw2", "gw3")[: n % 4], checks=(spec(interval=10 + n), spec("b"))[: n % 3])
            )
            await trio.sleep(0.3)
            wanted = len(lab.writer.snapshot.groups["ike"].members) * min(n % 3, 2)
            assert len(lab.open) == len(lab.prober.findings) == lab.tasks(nursery) == wanted


async def test_a_run_that_a_reload_stops_says_nothing(autojump_clock: MockClock) -> None:
    lab = Lab(fakes.config(service("gw1", checks=(spec(fall=1),))), always(Step(DOWN, 1.5)))
    async with lab.probing():
        await trio.sleep(1)
        lab.load(service("gw1", checks=()))
        await trio.sleep(10)
        assert lab.member("gw1").health is UNKNOWN
    assert [(run.finished, run.ended) for run in lab.runs] == [(False, 1.0)]


async def test_what_was_found_stands_when_only_the_times_of_a_check_change(autojump_clock: MockClock) -> None:
    lab = Lab(fakes.config(service("gw1", checks=(spec(fall=1),))), always(Step(DOWN)))
    async with lab.probing():
        await trio.sleep(1)
        lab.load(service("gw1", checks=(spec(interval=60.0),)))
        assert lab.member("gw1").health is UNHEALTHY
        await trio.lowlevel.checkpoint()
        assert lab.member("gw1").health is UNHEALTHY
        assert lab.told == [lab.told[0], lab.writer.snapshot]


async def test_what_an_agent_asked_for_stands_too(autojump_clock: MockClock) -> None:
    draining = CheckResult(True, "drained by hand", None, 40, AdminState.DRAINING)
    lab = Lab(fakes.config(service("gw1")), always(Step(draining)))
    async with lab.probing():
        await trio.sleep(1)
        lab.script = always(Step(UP))
        lab.load(service("gw1", checks=(spec(interval=60.0),)))
        await trio.sleep(1)
        assert (lab.member("gw1").asked, lab.member("gw1").share) == (AdminState.DRAINING, 40)


async def test_a_server_without_its_failing_check_is_unknown(autojump_clock: MockClock) -> None:
    lab = Lab(fakes.config(service("gw1", checks=(spec(fall=1),))), always(Step(DOWN)))
    async with lab.probing():
        await trio.sleep(1)
        assert not lab.member("gw1").keeps
        lab.load(service("gw1", checks=()))
        await trio.sleep(1)
        assert (lab.member("gw1").health, lab.member("gw1").takes) == (UNKNOWN, True)


async def test_a_server_that_moves_is_looked_at_anew(autojump_clock: MockClock) -> None:
    lab = Lab(fakes.config(service("gw1", checks=(spec(fall=1),))), always(Step(DOWN)))
    async with lab.probing():
        await trio.sleep(1)
        moved = fakes.servers("gw1", address="10.60.0.99")
        lab.script = always(Step(DOWN, 1.0))
        lab.load(fakes.leader(*moved, checks=(spec(fall=1),)))
        await trio.sleep(SPREAD)
        assert lab.member("gw1").health is UNKNOWN
        await trio.sleep(2)
        assert lab.member("gw1").health is UNHEALTHY


async def test_a_check_that_cannot_be_made_leaves_the_others(autojump_clock: MockClock) -> None:
    broken = spec(interval=5.0)
    broken.ref.options["nmae"] = ""  # type: ignore[index]
    with capture_logs() as logs:
        lab = Lab(fakes.config(service("gw1", checks=(broken, spec("b")))))
        async with lab.probing():
            await trio.sleep(1)
            assert [run.check.name for run in lab.runs] == ["b"]
            assert lab.member("gw1").health is HEALTHY
    assert [entry["event"] for entry in logs if entry["log_level"] == "error"] == ["check cannot be used"]


# Ends


async def test_the_end_stops_runs_that_are_on_their_way(autojump_clock: MockClock) -> None:
    lab = Lab(fakes.config(service()), always(Step(UP, 1.0)))
    async with lab.probing():
        await trio.sleep(SPREAD + 0.1)
        assert len(lab.open) == 2
    assert [run.finished for run in lab.runs] == [False, False]
    assert trio.current_time() == pytest.approx(SPREAD + 0.1)


async def test_a_prober_that_is_started_again_goes_on_with_what_it_knew(autojump_clock: MockClock) -> None:
    lab = Lab(fakes.config(service("gw1", checks=(spec(fall=1),))), always(Step(DOWN)))
    async with lab.probing():
        await trio.sleep(1)
    lab.script = always(Step(DOWN, 1.0))
    async with lab.probing() as nursery:
        await trio.sleep(SPREAD)
        assert lab.member("gw1").health is UNHEALTHY
        assert lab.tasks(nursery) == 1
