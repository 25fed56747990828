"""Who may compute what, who should, and who has: whatever is claimed by whom, every lane counts once."""

from __future__ import annotations

from collections import Counter
from itertools import chain, combinations
from math import inf

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from elastictrain.layout import deal_lanes
from elastictrain.redundancy import (
    SLACK,
    Claim,
    Lanes,
    Pace,
    Sharing,
    Way,
    agreed,
    group_of,
    groups_of,
    is_late,
    most_roots,
    next_take_s,
    read_claim,
    say_lanes,
    second_holders,
    sharing_of,
    taken_over,
    to_take,
)
from elastictrain.sim.shared import shared_step
from elastictrain.tree import most_sums, roots


@st.composite
def splits(draw: st.DrawFn, least: int = 1) -> Lanes:
    counts = draw(st.lists(st.integers(1, 9), min_size=least, max_size=8))
    return deal_lanes(sum(counts), counts, draw(st.sampled_from(["contiguous", "round_major"])))


def even(workers: int, each: int) -> Lanes:
    return deal_lanes(workers * each, [1.0] * workers, "contiguous")


KINDS = st.lists(st.sampled_from("ab"), min_size=8, max_size=8)


@given(splits(), st.integers(1, 5), st.booleans(), KINDS)
def test_a_lane_has_at_most_one_second_holder_of_the_same_kind(
    lanes: Lanes, depth: int, firsts: bool, kinds: list[str]
) -> None:
    sharing = second_holders(lanes, depth, firsts=firsts, kinds=kinds[: len(lanes)])
    assert all(count == 1 for count in Counter(lane for more in sharing.second for lane in more).values())
    for rank, more in enumerate(sharing.second):
        for lane in more:
            owner, place = sharing.owner(lane)
            assert owner != rank
            assert kinds[owner] == kinds[rank]
            assert place >= len(lanes[owner]) - depth
            assert firsts or place > 0
    for owner, own in enumerate(lanes):
        alike = sum(kind == kinds[owner] for kind in kinds[: len(lanes)]) - 1
        expected = min(depth, len(own) - (not firsts)) if alike else 0
        assert sum(lane in sharing.shared for lane in own) == expected


def test_the_last_lanes_of_a_worker_have_different_second_holders() -> None:
    sharing = second_holders(even(4, 4), 2, firsts=False)
    assert sharing.second == ((10, 15), (3, 14), (2, 7), (6, 11))
    assert sharing.most == 6


@given(splits(), st.integers(2, 5), KINDS)
def test_a_group_has_the_same_lanes(lanes: Lanes, size: int, kinds: list[str]) -> None:
    kinds = kinds[: len(lanes)]
    sharing = groups_of(lanes, size, kinds=kinds)
    for rank in range(len(lanes)):
        members = group_of(rank, len(lanes), size, kinds)
        assert rank in members
        assert len({kinds[other] for other in members}) == 1
        everything = sorted(lane for other in members for lane in lanes[other])
        assert sorted(lanes[rank] + sharing.second[rank]) == everything
        assert all(group_of(other, len(lanes), size, kinds) == members for other in members)


@settings(max_examples=300)
@given(splits(2), st.integers(1, 4), st.booleans(), st.data())
def test_every_lane_is_computed_once_and_nobody_waits_much_longer_for_it(
    lanes: Lanes, depth: int, firsts: bool, data: st.DataObject
) -> None:
    """Whatever was usual, whatever this step is like: at worst the lanes of who helps, at the pace that it has now."""
    sharing = second_holders(lanes, depth, firsts=firsts)
    world, some = len(lanes), st.floats(0.01, 10)
    usual_s = data.draw(st.lists(st.one_of(st.just(0.0), some), min_size=world, max_size=world))
    lane_s = data.draw(st.lists(some, min_size=world, max_size=world))
    found, ends_s = shared_step(sharing, lane_s, usual_s)
    count = sum(map(len, lanes))
    assert sorted(lane for own in found for lane in own) == list(range(count))
    for rank, own in enumerate(found):
        assert set(own) <= set(lanes[rank]) | set(sharing.second[rank])
        assert firsts or lanes[rank][0] in own
    alone_s = max(len(own) * one for own, one in zip(lanes, lane_s, strict=True))
    assert max(ends_s) <= alone_s + max(lane_s) * (1 + depth)


@given(splits(2), st.integers(1, 4), st.floats(0.01, 10))
def test_where_everything_is_as_usual_nothing_is_taken_over(lanes: Lanes, depth: int, lane_s: float) -> None:
    """Lanes are dealt out by speed: all are done at about the same time."""
    counts = [len(own) for own in lanes]
    own_s = [lane_s / count for count in counts]
    found, _ = shared_step(second_holders(lanes, depth, firsts=True), own_s, own_s)
    assert found == tuple(tuple(sorted(own)) for own in lanes)


