"""Reading batches: the thin shell that turns `(step, lane)` into arrays."""

from __future__ import annotations

import threading
import weakref
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from elastictrain.data.ids import SampleIds
from elastictrain.data.meter import Meter
from elastictrain.data.order import Int64Array, Window
from elastictrain.data.source import Arrays
from elastictrain.data.sources import AnySource
from elastictrain.data.warm import WarmCache, cache_root
from elastictrain.errors import DataError

_GATHER_BYTES = 1 << 18
_MAX_DECODED_BLOCKS = 2
"""Blocks kept besides the windows: neighbouring lanes meet inside one, and small sources have few."""


class Batch(dict[str, npt.NDArray[Any]]):
    """A batch's arrays by name; `ids`: the ids of its samples (see `data.ids`), in the order of its rows."""

    def __init__(self, arrays: Arrays, ids: SampleIds) -> None:
        super().__init__(arrays)
        self.ids = ids


class _Block:
    """A decoded block; windows share it, and it goes with the last of them."""

    __slots__ = ("__weakref__", "arrays", "number")

    def __init__(self, number: int, arrays: Arrays) -> None:
        self.number, self.arrays = number, arrays


class _Loaded:
    """A lane's window: its blocks, and where in them each of its places lies.

    Rows are gathered for several batches at once, as many as stay in a processor's cache: a gather of few rows costs
    more in calls than in copying. Of what was gathered every row is handed out once, so a batch may be a view of it.
    """

    def __init__(self, source: AnySource, window: Window, blocks: list[_Block]) -> None:
        self.key = (window.epoch, window.number)
        numbers = window.permutation()
        edges = np.cumsum([0, *(piece.stop - piece.start for piece in window.pieces)], dtype=np.int64)
        shifts = np.asarray([piece.start for piece in window.pieces]) - edges[:-1]
        self._blocks = blocks
        self._which = (np.searchsorted(edges, numbers, side="right") - 1).astype(np.int32)
        self._rows: Int64Array = numbers + shifts[self._which]
        numbers_of_blocks = np.asarray([piece.block for piece in window.pieces])
        self._ids = source.ids_of(window, numbers_of_blocks[self._which], self._rows)
        for name in blocks[0].arrays:
            _check_shapes([block.arrays[name] for block in blocks], name)
        row_bytes = sum(array[:1].nbytes for array in blocks[0].arrays.values())
        self._at_once = max(1, _GATHER_BYTES // max(1, row_bytes))
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
        for at, block in enumerate(self._blocks):
            mine = np.flatnonzero(which == at)
            for name, array in block.arrays.items() if len(mine) else ():
                if len(mine) == len(rows):
                    arrays[name] = array[rows]
                    continue
                if name not in arrays:
                    arrays[name] = np.empty((len(rows), *array.shape[1:]), dtype=array.dtype)
                arrays[name][mine] = array[rows[mine]]
        return arrays


@dataclass(frozen=True, slots=True)
class ReaderFacts:
    """What a reader has done: blocks that were decoded, and taken from the warm cache."""

    decoded: int
    warm: int


class LaneReader:
    """Batches of any lane at any step; the same bits for every caller, in any order of calls. Thread-safe.

    A lane holds the blocks of its current window, and a batch is gathered from them. Memory: the blocks of one window
    (`window_row_groups`, and one more where a window is cut within one) for each lane in use, lanes that meet in a
    block sharing it, and `_MAX_DECODED_BLOCKS` blocks. A lane that has not been asked for during two rounds of all
    lanes has moved to another worker and is forgotten. Blocks in the warm cache (`data.warm_cache_bytes`) are mapped
    and take no memory of their own.
    """

    def __init__(self, source: AnySource, *, warm: WarmCache | None = None) -> None:
        """`warm`: by default a cache of the size that the job's data setting says, if it says any."""
        self.source = source
        limit_bytes = source.spec.warm_cache_bytes
        if warm is None and limit_bytes:
            warm = WarmCache(cache_root(), source.content, limit_bytes)
        self.warm, self.meter = warm, Meter()
        self._lock = threading.Lock()
        self._windows: dict[tuple[int, int], _Loaded] = {}  # by (lane, source of a mixture)
        self._living: weakref.WeakValueDictionary[int, _Block] = weakref.WeakValueDictionary()
        self._recent: OrderedDict[int, _Block] = OrderedDict()
        self._last_use: OrderedDict[int, int] = OrderedDict()  # by lane, the one that was longest idle first
        self._calls = 0
        self._closed = False
        self.blocks_decoded = 0  # how often a block was read, for tests and for tuning

    def batch(self, step: int, lane: int) -> Batch:
        """Return batch `step` of `lane`, arrays that belong to the caller.

        Token mode: {"tokens": int64 [lane_batch_size, sequence_length + 1]}; a mixture's stage with shorter sequences
        has as many more of them. Table mode: every column as [lane_batch_size, …] in its own dtype. Its ids, one for
        each sample, have come the same way as the rows. Raises DataError (see `Source.read_block`), IndexError for a
        lane or step that does not exist.
        """
        with self._lock, self.meter.stage("pack"):
            if self._closed:
                raise RuntimeError("the LaneReader is closed")
            self._calls += 1
            parts = [self._load(window).rows(start, stop) for window, start, stop in self.source.spans(step, lane)]
            self._forget_idle_lanes(lane)
            batch = {name: _join([arrays[name] for arrays, _ in parts], name) for name in parts[0][0]}
            return Batch(self.source.finish(step, lane, batch), np.concatenate([ids for _, ids in parts]))

    def close(self) -> None:
        """Close all files and drop what is decoded; may be called twice."""
        with self._lock:
            self._closed = True
            self._windows.clear()
            self._recent.clear()
            self.source.close()

    @property
    def facts(self) -> ReaderFacts:
        return ReaderFacts(self.blocks_decoded, self.warm.hits if self.warm else 0)

    def _load(self, window: Window) -> _Loaded:
        key = (window.epoch, window.number)
        place = (window.lane, window.source)
        loaded = self._windows.get(place)
        if loaded is None or loaded.key != key:
            self._windows.pop(place, None)  # its memory goes before the next window comes
            loaded = _Loaded(self.source, window, [self._block(piece.block) for piece in window.pieces])
            self._windows[place] = loaded
        return loaded

    def _block(self, number: int) -> _Block:
        block = self._living.get(number)
        if block is None:
            while len(self._recent) >= _MAX_DECODED_BLOCKS:
                self._recent.popitem(last=False)
            block = _Block(number, self._read(number))
            self._living[number] = block
        self._recent[number] = block
        self._recent.move_to_end(number)
        while len(self._recent) > _MAX_DECODED_BLOCKS:
            self._recent.popitem(last=False)
        return block

    def _read(self, number: int) -> Arrays:
        if self.warm is not None:
            with self.meter.stage("store"):
                arrays = self.warm.load(number)
            if arrays is not None:
                return arrays
        with self.meter.stage("decode"):
            arrays = self.source.read_block(number)
        self.blocks_decoded += 1
        if self.warm is not None:
            with self.meter.stage("store"):
                self.warm.store(number, arrays)
        return arrays

    def _forget_idle_lanes(self, used: int) -> None:
        """Of a lane in use every window is kept: a rare source of a mixture waits for its turn."""
        self._last_use[used] = self._calls
        self._last_use.move_to_end(used)
        while (idle := next(iter(self._last_use.items())))[1] < self._calls - 2 * self.source.lanes:
            del self._last_use[idle[0]]
            for place in [place for place in self._windows if place[0] == idle[0]]:
                del self._windows[place]


def _check_shapes(parts: list[npt.NDArray[Any]], name: str) -> None:
    shapes = sorted({part.shape[1:] for part in parts})
    if len(shapes) > 1:
        raise DataError(
            f"column {name!r}: rows of different shapes {shapes} in two row groups. Expected lists of equal "
            "length in all files. Pad them before, or leave the column out of data.columns"
        )


def _join(parts: list[npt.NDArray[Any]], name: str) -> npt.NDArray[Any]:
    """Join rows of several windows."""
    _check_shapes(parts, name)
    return np.concatenate(parts) if len(parts) > 1 else parts[0]
