"""Mixtures: exact counts at any position, and positions that go on over any change of weights."""

from __future__ import annotations

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from elastictrain.data.mixture import (
    ENDLESS,
    Apportionment,
    Schedule,
    Segment,
    join_plans,
    weights_from_amounts,
    weights_from_temperature,
)

weights = st.lists(st.integers(0, 1000), min_size=1, max_size=12).filter(any)
FAR = 10**15


@given(weights, st.integers(1, 16), st.data())
def test_counts_add_up_grow_one_by_one_and_stay_near_the_shares(
    chosen: list[int], lanes: int, data: st.DataObject
) -> None:
    dealt = Apportionment(chosen, lanes)
    lane = data.draw(st.integers(0, lanes - 1))
    start = data.draw(st.one_of(st.just(0), st.integers(0, 500), st.integers(FAR, FAR + 10**6)))
    before = dealt.counts(start, lane)
    for draws in range(start, start + 40):
        counts = dealt.counts(draws, lane)
        assert sum(counts) == draws
        assert sum(now - then for now, then in zip(counts, before, strict=True)) in (0, 1)
        assert all(0 <= now - then <= 1 for now, then in zip(counts, before, strict=True))
        for count, weight in zip(counts, chosen, strict=True):
            assert abs(count - Fraction(draws * weight, sum(chosen))) < 4
            assert weight or count == 0
        before = counts


@given(weights, st.integers(1, 40), st.integers(1, 4), st.integers(0, 10**6))
def test_a_step_of_all_lanes_is_near_the_shares_too(chosen: list[int], lanes: int, size: int, step: int) -> None:
    """Lanes are out of phase: with 40 lanes in phase, a source of share 1/40 would come all at once."""
    dealt = Apportionment(chosen, lanes)
    totals = [0] * len(chosen)
    for lane in range(lanes):
        for i, (now, then) in enumerate(
            zip(dealt.counts((step + 1) * size, lane), dealt.counts(step * size, lane), strict=True)
        ):
            totals[i] += now - then
    for total, weight in zip(totals, chosen, strict=True):
        assert abs(total - Fraction(lanes * size * weight, sum(chosen))) < 9


@given(st.integers(1, 99), st.integers(1, 40), st.integers(0, 10**6))
def test_two_sources_are_exact_over_all_lanes(share: int, lanes: int, draws: int) -> None:
    dealt = Apportionment([share, 100 - share], lanes)
    total = sum(dealt.counts(draws, lane)[0] for lane in range(lanes))
    assert abs(total - Fraction(draws * lanes * share, 100)) < 1


@given(weights, st.integers(1, 9), st.integers(0, FAR), st.integers(0, 60), st.data())
def test_dealing_is_what_the_counts_say(
    chosen: list[int], lanes: int, start: int, length: int, data: st.DataObject
) -> None:
    dealt = Apportionment(chosen, lanes)
    lane = data.draw(st.integers(0, lanes - 1))
    counts = dealt.counts(start, lane)
    for draw, source in enumerate(dealt.deal(start, start + length, lane), start=start + 1):
        counts[source] += 1
        assert counts == dealt.counts(draw, lane)


@given(weights, st.integers(2, 50), st.integers(1, 5))
def test_only_the_proportions_count(chosen: list[int], factor: int, lanes: int) -> None:
    one, other = Apportionment(chosen, lanes), Apportionment([factor * weight for weight in chosen], lanes)
    assert one.deal(0, 50, lanes - 1) == other.deal(0, 50, lanes - 1)


@st.composite
def schedules(draw: st.DrawFn) -> Schedule:
    steps = draw(st.lists(st.integers(1, 6), min_size=0, max_size=4))
    at, segments = draw(st.integers(0, 50)), []
    for gap in [0, *steps]:
        at += gap
        named = draw(st.dictionaries(st.sampled_from("abcd"), st.integers(1, 9), min_size=1))
        segments.append(Segment(at, named))
    return Schedule(segments, lanes=draw(st.integers(1, 4)), lane_batch_size=draw(st.integers(1, 5)))