def test_a_hiccup_is_shared_by_the_others() -> None:
    """Of four workers with eight lanes one takes three times as long: alone it would take 24. It goes on with the lane
    that it begins just before somebody else would."""
    usual_s, lane_s = [1.0] * 4, [1.0, 3.0, 1.0, 1.0]
    sharing = second_holders(even(4, 8), 6, firsts=False)
    found, ends_s = shared_step(sharing, lane_s, usual_s)
    assert max(ends_s) == 12.0
    assert found[1] == (8, 9, 10, 11)
    assert sorted(map(len, found)) == [4, 9, 9, 10]
    late, _ = shared_step(second_holders(even(4, 8), 2, firsts=False), lane_s, usual_s)
    assert len(late[1]) == 6, "only lanes that have a second holder"


@settings(max_examples=300)
@given(splits(2), st.integers(1, 4), st.booleans(), st.data())
def test_who_waits_wakes_up_when_there_is_something_to_take(
    lanes: Lanes, depth: int, firsts: bool, data: st.DataObject
) -> None:
    sharing = second_holders(lanes, depth, firsts=firsts)
    usual_s = data.draw(st.lists(st.floats(0.01, 10), min_size=len(lanes), max_size=len(lanes)))
    rank = data.draw(st.integers(0, len(lanes) - 1))
    now_s = data.draw(st.floats(0, 50))
    tried = set(data.draw(st.lists(st.sampled_from(sharing.second[rank])))) if sharing.second[rank] else set()
    while wanted := to_take(sharing, rank, tried, now_s, usual_s):
        tried.update(wanted)
    next_s = next_take_s(sharing, rank, tried, now_s, usual_s)
    end_s = max(len(own) * one for own, one in zip(lanes, usual_s, strict=True))
    if next_s == inf:
        for part in range(1, 20):  # nothing comes before the usual end
            later_s = now_s + part / 20 * (end_s - now_s)
            assert later_s < now_s or not to_take(sharing, rank, tried, later_s, usual_s)
        return
    assert now_s < next_s < end_s
    assert to_take(sharing, rank, tried, next_s, usual_s)
    for part in range(20):
        assert not to_take(sharing, rank, tried, now_s + part / 20 * (next_s - now_s), usual_s)
    unknown = [*usual_s[:-1], 0.0]
    assert next_take_s(sharing, rank, tried, now_s, unknown) == inf


def test_a_lane_that_becomes_late_after_the_others_are_done_is_taken() -> None:
    """Worker 0 has half the lanes and is done after two seconds; worker 1 stands still in its second one."""
    sharing = second_holders(((0, 1), (2, 3, 4, 5)), 2, firsts=False)
    assert to_take(sharing, 0, (), 2.0, (1.0, 1.0)) == (5,), "it would be done with it earlier"
    assert to_take(sharing, 0, (5,), 2.0, (1.0, 1.0)) == ()
    assert next_take_s(sharing, 0, (5,), 2.0, (1.0, 1.0)) == 2.25
    found, ends_s = shared_step(second_holders(((0, 1), (2, 3, 4, 5)), 1, firsts=False), (1.4, 3.0), (1.3, 1.0))
    assert found == ((0, 1, 5), (2, 3, 4)), "at 3.25 s, done with its own since 2.8 s"
    assert ends_s == (4.65, 9.0)


def test_a_slow_device_takes_nothing_from_a_fast_one() -> None:
    sharing = second_holders((tuple(range(8)), (8, 9)), 2, firsts=False)
    usual_s = (1.0, 4.0)
    assert to_take(sharing, 1, (), 8.0, usual_s) == (), "it would need four times as long for it"
    assert to_take(sharing, 0, (), 8.0, usual_s) == (9,), "the other way round it pays"
    assert to_take(sharing, 0, (9,), 8.0, usual_s) == ()
    assert to_take(sharing, 0, (), 8.0, (1.0, 0.0)) == to_take(sharing, 0, (), 8.0, (0.0, 4.0)) == (), "unknown"


def test_what_may_have_been_begun_just_now_is_left_alone() -> None:
    """Less than a quarter of a lane is noise: who is early by it takes nothing, unless it is done well before."""
    sharing = second_holders((tuple(range(7)), tuple(range(7, 15))), 1, firsts=False)
    assert sharing.second == ((14,), (6,))
    assert to_take(sharing, 0, (), 7.2, (1.0, 1.0)) == ()
    assert to_take(sharing, 0, (), 7.3, (1.0, 1.0)) == (14,)
    assert to_take(sharing, 0, (), 7.0, (0.7, 1.0)) == (14,)
    assert to_take(sharing, 0, (), 7.0, (0.8, 1.0)) == ()


def test_a_copy_is_begun_when_the_wait_has_cost_as_much() -> None:
    sharing = second_holders(even(2, 4), 1, firsts=True)
    lane = sharing.second[0][0]
    assert not is_late(sharing, lane, 4.9, (1.0, 1.0), 1.0)
    assert is_late(sharing, lane, 5.0, (1.0, 1.0), 1.0)
    assert not is_late(sharing, lane, 4.9 + SLACK, (1.0, 1.0), 2.0)
    assert not is_late(sharing, lane, 4.2, (1.0, 1.0), 0.01), "less is noise"
    assert not is_late(sharing, lane, 99.0, (1.0, 0.0), 1.0)
    assert not is_late(sharing, lane, 99.0, (1.0, 1.0), 0.0)


