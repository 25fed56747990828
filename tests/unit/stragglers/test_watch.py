"""The watch over a run: generations, findings in words, nonsense; and a few virtual runs from end to end."""

from __future__ import annotations

from dataclasses import replace

import pytest

from elastictrain.engine.shares import MEASURED_EACH
from elastictrain.sim.speeds import Slowness, SpeedScenario, run_speeds, unwatched_s
from elastictrain.stragglers.decision import Policy
from elastictrain.stragglers.signals import Signal
from elastictrain.stragglers.watch import StragglerWatch

NAMES = (3, 5, 8, 9)


def records(factors: tuple[float, ...], step: int, lanes: tuple[int, ...] = (4, 4, 4, 4)) -> bytes:
    wobble = [1.0 + 0.002 * ((step * 5 + place) % 3) for place in range(len(factors))]
    return b"".join(
        Signal(own, 0.1 * own * factor * w, arrive_s=0.1 * own * factor * w, exchange_s=0.01).encode()
        for own, factor, w in zip(lanes, factors, wobble, strict=True)
    )


def feed(watch: StragglerWatch, steps: range, factors: tuple[float, ...], generation: int = 1, names=NAMES):
    findings, decisions = [], []
    for step in steps:
        verdict = watch.feed(generation, names, step, records(factors, step, (4,) * len(names)))
        findings += verdict.findings
        decisions += [verdict.decision] if verdict.decision else []
    return findings, decisions


def test_a_slow_worker_is_named_by_its_number_and_lanes_are_proposed():
    watch = StragglerWatch(1000)
    assert feed(watch, range(1, 20), (1, 1, 1, 1)) == ([], [])
    (finding,), decisions = feed(watch, range(20, 30), (1, 1, 2, 1))
    assert (finding.kind, finding.worker, finding.cause, finding.since) == ("slow", 8, "compute", 20)
    assert finding.words == "since step 20 its lanes take 2.00 x what was usual"
    assert decisions[0].action == "move_lanes"
    assert decisions[0].lanes[2] == 2
    assert watch.speeds()[8] == pytest.approx(0.5, rel=0.02)


def test_what_is_known_of_a_worker_outlives_a_generation():
    watch = StragglerWatch(1000)
    feed(watch, range(1, 20), (1, 1, 1, 1))
    feed(watch, range(20, 30), (1, 1, 2, 1))
    findings, decisions = feed(watch, range(31, 34), (1, 2, 1), generation=2, names=(3, 8, 9))
    assert findings == []
    assert decisions[0].lanes[1] < 4, "no second warm-up"
    findings, _ = feed(watch, range(40, 50), (1, 1, 1), generation=2, names=(3, 8, 9))
    assert [(one.kind, one.worker) for one in findings] == [("recovered", 8)]


def test_the_past_says_nothing():
    watch = StragglerWatch(1000)
    feed(watch, range(1, 20), (1, 1, 1, 1), generation=2)
    for generation, step in 8 * ((1, 50), (2, 19), (2, 5)):
        assert not watch.feed(generation, NAMES, step, records((1, 1, 9, 1), step)).findings
    assert watch.generation == 2


def test_records_of_another_number_of_workers_say_nothing():
    watch = StragglerWatch(1000)
    verdict = watch.feed(1, NAMES, 1, records((1, 1), 1, (4, 4)))
    assert (verdict.findings, verdict.decision, watch.detector) == ((), None, None)


def test_nonsense_is_told_once_and_the_lanes_of_others_move():
    watch = StragglerWatch(1000)
    feed(watch, range(1, 20), (1, 1, 1, 1))
    findings, decisions = feed(watch, range(20, 60), (1, float("nan"), 3, 1))
    assert [(one.kind, one.worker) for one in findings if one.kind == "nonsense"] == [("nonsense", 5)]
    assert ("slow", 8) in [(one.kind, one.worker) for one in findings], "the others are still watched"
    assert {decision.lanes[1] for decision in decisions} == {4}
    assert decisions[0].lanes[2] < 4


def test_who_only_watches_decides_nothing():
    watch = StragglerWatch(1000)
    for step in range(1, 40):
        assert watch.feed(1, NAMES, step, records((1, 1, 2 if step > 20 else 1, 1), step), acts=False).decision is None


@pytest.mark.parametrize("workers", [2, 8])
def test_a_virtual_run_with_a_slow_worker(workers):
    slow = Slowness(1, "compute", 2.0, 50, 200)
    report = run_speeds(SpeedScenario(workers, 8 * workers, 300, 7, slowness=(slow,)))
    assert [(one.kind, one.worker, one.cause) for one in report.findings] == [
        ("slow", 1, "compute"),
        ("recovered", 1, "compute"),
    ]
    assert report.share_of_oracle > 0.9
    assert report.reversals == 0
    assert report.outcomes == ["confirmed", "confirmed"]
    assert report.lanes == (8,) * workers


def test_a_virtual_run_without_one():
    report = run_speeds(SpeedScenario(8, 64, 500, 3, lengths=0.3))
    assert (report.findings, report.decisions) == ([], [])
    assert report.none_s == report.ours_s == report.oracle_s


def test_ten_thousand_virtual_workers():
    """The same code as for two: every slow worker is found, and nobody else; the lanes go where they are computed."""
    slow = tuple(Slowness(worker, "compute", 2.0, 25 + n, 10**6) for n, worker in enumerate((17, 4_500, 9_999)))
    rare = {"hiccup_every": 1e6, "collect_every": 1e6}  # else every step would have some, and nobody else would count
    scenario = SpeedScenario(10_000, 80_000, 45, 5, slowness=slow, **rare)
    report = run_speeds(scenario)
    assert [(one.kind, one.worker, one.since) for one in report.findings] == [
        ("slow", 17, 25), ("slow", 4_500, 26), ("slow", 9_999, 27)
    ]  # fmt: skip
    assert [report.lanes[own.worker] for own in slow] == [4, 4, 4]
    assert sum(report.lanes) == 80_000
    assert report.oracle_s < report.ours_s < report.none_s


