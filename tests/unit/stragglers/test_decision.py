"""What is done about a slow worker, and what is not."""

from __future__ import annotations

from dataclasses import replace

import pytest

from elastictrain.stragglers.decision import Decider, Decision, Policy, Situation
from elastictrain.stragglers.rental import Case, pays, prior_s, remaining_s

EVEN = (4, 4, 4, 4)


def situation(step: int, units: tuple[float, ...] = (1.0, 1.0, 1.0, 1.0), **changes) -> Situation:
    lanes = changes.pop("lanes", EVEN)
    arrived = max(unit * own for unit, own in zip(units, lanes, strict=True))
    base = Situation(step, lanes, units, arrived, 10.0 * step, 10_000)
    return replace(base, **changes)


def play(decider: Decider, units: tuple[float, ...], steps: range, lanes=EVEN, **changes):
    """Steps under these speeds; moves take effect at once. Returns (decisions, lanes at the end)."""
    decisions: list[Decision] = []
    for step in steps:
        decision = decider.decide(situation(step, units, lanes=lanes, **changes))
        if decision is not None:
            decisions.append(decision)
            lanes = decision.lanes or lanes
    return decisions, lanes


def test_equal_workers_are_left_alone():
    decisions, _ = play(Decider(4), (1.0, 1.01, 0.99, 1.0), range(200))
    assert decisions == []


def test_lanes_move_by_the_exact_split_and_the_move_is_confirmed():
    decider = Decider(4)
    decisions, lanes = play(decider, (1.0, 1.0, 2.0, 1.0), range(60), slow={2: 0})
    (move,) = decisions
    assert (move.action, move.before_s, move.after_s) == ("move_lanes", 8.0, 5.0)
    assert sorted(lanes) == [2, 4, 5, 5]
    assert lanes[2] == 2
    assert decider.outcomes == ["confirmed"]


def test_a_gain_below_the_least_moves_nothing():
    decider = Decider(4, Policy(min_gain=0.4))
    assert play(decider, (1.0, 1.0, 2.0, 1.0), range(60), slow={2: 0})[0] == []  # it would win 3 of 8
    assert play(Decider(4, Policy(min_gain=0.37)), (1.0, 1.0, 2.0, 1.0), range(60), slow={2: 0})[0] != []


def test_a_move_that_wins_nothing_is_taken_back_and_not_tried_again_soon():
    decider, lanes = Decider(4), EVEN
    acted = []
    for step in range(1300):
        slow = {2: 0} if step < 200 else {2: 200}  # and said anew
        now = situation(step, (1.0, 1.0, 2.0, 1.0), lanes=lanes, slow=slow, arrived_s=8.0)  # whatever its lanes
        decision = decider.decide(now)
        if decision is not None:
            acted.append((decision.action, step))
            lanes = decision.lanes
    assert [action for action, _ in acted[:2]] == ["move_lanes", "move_back"]
    assert decider.outcomes[:2] == ["taken back", "moved back"]
    assert 200 <= acted[2][1] <= 225, "nothing new is known before"
    assert acted[3][0] == "move_back"
    assert [step for _, step in acted[4:]] == [step for _, step in acted[4:] if step > 1200]


def test_another_alarm_meanwhile_spoils_the_verdict_and_is_acted_on():
    decider = Decider(4)
    _, lanes = play(decider, (1.0, 1.0, 2.0, 1.0), range(2), slow={2: 0})
    units = (1.0, 3.0, 2.0, 1.0)
    decisions, _ = play(decider, units, range(2, 8), lanes, slow={2: 0, 1: 3})
    assert decider.outcomes == ["overtaken"]
    assert decisions[0].lanes[1] < lanes[1]


def test_a_move_that_nobody_hears_of_is_given_up_after_a_while():
    decider = Decider(4)
    decisions = []
    for step in range(130):
        now = situation(step, (1.0, 1.0, 2.0, 1.0), slow={2: 0})  # the lanes never change
        decision = decider.decide(now)
        decisions += [] if decision is None else [step]
    assert decisions == [0, 51, 102]
    assert decider.outcomes[0] == "overtaken"


def test_a_recovered_worker_gets_its_lanes_back_later_each_time():
    decider, lanes = Decider(4, Policy(hold_steps=10)), EVEN
    waited = []
    step = 0
    for _ in range(3):
        for _ in range(40):
            decision = decider.decide(situation(step, (1.0, 1.0, 2.0, 1.0), lanes=lanes, slow={2: step}))
            lanes = decision.lanes if decision else lanes
            step += 1
        assert lanes[2] == 2
        fast_since = step
        while lanes != EVEN:
            decision = decider.decide(situation(step, lanes=lanes))
            lanes = decision.lanes if decision else lanes
            step += 1
        waited.append(step - fast_since)
        step += 60
    assert waited[0] >= 10
    assert waited[1] >= 2 * waited[0] - 2
    assert waited[2] >= 2 * waited[1] - 2


def test_nothing_is_done_for_the_last_steps():
    decisions, _ = play(Decider(4), (1.0, 1.0, 2.0, 1.0), range(60), slow={2: 0}, left_steps=1)
    assert decisions == []


def test_workers_stay_unless_it_is_allowed():
    assert {d.action for d in play(Decider(4), (1.0, 1.0, 50.0, 1.0), range(300), slow={2: 0}, spares=1)[0]} == {
        "move_lanes"
    }


