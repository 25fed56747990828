"""The order: a bijection on every epoch, whatever the split of lanes to workers, and stable for ever."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from elastictrain.data.order import LaneOrder, derive_key, permutation

block_rows = st.lists(st.integers(0, 23), min_size=1, max_size=30)


@st.composite
def orders(draw: st.DrawFn) -> LaneOrder:
    lanes = draw(st.integers(1, 6))
    size = draw(st.integers(1, 4))
    rows = draw(block_rows)
    rows.append(lanes * size)  # at least one step
    return LaneOrder(
        rows,
        seed=draw(st.integers(-(2**70), 2**70)),
        lanes=lanes,
        lane_batch_size=size,
        window_blocks=draw(st.integers(1, 4)),
        shuffle=draw(st.booleans()),
    )


def samples_of(order: LaneOrder, step: int, lane: int) -> list[tuple[int, int]]:
    blocks, rows = order.samples_of(step, lane)
    return list(zip(blocks.tolist(), rows.tolist(), strict=True))


@given(orders(), st.integers(0, 3))
def test_an_epoch_uses_every_sample_once_but_for_the_stated_remainder(order: LaneOrder, epoch: int) -> None:
    first = epoch * order.steps_per_epoch
    seen = [
        sample
        for step in range(first, first + order.steps_per_epoch)
        for lane in range(order.lanes)
        for sample in samples_of(order, step, lane)
    ]
    everything = {(b, r) for b, n in enumerate(order.block_rows.tolist()) for r in range(n)}
    assert len(seen) == len(set(seen))
    assert set(seen) <= everything
    assert len(everything) - len(seen) == order.dropped_per_epoch
    assert order.dropped_per_epoch < order.lanes * order.lane_batch_size


@given(orders(), st.data())
def test_any_split_of_lanes_over_workers_that_moves_at_any_step_gives_the_same_samples(
    order: LaneOrder, data: st.DataObject
) -> None:
    steps = 2 * order.steps_per_epoch
    undisturbed = [[samples_of(order, s, lane) for lane in range(order.lanes)] for s in range(steps)]
    got: list[list[list[tuple[int, int]] | None]] = []
    for step in range(steps):
        workers = data.draw(st.integers(1, 5))
        owner = data.draw(st.lists(st.integers(0, workers - 1), min_size=order.lanes, max_size=order.lanes))
        row: list[list[tuple[int, int]] | None] = [None] * order.lanes
        for worker in range(workers):
            fresh = LaneOrder(  # a worker knows the job and the step, and nothing that went before
                order.block_rows,
                seed=order.seed,
                lanes=order.lanes,
                lane_batch_size=order.lane_batch_size,
                window_blocks=order.window_blocks,
                shuffle=order.shuffle,
            )
            for lane in [lane for lane in range(order.lanes) if owner[lane] == worker]:
                row[lane] = samples_of(fresh, step, lane)
        got.append(row)
    assert got == undisturbed


@given(orders(), st.integers(0, 2), st.data())
def test_windows_tile_a_lane_and_hold_few_blocks(order: LaneOrder, epoch: int, data: st.DataObject) -> None:
    lane = data.draw(st.integers(0, order.lanes - 1))
    position, numbers = 0, []
    while position < order.samples_per_lane:
        window = order.window_at(epoch, lane, position)
        inside = data.draw(st.integers(window.start, window.stop - 1))
        assert order.window_at(epoch, lane, inside) == window
        assert window.start == position < window.stop
        assert 1 <= len(window.pieces) <= order.window_blocks
        assert sum(p.stop - p.start for p in window.pieces) == window.stop - window.start
        assert sorted(window.permutation().tolist()) == list(range(window.stop - window.start))
        numbers.append(window.number)
        position = window.stop
    assert position == order.samples_per_lane
    assert numbers == list(range(len(numbers)))


@given(st.integers(0, 2**64 - 1), st.integers(0, 300))
def test_permutation_is_a_bijection(key: int, n: int) -> None:
    assert sorted(permutation(key, n).tolist()) == list(range(n))


@given(st.integers(0, 10**6), st.integers(0, 10**6))
def test_seed_and_epoch_are_not_added(seed: int, epoch: int) -> None:
    assert derive_key("blocks", seed, epoch + 1) != derive_key("blocks", seed + 1, epoch)


def test_lanes_windows_and_epochs_are_shuffled_differently() -> None:
    order = LaneOrder([50] * 40, seed=3, lanes=4, lane_batch_size=5)
    permutations = [
        tuple(order.window_at(epoch, lane, position).permutation().tolist())
        for epoch in (0, 1)
        for lane in range(4)
        for position in (0, 100)
    ]
    assert len(set(permutations)) == len(permutations)


def test_not_shuffled_is_file_order_per_lane() -> None:
    order = LaneOrder([5, 0, 7], seed=1, lanes=2, lane_batch_size=3, shuffle=False)
    assert samples_of(order, 0, 0) + samples_of(order, 1, 0) == [(0, r) for r in range(5)] + [(2, 0)]
    assert samples_of(order, 0, 1) + samples_of(order, 1, 1) == [(2, r) for r in range(1, 7)]


def test_golden_vectors() -> None:
    """Runs that are resumed years later must find these bits: change them only with ORDER_VERSION."""
    assert derive_key("blocks", 0, 0) == GOLDEN_KEYS[0]
    assert derive_key("window", 17, 3, 2, 9) == GOLDEN_KEYS[1]
    assert permutation(0, 10).tolist() == GOLDEN_ZERO
    assert permutation(2**64 - 1, 12).tolist() == GOLDEN_MAX
    order = LaneOrder([4, 6, 3, 5, 6], seed=17, lanes=2, lane_batch_size=3)
    got = {(step, lane): samples_of(order, step, lane) for step in (0, 3, 5) for lane in (0, 1)}
    assert got == GOLDEN_SAMPLES


def test_first_key_of_splitmix64_is_the_published_one() -> None:
    """`mix(0 + gamma)` is the first output of SplitMix64 with seed 0: 0xE220A8397B1DCDAF."""
    z, mask = 0x9E3779B97F4A7C15, 2**64 - 1
    keys = []
    for i in range(1, 11):
        x = (i * z) & mask
        x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & mask
        x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & mask
        keys.append(x ^ (x >> 31))
    assert keys[0] == 0xE220A8397B1DCDAF
    assert permutation(0, 10).tolist() == sorted(range(10), key=lambda i: keys[i])


@pytest.mark.parametrize(("step", "lane"), [(-1, 0), (0, 2), (0, -1)])
def test_places_that_do_not_exist(step: int, lane: int) -> None:
    with pytest.raises(IndexError, match=r"expected|steps per epoch"):
        LaneOrder([10], seed=0, lanes=2, lane_batch_size=1).samples_of(step, lane)


def test_sizes_that_do_not_exist() -> None:
    with pytest.raises(ValueError, match="lanes \\(0\\)"):
        LaneOrder([10], seed=0, lanes=0, lane_batch_size=1)


def test_a_billion_samples_cost_a_moment() -> None:
    order = LaneOrder(np.full(100_000, 10_000), seed=0, lanes=64, lane_batch_size=8)
    blocks, rows = order.samples_of(order.steps_per_epoch * 3 // 2, 63)
    assert blocks.shape == rows.shape == (8,)


GOLDEN_KEYS = (8966678846167057890, 7024673053617460569)
GOLDEN_ZERO = [2, 4, 6, 8, 5, 1, 7, 0, 9, 3]
GOLDEN_MAX = [9, 10, 2, 7, 3, 4, 8, 11, 5, 0, 1, 6]
GOLDEN_SAMPLES = {
    (0, 0): [(3, 1), (3, 2), (1, 0)],
    (0, 1): [(2, 1), (2, 2), (4, 2)],
    (3, 0): [(1, 2), (1, 1), (4, 0)],
    (3, 1): [(0, 2), (0, 1), (0, 3)],
    (5, 0): [(1, 5), (0, 2), (1, 1)],
    (5, 1): [(4, 1), (3, 4), (3, 3)],
}
