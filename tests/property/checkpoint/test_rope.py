"""A run in several buffers is stored, hashed and cut like the same run in one, and nothing of it is copied."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from elastictrain_checkpoint import DIGEST_BLOCK_ELEMENTS, InvalidPiece, Piece, block_hashes
from elastictrain_checkpoint.header import pack_header
from elastictrain_checkpoint.pack import cut_piece, plan_packs
from elastictrain_checkpoint.rope import as_rope, cut_rope, rope_bytes

CELL = DIGEST_BLOCK_ELEMENTS


@given(st.lists(st.binary(max_size=6), max_size=6), st.data())
def test_a_cut_is_the_cut_of_the_joined_bytes(buffers: list[bytes], data: st.DataObject) -> None:
    whole = b"".join(buffers)
    rope = as_rope(buffers, "t", 1)
    start, stop = sorted(data.draw(st.tuples(*[st.integers(0, len(whole))] * 2)))
    found = cut_rope(rope, start, stop)
    assert b"".join(found) == whole[start:stop]
    assert rope_bytes(found) == stop - start
    assert all(len(view) for view in (*rope, *found))


@given(st.lists(st.integers(0, 9), max_size=5), st.integers(1, 4))
def test_only_the_last_buffer_may_end_off_the_step(lengths: list[int], step: int) -> None:
    filled = [length for length in lengths if length]
    buffers = [bytes(length) for length in lengths]
    if all(length % step == 0 for length in filled[:-1]):
        assert [len(view) for view in as_rope(tuple(buffers), "t", step)] == filled
    else:
        with pytest.raises(InvalidPiece, match=rf"^t: buffer \d of {len(filled)} .* multiple of {step} in all but"):
            as_rope(buffers, "t", step)


@st.composite
def runs(draw: st.DrawFn) -> tuple[tuple[int, ...], int, np.ndarray, list[np.ndarray]]:
    """A tensor's shape, where its run starts, the run, and the same run in buffers of their own."""
    shape = draw(st.sampled_from([(40_000,), (9, 4500), (4500, 9), (3, 50, 270), (2, 2, 5000), (1, 1, 30_000)]))
    count = math.prod(shape)
    grid = st.integers(0, count // CELL).map(lambda cell: cell * CELL)
    start, stop = sorted(draw(st.tuples(grid, grid | st.just(count))))
    whole = np.random.default_rng(0).integers(0, 2**16, count, dtype=np.uint16)[start:stop]
    at = draw(st.lists(st.integers(0, len(whole) // CELL).map(lambda cell: cell * CELL), max_size=6))
    return shape, start, whole, [part.copy() for part in np.split(whole, sorted(at))]


@given(runs())
@example(((9, 4500), 4096, np.arange(8192, dtype=np.uint16), list(np.arange(8192, dtype=np.uint16).reshape(2, -1))))
def test_a_piece_in_buffers_is_cut_hashed_and_planned_as_in_one(
    case: tuple[tuple[int, ...], int, np.ndarray, list[np.ndarray]],
) -> None:
    shape, start, whole, buffers = case
    one = cut_piece(Piece("t", "U16", shape, start, whole))
    several = cut_piece(Piece("t", "U16", shape, start, buffers))
    assert [(box.box, b"".join(box.rope)) for box in several] == [(box.box, b"".join(box.rope)) for box in one]
    assert [box.size_bytes for box in several] == [2 * math.prod(box.box[1]) for box in one]
    assert len(several) <= 2 * len(shape) - 1
    assert block_hashes(buffers, 2) == block_hashes(whole, 2)
    packs = plan_packs(several, 1 << 30)
    assert len(packs) == len(several)
    assert [pack_header(pack) for pack in packs] == [pack_header(pack) for pack in plan_packs(one, 1 << 30)]
    for box in several:
        views = [np.frombuffer(view, dtype=np.uint8) for view in box.rope]
        assert all(any(np.shares_memory(view, buffer) for buffer in buffers) for view in views)
