"""Health checks under virtual time: when they run, and what their answers do."""

from __future__ import annotations

import errno
from collections.abc import Sequence
from typing import Any

import pytest
import trio
from structlog.testing import capture_logs
from trio.testing import MockClock

from sapin.core.affinity import Cleared
from sapin.core.contracts import Candidate, CheckResult, Request, Target
from sapin.core.dataplane.prober import MIN_WAKE, SMOOTHING, SPREAD
from sapin.core.model import AdminState, Health, PluginRef
from sapin.core.registry import FAULT_LIMIT, SUSPENSION
from tests import fakes
from tests.sim.probing import DOWN, UP, Lab, Step, always, in_turn, pauses, service, spec

ENABLED, DRAINING, DISABLED = AdminState
HEALTHY, UNHEALTHY, UNKNOWN = Health.HEALTHY, Health.UNHEALTHY, Health.UNKNOWN


# When they run


async def test_first_runs_are_soon_and_spread(autojump_clock: MockClock) -> None:
    lab = Lab(fakes.config(service(*(f"gw{n}" for n in range(20)))))
    async with lab.probing():
        await trio.sleep(SPREAD + 0.01)
    started = [run.started for run in lab.runs]
    assert len(started) == 20
    assert max(started) - min(started) > SPREAD / 2


async def test_the_interval_is_between_two_runs(autojump_clock: MockClock) -> None:
    lab = Lab(fakes.config(service(checks=(spec(interval=7.0, timeout=3.0),))), always(Step(UP, 1.5)))
    async with lab.probing():
        await trio.sleep(100)
    for server in ("gw1", "gw2"):
        assert pauses(lab.of(server)) == pytest.approx([7.0] * 11)


async def test_jitter_varies_the_interval_within_its_bounds(autojump_clock: MockClock) -> None:
    lab = Lab(fakes.config(service(checks=(spec(interval=5.0, jitter=0.2),))))
    async with lab.probing():
        await trio.sleep(1_000)
    found = pauses(lab.of("gw1"))
    assert len(found) > 150
    assert 4.0 <= min(found) < 4.1
    assert 5.9 < max(found) <= 6.0
    assert found != pauses(lab.of("gw2"))


async def test_an_interval_may_be_shorter_than_what_suspicion_waits_for(autojump_clock: MockClock) -> None:
    lab = Lab(fakes.config(service("gw1", checks=(spec(interval=0.1),))))
    async with lab.probing():
        lab.prober.suspect("ike", "gw1")
        await trio.sleep(2)
    assert pauses(lab.of("gw1")) == pytest.approx([0.1] * len(pauses(lab.of("gw1"))))
    assert len(lab.runs) >= 18


async def test_suspicion_wakes_the_checks_of_the_server_alone(autojump_clock: MockClock) -> None:
    lab = Lab(fakes.config(service()))
    async with lab.probing():
        await trio.sleep(3)
        lab.prober.suspect("ike", "gw1")
        lab.prober.suspect("other", "gw2")
        await trio.sleep(1)
    assert [run.started for run in lab.of("gw1")][1:] == [3.0]
    assert len(lab.of("gw2")) == 1


async def test_the_interval_begins_anew_after_suspicion(autojump_clock: MockClock) -> None:
    lab = Lab(fakes.config(service()))
    async with lab.probing():
        await trio.sleep(3)
        lab.prober.suspect("ike", "gw1")
        await trio.sleep(20.5)
    assert [run.started for run in lab.of("gw1")][1:] == pytest.approx([3, 13, 23])


async def test_suspicion_without_end_does_not_run_a_check_more_often_than_it_may(
    autojump_clock: MockClock,
) -> None:
    lab = Lab(fakes.config(service("gw1")))
    async with lab.probing():
        for _ in range(3_000):
            lab.prober.suspect("ike", "gw1")
            await trio.sleep(0.001)
    assert len(lab.runs) == pytest.approx(3 / MIN_WAKE, abs=1)
    assert min(pauses(lab.runs)) >= MIN_WAKE - 1e-9


async def test_suspicion_during_a_run_asks_for_one_more(autojump_clock: MockClock) -> None:
    """What the run had found by then may be older than the suspicion."""
    lab = Lab(fakes.config(service("gw1")), always(Step(UP, 1.0)))
    async with lab.probing():
        await trio.sleep(SPREAD + 0.5)
        assert lab.runs[0].ended is None
        lab.prober.suspect("ike", "gw1")
        await trio.sleep(5)
    assert pauses(lab.runs) == pytest.approx([MIN_WAKE])


