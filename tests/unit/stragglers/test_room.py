"""A split for which there is no memory: the best one that fits, then another worker in its place, else a word."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from elastictrain.sim.speeds import Slowness, SpeedScenario, run_speeds
from elastictrain.stragglers.decision import Decider, Decision, Policy, Refused, Situation
from elastictrain.stragglers.room import NoRoom, best_with_room, makespan_s

EVEN = (4, 4, 4, 4)
SLOW = (1.0, 1.0, 4.0, 1.0)


@dataclass
class Caps:
    """Each worker has memory for so many lanes, whichever they are, and so has a spare. `asked`: how often."""

    most: tuple[int, ...]
    spare: int = 100
    asked: int = 0

    def _short(self, most: tuple[int, ...], lanes: tuple[int, ...]) -> NoRoom | None:
        self.asked += 1
        assert len(most) == len(lanes)
        for place, (cap, own) in enumerate(zip(most, lanes, strict=True)):
            if own > cap:
                return NoRoom(place, f"worker {place} has room for {cap}")
        return None

    def split(self, lanes: tuple[int, ...]) -> NoRoom | None:
        return self._short(self.most, lanes)

    def without(self, worker: int, lanes: tuple[int, ...]) -> NoRoom | None:
        return self._short((*self.most[:worker], *self.most[worker + 1 :]), lanes)

    def replaced(self, worker: int, lanes: tuple[int, ...]) -> NoRoom | None:
        return self._short((*self.most[:worker], self.spare, *self.most[worker + 1 :]), lanes)


def play(decider: Decider, room: Caps, steps: range, lanes: tuple[int, ...] = EVEN,
         units: tuple[float, ...] = SLOW, **changes: Any) -> tuple[list[Decision], list[Refused]]:  # fmt: skip
    """Steps under these speeds; moves take effect at once, and nothing comes of the others."""
    decisions, refused = list[Decision](), list[Refused]()
    for step in steps:
        now = Situation(step, lanes, units, makespan_s(units, lanes), 10.0 * step, 10_000, slow={2: 0}, room=room)
        decision = decider.decide(replace(now, **changes))
        refused += [] if decider.refused is None else [decider.refused]
        if decision is not None:
            decisions.append(decision)
            lanes = decision.lanes or lanes
    return decisions, refused


def test_the_best_split_that_fits_is_made_when_the_best_of_all_does_not():
    """(5, 5, 1, 5) would take 5 s, but there is room for (5, 4, 3, 4) or (4, 5, 3, 4) only."""
    decisions, refused = play(Decider(4), Caps((5, 4, 4, 4)), range(200))
    assert [(one.action, one.lanes, one.before_s, one.after_s) for one in decisions] == [
        ("move_lanes", (5, 4, 3, 4), 16.0, 12.0)
    ]
    assert refused == [Refused((5, 5, 1, 5), "worker 1 has room for 4", "smaller_move")]


def test_where_no_lane_can_move_nothing_is_done_and_told_once():
    for policy in (Policy(), Policy(evict=True)):
        decisions, refused = play(Decider(4, policy), Caps(EVEN), range(300))
        assert decisions == []
        assert refused == [Refused((5, 5, 1, 5), "worker 0 has room for 4", "nothing")]


def test_where_no_lane_can_move_a_spare_takes_the_place_of_the_slow_worker():
    decider = Decider(4, Policy(evict=True))
    decisions, refused = play(decider, Caps(EVEN, spare=4), range(300), spares=1)
    assert [(one.action, one.worker, one.before_s, one.after_s) for one in decisions] == [("replace", 2, 16.0, 4.0)]
    assert [one.instead for one in refused] == ["replace"]


def test_a_spare_that_comes_later_takes_its_place_later():
    decider = Decider(4, Policy(evict=True))
    room = Caps(EVEN, spare=4)
    assert play(decider, room, range(60))[0] == []
    assert [one.action for one in play(decider, room, range(60, 120), spares=1)[0]] == ["replace"]


def test_a_spare_with_too_little_memory_is_no_help():
    assert play(Decider(4, Policy(evict=True)), Caps(EVEN, spare=3), range(300), spares=1)[0] == []


def test_nobody_is_left_out_whose_lanes_fit_nowhere_else():
    """They are fit for 5 lanes each: for one of 16 lanes without worker 2, but not for all."""
    units = (1.0, 1.0, 60.0, 1.0)
    policy = Policy(evict=True)
    for most, actions in ((5, ["move_lanes"]), (6, ["move_lanes", "leave_out"])):
        decisions, _ = play(Decider(4, policy), Caps((most,) * 4), range(60), units=units)
        assert [one.action for one in decisions] == actions


def test_what_a_smaller_move_does_not_give_back_a_spare_may():
    decider = Decider(4, Policy(evict=True))
    decisions, refused = play(decider, Caps((5, 4, 4, 4)), range(300), spares=1)
    assert [one.action for one in decisions] == ["move_lanes", "replace"]
    assert [one.instead for one in refused] == ["smaller_move"]


def test_nobody_is_asked_again_in_each_step():
    room = Caps(EVEN)
    play(Decider(4), room, range(20))
    assert room.asked < 60


def brute_force(total: int, units: tuple[float, ...], most: tuple[int, ...]) -> float:
    fits = [
        lanes for lanes in product(*(range(1, cap + 1) for cap in most)) if sum(lanes) == total
    ]  # fmt: skip
    return min(makespan_s(units, lanes) for lanes in fits)


def test_of_many_workers_few_questions_are_asked():
    """Every other one of 200 takes twice as long: 11 and 5 lanes; but one of the fast ones has room for 10."""
    units, before, room = (1.0, 2.0) * 100, (8,) * 200, Caps((20, 20) * 99 + (10, 20))
    found = best_with_room(1600, units, room.split, least=[1] * 200, before=before)
    assert found.lack is not None
    assert found.lanes is not None
    assert makespan_s(units, found.lanes) == 12.0
    assert room.asked <= 50


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_it_is_the_best_that_fits_where_memory_depends_on_the_number_of_lanes(data):
    workers = data.draw(st.integers(2, 4))
    before = tuple(data.draw(st.lists(st.integers(1, 4), min_size=workers, max_size=workers)))
    most = tuple(own + data.draw(st.integers(0, 3)) for own in before)
    units = tuple(data.draw(st.lists(st.sampled_from([0.5, 1.0, 1.3, 2.0, 7.0]), min_size=workers, max_size=workers)))
    found = best_with_room(sum(before), units, Caps(most).split, least=[1] * workers, before=before)
    assert found.lanes is not None
    assert sum(found.lanes) == sum(before)
    assert makespan_s(units, found.lanes) == pytest.approx(brute_force(sum(before), units, most), rel=1e-12)
    assert (found.lack is None) == (found.lanes == found.wanted)


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 2**32), st.integers(2, 5), st.data())
def test_what_is_found_fits_whatever_does_and_is_no_worse_than_what_is(salt, workers, data):
    """Whether a split fits may depend on anything: on which lanes a worker has, on what the others have."""
    before = tuple(data.draw(st.lists(st.integers(1, 5), min_size=workers, max_size=workers)))
    units = tuple(data.draw(st.lists(st.sampled_from([0.5, 1.0, 1.3, 2.0]), min_size=workers, max_size=workers)))

    def fits(lanes: tuple[int, ...]) -> NoRoom | None:
        whose = hash((salt, lanes)) % (2 * workers + 1)
        return None if lanes == before or whose > workers else NoRoom(None if whose == workers else whose, "full")

    found = best_with_room(sum(before), units, fits, least=[1] * workers, before=before)
    assert found.lanes is not None
    assert fits(found.lanes) is None
    assert sum(found.lanes) == sum(before)
    assert min(found.lanes) >= 1
    assert makespan_s(units, found.lanes) <= makespan_s(units, before)


@pytest.mark.parametrize(("more", "share"), [(0, 0.0), (1, 0.5), (4, 0.95)])
def test_in_a_simulated_run_what_there_is_room_for_is_won(more, share):
    """One of 8 at a third of its speed, 8 lanes each, and room for so many lanes more: 8, 2 and about 1 lanes move."""
    scenario = SpeedScenario(8, 64, 200, 3, slowness=(Slowness(2, "compute", 3.0, 50, 1000),))
    report = run_speeds(scenario, Policy(evict=True), Caps((8 + more,) * 8))
    assert max(report.lanes) <= 8 + more
    assert report.share_of_oracle >= share
    assert [one.instead for one in report.refused] == {0: ["nothing"], 1: [], 4: []}[more]
    assert report.reversals == 0


def test_step_by_step_too_nobody_gets_more_than_it_may():
    def fits(lanes: tuple[int, ...]) -> NoRoom | None:
        return NoRoom(None, "not that one") if lanes == (4, 1, 3) else None

    found = best_with_room(8, [1.0] * 3, fits, least=(1, 1, 1), most=(8, 1, 8), before=(6, 1, 1))
    assert found.wanted == (4, 1, 3)
    assert found.lanes is not None
    assert found.lanes[1] == 1
    assert sum(found.lanes) == 8
