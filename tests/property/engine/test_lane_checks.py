"""Lanes computed twice: every lane and every worker in its turn, the wrong one named, within the expected delay."""

from __future__ import annotations

import random
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from elastictrain.controller.recovery import less_trusting
from elastictrain.engine.lane_checks import (
    Health,
    LaneCheck,
    LaneVerdict,
    expected_delay_steps,
    judge_lane,
    lane_check,
)
from elastictrain.layout import Layout, balanced, deal_lanes
from elastictrain.protocol import Doubt


def layout_of(world: int, lanes: int, shares: list[float] | None = None) -> Layout:
    made = balanced(1, range(10, 10 + world), lanes, [10] * 6)
    return made if shares is None else made.with_lanes(deal_lanes(lanes, shares, "contiguous"))


worlds = st.tuples(st.integers(2, 6), st.integers(0, 9)).map(lambda pair: layout_of(pair[0], pair[0] + pair[1]))


@given(worlds, st.integers(-(2**40), 2**40), st.integers(1, 60), st.integers(0, 5))
def test_in_a_round_every_lane_is_checked_once_by_another_worker(
    layout: Layout, seed: int, every: int, round_: int
) -> None:
    first = round_ * layout.lane_count + 1
    steps = [every * number for number in range(first, first + layout.lane_count)]
    checks = [lane_check(layout, step, seed=seed, every=every) for step in steps]
    assert sorted(check.lane for check in checks if check is not None) == list(range(layout.lane_count))
    for check in checks:
        assert check is not None
        assert check.lane in layout.lanes_of(check.worker)
        assert check.checker in layout.workers
        assert check.checker != check.worker
    assert checks == [lane_check(layout, step, seed=seed, every=every) for step in steps]


@given(worlds, st.integers(0, 2**40))
def test_everybody_checks_others(layout: Layout, seed: int) -> None:
    checks = [lane_check(layout, step, seed=seed, every=1) for step in range(1, 20 * layout.lane_count + 1)]
    turns = Counter(check.checker for check in checks if check is not None)
    assert set(turns) == set(layout.workers)


@given(worlds, st.integers(1, 1000), st.integers(2, 60))
def test_only_at_its_interval_and_never_alone(layout: Layout, step: int, every: int) -> None:
    assert (lane_check(layout, step, seed=0, every=every) is not None) == (step % every == 0)
    assert lane_check(layout, step, seed=0, every=None) is None
    alone = layout_of(1, 5)
    assert lane_check(alone, every, seed=0, every=every) is None


@given(st.integers(1, 200), st.lists(st.sampled_from("ab"), min_size=4, max_size=4))
def test_only_workers_of_the_same_numerics_check_each_other(step: int, kinds: list[str]) -> None:
    layout = layout_of(4, 8)
    by_worker = dict(zip(layout.workers, kinds, strict=True))
    check = lane_check(layout, step, seed=3, every=1, kinds=by_worker)
    plain = lane_check(layout, step, seed=3, every=1)
    assert plain is not None
    if check is None:
        assert list(by_worker.values()).count(by_worker[plain.worker]) == 1
    else:
        assert check.lane == plain.lane
        assert by_worker[check.worker] == by_worker[check.checker]


def test_the_order_is_what_it_always_was() -> None:
    """A run that is resumed checks the same lanes: other versions, other platforms."""
    layout = layout_of(3, 7)
    found = [lane_check(layout, step, seed=5, every=10) for step in range(10, 150, 10)]
    assert [(c.lane, c.worker, c.checker) for c in found if c is not None] == GOLDEN


GOLDEN = [
    (4, 11, 12),
    (6, 12, 10),
    (1, 10, 12),
    (0, 10, 11),
    (2, 10, 12),
    (3, 11, 10),
    (5, 12, 11),
    (6, 12, 11),
    (3, 11, 10),
    (0, 10, 12),
    (1, 10, 11),
    (2, 10, 12),
    (5, 12, 10),
    (4, 11, 12),
]


