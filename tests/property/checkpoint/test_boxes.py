"""Geometry against NumPy."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from elastictrain_checkpoint import InvalidPiece, box_runs, flat_range_to_boxes
from elastictrain_checkpoint.boxes import first_overlap
from elastictrain_checkpoint.part import FileRecord, TensorRecord
from elastictrain_checkpoint.table import build_table

shapes = st.lists(st.integers(1, 5), max_size=4).map(tuple)


@st.composite
def flat_ranges(draw: st.DrawFn) -> tuple[tuple[int, ...], int, int]:
    shape = draw(shapes)
    start, stop = sorted(draw(st.tuples(*[st.integers(0, math.prod(shape))] * 2)))
    return shape, start, stop


@st.composite
def boxes(draw: st.DrawFn, shape: tuple[int, ...]) -> tuple[list[int], list[int]]:
    offsets = [draw(st.integers(0, dim - 1)) for dim in shape]
    return offsets, [draw(st.integers(1, dim - at)) for dim, at in zip(shape, offsets, strict=True)]


def elements(shape: tuple[int, ...], offsets: list[int], sizes: list[int]) -> np.ndarray:
    """Flat numbers of the elements of a box, in the order of its bytes."""
    where = tuple(slice(o, o + s) for o, s in zip(offsets, sizes, strict=True))
    return np.arange(math.prod(shape)).reshape(shape)[where].reshape(-1)


@given(flat_ranges())
def test_a_flat_range_is_few_boxes_in_order_and_nothing_else(case: tuple[tuple[int, ...], int, int]) -> None:
    shape, start, stop = case
    cut = flat_range_to_boxes(shape, start, stop)
    found = [elements(shape, list(o), list(s)) for o, s in cut]
    assert np.concatenate([np.zeros(0, int), *found]).tolist() == list(range(start, stop))
    assert len(cut) <= max(1, 2 * len(shape) - 1)
    assert all(found_one.size for found_one in found)


@given(shapes.flatmap(lambda shape: st.tuples(st.just(shape), boxes(shape))))
def test_runs_of_a_box(case: tuple[tuple[int, ...], tuple[list[int], list[int]]]) -> None:
    shape, (offsets, sizes) = case
    starts, run = box_runs(shape, offsets, sizes)
    assert (starts[:, None] + np.arange(run)).reshape(-1).tolist() == elements(shape, offsets, sizes).tolist()


@given(
    st.lists(st.integers(1, 5), min_size=1, max_size=3)
    .map(tuple)
    .flatmap(lambda shape: st.tuples(st.just(shape), st.lists(boxes(shape), max_size=6)))
)
def test_tiling_is_exactly_each_element_once(case: tuple[tuple[int, ...], list[tuple[list[int], list[int]]]]) -> None:
    shape, some = case
    check_tiling(shape, some)


@given(flat_ranges(), st.data())
def test_a_true_tiling_is_accepted_and_one_wrong_box_is_not(
    case: tuple[tuple[int, ...], int, int], data: st.DataObject
) -> None:
    shape, start, stop = case
    edges = [(0, start), (start, stop), (stop, math.prod(shape))]
    some = [(list(o), list(s)) for a, b in edges for o, s in flat_range_to_boxes(shape, a, b)]
    check_tiling(shape, some)
    broken = list(some)
    broken[data.draw(st.integers(0, len(some) - 1))] = data.draw(boxes(shape))
    check_tiling(shape, broken)


def check_tiling(shape: tuple[int, ...], some: list[tuple[list[int], list[int]]]) -> None:
    hits = np.zeros(math.prod(shape), dtype=int)
    for offsets, sizes in some:
        hits[elements(shape, offsets, sizes)] += 1
    overlap = (
        first_overlap(*(np.array([b[i] for b in some], dtype=np.int64).reshape(len(some), -1) for i in (0, 1)))
        if some
        else None
    )
    assert (overlap is not None) == bool((hits > 1).any())
    if overlap is not None:
        one, two = (set(elements(shape, *some[i]).tolist()) for i in overlap)
        assert one & two
    record = TensorRecord(dtype="U8", shape=list(shape), chunks=[(0, 0, o, s) for o, s in some])
    file = FileRecord(path="a/w.safetensors", size_bytes=10**6, data_start=0, sums="", root="")
    if (hits == 1).all():
        table = build_table({"t": record}, [file])
        assert table.size_bytes.sum() == math.prod(shape)
    else:
        with pytest.raises(ValueError, match=r"^t: "):
            build_table({"t": record}, [file])


def test_the_ends_of_the_range_are_checked() -> None:
    for start, stop in ((-1, 2), (0, 7), (3, 2)):
        with pytest.raises(InvalidPiece, match="do not lie in shape"):
            flat_range_to_boxes((2, 3), start, stop)
    assert flat_range_to_boxes((2, 0), 0, 0) == [((0, 0), (2, 0))]
    assert flat_range_to_boxes((), 0, 1) == [((), ())]
