"""An order without some of its samples, from a step on. Pure.

`HoledOrder` takes the samples of a `Hole` (rows of one block) out of an order. What was used before the hole was made
is as it was; from that step on every lane passes over the samples of the hole, and those behind move up. So no other
sample is lost or used twice in the epoch, but that the epoch ends when the first lane has no whole batch left: what the
other lanes still have is left out of that epoch, as the end of the stream is. In later epochs the hole is there from
the start. Holes are added in turn: each is stated against the order that was in force when it was made.

A lane knows the places of its hole in an epoch as a sorted array, so a batch is found in O(log samples of the hole).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from elastictrain.data.order import Int64Array, LaneOrder, Window
from elastictrain.errors import DataError

_EPOCHS_KEPT = 2
_EMPTY_EPOCHS = 100
_TOO_MUCH = "these samples cannot all be skipped"


@dataclass(frozen=True, slots=True)
class Hole:
    """Samples `[start, stop)` of `block` are not used from step `at` of the order on."""

    block: int
    start: int
    stop: int
    at: int


class _Layer(Protocol):
    """An order as the next hole sees it: in every epoch, each lane has a row of samples."""

    lanes: int
    lane_batch_size: int

    def length(self, epoch: int, lane: int) -> int: ...

    def steps_of(self, epoch: int) -> int: ...

    def locate(self, step: int) -> tuple[int, int]: ...

    def runs(self, epoch: int, lane: int, start: int, stop: int) -> Iterator[tuple[Window, int, int]]: ...

    def find(self, epoch: int, lane: int, hole: Hole) -> Int64Array: ...


class _Whole:
    """A `LaneOrder` as a layer."""

    def __init__(self, order: LaneOrder) -> None:
        self.order, self.lanes, self.lane_batch_size = order, order.lanes, order.lane_batch_size

    def length(self, epoch: int, lane: int) -> int:
        del epoch, lane
        return self.order.samples_per_lane

    def steps_of(self, epoch: int) -> int:
        del epoch
        return self.order.steps_per_epoch

    def locate(self, step: int) -> tuple[int, int]:
        epoch, position = self.order.locate_step(step)
        return epoch, position // self.lane_batch_size

    def runs(self, epoch: int, lane: int, start: int, stop: int) -> Iterator[tuple[Window, int, int]]:
        while start < stop:
            window = self.order.window_at(epoch, lane, start)
            end = min(stop, window.stop)
            yield window, start - window.start, end - window.start
            start = end

    def find(self, epoch: int, lane: int, hole: Hole) -> Int64Array:
        """Return the positions of the hole's samples in a lane, ascending."""
        begin = _start_of(self.order, epoch, hole.block)
        if begin is None:
            return np.zeros(0, dtype=np.int64)
        segment = lane * self.order.samples_per_lane
        position = max(begin + hole.start - segment, 0)
        stop = min(begin + hole.stop - segment, self.order.samples_per_lane)
        found = [np.zeros(0, dtype=np.int64)]
        while position < stop:
            window = self.order.window_at(epoch, lane, position)
            # Before they are permuted, the window's samples lie in the order of the stream, as `position` counts.
            first, last = position - window.start, min(stop, window.stop) - window.start
            numbers = window.permutation()
            found.append(np.flatnonzero((numbers >= first) & (numbers < last)) + window.start)
            position = window.stop
        return np.concatenate(found)


def _start_of(order: LaneOrder, epoch: int, block: int) -> int | None:
    """Where a block begins in an epoch's stream; None for an empty one, which is never visited."""
    stream = order._stream(epoch)
    found = np.flatnonzero(stream.blocks == block)
    return int(stream.starts[found[0]]) if len(found) else None


class HoledOrder:
    """`order` without the samples of `holes`, in the order in which they were made; reads like a `LaneOrder`.

    Raises DataError when a hole leaves less than one step in an epoch, and IndexError for a hole outside the source.
    """

    def __init__(self, order: LaneOrder, holes: Iterable[Hole]) -> None:
        self.base = order
        self.holes = tuple(holes)
        self.lanes, self.lane_batch_size, self.block_rows = order.lanes, order.lane_batch_size, order.block_rows
        self.samples, self.seed = order.samples, order.seed
        self.repeated_per_epoch = 0
        layer: _Layer = _Whole(order)
        for hole in self.holes:
            if not (0 <= hole.block < len(order.block_rows) and 0 <= hole.start < hole.stop) or hole.at < 0:
                raise IndexError(f"{hole}: expected a block below {len(order.block_rows)} and 0 <= start < stop")
        for at, together in itertools.groupby(self.holes, key=lambda hole: hole.at):
            layer = _Holed(layer, at, tuple(together))
        self._layer = layer

    @property
    def steps_per_epoch(self) -> int:
        """Of an epoch that has all holes from its start; epochs may differ by what a lane's end leaves over."""
        last = max((self._layer.locate(hole.at)[0] for hole in self.holes), default=-1)
        return self._layer.steps_of(last + 1)

    @property
    def samples_per_lane(self) -> int:
        return self.steps_per_epoch * self.lane_batch_size

    @property
    def dropped_per_epoch(self) -> int:
        """Samples that such an epoch leaves out, those of the holes among them."""
        return self.samples - self.samples_per_lane * self.lanes

    def locate_step(self, step: int) -> tuple[int, int]:
        """Return (epoch, samples that every lane has had in it before) of `step`."""
        epoch, inside = self._layer.locate(step)
        return epoch, inside * self.lane_batch_size

    def spans(self, step: int, lane: int) -> Iterator[tuple[Window, int, int]]:
        """Yield the runs of windows that batch `step` of `lane` is made of, each with its `[start, stop)`."""
        if not 0 <= lane < self.lanes:
            raise IndexError(f"lane {lane}: expected 0 <= lane < {self.lanes}")
        epoch, start = self.locate_step(step)
        yield from self._layer.runs(epoch, lane, start, start + self.lane_batch_size)

    def after(self, window: Window) -> Window:
        """Return the window that follows in a window's lane; all of it may lie in a hole."""
        return self.base.after(window)

    def batches_in(self, window: Window, start: int) -> int:
        """A hole may lie behind any batch, so no more than that one is known to be at `start`."""
        del window, start
        return 1

    def samples_of(self, step: int, lane: int) -> tuple[Int64Array, Int64Array]:
        """Return (block, row in the block) of every sample of a batch, in order; shapes [lane_batch_size]."""
        found = [samples_of_run(*run) for run in self.spans(step, lane)]
        return np.concatenate([blocks for blocks, _ in found]), np.concatenate([rows for _, rows in found])


