"""The order of the data: which samples are batch `step` of lane `lane`. Pure; knows no files and no workers.

The source is a list of blocks (row groups) with known numbers of samples. In every epoch

1. the blocks are put in a permuted order: the *stream* of the epoch;
2. the stream is cut into `lanes` equal contiguous segments by sample count, one per lane. What does not fill
   a whole step of all lanes is the end of the stream: it is left out of this epoch (`dropped_per_epoch`), and
   as the stream is permuted anew in the next epoch it is another part each time. With `repeat` the last step is
   filled up from the beginning of the stream instead (`repeated_per_epoch`);
3. inside a lane, the blocks of the segment are taken `window_blocks` at a time; the samples of such a window
   are permuted.

So a lane needs `window_blocks` decoded blocks at a time, reads are sequential within a block, and any position
is found in O(log blocks) after an O(blocks log blocks) set-up per epoch: there is nothing to skip on resuming.

The permutation is our own, because NumPy promises no stable stream of its generators over versions.
**Specification** (`ORDER_VERSION` 1, held by golden vectors in the tests):

- `derive_key(purpose, *numbers)`: BLAKE2b with an 8-byte digest, read as a little-endian integer, of the ASCII
  text `elastictrain-order-1|purpose|n1|n2|…` with the numbers in decimal;
- `permutation(key, n)`: element `i` gets the 64-bit sort key `mix(key + (i + 1) * 0x9E3779B97F4A7C15 mod 2**64)`,
  `mix` being the finaliser of SplitMix64 (Steele, Lea and Flood, "Fast splittable pseudorandom number
  generators", OOPSLA 2014); the permutation is the stable ascending argsort of the sort keys.

Blocks are keyed by (seed, epoch), windows by (seed, epoch, lane, window). Hashing the tuple, and not adding the
epoch to the seed, keeps runs with neighbouring seeds unrelated.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

ORDER_VERSION = 1

_GAMMA = np.uint64(0x9E3779B97F4A7C15)
_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2 = np.uint64(0x94D049BB133111EB)

Int64Array = npt.NDArray[np.int64]


def derive_key(purpose: str, *numbers: int) -> int:
    """Return the 64-bit key of `purpose` and `numbers` (see the specification above)."""
    text = "|".join([f"elastictrain-order-{ORDER_VERSION}", purpose, *(str(int(n)) for n in numbers)])
    return int.from_bytes(hashlib.blake2b(text.encode("ascii"), digest_size=8).digest(), "little")


def permutation(key: int, n: int) -> Int64Array:
    """Return the permutation of `0 … n-1` that belongs to `key`; shape [n], int64."""
    z = np.arange(1, n + 1, dtype=np.uint64)
    with np.errstate(over="ignore"):  # arithmetic modulo 2**64 is what SplitMix64 asks for
        z *= _GAMMA
        z += np.uint64(key)
        shifted = z >> np.uint64(30)
        for shift, factor in ((27, _MIX_1), (31, _MIX_2)):
            z ^= shifted
            z *= factor
            np.right_shift(z, np.uint64(shift), out=shifted)
        z ^= shifted
    return _sorted_by(z, shifted)


def _sorted_by(keys: npt.NDArray[np.uint64], memory: npt.NDArray[np.uint64]) -> Int64Array:
    """Return the stable ascending argsort of `keys`; `memory`, of the same shape, is written to.

    To sort numbers takes half as long as to sort places by them. So the place takes the low bits of every key; where
    no two keys have equal high bits, these decide the order alone.
    """
    n = len(keys)
    bits = np.uint64(max(0, n - 1).bit_length())
    low = (np.uint64(1) << bits) - np.uint64(1)
    packed = np.bitwise_and(keys, ~low, out=memory)
    packed |= np.arange(n, dtype=np.uint64)
    packed.sort()
    high = packed >> bits
    if n > 1 and bool(np.any(high[1:] == high[:-1])):
        return np.argsort(keys, kind="stable").astype(np.int64, copy=False)
    packed &= low
    return packed.view(np.int64)


@dataclass(frozen=True)
class Piece:
    """Samples `[start, stop)` of block `block`."""

    block: int
    start: int
    stop: int


@dataclass(frozen=True)
class Window:
    """Positions `[start, stop)` of a lane's segment in one epoch: `pieces` in a row, then permuted by `key`.

    `key` is None when the source is not shuffled. `source` tells the sources of a mixture apart: each has windows
    of its own in every lane.
    """

    epoch: int
    lane: int
    number: int
    start: int
    stop: int
    pieces: tuple[Piece, ...]
    key: int | None
    source: int = 0

    def permutation(self) -> Int64Array:
        """Position `start + i` holds the sample number `permutation()[i]` of the joined pieces."""
        count = self.stop - self.start
        return np.arange(count, dtype=np.int64) if self.key is None else permutation(self.key, count)


@dataclass(frozen=True)
class _Stream:
    """One epoch's stream: block `blocks[i]` holds the stream positions `[starts[i], starts[i+1])`."""

    blocks: Int64Array
    starts: Int64Array


