"""Reading batches: the thin shell that turns `(step, lane)` into arrays."""

from __future__ import annotations

import threading
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from elastictrain.data.mixed import MixedSource
from elastictrain.data.order import Window
from elastictrain.data.source import Arrays, Source
from elastictrain.errors import DataError

_MAX_DECODED_BLOCKS = 2
"""Blocks kept besides the windows: neighbouring lanes meet inside one, and small sources have few."""


@dataclass
class _Loaded:
    key: tuple[int, int]  # (epoch, number of the window)
    arrays: Arrays  # [samples of the window, …], already in their final order
    last_use: int


class LaneReader:
    """Batches of any lane at any step; the same bits for every caller, in any order of calls. Thread-safe.

    A lane keeps its current window decoded and permuted, so that a batch is a copy of consecutive rows. Memory:
    one window (at most `window_row_groups` blocks, less where lanes share blocks) per lane in use, and
    `_MAX_DECODED_BLOCKS` blocks. A lane that has not been asked for during two rounds of all lanes has moved to
    another worker and is forgotten.
    """

    def __init__(self, source: Source | MixedSource) -> None:
        self.source = source
        self._lock = threading.Lock()
        self._windows: dict[tuple[int, int], _Loaded] = {}  # by (lane, source of a mixture)
        self._blocks: OrderedDict[int, Arrays] = OrderedDict()
        self._calls = 0
        self._closed = False
        self.blocks_decoded = 0  # how often a block was read, for tests and for tuning

    def batch(self, step: int, lane: int) -> Arrays:
        """Return batch `step` of `lane`, arrays that belong to the caller.

        Token mode: {"tokens": int64 [lane_batch_size, sequence_length + 1]}; a mixture's stage with shorter sequences
        has as many more of them. Table mode: every column as
        [lane_batch_size, …] in its own dtype. Raises DataError (see `Source.read_block`), IndexError for a
        lane or step that does not exist.
        """
        with self._lock:
            if self._closed:
                raise RuntimeError("the LaneReader is closed")
            self._calls += 1
            parts: list[Arrays] = []
            for window, start, stop in self.source.spans(step, lane):
                arrays = self._load(window)
                parts.append({name: array[start:stop] for name, array in arrays.items()})
            self._forget_idle_lanes()
        joined = {name: _join([part[name] for part in parts], name) for name in parts[0]}
        return self.source.finish(step, lane, joined)

    def close(self) -> None:
        """Close all files and drop what is decoded; may be called twice."""
        with self._lock:
            self._closed = True
            self._windows.clear()
            self._blocks.clear()
            self.source.close()

    def _load(self, window: Window) -> Arrays:
        key = (window.epoch, window.number)
        place = (window.lane, window.source)
        loaded = self._windows.get(place)
        if loaded is None or loaded.key != key:
            self._windows.pop(place, None)  # its memory goes before the next window comes
            loaded = _Loaded(key, self._assemble(window), self._calls)
            self._windows[place] = loaded
        loaded.last_use = self._calls
        return loaded.arrays

    def _assemble(self, window: Window) -> Arrays:
        pieces = []
        for piece in window.pieces:
            block = self._decoded(piece.block)
            pieces.append({name: array[piece.start : piece.stop] for name, array in block.items()})
        order = window.permutation()
        joined = {name: _join([piece[name] for piece in pieces], name) for name in pieces[0]}
        return {name: array[order] for name, array in joined.items()}

    def _decoded(self, block: int) -> Arrays:
        arrays = self._blocks.pop(block, None)
        if arrays is None:
            while len(self._blocks) >= _MAX_DECODED_BLOCKS:
                self._blocks.popitem(last=False)
            arrays = self.source.read_block(block)
            self.blocks_decoded += 1
        self._blocks[block] = arrays
        return arrays

    def _forget_idle_lanes(self) -> None:
        used: dict[int, int] = {}  # a lane is in use if any of its windows is: a rare source waits for its turn
        for (lane, _), loaded in self._windows.items():
            used[lane] = max(used.get(lane, 0), loaded.last_use)
        horizon = self._calls - 2 * self.source.lanes
        for place in [place for place in self._windows if used[place[0]] < horizon]:
            del self._windows[place]


def _join(parts: list[npt.NDArray[Any]], name: str) -> npt.NDArray[Any]:
    """Join rows of several blocks into a new array."""
    shapes = sorted({part.shape[1:] for part in parts})
    if len(shapes) > 1:
        raise DataError(
            f"column {name!r}: rows of different shapes {shapes} in two row groups. Expected lists of equal "
            "length in all files. Pad them before, or leave the column out of data.columns"
        )
    return np.concatenate(parts)
