"""A window that is loaded: its decoded blocks, and the rows of them in the order of the window."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from elastictrain.data.buffers import of_gathers, of_this_thread
from elastictrain.data.byte_tokens import alike
from elastictrain.data.ids import SampleIds
from elastictrain.data.order import Int64Array, Window
from elastictrain.data.packed import Arrays
from elastictrain.errors import DataError

if TYPE_CHECKING:
    from elastictrain.data.sources import AnySource

GATHER_BYTES = 1 << 19
_FEW_EDGES = 8
"""Up to so many, comparing with each of them takes less time than to search for every number."""
_RADIX = 1 << 16
"""NumPy sorts stably by the radix of numbers of 16 bits, and by merging what has more: several times as long."""

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
        # Rows are taken from arrays as NumPy likes them; of others every gather would copy all.
        self.number, self.arrays = number, {name: np.require(array, None, ["C", "A"]) for name, array in arrays.items()}
        self.bytes = sum(array.nbytes for array in arrays.values())


def _alike(blocks: list[Block]) -> list[Block]:
    """Blocks whose arrays have the same names; those that must be made anew for it belong to this window alone."""
    made = alike([block.arrays for block in blocks])
    return [
        block if block.arrays is arrays else Block(block.number, arrays)
        for block, arrays in zip(blocks, made, strict=True)
    ]


class Loaded:
    """A lane's window: its blocks, and where in them each of its places lies.

    Rows are gathered for several batches at once, as many as stay in a processor's cache: a gather of few rows costs
    more in calls than in copying. Of what was gathered every row is handed out once, so a batch may be a view of it.
    """

    def __init__(self, source: AnySource, window: Window, blocks: list[Block]) -> None:
        self.key, self.blocks = key_of(window), _alike(blocks)
        blocks = self.blocks
        numbers = window.permutation()
        edges = np.cumsum([0, *(piece.stop - piece.start for piece in window.pieces)], dtype=np.int64)
        shifts = np.asarray([piece.start for piece in window.pieces]) - edges[:-1]
        self._which = _places_of(numbers, edges)
        self._rows: Int64Array = numbers + shifts[self._which]
        numbers_of_blocks = np.asarray([piece.block for piece in window.pieces])
        self._ids = source.ids_of(window, numbers_of_blocks[self._which], self._rows)
        for name in blocks[0].arrays:
            check_shapes([block.arrays[name] for block in blocks], name)
        row_bytes = sum(array[:1].nbytes for array in blocks[0].arrays.values())
        self.at_once = max(1, GATHER_BYTES // max(1, row_bytes))
        self._gathered: tuple[int, int, Arrays] = (0, 0, {})
        self._plan, self._next = Plan(self._which[:0], self._rows[:0], start=0, size=1), 0

    def rows(self, start: int, stop: int) -> tuple[Arrays, SampleIds]:
        """Return the rows at the window's places `[start, stop)`, which are the caller's, and their ids."""
        first, end, arrays = self._gathered
        if not (first <= start and stop <= end):
            first = start
            end = min(len(self._rows), start + max(1, self.at_once // (stop - start)) * (stop - start))
            arrays = self._gather(first, end)
        # From here on these rows belong to the caller: who asks for them again gets them from the blocks.
        self._gathered = (stop, end, {name: array[stop - first :] for name, array in arrays.items()})
        return {name: array[start - first : stop - first] for name, array in arrays.items()}, self._ids[start:stop]

    def _gather(self, start: int, stop: int) -> Arrays:
        """Take the rows of each block one behind the other, then put them in order: by then they are in the cache."""
        if not self._plan.covers(start, stop):
            # Who goes on where the last gather ended is likely to go on so; anybody else gets a plan for this alone.
            end = len(self._rows) if start == self._next else stop
            self._plan = Plan(self._which[start:end], self._rows[start:end], start=start, size=stop - start)
        self._next = stop
        return self._plan.gather(self.blocks, start, stop)


def _places_of(numbers: Int64Array, edges: Int64Array) -> npt.NDArray[np.int32]:
    """Return between which two of the sorted `edges` each number lies; the first edge is the lowest number."""
    if len(edges) > _FEW_EDGES:
        return (np.searchsorted(edges, numbers, side="right") - 1).astype(np.int32)
    which = np.zeros(len(numbers), dtype=np.int32)
    for edge in edges[1:-1].tolist():
        which += numbers >= edge
    return which


class Plan:
    """In which order to take the places of a window from `start` on from its blocks, `size` of them at a time.

    `which` block holds each of these places, and in which of its `rows`; both of shape [places].
    """

    def __init__(self, which: npt.NDArray[np.int32], rows: Int64Array, *, start: int, size: int) -> None:
        self.start, self.stop, self.size = start, start + len(rows), max(1, size)
        self._blocks = int(which.max(initial=0)) + 1
        places = np.arange(len(rows), dtype=np.int32)
        gathers = places // np.int32(self.size)
        group = gathers * np.int32(self._blocks) + which
        groups = -(-len(rows) // self.size) * self._blocks
        order = np.argsort(group.astype(np.uint16) if groups <= _RADIX else group, kind="stable")
        self._rows = rows[order]
        self._ends: list[int] = np.cumsum(np.bincount(group, minlength=groups)).tolist()
        self._back = np.empty(len(rows), dtype=np.int32)
        self._back[order] = places - gathers * np.int32(self.size)

    def covers(self, start: int, stop: int) -> bool:
        """Whether the places `[start, stop)` lie in one gather of this plan, and begin it."""
        inside = self.start <= start and stop <= self.stop and stop - start <= self.size
        return inside and (start - self.start) % self.size == 0

    def gather(self, blocks: list[Block], start: int, stop: int) -> Arrays:
        """Return the rows at places that the plan `covers`."""
        at, end = start - self.start, stop - self.start
        group = at // self.size * self._blocks
        edges = [at, *self._ends[group : group + self._blocks]]
        arrays: Arrays = {}
        for name, array in blocks[0].arrays.items():
            memory = of_gathers if self._blocks == 1 else of_this_thread
            joined = memory.empty((edges[-1] - at, *array.shape[1:]), array.dtype)
            for block, first, last in zip(blocks, edges, edges[1:], strict=False):
                if first < last:  # "clip": NumPy takes straight into `out`; all of these rows are there
                    rows, mine = self._rows[first:last], joined[first - at : last - at]
                    block.arrays[name].take(rows, axis=0, out=mine, mode="clip")
            if self._blocks == 1:
                arrays[name] = joined[: end - at]
                continue
            arrays[name] = of_gathers.empty((end - at, *array.shape[1:]), array.dtype)
            joined.take(self._back[at:end], axis=0, out=arrays[name], mode="clip")
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