@pytest.mark.parametrize("cause", ["compute", "data", "link"])
def test_what_nobody_looks_at_takes_as_long_as_lanes_that_stay(cause):
    slow = (Slowness(1, cause, 1.8, 20, 60),)
    scenario = SpeedScenario(4, 32, 80, 9, lengths=0.3, speeds=(1.0, 1.0, 0.5, 1.0), slowness=slow)
    report = run_speeds(scenario)
    assert unwatched_s(scenario) == pytest.approx(report.none_s)
    assert report.ours_s < report.none_s
    alike = replace(scenario, speeds=())
    assert unwatched_s(alike) > unwatched_s(replace(alike, slowness=())) + 20.0, "1.3 s in each of 40 steps"


def shared(taken: dict[int, int], factors: tuple[float, ...], step: int) -> bytes:
    """As `records`, but worker at a place has computed so many lanes more (less) than its four."""
    found = []
    for place, factor in enumerate(factors):
        more = taken.get(place, 0)
        own_s = 0.1 * (4 + more) * factor * (1.0 + 0.002 * ((step * 5 + place) % 3))
        found.append(Signal(4 + more, own_s, arrive_s=own_s, exchange_s=0.01, more=more).encode())
    return b"".join(found)


def test_lanes_taken_over_in_a_step_are_nobodys_slowness():
    """Who has computed more has needed more time for it, in proportion, and nothing was moved."""
    watch = StragglerWatch(1000)
    for step in range(1, 60):
        swapped = {step % 4: 2, (step + 1) % 4: -2} if step % 2 else {}
        verdict = watch.feed(1, NAMES, step, shared(swapped, (1, 1, 1, 1), step))
        assert not verdict.findings
        assert verdict.decision is None


def test_who_is_slow_is_named_although_others_take_over_its_lanes():
    """And what is moved is what was dealt out, not what was computed."""
    watch = StragglerWatch(1000)
    for step in range(1, 20):
        watch.feed(1, NAMES, step, shared({}, (1, 1, 1, 1), step))
    findings, decisions = [], []
    for step in range(20, 30):
        verdict = watch.feed(1, NAMES, step, shared({2: -2, 0: 1, 1: 1}, (1, 1, 2, 1), step))
        findings += verdict.findings
        decisions += [verdict.decision] if verdict.decision else []
    assert [(one.kind, one.worker, one.cause, one.since) for one in findings] == [("slow", 8, "compute", 20)]
    assert decisions[0].lanes[2] == 2
    assert sum(decisions[0].lanes) == 16
    assert decisions[0].before_s == pytest.approx(0.8, rel=0.02), "four lanes at half speed"


def test_who_is_measured_now_and_then_gives_its_place_away():
    """Its single lane is overtaken in all steps but one in eight: these are enough to name it, and to replace it."""
    watch, findings, decisions = StragglerWatch(100_000, policy=Policy(evict=True)), [], []
    for step in range(1, 60):
        is_slow, each = step >= 20, []
        for place in range(4):
            lanes = 2 if is_slow and place == 3 else 0 if is_slow and place == 2 and step % MEASURED_EACH else 1
            own_s = 0.1 * lanes * (4 if is_slow and place == 2 else 1) * (1.0 + 0.002 * ((step * 5 + place) % 3))
            each.append(Signal(lanes, own_s, arrive_s=0.4, exchange_s=0.01, more=lanes - 1).encode())
        verdict = watch.feed(1, NAMES, step, b"".join(each), spares=1)
        findings += verdict.findings
        decisions += [verdict.decision] if verdict.decision else []
    assert [(one.worker, one.cause, round(one.factor)) for one in findings] == [(8, "compute", 4)]
    assert [(one.action, one.worker) for one in decisions[:1]] == [("replace", 2)]


def test_peers_are_those_of_the_same_role():
    """All of one role are slow: among all workers they are half, and what half of them share is nobody's own change;
    against their own role only the one that is slower still is named."""
    roles = (0, 0, 0, 0, 1, 1, 1, 1, 1)
    names, calm = tuple(range(9)), (1.0,) * 9
    slow = (1.0, 1.0, 1.0, 1.0, 1.5, 1.5, 1.5, 1.5, 3.0)
    told = {}
    for given in ((), roles):
        watch, found = StragglerWatch(1000), []
        for step in range(1, 40):
            raw = records(slow if step >= 20 else calm, step, (4,) * 9)
            found += watch.feed(1, names, step, raw, roles=given, acts=False).findings
        told[given] = {(one.kind, one.worker) for one in found}
    assert told[roles] == {("slow", 8)}
    assert told[()] == {("faster", 0), ("faster", 1), ("faster", 2), ("faster", 3), ("slow", 8)}
    with pytest.raises(ValueError, match="2 roles for 3 workers"):
        StragglerWatch(10).enter(1, (0, 1, 2), (0, 1))


def test_speeds_to_deal_lanes_out_by_do_not_wait_for_who_talks_nonsense():
    """A planned job is dealt out by them in its next generation; who is not known counts as the median one there."""
    watch = StragglerWatch(1000)
    feed(watch, range(1, 3), (1, float("nan"), 2, 1))
    assert watch.dealt_speeds() == {}
    feed(watch, range(3, 20), (1, float("nan"), 2, 1))
    assert watch.dealt_speeds() == pytest.approx({3: 1.0, 8: 0.5, 9: 1.0}, rel=0.02)
