"""An order with holes: what was used before stays, the holes are never used again, nothing else is lost or repeated."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from elastictrain.data.holes import Hole, HoledOrder
from elastictrain.data.order import LaneOrder
from elastictrain.errors import DataError

Sample = tuple[int, int]


@st.composite
def base_orders(draw: st.DrawFn) -> LaneOrder:
    lanes, size = draw(st.integers(1, 4)), draw(st.integers(1, 3))
    rows = draw(st.lists(st.integers(0, 17), min_size=1, max_size=12))
    rows.append(4 * lanes * size)
    return LaneOrder(
        rows, seed=draw(st.integers(0, 99)), lanes=lanes, lane_batch_size=size,
        window_blocks=draw(st.integers(1, 3)), shuffle=draw(st.booleans()),
    )  # fmt: skip


@st.composite
def cases(draw: st.DrawFn) -> tuple[LaneOrder, list[Hole]]:
    order = draw(base_orders())
    holes, at = [], 0
    filled = np.flatnonzero(order.block_rows).tolist()
    for _ in range(draw(st.integers(1, 4))):
        block = draw(st.sampled_from(filled))
        rows = int(order.block_rows[block])
        start = draw(st.integers(0, rows - 1))
        at += draw(st.integers(0, 2 * order.steps_per_epoch))
        holes.append(Hole(block, start, draw(st.integers(start + 1, min(rows, start + 6))), at))
    return order, holes


def batch(order: LaneOrder | HoledOrder, step: int, lane: int) -> list[Sample]:
    blocks, rows = order.samples_of(step, lane)
    return list(zip(blocks.tolist(), rows.tolist(), strict=True))


def holed(order: LaneOrder, holes: list[Hole]) -> HoledOrder | None:
    try:
        return HoledOrder(order, holes)
    except DataError:  # the holes leave too little; `test_too_much_is_refused` looks at the words
        return None


def row_of_samples(order: LaneOrder, epoch: int, lane: int) -> list[Sample]:
    first = epoch * order.steps_per_epoch
    return [sample for step in range(first, first + order.steps_per_epoch) for sample in batch(order, step, lane)]


def model(order: LaneOrder, holes: list[Hole], steps: int) -> list[list[list[Sample]]]:
    """The batches, lane by lane, from lists: every epoch is the base's, from which each hole is struck in turn."""
    found: list[list[list[Sample]]] = []
    rows: list[list[Sample]] = []
    epoch, inside, made = -1, 0, 0
    while len(found) < steps:
        if epoch < 0 or min(map(len, rows)) < (inside + 1) * order.lane_batch_size:
            epoch, inside = epoch + 1, 0
            rows = [row_of_samples(order, epoch, lane) for lane in range(order.lanes)]
            gone = {(h.block, r) for h in holes[:made] for r in range(h.start, h.stop)}
            rows = [[sample for sample in row if sample not in gone] for row in rows]
            # A hole of this very step strikes below; an epoch that nothing is left of is passed over.
        while made < len(holes) and holes[made].at == len(found):
            hole, used = holes[made], inside * order.lane_batch_size
            struck = {(hole.block, r) for r in range(hole.start, hole.stop)}
            rows = [row[:used] + [s for s in row[used:] if s not in struck] for row in rows]
            made += 1
        if min(map(len, rows)) < (inside + 1) * order.lane_batch_size:
            continue
        at = inside * order.lane_batch_size
        found.append([row[at : at + order.lane_batch_size] for row in rows])
        inside += 1
    return found


@settings(max_examples=300, deadline=None)
@given(cases())
def test_batches_are_those_of_striking_samples_from_lists(case: tuple[LaneOrder, list[Hole]]) -> None:
    order, holes = case
    with_holes = holed(order, holes)
    if with_holes is None:
        return
    steps = holes[-1].at + 2 * order.steps_per_epoch
    expected = model(order, holes, steps)
    got = [[batch(with_holes, step, lane) for lane in range(order.lanes)] for step in range(steps)]
    assert got == expected


@settings(max_examples=150, deadline=None)
@given(cases())
def test_before_a_hole_nothing_changes_and_after_it_none_of_it_is_used(case: tuple[LaneOrder, list[Hole]]) -> None:
    order, holes = case
    layers = [holed(order, holes[:count]) for count in range(len(holes) + 1)]
    for before, after, hole in zip(layers, layers[1:], holes, strict=False):
        if before is None or after is None:
            return
        for step in range(hole.at):
            assert all(batch(before, step, lane) == batch(after, step, lane) for lane in range(order.lanes))
        gone = {(hole.block, row) for row in range(hole.start, hole.stop)}
        for step in range(hole.at, hole.at + order.steps_per_epoch):
            assert not gone & {s for lane in range(order.lanes) for s in batch(after, step, lane)}


@settings(max_examples=150, deadline=None)
@given(cases())
def test_no_sample_comes_twice_in_an_epoch_and_only_ends_of_lanes_are_left_out(
    case: tuple[LaneOrder, list[Hole]],
) -> None:
    order, holes = case
    with_holes = holed(order, holes)
    if with_holes is None:
        return
    steps = holes[-1].at + 2 * order.steps_per_epoch
    by_epoch = itertools.groupby(range(steps), key=lambda step: with_holes.locate_step(step)[0])
    for number, (epoch, members) in enumerate(by_epoch):
        assert epoch >= number
        used = [s for step in members for lane in range(order.lanes) for s in batch(with_holes, step, lane)]
        assert len(used) == len(set(used))


def test_a_hole_costs_the_epoch_no_more_than_the_batches_of_its_own_lane() -> None:
    order = LaneOrder([40] * 4, seed=3, lanes=2, lane_batch_size=2)
    epoch = HoledOrder(order, [Hole(1, 0, 4, 0)])
    assert order.steps_per_epoch - epoch.steps_per_epoch in (1, 2)


@pytest.mark.parametrize("hole", [Hole(4, 0, 1, 0), Hole(0, 3, 3, 0), Hole(-1, 0, 1, 0), Hole(0, 0, 1, -1)])
def test_a_hole_that_is_not_there_is_refused(hole: Hole) -> None:
    with pytest.raises(IndexError, match="expected a block below 4"):
        HoledOrder(LaneOrder([40] * 4, seed=3, lanes=2, lane_batch_size=2), [hole])


def test_too_much_is_refused() -> None:
    with pytest.raises(DataError, match=r"cannot all be skipped: .*Skip fewer, or lower lanes or lane_batch_size"):
        HoledOrder(LaneOrder([8], seed=3, lanes=2, lane_batch_size=2), [Hole(0, 0, 7, 0)])