# What their answers do


async def test_the_first_success_makes_healthy(autojump_clock: MockClock) -> None:
    lab = Lab(fakes.config(service()))
    async with lab.probing():
        assert lab.member("gw1").health is UNKNOWN
        await trio.sleep(1)
        assert lab.member("gw1").health is HEALTHY


@pytest.mark.parametrize("start", [[], [UP]])
async def test_failures_in_a_row_make_unhealthy_and_successes_healthy(
    autojump_clock: MockClock, start: list[CheckResult]
) -> None:
    outcomes = [*start, DOWN, DOWN, DOWN, UP, UP]
    lab = Lab(fakes.config(service(checks=(spec(rise=2, fall=3),))), in_turn(*outcomes))
    found: list[Health] = []
    async with lab.probing():
        await trio.sleep(5)
        for _ in outcomes:
            found.append(lab.member("gw1").health)
            await trio.sleep(10)
        assert lab.member("gw2").health is HEALTHY
    before = HEALTHY if start else UNKNOWN
    assert found[-5:] == [before, before, UNHEALTHY, UNHEALTHY, HEALTHY]


async def test_a_fall_clears_the_pins_of_the_server_at_that_moment(autojump_clock: MockClock) -> None:
    lab = Lab(fakes.config(service(checks=(spec(fall=2),))), in_turn(UP, DOWN))
    async with lab.probing():
        await trio.sleep(1)
        for key, server in ((b"src:1", "gw1"), (b"src:2", "gw2")):
            lab.writer.snapshot.groups["ike"].table.put((key,), lab.member(server), 1)
        lab.fed.clear()
        await trio.sleep(15)
        assert lab.fed == []
        await trio.sleep(10)
        assert lab.fed == [Cleared("ike", "gw1")]
        assert [new.groups["ike"].pools[4].candidates for new in lab.told] == [(lab.member("gw2"),)]


async def test_an_answer_that_takes_too_long_is_a_failure(autojump_clock: MockClock) -> None:
    lab = Lab(fakes.config(service("gw1", checks=(spec(timeout=2.0, fall=1),))), always(Step(UP, 60.0)))
    async with lab.probing():
        await trio.sleep(5)
        assert lab.member("gw1").health is UNHEALTHY
        assert lab.finding("gw1").last == CheckResult(False, "no answer within 2 s")
    assert (lab.runs[0].ended or 0) - lab.runs[0].started == pytest.approx(2.0)


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (ConnectionRefusedError(errno.ECONNREFUSED, "Connection refused"), "Connection refused"),
        (OSError("odd"), "odd"),
    ],
)
async def test_an_error_of_the_network_is_a_failure(
    autojump_clock: MockClock, error: OSError, reason: str
) -> None:
    lab = Lab(fakes.config(service(checks=(spec(fall=1),))), in_turn(error))
    async with lab.probing():
        await trio.sleep(1)
        assert lab.member("gw1").health is UNHEALTHY
        assert lab.finding("gw1").last == CheckResult(False, reason)
        assert lab.finding("gw1").hosted.faults.total == 0


async def test_a_shortage_of_this_node_says_nothing_about_the_server(autojump_clock: MockClock) -> None:
    shortage = OSError(errno.EMFILE, "Too many open files")
    lab = Lab(fakes.config(service(checks=(spec(fall=1),))), in_turn(UP, shortage))
    async with lab.probing():
        await trio.sleep(100)
        assert lab.member("gw1").health is HEALTHY
        assert "Too many open files" in (lab.finding("gw1").last or DOWN).reason


class NoText(Exception):
    def __str__(self) -> str:
        raise RuntimeError("no")


NONSENSE: dict[str, Any] = {
    "nothing": None,
    "a truth": True,
    "health that is none": CheckResult("yes", "fine"),  # type: ignore[arg-type]
    "a reason that is none": CheckResult(False, None),  # type: ignore[arg-type]
    "a state by name": CheckResult(False, "", state="drain"),  # type: ignore[arg-type]
    "a share below nothing": CheckResult(False, "", share=-1),
    "a share that is no number": CheckResult(False, "", share="50%"),  # type: ignore[arg-type]
    "a share in parts": CheckResult(False, "", share=0.5),  # type: ignore[arg-type]
    "a time below nothing": CheckResult(False, "", -0.1),
    "no time": CheckResult(False, "", float("nan")),
    "endless time": CheckResult(False, "", float("inf")),
    "a time that is no number": CheckResult(False, "", "0.1 s"),  # type: ignore[arg-type]
    "an exception": ZeroDivisionError("by zero"),
    "an exception that has no text": NoText(),
    "an exception group": ExceptionGroup("some", [ZeroDivisionError("by zero")]),
}


