"""How rows are gathered and put in order: the same as NumPy's own sorting and searching would give."""

from __future__ import annotations

import threading

import numpy as np
import pytest

from elastictrain.data.buffers import Scratch
from elastictrain.data.order import _sorted_by, permutation
from elastictrain.data.windows import Block, Plan, _places_of


@pytest.mark.parametrize("n", [0, 1, 2, 3, 255, 256, 257, 5000])
@pytest.mark.parametrize("keys_of", [1, 3, 1 << 16, 1 << 63])
def test_keys_are_sorted_as_a_stable_argsort_does_it(n: int, keys_of: int) -> None:
    """With few different keys many are equal; with keys below 2**16 their high bits are, and the low ones are not."""
    keys = np.random.default_rng(n).integers(0, keys_of, n, dtype=np.uint64)
    expected = np.argsort(keys, kind="stable")
    found = _sorted_by(keys.copy(), np.empty_like(keys))
    assert found.dtype == np.int64
    assert found.tolist() == expected.tolist()


def test_keys_that_differ_in_their_low_bits_alone_are_sorted_by_them() -> None:
    keys = np.asarray([(1 << 60) + 3, (1 << 60) + 2, (1 << 60) + 1, 7], dtype=np.uint64)
    assert _sorted_by(keys.copy(), np.empty_like(keys)).tolist() == [3, 2, 1, 0]


def test_a_permutation_belongs_to_whoever_asked_for_it() -> None:
    first = permutation(5, 1000)
    before = first.copy()
    permutation(6, 1000)
    assert (first == before).all()


@pytest.mark.parametrize("lengths", [[5], [3, 4], [0, 3, 0, 2], [2] * 30, [1, 0] * 20])
def test_places_of_numbers_are_those_of_a_search(lengths: list[int]) -> None:
    edges = np.cumsum([0, *lengths])
    numbers = np.random.default_rng(1).permutation(edges[-1])
    found = _places_of(numbers, edges)
    assert found.dtype == np.int32
    assert found.tolist() == (np.searchsorted(edges, numbers, side="right") - 1).tolist()


@pytest.mark.parametrize("size", [1, 7, 1000])
def test_a_plan_gathers_the_rows_of_all_blocks_in_order(size: int) -> None:
    """With one place at a time there are more groups than sixteen bits hold."""
    places = 40_000
    random = np.random.default_rng(2)
    blocks = [Block(number, {"x": random.integers(0, 1 << 40, (50, 3))}) for number in range(2)]
    which = random.integers(0, 2, places).astype(np.int32)
    rows = random.integers(0, 50, places)
    plan = Plan(which, rows, start=0, size=size)
    for start in (0, 33 * size, 39 * size):
        stop = min(places, start + size)
        expected = [blocks[b].arrays["x"][r].tolist() for b, r in zip(which[start:stop], rows[start:stop], strict=True)]
        assert plan.gather(blocks, start, stop)["x"].tolist() == expected


@pytest.mark.parametrize("count", [1, 2])
def test_what_was_gathered_before_stays_when_more_is_gathered(count: int) -> None:
    blocks = [Block(number, {"x": np.full((4, 5000), number)}) for number in range(count)]
    plan = Plan(np.arange(4, dtype=np.int32) % count, np.arange(4), start=0, size=2)
    first = plan.gather(blocks, 0, 2)["x"]
    before = first.copy()
    for block in blocks:
        block.arrays["x"][:] = 9
    assert (plan.gather(blocks, 2, 4)["x"] == 9).all()
    assert (first == before).all()


def test_each_thread_has_memory_of_its_own_and_keeps_none_that_is_far_too_large() -> None:
    scratch, other = Scratch(), []
    mine = scratch.empty((1 << 20,), np.dtype(np.uint8))
    assert scratch.empty((10, 100), np.dtype(np.int64)).ctypes.data != mine.ctypes.data  # 1 MiB for 8 kB: given back
    mine = scratch.empty((4, 8), np.dtype(np.int64))
    assert (mine.shape, mine.dtype) == ((4, 8), np.dtype(np.int64))
    assert scratch.empty((8,), np.dtype(np.int32)).ctypes.data == mine.ctypes.data  # used again
    thread = threading.Thread(target=lambda: other.append(scratch.empty((4, 8), np.dtype(np.int64))))
    thread.start()
    thread.join()
    assert other[0].ctypes.data != mine.ctypes.data
    assert scratch.empty((2,), np.dtype(object)).tolist() == [None, None]
