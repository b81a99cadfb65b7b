"""What silence and probes say of the peer, at heartbeats of 25 ms of which three may be missed."""

from __future__ import annotations

import pytest

from sapin.cluster.detector import MAX_PAUSES, Detector, Verdict

MS = 0.001


def watch(detector: Detector, begin: float, until: float, answers: bool = False) -> tuple[float, int]:
    """Looks each millisecond; when it was first gone (or ``until``), and how many probes were sent."""
    now, probes = begin, 0
    while now < until:
        verdict = detector.look(now)
        if detector.probe(now):
            probes += 1
            if answers:
                detector.answered(now)
        if verdict is Verdict.GONE:
            break
        now += MS
    return now, probes


@pytest.fixture
def heard() -> Detector:
    detector = Detector(0.025, 3, 0.0)
    detector.heard(1.0)
    return detector


def test_a_peer_that_speaks_is_there(heard: Detector) -> None:
    for now in (1.0, 1.02, 1.037):
        assert heard.look(now) is Verdict.SPEAKS
        assert not heard.probe(now)
    assert heard.deadline == pytest.approx(1.0375)


def test_silence_of_three_heartbeats_and_no_answer_is_the_end(heard: Detector) -> None:
    gone, probes = watch(heard, 1.0, 2.0)
    assert gone == pytest.approx(1.075, abs=2 * MS)
    assert probes >= 3


def test_a_closed_pipe_and_no_answer_is_the_end_after_30_ms(heard: Detector) -> None:
    heard.closed(1.01)
    gone, probes = watch(heard, 1.01, 2.0)
    assert gone == pytest.approx(1.04, abs=2 * MS)
    assert probes >= 3


def test_a_closed_pipe_and_a_machine_where_nobody_listens_is_the_end_at_once(heard: Detector) -> None:
    heard.closed(1.01)
    assert heard.look(1.011) is Verdict.SILENT
    heard.refused()
    assert heard.look(1.012) is Verdict.GONE


def test_a_refusal_says_nothing_while_the_pipe_stands(heard: Detector) -> None:
    assert heard.look(1.04) is Verdict.SILENT
    heard.refused()
    assert heard.look(1.041) is Verdict.SILENT


def test_a_peer_that_answers_probes_is_alive_however_silent(heard: Detector) -> None:
    gone, probes = watch(heard, 1.0, 6.0, answers=True)
    assert gone >= 6.0
    assert heard.look(6.0) is Verdict.ALIVE
    assert 45 <= probes <= 55  # each 100 ms


def test_a_peer_that_stops_answering_is_gone_after_as_many_probes(heard: Detector) -> None:
    watch(heard, 1.0, 2.0, answers=True)
    gone, probes = watch(heard, 2.0, 4.0)
    assert 2.3 <= gone <= 2.45
    assert probes >= 3
    heard.answered(3.0)
    assert heard.look(3.0) is Verdict.ALIVE


def test_who_was_asleep_begins_to_listen_anew_and_not_for_ever(heard: Detector) -> None:
    now = 1.0
    for _ in range(MAX_PAUSES):
        now += 0.2
        heard.afresh(now)
        assert heard.look(now) is Verdict.SPEAKS
    heard.afresh(now + 0.2)
    gone, _ = watch(heard, now + 0.2, now + 1)
    assert gone < now + 0.25


def test_the_deadline_is_never_behind_what_was_looked_at() -> None:
    detector = Detector(0.025, 3, 0.0)
    detector.heard(1.0)
    now = 1.0
    for _ in range(40):
        now = detector.deadline
        detector.look(now)
        detector.probe(now)
        assert detector.deadline > now or detector.look(now) is not Verdict.SPEAKS
    assert detector.look(now) is Verdict.GONE
