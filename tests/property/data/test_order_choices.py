"""Strict order, ragged ends by stated policy, and how well the window shuffle mixes."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from elastictrain.data.order import LaneOrder, StrictOrder
from elastictrain.data.quality import expected_blocks, mixing

block_rows = st.lists(st.integers(0, 9), min_size=1, max_size=12).filter(any)
sizes = st.tuples(st.integers(1, 5), st.integers(1, 4))
kinds = st.sampled_from(["window", "none", "strict"])


def make(kind: str, rows: list[int], lanes: int, size: int, *, repeat: bool) -> LaneOrder | StrictOrder:
    if kind == "strict":
        return StrictOrder(rows, seed=1, lanes=lanes, lane_batch_size=size, repeat=repeat)
    return LaneOrder(rows, seed=1, lanes=lanes, lane_batch_size=size, shuffle=kind == "window", repeat=repeat)


def epoch_of(order: LaneOrder | StrictOrder, epoch: int) -> list[list[tuple[int, int]]]:
    """The samples of every step, lane after lane."""
    first = epoch * order.steps_per_epoch
    found = []
    for step in range(first, first + order.steps_per_epoch):
        both = [order.samples_of(step, lane) for lane in range(order.lanes)]
        found.append([(int(b), int(r)) for blocks, rows in both for b, r in zip(blocks, rows, strict=True)])
    return found


@given(block_rows, sizes, st.integers(0, 2), st.booleans())
def test_strict_order_is_the_order_of_the_files(
    rows: list[int], size: tuple[int, int], epoch: int, repeat: bool
) -> None:
    order = make("strict", rows, *size, repeat=repeat)
    files = [(block, row) for block, count in enumerate(rows) for row in range(count)]
    got = [sample for step in epoch_of(order, epoch) for sample in step]
    assert got == [files[i % len(files)] for i in range(len(got))]
    assert len(got) - len(files) == order.repeated_per_epoch - order.dropped_per_epoch


@given(kinds, block_rows, sizes, st.integers(0, 2))
def test_repeating_uses_everything_and_repeats_less_than_a_step(
    kind: str, rows: list[int], size: tuple[int, int], epoch: int
) -> None:
    order = make(kind, rows, *size, repeat=True)
    used = Counter(sample for step in epoch_of(order, epoch) for sample in step)
    everything = {(block, row) for block, count in enumerate(rows) for row in range(count)}
    assert set(used) == everything
    assert order.dropped_per_epoch == 0
    assert sum(used.values()) - len(everything) == order.repeated_per_epoch < size[0] * size[1]
    assert max(used.values()) - min(used.values()) <= 1, "no sample is repeated before all were"


@given(kinds, block_rows, sizes)
def test_dropping_repeats_nothing(kind: str, rows: list[int], size: tuple[int, int]) -> None:
    order = make(kind, rows, *size, repeat=False)
    used = [sample for step in epoch_of(order, 0) for sample in step]
    assert len(used) == len(set(used)) == sum(rows) - order.dropped_per_epoch
    assert order.repeated_per_epoch == 0
    assert order.dropped_per_epoch < size[0] * size[1]


@given(kinds, block_rows, st.integers(1, 4), st.integers(0, 60), st.integers(0, 30), st.booleans())
def test_positions_count_through_epochs(
    kind: str, rows: list[int], lanes: int, start: int, length: int, repeat: bool
) -> None:
    order = make(kind, [*rows, lanes], lanes, 1, repeat=repeat)
    for lane in range(lanes):
        got = []
        for window, first, stop in order.spans_at(start, start + length, lane):
            blocks = np.concatenate([np.full(p.stop - p.start, p.block) for p in window.pieces])
            inside = np.concatenate([np.arange(p.start, p.stop) for p in window.pieces])
            chosen = window.permutation()[first:stop]
            got += list(zip(blocks[chosen].tolist(), inside[chosen].tolist(), strict=True))
        expected = []
        for step in range(start, start + length):
            block, row = order.samples_of(step, lane)
            expected.append((int(block[0]), int(row[0])))
        assert got == expected


def test_the_default_leaves_the_end_out() -> None:
    order = LaneOrder([10], seed=0, lanes=2, lane_batch_size=2)
    assert (order.steps_per_epoch, order.dropped_per_epoch, order.repeated_per_epoch) == (2, 2, 0)
    order = LaneOrder([10], seed=0, lanes=2, lane_batch_size=2, repeat=True)
    assert (order.steps_per_epoch, order.dropped_per_epoch, order.repeated_per_epoch) == (3, 0, 2)


@pytest.mark.parametrize("lanes", [1, 8])
@pytest.mark.parametrize("window", [1, 2, 4])
def test_a_step_comes_of_as_many_blocks_as_its_windows_promise(lanes: int, window: int) -> None:
    """Each lane draws from `window` blocks at least: at least as many differ as that many equal draws give."""
    order = LaneOrder([100] * 200, seed=2, lanes=lanes, lane_batch_size=16, window_blocks=window)
    promised = lanes * expected_blocks(np.full(window, 100), 16)
    found = mixing(order, steps=12)
    assert found.blocks_per_step >= 0.9 * promised
    assert found.blocks_per_step <= lanes * (2 * window), "a batch lies in two windows at most"
    assert 0 < found.quality <= 1.05


def test_one_window_over_everything_is_a_full_shuffle() -> None:
    order = LaneOrder([50] * 40, seed=5, lanes=1, lane_batch_size=32, window_blocks=40)
    assert mixing(order, steps=40).quality == pytest.approx(1.0, abs=0.03)


def test_wider_windows_and_more_lanes_mix_better_and_no_shuffle_hardly_at_all() -> None:
    def quality(**settings: int | bool) -> float:
        base = {"seed": 3, "lanes": 4, "lane_batch_size": 16, "window_blocks": 2}
        return mixing(LaneOrder([100] * 400, **{**base, **settings}), steps=12).quality  # type: ignore[arg-type]

    qualities = [quality(window_blocks=w) for w in (1, 2, 4, 8)]
    assert qualities == sorted(qualities)
    assert quality(lanes=16, lane_batch_size=4) > quality()
    assert quality(shuffle=False) < 0.15


def test_expected_blocks_of_a_full_shuffle() -> None:
    assert expected_blocks(np.asarray([5, 5]), 1) == pytest.approx(1)
    assert expected_blocks(np.asarray([5, 5]), 2) == pytest.approx(1.5)
    assert expected_blocks(np.asarray([7]), 3) == pytest.approx(1)
    assert expected_blocks(np.asarray([0, 7]), 3) == pytest.approx(1)


@pytest.mark.parametrize("kind", ["strict", "window"])
def test_places_that_do_not_exist(kind: str) -> None:
    order = make(kind, [10], 2, 1, repeat=False)
    for place in ((-1, 0, 0), (0, 2, 0), (0, 0, 5)):
        with pytest.raises(IndexError, match="expected epoch >= 0"):
            order.window_at(*place)
