"""Splits that are offered: whatever is said in which order, workers switch together or not at all."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from elastictrain.layout import Layout, Shard, deal_lanes
from elastictrain.offers import first_split, mark_of

LANES = 6


def layout(world: int = 3) -> Layout:
    lanes = deal_lanes(LANES, [1.0] * world, "contiguous")
    return Layout(7, tuple(range(world)), lanes, (Shard(0, 1, 0, None),), LANES)


def dealt(*counts: int) -> tuple[tuple[int, ...], ...]:
    return deal_lanes(LANES, counts, "contiguous")


def test_the_newest_controller_counts_and_its_highest_number() -> None:
    first = first_split(layout())
    newest = first.after(7, 2, dealt(4, 1, 1), 1)
    assert (newest.lanes, newest.epoch, newest.number) == (dealt(4, 1, 1), 1, 2)
    assert newest.after(7, 1, dealt(1, 4, 1), 1) == newest, "overtaken by a newer one on its way"
    assert newest.after(7, 2, dealt(1, 4, 1), 1) == newest, "another split under a number that was given away"
    assert newest.after(7, 9, dealt(1, 1, 4), 0) == newest, "a controller that was replaced"
    newer = newest.after(7, 1, dealt(1, 1, 4), 2)
    assert newer.lanes == dealt(1, 1, 4), "a new controller does not know of number 2"
    assert newer.after(7, 2, dealt(3, 2, 1), 2).lanes == dealt(3, 2, 1)


@pytest.mark.parametrize("lanes", [dealt(4, 2), dealt(2, 2, 1, 1), ((0, 1), (2, 3), ()), ((0, 1), (2, 3), (4,)),
                                   ((0, 1), (2, 3), (4, 4)), ((0, 1, 2, 3), (4,), (6,))])  # fmt: skip
def test_what_does_not_deal_out_these_lanes_is_not_taken(lanes: tuple[tuple[int, ...], ...]) -> None:
    first = first_split(layout())
    assert first.after(7, 1, lanes, 5) == first
    assert first.after(6, 1, dealt(4, 1, 1), 5) == first, "of another generation"


def test_a_mark_names_the_split_and_nothing_else() -> None:
    """Where one worker's lanes end is part of it; the type in which it came is not."""
    assert mark_of(((0, 1), (2,))) != mark_of(((0,), (1, 2)))
    assert mark_of(((0, 2), (1,))) != mark_of(((0, 1), (2,)))
    told = first_split(layout()).after(7, 1, [[0, 1, 2, 3], [4], [5]], 1)  # type: ignore[arg-type]
    assert told.mark == mark_of(dealt(4, 1, 1))
    assert 0 <= told.mark < 1 << 63


SPLITS = [dealt(*counts) for counts in ((2, 2, 2), (4, 1, 1), (1, 4, 1), (1, 1, 4), (3, 2, 1))]
ORDERS = st.tuples(st.integers(0, 3), st.integers(0, 3), st.integers(0, 4), st.integers(0, 2))


@settings(max_examples=300, deadline=None)
@given(st.lists(st.tuples(ORDERS, st.booleans()), max_size=40))
def test_all_switch_to_the_same_split_or_nobody_does(script: list[tuple[tuple[int, int, int, int], bool]]) -> None:
    """Controllers that contradict each other and themselves, orders that get lost or come late, votes in between:
    every worker computes under the same split at all times.
    """
    named = [first_split(layout()) for _ in range(3)]
    in_force = list(named)
    for (epoch, number, which, worker), votes in script:
        named[worker] = named[worker].after(7, number, SPLITS[which], epoch)
        if votes and len({split.mark for split in named}) == 1:  # what `VoteFormat.tally` says
            in_force = list(named)
        assert len({split.lanes for split in in_force}) == 1


@settings(max_examples=100, deadline=None)
@given(st.permutations([(0, 1, 0), (0, 2, 1), (1, 0, 0), (1, 1, 2), (1, 2, 3), (2, 0, 4)]), st.integers(1, 6))
def test_the_order_in_which_offers_come_does_not_matter(orders: list[tuple[int, int, int]], count: int) -> None:
    """Each controller says one thing under a number; so all who have heard the same have the same."""
    one = other = first_split(layout())
    for epoch, number, which in orders[:count]:
        one = one.after(7, number, SPLITS[which], epoch)
    for epoch, number, which in sorted(orders[:count]):
        other = other.after(7, number, SPLITS[which], epoch)
    assert one == other


def test_a_split_with_the_same_lanes_is_no_change() -> None:
    """A controller that is back offers what is in force already: the mark is the same, so nobody switches."""
    again = first_split(layout()).after(7, 0, layout().lanes, 3)
    assert again == replace(first_split(layout()), epoch=3)
    assert again.mark == first_split(layout()).mark
