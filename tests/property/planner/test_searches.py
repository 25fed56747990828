"""The planner's searches against brute force, and laws that every optimum obeys."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from elastictrain.errors import CapacityError
from elastictrain.planner.lanes import Team, Way, plan_lanes
from elastictrain.planner.places import Kind
from elastictrain.planner.reach import Reach
from elastictrain.planner.split import fill, fill_whole, split_affine, split_tables
from elastictrain.planner.stages import place_stages
from tests.support.planner_instances import CHECKS, check

SLICE = 150
"""Seeds per kind of problem; `benchmarks/planner.py` takes 2,000 of each."""


@pytest.mark.parametrize("kind", list(CHECKS))
def test_the_searches_find_what_brute_force_finds(kind: str) -> None:
    assert [seed for seed in range(SLICE) if not check(kind, seed)] == []


speeds = st.lists(st.floats(0.01, 10), min_size=1, max_size=8)


@given(each=speeds, total=st.integers(0, 40), factor=st.sampled_from([0.5, 2.0, 4.0]))
@settings(deadline=None)
def test_scaling_all_times_scales_the_makespan(each: list[float], total: int, factor: float) -> None:
    zeros = [0.0] * len(each)
    one = split_affine(total, zeros, each)
    other = split_affine(total, zeros, [factor * c for c in each])
    assert other.makespan == pytest.approx(factor * one.makespan)


@given(each=speeds, total=st.integers(1, 40), more=st.floats(0.01, 10))
@settings(deadline=None)
def test_one_more_worker_never_makes_it_slower(each: list[float], total: int, more: float) -> None:
    before = split_affine(total, [0.0] * len(each), each)
    after = split_affine(total, [0.0] * (len(each) + 1), [*each, more])
    assert after.makespan <= before.makespan * (1 + 1e-12)
    assert before.bound <= before.makespan


@given(each=speeds, total=st.integers(0, 40))
@settings(deadline=None)
def test_a_table_and_a_formula_agree(each: list[float], total: int) -> None:
    tables = [[c * n for n in range(total + 1)] for c in each]
    assert split_tables(total, tables).makespan == pytest.approx(split_affine(total, [0.0] * len(each), each).makespan)


@given(workers=st.lists(st.tuples(st.floats(0.1, 5), st.floats(0, 20)), min_size=1, max_size=8), part=st.floats(0, 1))
@settings(deadline=None)
def test_water_filling_reaches_the_amount_at_the_least_level(workers: list[tuple[float, float]], part: float) -> None:
    weights, room = [w for w, _ in workers], [r for _, r in workers]
    amount = part * sum(room) * (1 - 1e-9)
    level, shares = fill(amount, weights, room)
    assert sum(shares) == pytest.approx(amount, abs=1e-9)
    assert all(0 <= share <= space for share, space in zip(shares, room, strict=True))
    lower = sum(min(0.999 * level * w, r) for w, r in workers)
    assert lower < amount or amount == pytest.approx(lower, abs=1e-9)


def test_what_does_not_fit_is_an_error() -> None:
    with pytest.raises(CapacityError, match=r"^5 does not fit into room for 3: 2 too much$"):
        fill(5, [1, 1], [1, 2])
    with pytest.raises(CapacityError, match=r"^some worker's memory is too small before it holds any block$"):
        fill_whole(1, 1, [5], [4])
    with pytest.raises(CapacityError, match=r"^5 cannot be dealt out: the workers take at least 0, at most 4$"):
        split_affine(5, [0, 0], [1, 1], most=[2, 2])
    with pytest.raises(CapacityError, match=r"^1 cannot be dealt out: the workers take at least 2, at most 2$"):
        split_affine(1, [0, 0], [1, 1], least=[1, 1])
    with pytest.raises(ValueError, match=r"^table 0 falls: the cost of more things may not be smaller$"):
        split_tables(1, [[0, 2, 1]])
    with pytest.raises(ValueError, match=r"^each worker needs a time per thing above 0 and a fixed time of 0 or more$"):
        split_affine(1, [0], [0])


def test_a_search_that_is_cut_off_says_so() -> None:
    kinds = [
        Kind(6, tuple(s * (1 + 0.01 * n) for n in range(24)), (1.0,) * 24, (0.0,) * 24, 9.0) for s in (1.0, 1.3, 1.7)
    ]
    whole = place_stages(kinds, 8, 12)
    short = place_stages(kinds, 8, 12, limit=1)
    assert whole is not None
    assert whole.exact
    assert short is not None
    assert not short.exact
    assert short.bound_s <= whole.time_s <= short.time_s * (1 + 1e-12)


def test_stages_that_cannot_be_placed() -> None:
    kind = Kind(2, (1.0,) * 4, (1.0,) * 4, (0.0,) * 4, 3.0)
    assert place_stages([kind], 3, 4) is None  # two places only
    assert place_stages([kind], 1, 4) is None  # too much for one
    found = place_stages([kind], 2, 4)
    assert found is not None
    assert place_stages([kind], 2, 4, better_than_s=found.time_s) is None


def test_what_cannot_hold_the_layers_is_not_searched(monkeypatch: pytest.MonkeyPatch) -> None:
    """All places together are too small, though every layer fits on each: known before anything is tried."""
    kinds = [Kind(4, (1.0,) * 12, (1.0,) * 12, (0.5,) * 12, memory) for memory in (3.0, 2.9)]
    assert place_stages([replace(kind, memory_bytes=9.0) for kind in kinds], 4, 8) is not None

    def never(*_: object) -> None:
        raise AssertionError("searched")

    monkeypatch.setattr("elastictrain.planner.stages._Search.extend", never)
    monkeypatch.setattr("elastictrain.planner.stages._Search.guess", never)
    assert place_stages(kinds, 4, 8) is None


def test_places_hold_whole_layers_that_are_computed_again_and_no_more_parameters_than_they_may() -> None:
    again = Kind(1, (1.0,) * 8, (0.0,) * 8, (1.0,) * 8, 5.5, again_s=(0.5,) * 8, again_bytes=(0.0,) * 8)
    # six layers: half a layer too much to keep, so that a whole one is computed again, in half a second
    assert Reach([again], {}, [1.0]).most([6.3, 6.5]) == [5.0, 6.0]
    limited = Kind(1, (1.0,) * 8, (0.0,) * 8, (0.0,) * 8, 1.0, params=(1.0,) * 8, most_params=3.0 * (1 - 1e-9))
    assert Reach([limited], {}, [1.0]).most([8.0]) == [2.0]
    assert Reach([replace(limited, most_params=3.0)], {}, [1.0]).most([8.0]) == [3.0]


def test_a_worker_that_takes_more_time_gets_fewer_lanes_and_full_ones_fewer_blocks() -> None:
    quick = Team("quick", 2, 10.0, (Way("a", 0.0, 1.0, 8.0),))
    slow = Team("slow", 1, 40.0, (Way("a", 0.0, 2.0, 8.0),))
    found = plan_lanes([quick, slow], 10, 20.0)
    assert found is not None
    assert found.lanes == (4, 4, 2)
    assert found.blocks_share == pytest.approx((0.1, 0.1, 0.8))
    assert found.step_s == 4.0
    assert plan_lanes([quick, slow], 10, 37.0) is None
    assert plan_lanes([quick, slow], 10, 20.0, better_than_s=4.0) is None


def test_a_slow_device_whose_memory_is_needed_gets_a_lane() -> None:
    quick = Team("q", 2, 24.0, (Way("w", 0.0, 0.1, 10.0),))
    slow = Team("s", 1, 80.0, (Way("w", 0.0, 5.0, 10.0),))
    found = plan_lanes((quick, slow), 4, 60.0)
    assert found is not None
    assert found.lanes == (2, 1, 1)
    alone = plan_lanes((quick, slow), 4, 28.0)
    assert alone is not None
    assert alone.lanes == (2, 2, 0)


def test_a_way_that_needs_less_memory_is_taken_where_it_must() -> None:
    ways = (Way("keeps", 0.0, 1.0, 9.0), Way("again", 0.0, 1.5, 5.0))
    assert plan_lanes([Team("a", 2, 10.0, ways)], 8, 2.0).ways[0].name == "keeps"  # type: ignore[union-attr]
    assert plan_lanes([Team("a", 2, 10.0, ways)], 8, 6.0).ways[0].name == "again"  # type: ignore[union-attr]