class _Order(ABC):
    """What all orders share: epochs, steps, and batches put together from windows."""

    def __init__(
        self,
        block_rows: npt.ArrayLike,
        *,
        seed: int,
        lanes: int,
        lane_batch_size: int,
        window_blocks: int = 2,
        shuffle: bool = True,
        repeat: bool = False,
    ) -> None:
        if lanes < 1 or lane_batch_size < 1 or window_blocks < 1:
            raise ValueError(
                f"lanes ({lanes}), lane_batch_size ({lane_batch_size}) and window_blocks ({window_blocks}) "
                "must be at least 1"
            )
        self.block_rows: Int64Array = np.asarray(block_rows, dtype=np.int64)
        self.seed, self.lanes, self.lane_batch_size = seed, lanes, lane_batch_size
        self.window_blocks, self.shuffle = window_blocks, shuffle
        self.samples = int(self.block_rows.sum())
        per_step = lanes * lane_batch_size
        self.steps_per_epoch = (self.samples + (per_step - 1 if repeat else 0)) // per_step
        self.samples_per_lane = self.steps_per_epoch * lane_batch_size
        self.dropped_per_epoch = max(0, self.samples - self.samples_per_lane * lanes)
        self.repeated_per_epoch = max(0, self.samples_per_lane * lanes - self.samples)
        self._filled: Int64Array | None = None  # numbers of the blocks that have rows; None: all of them, as is usual
        if not np.all(self.block_rows):
            self._filled = np.flatnonzero(self.block_rows).astype(np.int64, copy=False)
        self._streams: dict[int, _Stream] = {}
        self._last: dict[int, Window] = {}

    def _stream(self, epoch: int) -> _Stream:
        stream = self._streams.get(epoch)
        if stream is None:
            count = len(self.block_rows if self._filled is None else self._filled)
            if self.shuffle:
                blocks = permutation(derive_key("blocks", self.seed, epoch), count)
            else:
                blocks = np.arange(count, dtype=np.int64)
            if self._filled is not None:
                blocks = self._filled[blocks]
            if self.repeated_per_epoch:  # the stream goes on with its beginning, as often as it takes
                rounds = -(-(self.samples + self.repeated_per_epoch) // self.samples)
                blocks = np.tile(blocks, rounds)
            starts = np.zeros(len(blocks) + 1, dtype=np.int64)
            np.take(self.block_rows, blocks, out=starts[1:], mode="clip")
            np.cumsum(starts[1:], out=starts[1:])
            stream = _Stream(blocks, starts)
            kept = dict(list(self._streams.items())[-1:])  # at an epoch's border lanes are in two epochs
            self._streams = {**kept, epoch: stream}
        return stream

    def after(self, window: Window) -> Window:
        """Return the window that is to be read next in a window's lane, in its epoch or in the next."""
        if window.stop < self.samples_per_lane:
            return self.window_at(window.epoch, window.lane, window.stop)
        return self.window_at(window.epoch + 1, window.lane, 0)

    def batches_in(self, window: Window, start: int) -> int:
        """Return how many batches in a row, the first of them at place `start` of a window, it holds."""
        return (window.stop - window.start - start) // self.lane_batch_size

    @abstractmethod
    def window_at(self, epoch: int, lane: int, position: int) -> Window:
        """Return the window that holds `position` (0 ≤ position < samples_per_lane) of a lane in an epoch."""

    def _check_place(self, epoch: int, lane: int, position: int) -> None:
        if not (0 <= lane < self.lanes and 0 <= position < self.samples_per_lane and epoch >= 0):
            raise IndexError(
                f"epoch {epoch}, lane {lane}, position {position}: expected epoch >= 0, "
                f"lane < {self.lanes}, position < {self.samples_per_lane}"
            )

    def locate_step(self, step: int) -> tuple[int, int]:
        """Return (epoch, first position in every lane) of `step`."""
        if self.steps_per_epoch == 0 or step < 0:
            raise IndexError(f"step {step}: the source has {self.steps_per_epoch} steps per epoch")
        epoch, step_in_epoch = divmod(step, self.steps_per_epoch)
        return epoch, step_in_epoch * self.lane_batch_size

    def spans(self, step: int, lane: int) -> Iterator[tuple[Window, int, int]]:
        """Yield the windows that batch `step` of `lane` touches, each with its `[start, stop)` in the window."""
        epoch, position = self.locate_step(step)
        return self._spans(epoch, position, position + self.lane_batch_size, lane)

    def spans_at(self, start: int, stop: int, lane: int) -> Iterator[tuple[Window, int, int]]:
        """As `spans`, for the positions `[start, stop)` of a lane counted through all epochs."""
        while start < stop:
            epoch, position = divmod(start, self.samples_per_lane)
            count = min(stop - start, self.samples_per_lane - position)
            yield from self._spans(epoch, position, position + count, lane)
            start += count

    def _spans(self, epoch: int, position: int, stop: int, lane: int) -> Iterator[tuple[Window, int, int]]:
        while position < stop:
            window = self.window_at(epoch, lane, position)
            end = min(stop, window.stop)
            yield window, position - window.start, end - window.start
            position = end

    def samples_of(self, step: int, lane: int) -> tuple[Int64Array, Int64Array]:
        """Return (block, row in the block) of every sample of a batch, in order; shapes [lane_batch_size]."""
        blocks, rows = [], []
        for window, start, stop in self.spans(step, lane):
            piece_blocks = [np.full(p.stop - p.start, p.block, dtype=np.int64) for p in window.pieces]
            piece_rows = [np.arange(p.start, p.stop, dtype=np.int64) for p in window.pieces]
            chosen = window.permutation()[start:stop]
            blocks.append(np.concatenate(piece_blocks)[chosen])
            rows.append(np.concatenate(piece_rows)[chosen])
        return np.concatenate(blocks), np.concatenate(rows)


class LaneOrder(_Order):
    """The order of a source for a seed, a number of lanes and a lane batch size.

    `block_rows[b]` is the number of samples of block `b` (empty blocks are allowed and never visited).
    Nothing here depends on how many workers there are.
    """

    def window_at(self, epoch: int, lane: int, position: int) -> Window:
        """Return the window that holds `position` (0 ≤ position < samples_per_lane) of a lane in an epoch."""
        self._check_place(epoch, lane, position)
        last = self._last.get(lane)  # most often the next batch lies in the same window
        if last is not None and last.epoch == epoch and last.start <= position < last.stop:
            return last
        stream = self._stream(epoch)
        segment_start = lane * self.samples_per_lane
        segment_stop = segment_start + self.samples_per_lane
        first = _block_at(stream.starts, segment_start)
        number = (_block_at(stream.starts, segment_start + position) - first) // self.window_blocks
        low = first + number * self.window_blocks
        high = min(low + self.window_blocks, len(stream.blocks))
        start = max(segment_start, int(stream.starts[low]))
        stop = min(segment_stop, int(stream.starts[high]))
        pieces = _pieces(stream, low, high, start, stop)
        key = derive_key("window", self.seed, epoch, lane, number) if self.shuffle else None
        window = Window(epoch, lane, number, start - segment_start, stop - segment_start, pieces, key)
        self._last[lane] = window
        return window


class StrictOrder(_Order):
    """The samples as they lie in the files: step `t` is the next `lanes * lane_batch_size` of them, lane after lane.

    Nothing is shuffled, and all lanes read in the same place, so on many workers each of them reads all blocks.
    """

    def __init__(self, block_rows: npt.ArrayLike, **settings: Any) -> None:
        super().__init__(block_rows, **{**settings, "shuffle": False})

    def window_at(self, epoch: int, lane: int, position: int) -> Window:
        """Return the window that holds `position` of a lane in an epoch: one batch."""
        self._check_place(epoch, lane, position)
        stream, size = self._stream(epoch), self.lane_batch_size
        number = position // size
        first = (number * self.lanes + lane) * size
        low, high = _block_at(stream.starts, first), _block_at(stream.starts, first + size - 1) + 1
        pieces = _pieces(stream, low, high, first, first + size)
        return Window(epoch, lane, number, number * size, (number + 1) * size, pieces, None)

    def after(self, window: Window) -> Window:
        """Return the next window of the lane that has something of another block; those before it need no reading."""
        stream, size = self._stream(window.epoch), self.lane_batch_size
        last = (window.number * self.lanes + window.lane + 1) * size - 1  # sample of the window
        end = int(stream.starts[_block_at(stream.starts, last) + 1])
        number = max(window.number + 1, -(-(end + 1 - (window.lane + 1) * size) // (self.lanes * size)))
        if number >= self.steps_per_epoch:
            return self.window_at(window.epoch + 1, window.lane, 0)
        return self.window_at(window.epoch, window.lane, number * size)


def _pieces(stream: _Stream, low: int, high: int, start: int, stop: int) -> tuple[Piece, ...]:
    """Return what of the stream's blocks `[low, high)` lies in its positions `[start, stop)`."""
    return tuple(
        Piece(
            block=int(stream.blocks[i]),
            start=max(start - int(stream.starts[i]), 0),
            stop=min(stop, int(stream.starts[i + 1])) - int(stream.starts[i]),
        )
        for i in range(low, high)
        if int(stream.starts[i]) < stop
    )


def _block_at(starts: Int64Array, position: int) -> int:
    return int(np.searchsorted(starts, position, side="right")) - 1