@given(schedules())
def test_no_position_is_lost_or_repeated_over_any_changes(schedule: Schedule) -> None:
    for lane in range(schedule.lanes):
        used: dict[int, list[int]] = {i: [] for i in range(len(schedule.names))}
        for step in range(30):
            assert schedule.positions(step, lane) == [len(used[i]) for i in used]
            runs = schedule.runs(step, lane)
            assert sum(run.stop - run.start for run in runs) == schedule.lane_batch_size
            allowed = schedule.segments[schedule.segment_at(step)].weights
            for run in runs:
                assert allowed.get(schedule.names[run.source])
                used[run.source] += range(run.start, run.stop)
        assert all(positions == list(range(len(positions))) for positions in used.values())


@given(schedules(), st.integers(0, 10**12), st.data())
def test_any_step_is_found_without_those_before(schedule: Schedule, step: int, data: st.DataObject) -> None:
    lane = data.draw(st.integers(0, schedule.lanes - 1))
    fresh = Schedule(schedule.segments, lanes=schedule.lanes, lane_batch_size=schedule.lane_batch_size)
    assert fresh.runs(step, lane) == schedule.runs(step, lane)
    after = schedule.positions(step + 1, lane)
    ends = dict(enumerate(schedule.positions(step, lane)))
    ends |= {run.source: run.stop for run in schedule.runs(step, lane)}
    assert [ends[i] for i in range(len(after))] == after


@given(schedules(), st.integers(1, 40), st.integers(1, 9))
def test_appending_a_stage_leaves_the_past_alone(schedule: Schedule, gap: int, weight: int) -> None:
    last = schedule.segments[-1].from_step
    origin = schedule.segments[0].from_step
    added = Segment(last + gap, {"a": weight, "new": 3})
    changed = Schedule([*schedule.segments, added], lanes=schedule.lanes, lane_batch_size=schedule.lane_batch_size)
    for step in range(last + gap - origin):
        got = [(changed.names[r.source], r.start, r.stop) for r in changed.runs(step, 0)]
        assert got == [(schedule.names[r.source], r.start, r.stop) for r in schedule.runs(step, 0)]


def test_every_window_of_ten_thousand_is_within_a_thousandth_over_an_edit() -> None:
    segments = [Segment(0, {"a": 7, "b": 2, "c": 1}), Segment(5_000, {"a": 1, "b": 1, "c": 1})]
    schedule = Schedule(segments, lanes=4, lane_batch_size=2)
    ideal = {0: {"a": 0.7, "b": 0.2, "c": 0.1}, 1: dict.fromkeys("abc", 1 / 3)}
    for start in (0, 1_000, 2_500, 4_000, 4_999, 6_000):
        stop = start + 5_000
        for lane in range(4):
            got = [b - a for a, b in zip(schedule.positions(start, lane), schedule.positions(stop, lane), strict=True)]
            old = max(0, 5_000 - start) * 2
            for count, name in zip(got, schedule.names, strict=True):
                expected = old * ideal[0][name] + (10_000 - old) * ideal[1][name]
                assert abs(count - expected) <= 10


def test_plans_that_were_replaced_count_until_then() -> None:
    first = [Segment(0, {"a": 1}), Segment(10, {"a": 1, "b": 1}), Segment(20, {"b": 1})]
    second = [Segment(0, {"a": 1}), Segment(10, {"a": 1, "b": 1}), Segment(30, {"a": 5, "c": 1}, 8)]
    joined = join_plans([(0, first), (15, second)])
    assert joined == [Segment(0, {"a": 1}), Segment(10, {"a": 1, "b": 1}), Segment(30, {"a": 5, "c": 1}, 8)]
    assert join_plans([(0, first), (25, second)]) == [*first, Segment(25, {"a": 1, "b": 1}), second[2]]
    assert join_plans([(12, first)]) == [Segment(12, {"a": 1, "b": 1}), first[2]]
    assert join_plans([(5, first), (5, second)]) == join_plans([(5, second)])
    assert [Segment.from_json(segment.as_json()) for segment in joined] == joined