@pytest.mark.parametrize(
    ("world", "lanes", "shares", "wrong_share"),
    [(2, 8, None, 0.1), (4, 16, None, 0.1), (4, 16, [5.0, 1.0, 1.0, 1.0], 0.1), (8, 32, None, 0.5), (3, 11, None, 1.0)],
)
def test_found_within_twice_the_expected_delay(
    world: int, lanes: int, shares: list[float] | None, wrong_share: float
) -> None:
    """The choice is the real one; the wrong lanes are random. The mean of 300 runs is near the formula."""
    layout, every = layout_of(world, lanes, shares), 50
    for bad in (layout.workers[0], layout.workers[-1]):
        dice, delays = random.Random(bad), []
        for run in range(300):
            step = 0
            while True:
                step += every
                check = lane_check(layout, step, seed=run, every=every)
                assert check is not None
                if bad in (check.worker, check.checker) and dice.random() < wrong_share:
                    break
            delays.append(step)
        expected = expected_delay_steps(wrong_share, len(layout.lanes_of(bad)) / lanes, world, every)
        assert 0.75 * expected < sum(delays) / len(delays) < 1.25 * expected
        assert sum(delays) / len(delays) <= 2 * expected


def test_the_formula() -> None:
    assert expected_delay_steps(0.1, 0.25, 4, 50) == pytest.approx(1000)
    assert expected_delay_steps(0.1, 0.5, 2, 50) == pytest.approx(500)
    assert expected_delay_steps(1.0, 1 / 8, 8, 50) == pytest.approx(200)


# --- who was wrong ---


@settings(max_examples=200)
@given(st.integers(3, 7), st.data())
def test_most_workers_outvote_one_that_is_wrong_then_or_now(world: int, data: st.DataObject) -> None:
    bad = data.draw(st.integers(0, world - 1))
    partner = data.draw(st.sampled_from([w for w in range(world) if w != bad]))
    right, wrong = 1, data.draw(st.integers(2, 9))
    first = {bad: wrong, partner: right}
    again = dict.fromkeys(range(world), right) | {bad: data.draw(st.sampled_from([right, wrong, 77]))}
    assert judge_lane(first, again) == LaneVerdict(named={bad})


@pytest.mark.parametrize(
    ("first", "again", "verdict"),
    [
        ((5, 1), (1, 1), LaneVerdict(named={0})),  # it computes right the second time
        ((5, 1), (6, 1), LaneVerdict(named={0})),  # it contradicts itself
        ((1, 5), (1, 6), LaneVerdict(named={1})),
        ((5, 1), (5, 5), LaneVerdict(named={1})),
        ((5, 1), (5, 1), LaneVerdict(undecided={0, 1})),
        ((5, 1), (6, 7), LaneVerdict(recipe=True)),
    ],
)
def test_two_workers(first: tuple[int, int], again: tuple[int, int], verdict: LaneVerdict) -> None:
    found = judge_lane(dict(enumerate(first)), dict(enumerate(again)))
    assert found == verdict


def test_a_recipe_that_is_not_deterministic_is_nobodys_fault() -> None:
    assert judge_lane({0: 1, 1: 2}, {0: 3, 1: 4, 2: 5, 3: 6}).recipe
    assert judge_lane({0: 1, 1: 2}, {0: 1, 1: 2, 2: 1, 3: 2}) == LaneVerdict(undecided={0, 1, 3})


# --- how far back ---


def test_the_last_good_step() -> None:
    health = Health()
    health.joined([1, 2, 3], 10)
    health.took(LaneCheck(0, 1, 2), 50)
    health.took(LaneCheck(1, 2, 1), 90)
    health.joined([4], 60)
    assert health.good_step({1}, "since_last_check") == 90
    assert health.good_step({1}, "since_it_joined") == 10
    assert health.good_step({3}, "since_last_check") == 10
    assert health.good_step({1, 3}, "since_last_check") == 10
    assert health.good_step({4}, "since_last_check") == 60
    health.went_back(55)
    assert health.good_step({1}, "since_last_check") == 55
    assert health.good_step({4}, "since_it_joined") == 55


@given(
    st.lists(st.dictionaries(st.integers(0, 3), st.integers(0, 50)), min_size=2, max_size=4),
    st.lists(st.dictionaries(st.integers(0, 3), st.integers(0, 50)), min_size=2, max_size=4),
)
def test_whoever_merges_first_all_know_the_same(since: list[dict[int, int]], passed: list[dict[int, int]]) -> None:
    parts = [Health(dict(a), dict(b)) for a, b in zip(since, passed, strict=False)]
    one, other = Health(), Health()
    for part in parts:
        one.merge(part)
    for part in reversed(parts):
        other.merge(part)
    assert one == other


def test_of_several_doubts_the_one_that_trusts_least_counts() -> None:
    assert less_trusting(None, Doubt(4, "a"), Doubt(2, "b")) == Doubt(2, "b")
    assert less_trusting(None) is None
