"""A window that is loaded: its decoded blocks, and the rows of them in the order of the window."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from elastictrain.data.ids import SampleIds
from elastictrain.data.order import Int64Array, Window
from elastictrain.data.packed import Arrays
from elastictrain.errors import DataError

if TYPE_CHECKING:
    from elastictrain.data.sources import AnySource

GATHER_BYTES = 1 << 18

Place = tuple[int, int]
"""(lane, source of a mixture): has one window at a time."""
Key = tuple[int, int]
"""(epoch, number): tells the windows of a place apart, and sorts them."""


def place_of(window: Window) -> Place:
    return window.lane, window.source


def key_of(window: Window) -> Key:
    return window.epoch, window.number


class Block:
    """A decoded block; windows share it, and it goes with the last of them."""

    __slots__ = ("__weakref__", "arrays", "bytes", "number")

    def __init__(self, number: int, arrays: Arrays) -> None:
        self.number, self.arrays = number, arrays
        self.bytes = sum(array.nbytes for array in arrays.values())


class Loaded:
    """A lane's window: its blocks, and where in them each of its places lies.

    Rows are gathered for several batches at once, as many as stay in a processor's cache: a gather of few rows costs
    more in calls than in copying. Of what was gathered every row is handed out once, so a batch may be a view of it.
    """

    def __init__(self, source: AnySource, window: Window, blocks: list[Block]) -> None:
        self.key, self.blocks = key_of(window), blocks
        numbers = window.permutation()
        edges = np.cumsum([0, *(piece.stop - piece.start for piece in window.pieces)], dtype=np.int64)
        shifts = np.asarray([piece.start for piece in window.pieces]) - edges[:-1]
        self._which = (np.searchsorted(edges, numbers, side="right") - 1).astype(np.int32)
        self._rows: Int64Array = numbers + shifts[self._which]
        numbers_of_blocks = np.asarray([piece.block for piece in window.pieces])
        self._ids = source.ids_of(window, numbers_of_blocks[self._which], self._rows)
        for name in blocks[0].arrays:
            check_shapes([block.arrays[name] for block in blocks], name)
        row_bytes = sum(array[:1].nbytes for array in blocks[0].arrays.values())
        self._at_once = max(1, GATHER_BYTES // max(1, row_bytes))
        self._gathered: tuple[int, int, Arrays] = (0, 0, {})

    def rows(self, start: int, stop: int) -> tuple[Arrays, SampleIds]:
        """Return the rows at the window's places `[start, stop)`, which are the caller's, and their ids."""
        first, end, arrays = self._gathered
        if not (first <= start and stop <= end):
            first = start
            end = min(len(self._rows), start + max(1, self._at_once // (stop - start)) * (stop - start))
            arrays = self._gather(first, end)
        # From here on these rows belong to the caller: who asks for them again gets them from the blocks.
        self._gathered = (stop, end, {name: array[stop - first :] for name, array in arrays.items()})
        return {name: array[start - first : stop - first] for name, array in arrays.items()}, self._ids[start:stop]

    def _gather(self, start: int, stop: int) -> Arrays:
        which, rows = self._which[start:stop], self._rows[start:stop]
        arrays: Arrays = {}
        for at, block in enumerate(self.blocks):
            mine = np.flatnonzero(which == at)
            for name, array in block.arrays.items() if len(mine) else ():
                if len(mine) == len(rows):
                    arrays[name] = array[rows]
                    continue
                if name not in arrays:
                    arrays[name] = np.empty((len(rows), *array.shape[1:]), dtype=array.dtype)
                arrays[name][mine] = array[rows[mine]]
        return arrays


def check_shapes(parts: list[npt.NDArray[Any]], name: str) -> None:
    """Raise DataError for rows of different shapes."""
    if len(parts) < 2 or len(shapes := sorted({part.shape[1:] for part in parts})) < 2:
        return
    raise DataError(
        f"column {name!r}: rows of different shapes {shapes} in two row groups. Expected lists of equal "
        "length in all files. Pad them before, or leave the column out of data.columns"
    )


def join(parts: list[npt.NDArray[Any]], name: str) -> npt.NDArray[Any]:
    """Join rows of several windows. Raises DataError, as `check_shapes`."""
    check_shapes(parts, name)
    return np.concatenate(parts) if len(parts) > 1 else parts[0]