def test_a_worker_too_slow_for_a_single_lane_is_replaced_or_left_out():
    policy = Policy(evict=True)
    for spares, action in ((1, "replace"), (0, "leave_out")):
        decisions, _ = play(Decider(4, policy), (1.0, 1.0, 50.0, 1.0), range(80), slow={2: 0}, spares=spares)
        assert decisions[0].action == "move_lanes", "lanes first"
        assert (decisions[1].action, decisions[1].worker) == (action, 2)
        assert len(decisions) == 2


def test_a_worker_is_not_left_out_when_too_few_would_be_left():
    decider = Decider(4, Policy(evict=True))
    decisions, _ = play(decider, (1.0, 1.0, 50.0, 1.0), range(200), slow={2: 0}, least_workers=4)
    assert {decision.action for decision in decisions} == {"move_lanes"}


def test_a_worker_that_still_earns_its_place_stays():
    """With 16 lanes, one at half speed takes its share of them; without it the others would have more to do."""
    decisions, _ = play(Decider(4, Policy(evict=True)), (1.0, 1.0, 2.0, 1.0), range(400), slow={2: 0})
    assert {decision.action for decision in decisions} == {"move_lanes"}


def test_only_so_many_workers_go_within_an_hour():
    decider, units = Decider(4, Policy(evict=True)), (1.0, 50.0, 60.0, 1.0)
    decisions, _ = play(decider, units, range(300), slow={1: 0, 2: 0}, spares=2)
    assert [d.worker for d in decisions if d.action == "replace"] == [2]
    decisions, _ = play(decider, units, range(400, 900), (7, 1, 1, 7), slow={1: 0, 2: 0}, spares=2)
    assert [d.worker for d in decisions if d.action == "replace"] != [], "another hour"


def test_those_of_an_earlier_generation_count_too():
    gone: list[float] = []
    units = (1.0, 1.0, 50.0, 1.0)
    play(Decider(4, Policy(evict=True), evicted_s=gone), units, range(80), slow={2: 0}, spares=2)
    assert len(gone) == 1
    decisions, _ = play(Decider(4, Policy(evict=True), evicted_s=gone), units, range(80, 200), slow={2: 80}, spares=1)
    assert {decision.action for decision in decisions} == {"move_lanes"}


def test_numbers_must_fit_the_workers():
    with pytest.raises(ValueError, match="4 lane counts, 2 speeds for 4 workers"):
        Decider(4).decide(replace(situation(0), unit_s=(1.0, 1.0)))


CASE = Case(saved_s=1.0, cost_s=100.0, undo_s=100.0, step_s=10.0, lost_s=0.0, lasted_s=0.0, left_s=1e9)


def test_what_is_expected_to_pay_is_done_at_once():
    assert pays(CASE, prior=600.0) is None  # 60 steps of 1 s
    why = pays(CASE, prior=6000.0)
    assert why is not None
    assert "expected to save 600 s" in why


def test_what_has_cost_as_much_already_is_done_anyway():
    late = replace(CASE, lost_s=100.0)
    assert pays(replace(CASE, lost_s=99.0), prior=600.0) is None
    assert "100 s are lost already" in (pays(late, prior=600.0) or "")
    assert pays(replace(late, left_s=500.0), prior=600.0) is None, "the run is nearly over"


def test_nothing_to_win_never_pays():
    assert pays(replace(CASE, saved_s=0.0, lost_s=1e9), prior=1e9) is None


def test_what_has_lasted_will_last():
    assert remaining_s(600.0, 3600.0) > remaining_s(600.0, 60.0) > 600.0
    assert (prior_s(8), prior_s(32), prior_s(10_000)) == (600.0, 1440.0, 4320.0)


def test_a_move_that_no_step_can_judge_does_not_stand_in_the_way_for_ever():
    """A checkpoint is always being written, say: then no step counts."""
    decider = Decider(4)
    decisions, lanes = play(decider, (1.0, 1.0, 2.0, 1.0), range(5), slow={2: 0})
    assert [one.action for one in decisions] == ["move_lanes"]
    for step in range(5, 300):
        decider.decide(situation(step, (1.0, 1.0, 2.0, 1.0), lanes=lanes, slow={2: 0}, arrived_s=None))
    assert decider.outcomes == ["unjudged"]


def judged(arrived: list[float], before: tuple[float, ...] = (8.0,)) -> tuple[list[str], list[str]]:
    """(actions, outcomes) when the steps after the move take this long, again and again, and even ones as long as
    `before`. Promised: 3 s of 8 s.
    """
    decider, lanes, actions = Decider(4), EVEN, []
    for step in range(110):
        took = before[step % len(before)] if lanes == EVEN else arrived[step % len(arrived)]
        now = situation(step, (1.0, 1.0, 2.0, 1.0), lanes=lanes, slow={2: 0}, arrived_s=took)
        decision = decider.decide(now)
        if decision is not None:
            actions.append(decision.action)
            lanes = decision.lanes
    return actions, decider.outcomes


def test_a_move_is_taken_back_only_when_it_is_known_not_to_bring_its_gain():
    assert judged([6.9]) == (["move_lanes", "move_back"], ["taken back", "moved back"])
    noisy = [1.2, 6.55, 6.6, 12.0]  # half of the promised gain, nearly, but nobody knows
    assert judged(noisy) == (["move_lanes"], ["unjudged"])
    assert judged([8.3, 7.6, 8.1, 7.8]) == (["move_lanes", "move_back"], ["taken back", "moved back"])


def test_lanes_that_are_back_stay_whatever_noise_then_says():
    assert judged([8.0], (8.0, 19.0, 9.0, 0.5)) == (["move_lanes", "move_back"], ["taken back", "moved back"])