def samples_of_run(window: Window, start: int, stop: int) -> tuple[Int64Array, Int64Array]:
    """Return (block, row in the block) of the places `[start, stop)` of a window."""
    blocks = np.concatenate([np.full(p.stop - p.start, p.block, dtype=np.int64) for p in window.pieces])
    rows = np.concatenate([np.arange(p.start, p.stop, dtype=np.int64) for p in window.pieces])
    chosen = window.permutation()[start:stop]
    return blocks[chosen], rows[chosen]


class _Holed:
    """A layer without the samples of holes that were made at one step, `at`."""

    def __init__(self, inner: _Layer, at: int, holes: tuple[Hole, ...]) -> None:
        self._inner, self._holes = inner, holes
        self.lanes, self.lane_batch_size = inner.lanes, inner.lane_batch_size
        self._epoch, self._inside = inner.locate(at)
        self._starts = [at - self._inside]  # first steps of the epochs from `_epoch` on
        self._places: dict[int, list[Int64Array]] = {}
        if not self.steps_of(self._epoch + 1):
            raise DataError(
                f"{_TOO_MUCH}: without them a lane has less than one batch in an epoch. Skip fewer, or lower lanes or "
                "lane_batch_size"
            )

    def _of(self, epoch: int) -> list[Int64Array]:
        """The places of the hole in every lane's row of samples of an epoch."""
        found = self._places.get(epoch)
        if found is None:
            found = [self._all(epoch, lane) for lane in range(self.lanes)]
            if epoch == self._epoch:
                found = [places[places >= self._inside * self.lane_batch_size] for places in found]
            elif epoch < self._epoch:
                found = [places[:0] for places in found]
            self._places = {**dict(list(self._places.items())[-_EPOCHS_KEPT + 1 :]), epoch: found}
        return found

    def _all(self, epoch: int, lane: int) -> Int64Array:
        return np.unique(np.concatenate([self._inner.find(epoch, lane, hole) for hole in self._holes]))

    def length(self, epoch: int, lane: int) -> int:
        return self._inner.length(epoch, lane) - len(self._of(epoch)[lane])

    def steps_of(self, epoch: int) -> int:
        if epoch < self._epoch:
            return self._inner.steps_of(epoch)
        return min(self.length(epoch, lane) for lane in range(self.lanes)) // self.lane_batch_size

    def locate(self, step: int) -> tuple[int, int]:
        if step < self._starts[0]:
            return self._inner.locate(step)
        while step >= self._starts[-1]:
            self._starts.append(self._starts[-1] + self.steps_of(self._epoch + len(self._starts) - 1))
            if len(set(self._starts[-_EMPTY_EPOCHS:])) == 1 and len(self._starts) > _EMPTY_EPOCHS:
                raise DataError(f"{_TOO_MUCH}: {_EMPTY_EPOCHS} epochs in a row have no step left. Skip fewer samples")
        number = int(np.searchsorted(self._starts, step, side="right")) - 1
        return self._epoch + number, step - self._starts[number]

    def runs(self, epoch: int, lane: int, start: int, stop: int) -> Iterator[tuple[Window, int, int]]:
        places = self._inner_places(epoch, lane, np.arange(start, stop, dtype=np.int64))
        cuts = np.flatnonzero(np.diff(places) != 1) + 1
        for part in np.split(places, cuts):
            yield from self._inner.runs(epoch, lane, int(part[0]), int(part[-1]) + 1)

    def _inner_places(self, epoch: int, lane: int, places: Int64Array) -> Int64Array:
        """Where the samples at `places` lie in the order below: behind `i` samples of the hole they are `i` further."""
        hole = self._of(epoch)[lane]
        kept_before = hole - np.arange(len(hole))
        return places + np.searchsorted(kept_before, places, side="right")

    def find(self, epoch: int, lane: int, hole: Hole) -> Int64Array:
        found, mine = self._inner.find(epoch, lane, hole), self._of(epoch)[lane]
        found = found[~np.isin(found, mine)]
        return found - np.searchsorted(mine, found)
