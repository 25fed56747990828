"""The rows of a window come from its blocks as its order says, whoever asks for which of them, and how many at once."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from elastictrain.data import windows
from elastictrain.data.ids import sample_ids
from elastictrain.data.order import Piece, Window
from elastictrain.data.windows import Block, Loaded, Plan

KINDS = st.sampled_from(["u2", "i4", "f8", "?"])


class Ids:
    """All of a source that a window asks for."""

    def ids_of(self, window: Window, blocks: Any, rows: Any) -> Any:
        del window
        return sample_ids(blocks, rows)


@st.composite
def loaded(draw: st.DrawFn) -> tuple[Window, list[Block]]:
    """A window of one to four blocks with up to two columns, some of them laid out as no gather likes them."""
    cuts = draw(st.lists(st.tuples(st.integers(0, 5), st.integers(1, 30), st.integers(0, 5)), min_size=1, max_size=4))
    kinds, width = draw(st.lists(KINDS, min_size=1, max_size=2)), draw(st.integers(1, 4))
    pieces, blocks, odd = [], [], draw(st.integers(0, 4))
    for number, (before, count, behind) in enumerate(cuts):
        pieces.append(Piece(number + 7, before, before + count))
        rows = before + count + behind
        cells = np.arange(number * 1000, number * 1000 + rows * width).reshape(rows, width)
        arrays = {f"c{n}": cells.astype(kind) for n, kind in enumerate(kinds)} | {"row": cells[:, 0]}
        blocks.append(Block(number + 7, {name: _as_laid_out(array, odd) for name, array in arrays.items()}))
    total = sum(piece.stop - piece.start for piece in pieces)
    key = draw(st.none() | st.integers(0, 9))
    return Window(0, 0, 0, 0, total, tuple(pieces), key), blocks


def _as_laid_out(array: np.ndarray[Any, Any], odd: int) -> np.ndarray[Any, Any]:
    if odd == 1:
        return np.asfortranarray(array)
    if odd == 2:
        return np.repeat(array, 2, axis=0)[::2]
    if odd == 3:  # at an address that is no multiple of its size
        raw = np.frombuffer(b"?" + array.tobytes(), dtype=np.uint8)[1:]
        return np.frombuffer(raw.data, dtype=array.dtype).reshape(array.shape)
    return array


def expected(window: Window, blocks: list[Block], start: int, stop: int) -> tuple[dict[str, Any], list[int]]:
    """Row by row."""
    by_number = {block.number: block for block in blocks}
    places = [(piece.block, row) for piece in window.pieces for row in range(piece.start, piece.stop)]
    chosen = [places[at] for at in window.permutation()[start:stop].tolist()]
    found = {name: [by_number[block].arrays[name][row].tolist() for block, row in chosen] for name in blocks[0].arrays}
    return found, [block << 32 | row for block, row in chosen]


@given(loaded(), st.data())
def test_any_rows_in_any_order_of_asking_are_those_of_the_window(
    made: tuple[Window, list[Block]], data: st.DataObject
) -> None:
    window, blocks = made
    total = window.stop
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(windows, "GATHER_BYTES", data.draw(st.sampled_from([1, 100, 1000, 1 << 20])))
        found = Loaded(Ids(), window, blocks)  # type: ignore[arg-type]
        at = 0
        for _ in range(data.draw(st.integers(1, 12))):
            if data.draw(st.booleans()):  # somewhere else
                at = data.draw(st.integers(0, total - 1))
            stop = min(total, at + data.draw(st.sampled_from([1, 2, 3, 7])))
            if at == stop:
                at = 0
                continue
            arrays, ids = found.rows(at, stop)
            rows, numbers = expected(window, blocks, at, stop)
            assert {name: array.tolist() for name, array in arrays.items()} == rows
            assert ids.tolist() == numbers
            for array in arrays.values():  # they are the caller's
                array[:] = 0
            at = stop


@given(loaded(), st.integers(1, 9), st.data())
def test_a_plan_gathers_what_it_covers(made: tuple[Window, list[Block]], size: int, data: st.DataObject) -> None:
    window, blocks = made
    numbers = window.permutation()
    edges = np.cumsum([0, *(piece.stop - piece.start for piece in window.pieces)])
    which = (np.searchsorted(edges, numbers, side="right") - 1).astype(np.int32)
    rows = numbers - edges[which] + np.asarray([piece.start for piece in window.pieces])[which]
    begin = data.draw(st.integers(0, window.stop - 1))
    plan = Plan(which[begin:], rows[begin:], start=begin, size=size)
    start, stop = sorted(data.draw(st.tuples(st.integers(0, window.stop), st.integers(0, window.stop))))
    assert plan.covers(start, stop) == (start >= begin and (start - begin) % size == 0 and stop - start <= size)
    start = begin + size * data.draw(st.integers(0, (window.stop - 1 - begin) // size))
    stop = data.draw(st.integers(start + 1, min(window.stop, start + size)))
    assert plan.covers(start, stop)
    found = {name: array.tolist() for name, array in plan.gather(blocks, start, stop).items()}
    assert found == expected(window, blocks, start, stop)[0]