def test_a_hiccup_does_not_change_what_is_usual() -> None:
    pace = Pace(2)
    assert pace.usual_s() == (0.0, 0.0)
    for step in range(8):
        pace.learn([1.0 if step != 5 else 50.0, 0.0])
    assert pace.usual_s() == (1.0, 0.0)
    pace.learn([float("nan"), -1.0])
    pace.learn([float("inf"), 2.0])
    assert pace.usual_s() == (1.0, 2.0)
    for _ in range(5):
        pace.learn([3.0, 2.0])
    assert pace.usual_s() == (3.0, 2.0), "and what lasts does"


@given(splits(2), st.integers(0, 10**9), st.randoms())
def test_what_all_have_said_is_what_everybody_knows(lanes: Lanes, step: int, rng: object) -> None:
    count = sum(map(len, lanes))
    said = [say_lanes(step, own, count) for own in lanes]
    assert len({len(one) for one in said}) == 1
    found, dropped = agreed(said, step, count)
    assert not dropped
    assert found == tuple(tuple(sorted(own)) for own in lanes)
    assert taken_over(lanes, found) == ()
    with pytest.raises(ValueError, match="nobody has lanes \\["):
        agreed([say_lanes(step, (), count), *said[1:]], step, count)
    with pytest.raises(ValueError, match="several have lanes \\["):
        agreed([say_lanes(step, range(count), count), *said[1:]], step, count)
    with pytest.raises(ValueError, match=f"in step {step + 1} lanes of steps"):
        agreed(said, step + 1, count)


def test_who_has_taken_over_what() -> None:
    assert taken_over(((0, 1), (2, 3)), ((0, 3), (1, 2))) == ((1, 0, 1), (3, 1, 0))


@given(st.integers(0, 10**12), st.integers(0, 10**5), st.booleans())
def test_a_claim_comes_back(step: int, rank: int, done: bool) -> None:
    claim = Claim(step, rank, done)
    assert read_claim(claim.encode()) == claim
    assert all(read_claim(text) is None for text in ("", "?", ":", "1:", ":1", "a:b", "1:2:3"))


@settings(max_examples=200)
@given(splits(2), st.integers(1, 8), st.sampled_from(["take_over", "first_result", "coded"]), st.data())
def test_what_is_handed_over_has_room(lanes: Lanes, depth: int, way: Way, data: st.DataObject) -> None:
    """Whichever of its shared lanes others have, whichever of theirs it has, in whatever order it takes them."""
    count = sum(map(len, lanes))
    sharing = sharing_of(way, lanes, depth=depth, group=2)
    rank = data.draw(st.integers(0, len(lanes) - 1))
    at_once, handed = most_roots(sharing, way, count)[rank]
    own, second = sharing.lanes[rank], sharing.second[rank]
    if way == "coded":
        order = sorted(own + second)
    else:
        lost = data.draw(st.sets(st.sampled_from(own))) & sharing.shared
        more = data.draw(st.lists(st.sampled_from(second), unique=True)) if second else []
        order = [lane for lane in own if lane not in lost] + more
    assert len(roots(order, count)) <= handed
    # A copy, while it is computed, has a sum of its own.
    assert most_sums(tuple(order), count, apart=way == "first_result") <= at_once


@settings(max_examples=60)
@given(splits(2), st.integers(1, 4), st.data())
def test_no_more_room_is_asked_for_than_may_be_needed(lanes: Lanes, depth: int, data: st.DataObject) -> None:
    count = sum(map(len, lanes))
    sharing = sharing_of("first_result", lanes, depth=depth, group=2)
    rank = data.draw(st.integers(0, len(lanes) - 1))
    own, second = sharing.lanes[rank], sharing.second[rank]
    kept = set(own) - sharing.shared
    perhaps = [*(lane for lane in own if lane in sharing.shared), *second]
    assume(len(perhaps) <= 10)
    subsets = chain.from_iterable(combinations(perhaps, n) for n in range(len(perhaps) + 1))
    assert most_roots(sharing, "first_result", count)[rank][1] == max(
        len(roots({*kept, *some}, count)) for some in subsets
    )


def test_a_lost_lane_that_is_not_the_last_one_may_leave_most() -> None:
    """24 lanes, 3 workers: its own lanes 1 and 4 are lost, and it has all lanes of others that it may have."""
    sharing = sharing_of("take_over", even(3, 8), depth=7, group=2)
    lanes = {0, 2, 3, 5, 6, 7, *sharing.second[0]}
    assert len(roots(lanes, 24)) == most_roots(sharing, "take_over", 24)[0][1] == 11


def test_a_model_with_integer_buffers_keeps_a_lane_with_every_worker() -> None:
    lanes = even(3, 1)
    assert sharing_of("first_result", lanes, depth=2, group=2).shared == {0, 1, 2}
    assert sharing_of("first_result", lanes, depth=2, group=2, counters=True).shared == set()
    assert sharing_of("take_over", lanes, depth=2, group=2).shared == set()
    assert sharing_of("none", lanes, depth=2, group=2) == Sharing(lanes, ((), (), ()))