@pytest.mark.parametrize("outcome", NONSENSE.values(), ids=NONSENSE)
async def test_a_plugin_at_fault_says_nothing_about_the_server_and_is_suspended(
    autojump_clock: MockClock, outcome: Any
) -> None:
    lab = Lab(fakes.config(service(checks=(spec(fall=1),))), in_turn(UP, outcome))
    with capture_logs() as logs:
        async with lab.probing():
            await trio.sleep(1)
            before = lab.finding("gw1").last
            await trio.sleep(10 * FAULT_LIMIT)
            faults = lab.finding("gw1").hosted.faults
            assert (faults.total, faults.suspended_until > trio.current_time()) == (FAULT_LIMIT, True)
            await trio.sleep(SUSPENSION - 15)
            assert faults.total == FAULT_LIMIT
            gw1 = lab.member("gw1")
            assert (gw1.health, gw1.keeps, gw1.takes, gw1.share) == (HEALTHY, True, True, 100)
            assert (gw1.asked, gw1.response_time) == (ENABLED, None)
            assert lab.finding("gw1").last is before
            await trio.sleep(25)
            assert faults.total > FAULT_LIMIT
            assert lab.member("gw2").health is HEALTHY
            assert len(lab.of("gw2")) > 10
    told = [entry["suspended"] for entry in logs if entry["event"] == "check plugin at fault"]
    assert told[:2] == [False, True]


async def test_a_suspended_plugin_leaves_a_server_as_it_was(autojump_clock: MockClock) -> None:
    lab = Lab(fakes.config(service(checks=(spec(fall=1),))), in_turn(DOWN, ValueError("no")))
    async with lab.probing():
        await trio.sleep(200)
        assert lab.member("gw1").health is UNHEALTHY


async def test_a_plugin_that_recovers_goes_on(autojump_clock: MockClock) -> None:
    outcomes = [UP, *[ValueError("no")] * FAULT_LIMIT, DOWN]
    lab = Lab(fakes.config(service(checks=(spec(fall=1),))), in_turn(*outcomes))
    async with lab.probing():
        await trio.sleep(10 * FAULT_LIMIT + SUSPENSION + 15)
        assert lab.member("gw1").health is UNHEALTHY
        assert lab.finding("gw1").hosted.faults.in_a_row == 0


async def test_faults_with_answers_between_do_not_suspend(autojump_clock: MockClock) -> None:
    rest = [*[ValueError("no")] * (FAULT_LIMIT - 1), UP] * 3
    lab = Lab(fakes.config(service("gw1")), in_turn(*rest))
    async with lab.probing():
        await trio.sleep(10 * len(rest))
        assert len(lab.runs) == len(rest)
        assert lab.finding("gw1").hosted.faults.suspended_until == 0


async def test_the_worst_of_several_checks_decides(autojump_clock: MockClock) -> None:
    def script(name: str, target: Target, now: float) -> Step:
        return Step(DOWN if name == "icmp" and target.server == "gw1" and 50 < now < 100 else UP)

    lab = Lab(fakes.config(service(checks=(spec("ike"), spec("icmp", fall=1, rise=1)))), script)
    async with lab.probing():
        for until, health in ((45, HEALTHY), (70, UNHEALTHY), (115, HEALTHY)):
            await trio.sleep(until - trio.current_time())
            assert lab.member("gw1").health is health
            assert lab.member("gw2").health is HEALTHY


async def test_a_server_that_one_check_does_not_know_yet_is_unknown(autojump_clock: MockClock) -> None:
    lab = Lab(
        fakes.config(service("gw1", checks=(spec("ike"), spec("icmp", timeout=9)))),
        lambda name, target, now: Step(UP, 5.0 if name == "icmp" else 0.0),
    )
    async with lab.probing():
        await trio.sleep(3)
        assert lab.member("gw1").health is UNKNOWN
        await trio.sleep(3)
        assert lab.member("gw1").health is HEALTHY


