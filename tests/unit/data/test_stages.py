"""Stages: which step of which order a step of the run is, and how requests to skip something become one."""

from __future__ import annotations

import json
from dataclasses import asdict

from hypothesis import given
from hypothesis import strategies as st

from elastictrain.data.stages import Skip, stage_of, with_lanes, with_skips
from elastictrain.protocol import Stage

FIRST = Stage(0, 0, 4, 2)


def positions(stages: tuple[Stage, ...], first: int, end: int) -> list[tuple[int, int]]:
    return [(stage_of(stages, step).order, stage_of(stages, step).position(step)) for step in range(first, end)]


def test_step_one_is_the_first_of_the_order() -> None:
    assert positions((FIRST,), 1, 4) == [(0, 0), (0, 1), (0, 2)]


def test_a_jump_passes_over_its_steps_and_repeats_none() -> None:
    stages = with_skips((FIRST,), [Skip("steps 6 to 8", 5, 8, order=0)], 3)
    assert positions(stages, 1, 9) == [(0, p) for p in (0, 1, 2, 3, 4, 8, 9, 10)]


def test_what_has_been_trained_is_not_passed_over_again() -> None:
    assert positions(with_skips((FIRST,), [Skip("", 1, 3, order=0)], 6), 1, 9) == [(0, p) for p in range(8)]
    assert positions(with_skips((FIRST,), [Skip("", 3, 8, order=0)], 6), 5, 9) == [(0, p) for p in (4, 5, 8, 9)]


def test_a_new_number_of_lanes_begins_an_order_and_keeps_the_holes() -> None:
    stages = with_skips((FIRST,), [Skip("", 2, 5, block=7), Skip("", 4, 9, order=0)], 3)
    assert stages[-1] == Stage(
        1, 3, 4, 2, continues=True, begun=0, at=3, jumps=((4, 9),), holes=((7, 2, 5, 3),), skips=2
    )
    stages = with_lanes(stages, 8, 2, 10)
    assert stages[-1] == Stage(2, 10, 8, 2, holes=((7, 2, 5, 0),), skips=2)
    assert positions(stages, 10, 13) == [(0, 14), (2, 0), (2, 1)]
    later = with_skips(stages, [*[Skip("", 0, 1, order=0)] * 2, Skip("", 5, 6, order=0), Skip("", 1, 2, order=2)], 11)
    assert (later[-1].order, later[-1].jumps, later[-1].skips) == (2, ((1, 2),), 4), "of the old order nothing is left"
    assert positions(later, 11, 14) == [(2, 0), (2, 2), (2, 3)]


def test_nothing_new_is_no_stage() -> None:
    assert with_skips((FIRST,), [], 5) == (FIRST,)
    assert with_lanes((FIRST,), 4, 2, 5) == (FIRST,)
    stages = with_skips((FIRST,), [Skip("", 2, 3, order=0)], 1)
    assert with_skips(stages, [Skip("", 2, 3, order=0)], 9) == stages


def test_stages_come_back_from_json_also_those_of_before() -> None:
    stages = with_skips((FIRST,), [Skip("a", 2, 5, block=7), Skip("b", 4, 9, order=0)], 3)
    assert tuple(Stage.from_json(json.loads(json.dumps(asdict(stage)))) for stage in stages) == stages
    assert Stage.from_json({"index": 1, "from_step": 6, "lanes": 3, "lane_batch_size": 2}) == Stage(1, 6, 3, 2)
    assert Skip.of(json.loads(json.dumps(asdict(Skip("a", 1, 2, block=3))))) == Skip("a", 1, 2, block=3)


@given(st.lists(st.tuples(st.integers(0, 8), st.integers(0, 30), st.integers(1, 9)), max_size=6))
def test_taken_up_again_and_again_with_new_requests_no_place_comes_twice(plan: list[tuple[int, int, int]]) -> None:
    stages: tuple[Stage, ...] = (FIRST,)
    skips: list[Skip] = []
    step, banned = 0, set[int]()
    for run_on, start, length in plan:
        step += run_on
        before = {position for _, position in positions(stages, 1, step + 1)}
        skips.append(Skip("", start, start + length, order=0))
        stages = with_skips(stages, skips, step)
        banned |= set(range(start, start + length)) - before
    used = [position for _, position in positions(stages, 1, step + 40)]
    assert used == sorted(set(used))
    assert not banned & set(used)
    assert set(range(used[-1] + 1)) == set(used) | {p for p in banned if p <= used[-1]}
