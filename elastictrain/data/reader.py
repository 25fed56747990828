"""Reading batches: the thin shell that turns `(step, lane)` into arrays."""

from __future__ import annotations

import threading
import weakref
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from elastictrain.data.ids import SampleIds, sample_ids
from elastictrain.data.meter import Meter
from elastictrain.data.order import Int64Array, Window
from elastictrain.data.source import Arrays, Source
from elastictrain.data.warm import WarmCache, cache_root
from elastictrain.errors import DataError

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
    """A lane's window: its blocks, and where in them each of its places lies."""

    def __init__(self, window: Window, blocks: list[_Block]) -> None:
        self.key = (window.epoch, window.number)
        self._pieces = list(zip(window.pieces, blocks, strict=True))
        self._numbers: Int64Array = window.permutation()
        lengths = [piece.stop - piece.start for piece in window.pieces]
        self._edges: Int64Array = np.cumsum([0, *lengths], dtype=np.int64)
        for name in blocks[0].arrays:
            _check_shapes([block.arrays[name] for block in blocks], name)

    def rows(self, start: int, stop: int) -> tuple[Arrays, SampleIds]:
        """Return the rows at the window's places `[start, stop)`, as new arrays, and their ids."""
        numbers = self._numbers[start:stop]
        which = np.searchsorted(self._edges, numbers, side="right") - 1
        arrays: Arrays = {}
        ids = np.empty(len(numbers), dtype=np.uint64)
        for at, (piece, block) in enumerate(self._pieces):
            mine = np.flatnonzero(which == at)
            if not len(mine):
                continue
            rows = numbers[mine] - self._edges[at] + piece.start
            ids[mine] = sample_ids(block.number, rows)
            for name, array in block.arrays.items():
                if len(mine) == len(numbers):
                    arrays[name] = array[rows]
                    continue
                if name not in arrays:
                    arrays[name] = np.empty((len(numbers), *array.shape[1:]), dtype=array.dtype)
                arrays[name][mine] = array[rows]
        return arrays, ids


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

    def __init__(self, source: Source, *, warm: WarmCache | None = None) -> None:
        """`warm`: by default a cache of the size that the job's data setting says, if it says any."""
        self.source = source
        limit_bytes = getattr(source.spec, "warm_cache_bytes", 0)
        if warm is None and limit_bytes:
            warm = WarmCache(cache_root(), source.fingerprint, limit_bytes)
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

        Token mode: {"tokens": int64 [lane_batch_size, sequence_length + 1]}. Table mode: every column as
        [lane_batch_size, …] in its own dtype. Its ids have come the same way as the rows. Raises
        DataError (see `Source.read_block`), IndexError for a lane or step that does not exist.
        """
        with self._lock, self.meter.stage("pack"):
            if self._closed:
                raise RuntimeError("the LaneReader is closed")
            self._calls += 1
            parts = [self._load(window).rows(start, stop) for window, start, stop in self.source.spans(step, lane)]
            self._forget_idle_lanes(lane)
            batch = {name: _join([arrays[name] for arrays, _ in parts], name) for name in parts[0][0]}
            return Batch(self.source.finish(step, batch), np.concatenate([ids for _, ids in parts]))

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
            loaded = _Loaded(window, [self._block(piece.block) for piece in window.pieces])
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