def test_amounts_are_the_decimals_that_they_are_written_as() -> None:
    assert weights_from_amounts({"b": 0.1, "a": 0.2, "c": 0}) == {"a": 2, "b": 1}
    assert weights_from_amounts({"a": 1, "b": 2.5}, {"a": 1000, "b": 10}) == {"a": 40, "b": 1}
    assert weights_from_amounts({"a": 1e-9, "b": 1}) == {"a": 1, "b": 10**9}


def test_temperature_goes_from_by_size_to_equal() -> None:
    sizes = {"a": 3_000_000, "b": 1_000_000}
    assert weights_from_temperature(sizes, 1) == {"a": 3, "b": 1}
    assert weights_from_temperature(sizes, 1e9) == {"a": 1, "b": 1}
    two = weights_from_temperature(sizes, 2)
    assert two["a"] / two["b"] == pytest.approx(3**0.5, rel=1e-4)
    assert weights_from_temperature({"a": 10**12, "b": 1}, 1) == {"a": 65536, "b": 1}


@pytest.mark.parametrize(("wrong", "lanes"), [([0, 0], 1), ([1, -1], 1), ([1], 0)])
def test_weights_that_mean_nothing(wrong: list[int], lanes: int) -> None:
    with pytest.raises(ValueError, match="expected weights >= 0, one above, lanes >= 1"):
        Apportionment(wrong, lanes)


def test_golden_vectors() -> None:
    """Runs that are resumed years later must find these: change them only with MIXTURE_VERSION."""
    dealt = Apportionment([7, 2, 1], 3)
    got = ["".join("abc"[source] for source in dealt.deal(0, 20, lane)) for lane in range(3)]
    assert got == GOLDEN_DEAL
    assert Apportionment([5, 4, 3, 2, 1], 8).counts(10**12 + 7, 5) == GOLDEN_COUNTS


GOLDEN_DEAL = ["aaabaabaacaaabaabaac", "aabaacaabaaabaacaaba", "abaabaacaaabaabaacaa"]
GOLDEN_COUNTS = [333333333335, 266666666669, 200000000002, 133333333334, 66666666667]


@given(st.data())
def test_steps_within_limits_are_as_many_as_every_lane_has_samples_for(data: st.DataObject) -> None:
    names = "abc"[: data.draw(st.integers(1, 3))]
    lanes, size = data.draw(st.integers(1, 5)), data.draw(st.integers(1, 4))
    segments, begin = [], 0
    for _ in range(data.draw(st.integers(1, 3))):
        chosen = data.draw(st.lists(st.integers(0, 5), min_size=len(names), max_size=len(names)).filter(any))
        segments.append(Segment(begin, {name: weight for name, weight in zip(names, chosen, strict=True) if weight}))
        begin += data.draw(st.integers(1, 6))
    schedule = Schedule(segments, lanes=lanes, lane_batch_size=size)
    limits = data.draw(st.dictionaries(st.sampled_from([*names, "stranger"]), st.integers(0, 60), min_size=1))

    def fits(steps: int) -> bool:
        return all(
            schedule.positions(steps, lane)[schedule.names.index(name)] <= limit
            for name, limit in limits.items()
            if name in schedule.names
            for lane in range(lanes)
        )

    found = schedule.steps_within(limits)
    assert fits(found)
    assert found == ENDLESS or not fits(found + 1)
    known = data.draw(st.integers(0, found))
    assert schedule.steps_within(limits, known) == found
    assert schedule.steps_within({}) == ENDLESS
