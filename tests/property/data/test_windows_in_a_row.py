"""From window to window a lane passes through every epoch, and whole batches in a window are counted right."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from elastictrain.data import order as orders
from elastictrain.data.holes import Hole, HoledOrder
from elastictrain.data.order import LaneOrder, StrictOrder, permutation

SIZES = st.lists(st.integers(0, 30), min_size=1, max_size=12)


@given(SIZES, st.integers(1, 4), st.integers(1, 5), st.integers(1, 3), st.booleans())
def test_windows_follow_each_other_without_a_gap(
    sizes: list[int], lanes: int, size: int, window_blocks: int, repeat: bool
) -> None:
    order = LaneOrder(sizes, seed=5, lanes=lanes, lane_batch_size=size, window_blocks=window_blocks, repeat=repeat)
    if not sum(sizes) or not order.steps_per_epoch:
        return
    for lane in range(lanes):
        window, place = order.window_at(0, lane, 0), 0
        while window.epoch < 2:
            assert (window.epoch * order.samples_per_lane + window.start, window.lane) == (place, lane)
            place += window.stop - window.start
            window = order.after(window)
        assert (window.epoch, window.start, place) == (2, 0, 2 * order.samples_per_lane)


@given(SIZES, st.integers(1, 4), st.integers(1, 5), st.booleans())
def test_in_strict_order_the_next_window_is_the_first_with_something_of_another_block(
    sizes: list[int], lanes: int, size: int, repeat: bool
) -> None:
    order = StrictOrder(sizes, seed=5, lanes=lanes, lane_batch_size=size, repeat=repeat)
    for lane in range(lanes):
        row = [order.window_at(0, lane, step * size) for step in range(order.steps_per_epoch)]
        for at, window in enumerate(row):
            after = order.after(window)
            passed = row[at + 1 :] if after.epoch else row[at + 1 : after.number]
            assert (after.epoch, after.lane) in ((0, lane), (1, lane))
            assert all({p.block for p in one.pieces} <= {window.pieces[-1].block} for one in passed)
            assert after.epoch or len(passed) == after.number - at - 1
            if after.epoch:
                assert after.number == 0
            elif not repeat:
                assert {p.block for p in after.pieces} - {window.pieces[-1].block}


@given(SIZES, st.integers(1, 4), st.integers(1, 5), st.integers(1, 3), st.booleans())
def test_batches_of_a_window_that_lie_in_a_row_are_the_next_steps(
    sizes: list[int], lanes: int, size: int, window_blocks: int, strict: bool
) -> None:
    kind = StrictOrder if strict else LaneOrder
    order = kind(sizes, seed=5, lanes=lanes, lane_batch_size=size, window_blocks=window_blocks)
    for step in range(order.steps_per_epoch):
        for lane in range(lanes):
            (window, start, stop), *others = order.spans(step, lane)
            count = order.batches_in(window, start)
            assert (count == 0) == bool(others)
            for more in range(count):
                assert list(order.spans(step + more, lane)) == [(window, start + more * size, stop + more * size)]


def test_behind_a_hole_no_batches_are_known_to_lie_in_a_row() -> None:
    order = LaneOrder([20] * 6, seed=1, lanes=2, lane_batch_size=2)
    holed = HoledOrder(order, [Hole(1, 3, 8, 0)])
    window, start, _ = next(holed.spans(0, 0))
    assert holed.batches_in(window, start) == 1
    assert holed.after(window) == order.after(window)


def test_equal_sort_keys_keep_their_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(orders, "_MIX_2", np.uint64(1 << 63))  # leaves two keys only
    found = permutation(3, 1000)
    half = int(np.flatnonzero(np.diff(found) < 0)[0]) + 1
    assert 0 < half < 1000
    assert sorted(found.tolist()) == list(range(1000))
    assert np.all(np.diff(found[:half]) > 0)
    assert np.all(np.diff(found[half:]) > 0)
