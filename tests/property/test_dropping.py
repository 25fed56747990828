"""Which lanes of a step may be dropped, when they are, and what is left: the same for all, never more than may be."""

from __future__ import annotations

import math
from itertools import combinations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from elastictrain.layout import deal_lanes
from elastictrain.redundancy import (
    SLACK,
    Lanes,
    agreed,
    drop_from_s,
    droppable_lanes,
    most_roots,
    say_lanes,
    sharing_of,
)
from elastictrain.tree import Node, finish, most_sums, roots, whole
from tests.property.test_redundancy import even, splits


@given(splits(), st.integers(1, 5), st.booleans())
def test_only_the_last_lanes_of_a_worker_may_be_dropped(lanes: Lanes, at_most: int, firsts: bool) -> None:
    sharing = droppable_lanes(lanes, at_most, firsts=firsts)
    assert sharing.second == tuple(() for _ in lanes)
    assert sharing.shared == sharing.shown >= sharing.droppable
    for own in lanes:
        assert [lane for lane in own if lane in sharing.shown] == list(own[-at_most:])
        assert (own[0] in sharing.droppable) == (firsts and len(own) <= at_most)
    assert sharing_of("drop_slowest", lanes, depth=at_most, group=2, counters=not firsts) == sharing


@given(splits(2), st.integers(1, 4), st.data())
def test_what_is_late_is_dropped_when_the_wait_has_cost_what_it_is_worth(
    lanes: Lanes, at_most: int, data: st.DataObject
) -> None:
    sharing = droppable_lanes(lanes, at_most, firsts=True)
    some = st.floats(0.01, 10)
    usual_s = data.draw(st.lists(some, min_size=len(lanes), max_size=len(lanes)))
    undone = data.draw(st.sets(st.sampled_from(sorted(sharing.droppable)), min_size=1, max_size=at_most))
    since_s = data.draw(st.floats(0, 100))
    found_s = drop_from_s(sharing, undone, since_s, usual_s)
    step_s = max(len(own) * one for own, one in zip(lanes, usual_s, strict=True))
    for lane in undone:
        rank, place = sharing.owner(lane)
        assert found_s >= (place + 1 + SLACK) * usual_s[rank] * (1 - 1e-12), "nobody is dropped for its usual pace"
    grace_s = found_s - max(since_s, *((p + 1) * usual_s[r] for r, p in map(sharing.owner, undone)))
    assert grace_s <= step_s * (1 + 1e-9), "no wait for more than a step"
    assert grace_s >= step_s * len(undone) / sum(map(len, lanes)) - 1e-9
    assert drop_from_s(sharing, undone, since_s + 1.0, usual_s) >= found_s
    for fewer in combinations(sorted(undone), len(undone) - 1):
        assert not fewer or drop_from_s(sharing, fewer, since_s, usual_s) <= found_s, "the fewer the sooner"
    unknown = data.draw(st.integers(0, len(lanes) - 1))
    assert drop_from_s(sharing, undone, since_s, [*usual_s[:unknown], 0.0, *usual_s[unknown + 1 :]]) == math.inf


def test_a_hiccup_in_numbers() -> None:
    """Four workers with four lanes of a second each; one is a lane behind. A lane is a sixteenth of four seconds."""
    sharing = droppable_lanes(even(4, 4), 2, firsts=True)
    usual_s = (1.0,) * 4
    assert drop_from_s(sharing, [7], 4.0, usual_s) == 4.25
    assert drop_from_s(sharing, [6, 7], 4.0, usual_s) == 4.5
    assert drop_from_s(sharing, [7], 2.0, usual_s) == 4.25, "the others were quicker than usual"
    assert drop_from_s(sharing, [7], 9.0, usual_s) == 9.25, "all are slow"
    assert drop_from_s(sharing, [7], 4.0, (1.0, 3.0, 1.0, 1.0)) == 12.75, "a slow device is not late"


