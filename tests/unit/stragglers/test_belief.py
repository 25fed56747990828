"""Nonsense that is finite: lanes that nobody has, times that do not fit into the step, speeds that nobody can see."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from elastictrain.stragglers.belief import Arrival, believed
from elastictrain.stragglers.decision import Decider, Policy, Situation
from elastictrain.stragglers.room import PLENTY, NoRoom, Plenty
from elastictrain.stragglers.signals import Records, checked, table
from elastictrain.stragglers.watch import StragglerWatch

LIAR = 3
Lie = Callable[[Records], None]


def says(**values: float) -> Lie:
    def lie(records: Records) -> None:
        for name, value in values.items():
            records[name][LIAR] = value

    return lie


def run(lie: Lie, *, slow: bool = True, steps: int = 120, transfer_s: float = 0.002, factor: float = 2.0):
    """Four workers with four lanes of 20 ms; worker 1 takes `factor` times as long from step 30. Moves take effect at
    once.
    """
    rng, watch = np.random.default_rng(1), StragglerWatch(10_000)
    findings, decisions, lanes = [], [], np.full(4, 4)
    for step in range(1, steps + 1):
        unit = 0.02 * np.exp(0.01 * rng.standard_normal(4))
        unit[1] *= factor if slow and step >= 30 else 1
        took = unit * lanes
        records = table(
            lanes=lanes, compute_s=took, arrive_s=took, exchange_s=took.max() - took + transfer_s, tokens=lanes * 100,
            squares=lanes * 10_000,
        )  # fmt: skip
        lie(records)
        verdict = watch.feed(1, range(4), step, records.tobytes(), splits=(tuple(lanes.tolist()),))
        findings += [(one.kind, one.worker) for one in verdict.findings]
        if verdict.decision is not None:
            decisions.append(verdict.decision)
            assert sum(verdict.decision.lanes) == 16
            lanes = np.array(verdict.decision.lanes)
    return findings, decisions


def test_without_a_lie_lanes_move():
    findings, decisions = run(says())
    assert findings == [("slow", 1)]
    assert [one.action for one in decisions] == ["move_lanes"]


@pytest.mark.parametrize(
    "lie",
    [
        says(lanes=40),
        says(lanes=0, compute_s=0.0),
        says(compute_s=3600.0),
        says(compute_s=1e-30),
        says(data_s=5.0),
        says(flags=5 << 8),
    ],
)
def test_what_cannot_be_true_is_named_once_and_freezes_only_its_own_lanes(lie):
    """Also where nothing true was ever heard of it."""
    findings, decisions = run(lie)
    assert findings == [("nonsense", LIAR), ("slow", 1)], "the others are watched all the same"
    (move,) = decisions
    assert move.action == "move_lanes"
    assert sorted(move.lanes[:3]) == [2, 5, 5]
    assert (move.lanes[1], move.lanes[LIAR]) == (2, 4)


@pytest.mark.parametrize("slow", [True, False])
def test_who_talks_nonsense_once_its_speed_is_known_keeps_its_lanes(slow):
    """Nor do the others get more than they can compute in the time that it needs."""
    steps = iter(range(1, 1000))

    def later(records: Records) -> None:
        if next(steps) >= 20:
            records["compute_s"][LIAR] = np.nan

    findings, decisions = run(later, slow=slow)
    assert findings == [("nonsense", LIAR), *([("slow", 1)] if slow else [])]
    assert [one.lanes[LIAR] for one in decisions] == [4] * slow
    assert [one.lanes[1] for one in decisions] == [2] * slow


def test_a_move_is_judged_by_what_those_saw_who_are_believed():
    """One says nothing of use, and another boasts of its speed: the others wait for it all the longer."""

    def both(records: Records) -> None:
        records["compute_s"][LIAR] *= 0.02
        records["arrive_s"][LIAR] = records["compute_s"][LIAR]
        records["compute_s"][0] = records["exchange_s"][0] = np.nan

    findings, decisions = run(both, factor=1.5)
    assert findings[:2] == [("nonsense", 0), ("slow", 1)]
    assert [one.action for one in decisions] == ["move_lanes", "move_back"]
    assert decisions[0].lanes[LIAR] > 5
    assert {one.lanes[0] for one in decisions} == {4}


def test_who_is_slow_and_talks_nonsense_is_not_sent_away():
    def found(frozen: frozenset[int]) -> list[str]:
        now = Situation(50, (1, 1, 1), (0.1, 30.0, 0.1), 30.0, 100.0, 10_000, slow={1: 10}, frozen=frozen)
        decision = Decider(3, Policy(evict=True)).decide(now)
        return [] if decision is None else [decision.action]

    assert found(frozenset()) == found(frozenset({0})) == ["leave_out"]
    assert found(frozenset({1})) == []


@given(st.data())
def test_lanes_of_the_frozen_never_move(data):
    workers = data.draw(st.integers(2, 6))
    lanes = tuple(data.draw(st.lists(st.integers(1, 8), min_size=workers, max_size=workers)))
    units = tuple(data.draw(st.lists(st.sampled_from([0.1, 0.2, 0.4, 1.0]), min_size=workers, max_size=workers)))
    frozen = data.draw(st.frozensets(st.integers(0, workers - 1)))
    most = data.draw(st.lists(st.integers(1, 12), min_size=workers, max_size=workers))

    class Some(Plenty):
        def split(self, lanes: tuple[int, ...]) -> NoRoom | None:
            full = [place for place, own in enumerate(lanes) if own > most[place]]
            return NoRoom(full[0], "full") if full else None

    room = data.draw(st.sampled_from([PLENTY, Some()]))
    now = Situation(50, lanes, units, 1.0, 100.0, 10_000, slow={0: 10}, frozen=frozen, room=room)
    decision = Decider(workers).decide(now)
    if decision is not None:
        assert sum(decision.lanes) == sum(lanes)
        assert all(decision.lanes[place] == lanes[place] for place in frozen)


def test_a_lie_now_and_then_does_not_keep_a_slow_worker_from_being_relieved():
    turns = iter(range(1000))

    def often(records: Records) -> None:
        if next(turns) % 2:
            records["lanes"][LIAR] = 40

    findings, decisions = run(often)
    assert findings == [("nonsense", LIAR), ("slow", 1)]
    assert [one.action for one in decisions] == ["move_lanes"]


@pytest.mark.parametrize("transfer_s", [0.002, 0.1])
def test_a_speed_that_nobody_else_can_see_is_taken_back(transfer_s):
    """What it says could be true, and so it gets lanes; the others wait for it all the longer, and say so."""

    def boasts(records: Records) -> None:
        records["compute_s"][LIAR] *= 0.02
        records["arrive_s"][LIAR] = records["compute_s"][LIAR]

    findings, decisions = run(boasts, slow=False, transfer_s=transfer_s)
    assert findings == []
    assert [(one.action, one.lanes) for one in decisions] == [
        ("move_lanes", decisions[0].lanes),
        ("move_back", (4, 4, 4, 4)),
    ]
    assert decisions[0].lanes[LIAR] > 8


def test_lanes_are_held_against_the_splits_that_may_be_in_force():
    def sound(lanes: list[int], *splits: tuple[int, ...]) -> list[bool]:
        took = [0.1 * max(1, own) for own in lanes]
        records = table(lanes=lanes, compute_s=took, arrive_s=took)
        return [bool(one) for one in believed(records, splits)]

    assert sound([4, 4, 4, 40]) == [True] * 4, "nobody has said what they should be"
    assert sound([4, 4, 4, 40], (4, 4, 4, 4)) == [True, True, True, False]
    assert sound([4, 4, 4, 4], (5, 5, 3, 3), (4, 4, 4, 4)) == [True] * 4, "they have not heard of the newest yet"
    assert sound([5, 5, 3, 4], (5, 5, 3, 3), (4, 4, 4, 4)) == [True, True, True, False]
    assert sound([7, 1], (4, 4)) == [True] * 2, "a split of which a controller before this one may have told them"
    assert sound([4, 40], (4, 4)) == [True, False]
    assert sound([4, 4], (8,)) == [True] * 2, "of another number of workers"


def test_lanes_of_others_are_no_nonsense():
    """Of what each has computed, what was dealt out counts; a difference without room in the record says nothing."""
    took = [0.6, 0.2, 0.4]
    records = table(lanes=[6, 2, 4], compute_s=took, arrive_s=took, flags=[2 << 8, 0xFE << 8, 0])
    assert believed(records, [(4, 4, 4)]).all()
    records = table(lanes=[500, 4, 4], compute_s=took, arrive_s=took, flags=[127 << 8, 0, 0])
    assert believed(records, [(300, 4, 4)]).all()


def test_clocks_are_read_one_after_the_other():
    """A little more computation than time is what rounding makes."""
    records = table(lanes=[1] * 3, compute_s=[0.1, 0.105, 0.12], data_s=[0.001] * 3, arrive_s=[0.1] * 3)
    assert checked(records).tolist() == [True, True, False]


def test_when_the_last_one_came_is_what_the_others_waited_for():
    arrival = Arrival()
    told = table(arrive_s=[0.12, 0.06, 0.05], exchange_s=[0.01, 0.07, 0.08])
    assert arrival.last_s(0.1, told, judging=False) == pytest.approx(0.1), "20 ms are for something else"
    assert arrival.last_s(0.1, told, judging=True) == pytest.approx(0.1)
    link = table(arrive_s=[0.12, 0.06, 0.05], exchange_s=[0.51, 0.57, 0.08], mirror_s=[0.0, 0.5, 0.0])
    assert arrival.last_s(0.1, link, judging=True) == pytest.approx(0.1), "a slow link is no slow computation"
    hidden = table(arrive_s=[0.01, 0.06, 0.05], exchange_s=[0.01, 0.17, 0.18])
    assert arrival.last_s(0.06, hidden, judging=True) == pytest.approx(0.2)