async def test_a_followers_checks_count_for_the_group(autojump_clock: MockClock) -> None:
    """A gateway whose UDP 4500 is dead is dead, even if its UDP 500 answers."""
    leader = service()
    follower = fakes.follower(leader, checks=(spec("natt", fall=1),))
    lab = Lab(
        fakes.config(leader, follower),
        lambda name, target, now: Step(DOWN if (name, target.server) == ("natt", "gw2") else UP),
    )
    async with lab.probing():
        await trio.sleep(1)
        assert [lab.member(name).health for name in ("gw1", "gw2")] == [HEALTHY, UNHEALTHY]
    assert {run.target.endpoint.port for run in lab.of("gw2", "natt")} == {4500}


# Agents


async def test_what_an_agent_asks_for_is_done_and_taken_back(autojump_clock: MockClock) -> None:
    def word(share: int | None = None, state: AdminState | None = None) -> CheckResult:
        return CheckResult(True, "the agent says so", None, share, state)

    words = [word(50), word(state=DRAINING), word(share=20), word(state=DISABLED), word(100, ENABLED)]
    lab = Lab(fakes.config(service()), in_turn(*words))
    found = []
    async with lab.probing():
        await trio.sleep(1)
        for _ in words:
            gw1 = lab.member("gw1")
            found.append((gw1.share, gw1.asked, gw1.keeps, gw1.takes))
            assert gw1.admin is ENABLED
            await trio.sleep(10)
        assert lab.member("gw2").share == 100
    assert found == [
        (50, ENABLED, True, True),
        (50, DRAINING, True, False),
        (20, DRAINING, True, False),
        (20, DISABLED, False, False),
        (100, ENABLED, True, True),
    ]


async def test_of_several_agents_the_strictest_counts(autojump_clock: MockClock) -> None:
    answers = {
        "a": CheckResult(True, "", None, 70, DRAINING),
        "b": CheckResult(True, "", None, 30, ENABLED),
        "c": UP,
    }
    lab = Lab(
        fakes.config(service("gw1", checks=tuple(map(spec, answers)))), lambda name, *_: Step(answers[name])
    )
    async with lab.probing():
        await trio.sleep(1)
        assert (lab.member("gw1").share, lab.member("gw1").asked) == (30, DRAINING)


class Asking:
    """A scheduler that has agents asked, as the adaptive one does."""

    checks = (spec("agent", interval=3.0),)

    def pick(self, request: Request, candidates: Sequence[Candidate]) -> Candidate:
        return candidates[0]


async def test_the_checks_of_a_scheduler_run_once_per_server_of_the_group(autojump_clock: MockClock) -> None:
    leader = service(scheduler=PluginRef("asking"))
    config = fakes.config(leader, fakes.follower(leader))
    lab = Lab(config, plugins={"scheduler": {"asking": Asking}})
    async with lab.probing() as nursery:
        await trio.sleep(2)
        assert lab.tasks(nursery) == 4
    assert sorted((run.target.server, run.check.name) for run in lab.runs) == [
        ("gw1", ""),
        ("gw1", "agent"),
        ("gw2", ""),
        ("gw2", "agent"),
    ]


async def test_response_times_are_averaged(autojump_clock: MockClock) -> None:
    times = [0.1, 0.2, 0.2]
    lab = Lab(fakes.config(service()), in_turn(*(CheckResult(True, "", time) for time in times)))
    found: list[float | None] = []
    async with lab.probing():
        await trio.sleep(1)
        for _ in times:
            found.append(lab.member("gw1").response_time)
            await trio.sleep(10)
    second = 0.1 + SMOOTHING * 0.1
    assert found == pytest.approx([0.1, second, second + SMOOTHING * (0.2 - second)])
    assert lab.member("gw2").response_time is None


async def test_different_checks_do_not_mix_their_times(autojump_clock: MockClock) -> None:
    """The first that measures one keeps the server's time, and what was there before it wears off."""
    answers = {"none": UP, "ike": CheckResult(True, "", 0.1), "icmp": CheckResult(True, "", 9.0)}
    checks = tuple(map(spec, answers))
    lab = Lab(fakes.config(service("gw1", checks=checks)), lambda name, *_: Step(answers[name]))
    async with lab.probing():
        await trio.sleep(250)
        assert lab.member("gw1").response_time == pytest.approx(0.1, abs=0.01)