@given(splits(2), st.integers(0, 10**9), st.data())
def test_all_know_what_was_dropped(lanes: Lanes, step: int, data: st.DataObject) -> None:
    count = sum(map(len, lanes))
    dropped = data.draw(st.sets(st.integers(0, count - 1), min_size=1))
    kept = [[lane for lane in own if lane not in dropped] for own in lanes]
    lost = [[lane for lane in own if lane in dropped] for own in lanes]
    said = [say_lanes(step, have, count, gone) for have, gone in zip(kept, lost, strict=True)]
    assert len({len(one) for one in said}) == 1
    found, without = agreed(said, step, count, at_most=len(dropped))
    assert found == tuple(tuple(sorted(own)) for own in kept)
    assert without == dropped
    with pytest.raises(ValueError, match=f"were dropped, of which there may be {len(dropped) - 1}"):
        agreed(said, step, count, at_most=len(dropped) - 1)
    missing = [say_lanes(step, have, count) for have in kept]
    with pytest.raises(ValueError, match="nobody has lanes"):
        agreed(missing, step, count, at_most=count)
    loser = next(rank for rank, gone in enumerate(lost) if gone)
    both = say_lanes(step, lanes[loser], count, lost[loser])
    with pytest.raises(ValueError, match="several have lanes"):
        agreed([*said[:loser], both, *said[loser + 1 :]], step, count, at_most=count)


@given(st.integers(1, 70), st.data())
def test_the_sum_without_some_is_the_same_however_the_others_are_dealt_out(count: int, data: st.DataObject) -> None:
    absent = data.draw(st.sets(st.integers(0, count - 1), max_size=count - 1))
    holder = data.draw(st.lists(st.integers(0, 4), min_size=count, max_size=count))
    present = [leaf for leaf in range(count) if leaf not in absent]

    def pair(left: object, right: object) -> object:
        return (left, right)

    parts: dict[Node, object] = {}
    for who in set(holder):
        mine = [leaf for leaf in present if holder[leaf] == who]
        leaves = {Node(leaf, leaf + 1): leaf for leaf in mine}
        parts |= {root: finish(leaves, pair, root) for root in roots(mine, count)}
    alone = {Node(leaf, leaf + 1): leaf for leaf in present}
    assert finish(parts, pair, whole(count), absent) == finish(alone, pair, whole(count), absent)
    if absent:
        with pytest.raises(KeyError, match="no part covers leaf"):
            finish(alone, pair, whole(count))


def test_a_sum_of_nothing_is_refused() -> None:
    with pytest.raises(KeyError, match=r"all leaves of 0 \.\. 2 are absent"):
        finish({}, lambda a, b: a, whole(3), {0, 1, 2})


def test_a_half_without_its_sibling_goes_up_as_it_is() -> None:
    leaves = {Node(leaf, leaf + 1): str(leaf) for leaf in (0, 3, 4)}
    assert finish(leaves, lambda a, b: f"({a}+{b})", whole(5), {1, 2}) == "((0+3)+4)"


@settings(max_examples=200)
@given(splits(2), st.integers(1, 8), st.data())
def test_what_is_handed_over_has_room(lanes: Lanes, at_most: int, data: st.DataObject) -> None:
    count = sum(map(len, lanes))
    sharing = droppable_lanes(lanes, at_most, firsts=True)
    rank = data.draw(st.integers(0, len(lanes) - 1))
    at_once, handed = most_roots(sharing, "drop_slowest", count)[rank]
    lost = data.draw(st.sets(st.sampled_from(lanes[rank])) if lanes[rank] else st.just(set())) & sharing.droppable
    kept = tuple(lane for lane in lanes[rank] if lane not in lost)
    assert len(roots(kept, count)) <= handed
    assert most_sums(kept, count, apart=True) <= at_once


def test_lanes_of_one_worker() -> None:
    lanes = deal_lanes(4, [1.0], "contiguous")
    assert droppable_lanes(lanes, 2, firsts=True).droppable == {2, 3}
