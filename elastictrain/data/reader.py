"""Reading batches: the thin shell that turns `(step, lane)` into arrays."""

from __future__ import annotations

import math
import threading
import weakref
from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import islice

import numpy as np

from elastictrain.data.ahead import Ahead
from elastictrain.data.block_client import SharedBlocks
from elastictrain.data.byte_tokens import alike
from elastictrain.data.ids import SampleIds
from elastictrain.data.live import LiveSource
from elastictrain.data.meter import Meter
from elastictrain.data.order import Window
from elastictrain.data.runs import Batch as Batch
from elastictrain.data.runs import Run
from elastictrain.data.source import Arrays
from elastictrain.data.sources import AnySource
from elastictrain.data.warm import WarmCache, cache_root, read_through
from elastictrain.data.windows import Block, Loaded, Place, join, key_of, place_of
from elastictrain.errors import DataError

_MAX_DECODED_BLOCKS = 2
"""Blocks kept besides the windows: neighbouring lanes meet inside one, and small sources have few."""
_LOOK_S = 1.0
_CLOSE_S = 60.0
_FINISHED_BYTES = 1 << 20
"""Batches of a lane that are made in one go, as its next ones: what costs time by call is paid once for all of them."""


@dataclass(frozen=True, slots=True)
class ReaderFacts:
    """What a reader has done: blocks that were decoded, and taken from the warm cache."""

    decoded: int
    warm: int


class LaneReader:
    """Batches of any lane at any step; the same bits for every caller, in any order of calls. Thread-safe.

    A lane holds the blocks of its current window, and a batch is gathered from them. Memory: the blocks of one window
    (`window_row_groups`, and one more where a window is cut within one) for each lane in use, lanes that meet in a
    block sharing it, `_MAX_DECODED_BLOCKS` blocks, and `_FINISHED_BYTES` of batches for each lane. A lane that has not
    been asked for during two rounds of all lanes has moved to another worker and is forgotten. Blocks in the warm cache
    (`data.warm_cache_bytes`) are mapped and take no memory of their own.

    With `ahead_bytes` the windows that come next are decoded in a thread meanwhile, and their blocks take as much more;
    such a reader must be closed, or its reading ahead ended. With `shared` blocks come from the feeder of the node, as
    long as it brings them, and lie in memory that its workers share.
    """

    def __init__(
        self,
        source: AnySource,
        *,
        warm: WarmCache | None = None,
        ahead_bytes: int = 0,
        shared: SharedBlocks | None = None,
    ) -> None:
        """`warm`: by default a cache of the size that the job's data setting says, if it says any."""
        self.source, self.shared = source, shared
        limit_bytes = source.spec.warm_cache_bytes
        if warm is None and limit_bytes:
            warm = WarmCache(cache_root(), source.content, limit_bytes)
        self.warm, self.meter = warm, Meter()
        self._lock = threading.Lock()  # of `batch`; taken before the others
        self._order_lock = threading.Lock()  # of the source's order, which keeps what it has computed last
        self._blocks_changed = threading.Condition()  # of the blocks; not held while one is read
        self._in_reading: set[int] = set()
        self._needed_now: frozenset[int] = frozenset()  # blocks of the window that `batch` waits for
        self._windows: dict[Place, Loaded] = {}
        self._runs: dict[int, Run] = {}  # by lane: batches that are made, and not all handed out
        self._finished_row_bytes = _FINISHED_BYTES
        self._living: weakref.WeakValueDictionary[int, Block] = weakref.WeakValueDictionary()
        self._recent: OrderedDict[int, Block] = OrderedDict()
        self._last_use: dict[int, int] = {}  # by lane
        self._calls, self._two_rounds = 0, 2 * source.lanes
        self._look_at_call = self._two_rounds  # whether a lane is idle
        self._closed = False
        self._ahead: Ahead | None = None
        if ahead_bytes:
            # Who waits for data of its own disk decodes meanwhile; a remote store, or the node's feeder, might last.
            helps = not source.spec.is_remote and shared is None
            self._ahead = Ahead(self._load_ahead, self._after, self._steps_of, ahead_bytes, helps=helps)
        self.blocks_decoded = 0  # how often a block was read, for tests and for tuning

    def batch(self, step: int, lane: int) -> Batch:
        """Return batch `step` of `lane`, arrays that belong to the caller.

        Token mode: {"tokens": [lane_batch_size, sequence_length + 1]} of `data.batch_dtype`; a mixture's stage with
        shorter sequences has as many more of them. Table mode: every column as [lane_batch_size, …] in its own dtype.
        Its ids, one for each sample, have come the same way as the rows. Raises DataError (see `Source.read_block`),
        IndexError for a lane or step that does not exist.
        """
        run, number = self.take(step, lane)
        return run.batch(number)

    def take(self, step: int, lane: int) -> tuple[Run, int]:
        """As `batch`; what it returns is the run that the batch lies in, and which of it the batch is."""
        with self._lock:
            run = self._runs.get(lane)
            if run is None or run.next != step:
                run = self._make(step, lane)
            return run, self._hand_out(run)

    def made(self, places: Iterable[tuple[int, int]], count: int) -> list[tuple[Run, int]]:
        """As `take`, for those of the first `count` places, in their order, that are made already. The first one that
        is not ends it; and nothing is taken while somebody else reads, so this takes microseconds, always.
        """
        found: list[tuple[Run, int]] = []
        if self._lock.acquire(blocking=False):
            try:
                for step, lane in islice(places, count):
                    run = self._runs.get(lane)
                    if run is None or run.next != step:
                        break
                    found.append((run, self._hand_out(run)))
            finally:
                self._lock.release()
        return found

    def _hand_out(self, run: Run) -> int:
        self._calls += 1
        self._last_use[run.lane] = self._calls
        if self._calls > self._look_at_call:
            self._forget_idle_lanes()
        number = run.next - run.step
        run.next += 1
        if number + 1 == run.count:  # its memory goes with its batches
            self._runs.pop(run.lane, None)
        return number

    def expect(self, places: Iterable[tuple[int, int]], until: float = math.inf) -> None:
        """Say which (step, lane) are asked for next, in order: their windows are read ahead, and those of other lanes
        are not any more, nor those that no step before `until` needs. Does nothing without `ahead_bytes`; does not wait
        for anything that is being read.
        """
        if self._ahead is None:
            return
        first: dict[int, int] = {}
        for step, lane in places:
            first.setdefault(lane, step)
        needed: list[tuple[int, Window]] = []
        with self._order_lock:
            for lane, step in first.items():
                run = self._runs.get(lane)
                if run is not None and run.next == step:  # the lane goes on as it has
                    continue
                try:
                    windows = [window for window, _, _ in self.source.spans(step, lane)]
                except (DataError, IndexError):  # who asks for that batch gets it
                    continue
                for window in windows:
                    loaded = self._windows.get(place_of(window))
                    if loaded is None or loaded.key != key_of(window):
                        needed.append((step, window))
        self._ahead.expect(needed, first, until)

    def limit_ahead(self, ahead_bytes: int) -> None:
        """From now on windows that are read ahead may take so much; nothing that is there is thrown away."""
        if self._ahead is not None:
            self._ahead.limit(ahead_bytes)

    def end_ahead(self) -> None:
        """End reading ahead, and wait for its thread; batches come as before. May be called twice."""
        if self._ahead is not None:
            self._ahead.close()

    def close(self) -> None:
        """Close all files and drop what is decoded; may be called twice."""
        self.end_ahead()
        with self._lock, self._blocks_changed:
            self._closed = True
            self._blocks_changed.wait_for(lambda: not self._in_reading, _CLOSE_S)
            self._windows.clear()
            self._runs.clear()
            self._recent.clear()
            self.source.close()

    @property
    def facts(self) -> ReaderFacts:
        return ReaderFacts(self.blocks_decoded, self.warm.hits if self.warm else 0)

    def _make(self, step: int, lane: int) -> Run:
        """Make a batch, and as many of those behind it as lie in a row in its window and shall be made in one go."""
        if self._closed:  # `close` drops all runs, so this is looked at before anything is handed out
            raise RuntimeError("the LaneReader is closed")
        self._runs.pop(lane, None)
        with self._order_lock:
            spans = list(self.source.spans(step, lane))
        if len(spans) == 1:
            window, start, stop = spans[0]
            loaded, size = self._load(window, step, start), stop - start
            most = min(_FINISHED_BYTES // self._finished_row_bytes, loaded.at_once) // size
            count = max(1, min(self.source.batches_in(window, start), most))
            with self.meter.stage("pack"):
                arrays, ids = loaded.rows(start, start + count * size)
                run = Run(step, lane, count, self.source.finish(step, lane, arrays), ids)
                self._finished_row_bytes = max(1, run.bytes // (count * size))
        else:
            run = Run(step, lane, 1, *self._joined(step, lane, spans))
        self._runs[lane] = run
        return run

    def _joined(self, step: int, lane: int, spans: list[tuple[Window, int, int]]) -> tuple[Arrays, SampleIds]:
        """A batch of rows of several windows."""
        parts = []
        for window, start, stop in spans:
            loaded = self._load(window, step, start)
            with self.meter.stage("pack"):
                parts.append(loaded.rows(start, stop))
            del loaded  # its memory goes before the next window comes
        with self.meter.stage("pack"):
            found = alike([arrays for arrays, _ in parts])
            batch = {name: join([arrays[name] for arrays in found], name) for name in found[0]}
            return self.source.finish(step, lane, batch), np.concatenate([ids for _, ids in parts])

    def _load(self, window: Window, step: int, start: int) -> Loaded:
        place = place_of(window)
        loaded = self._windows.get(place)
        if loaded is None or loaded.key != key_of(window):
            self._windows.pop(place, None)  # its memory goes before the next window comes
            self._needed_now = frozenset(piece.block for piece in window.pieces)
            try:
                loaded = self._ahead.take(window) if self._ahead else None
                if loaded is None:
                    loaded = Loaded(self.source, window, [self._block(piece.block, step) for piece in window.pieces])
            finally:
                self._needed_now = frozenset()
            self._windows[place] = loaded
            if self._ahead:
                left = 1 - start / (window.stop - window.start)
                self._ahead.follow(window, step + left * self._steps_of(window, step))
        return loaded

    def _load_ahead(self, window: Window) -> Loaded:
        assert self._ahead is not None
        blocks, due = [], self._ahead.due(window)
        for piece in window.pieces:
            self._ahead.check()
            blocks.append(self._block(piece.block, due))
        return Loaded(self.source, window, blocks)

    def _after(self, window: Window) -> Window:
        with self._order_lock:
            return self.source.after(window)

    def _steps_of(self, window: Window, step: int) -> float:
        """For how many steps a window lasts."""
        rows = self.source.rows_per_step(window, step)
        return (window.stop - window.start) / rows if rows else math.inf

    def _block(self, number: int, due: float = 0.0) -> Block:
        """Return a block, decoding it if nobody has it; different ones are decoded by several threads at once. `due`:
        the step that needs it.
        """
        with self._blocks_changed:
            while (block := self._living.get(number)) is None and number in self._in_reading:
                self._blocks_changed.wait(_LOOK_S)  # its reading ends, in an error at the latest
            if block is not None:
                return self._keep(block)
            while len(self._recent) >= _MAX_DECODED_BLOCKS:  # their memory goes before the next one comes
                self._recent.popitem(last=False)
            self._in_reading.add(number)
        try:
            block = self._shared_block(number, due) or Block(number, self._read(number))
            with self._blocks_changed:
                self._living[number] = block
                return self._keep(block)
        finally:
            with self._blocks_changed:
                self._in_reading.discard(number)
                self._blocks_changed.notify_all()

    def _keep(self, block: Block) -> Block:
        self._recent[block.number] = block
        self._recent.move_to_end(block.number)
        while len(self._recent) > _MAX_DECODED_BLOCKS:
            self._recent.popitem(last=False)
        return block

    def _shared_block(self, number: int, due: float) -> Block | None:
        """A block of the warm cache or of the node's feeder; None where there is no feeder, or it does not bring it."""
        if self.shared is None:
            return None
        if self.warm is not None:
            with self.meter.stage("store"):
                arrays = self.warm.load(number)
            if arrays is not None:
                return Block(number, arrays)
        with self.meter.stage("feeder"):
            block = self.shared.take(number, due, urgent=lambda: number in self._needed_now)
        return block if block is not None and self._fits(block) else None

    def _fits(self, block: Block) -> bool:
        """Whether a block has the rows that this worker's order counts with; a gather would clip to others silently."""
        rows = None if isinstance(self.source, LiveSource) else self.source.rows_in(block.number)
        return rows is None or all(len(array) == rows for array in block.arrays.values())

    def _read(self, number: int) -> Arrays:
        arrays, decoded = read_through(self.warm, number, self.source.read_block, self.meter)
        with self._blocks_changed:
            self.blocks_decoded += decoded
        return arrays

    def _forget_idle_lanes(self) -> None:
        """Of a lane in use every window is kept: a rare source of a mixture waits for its turn."""
        since = self._calls - self._two_rounds
        for idle in [lane for lane, call in self._last_use.items() if call < since]:
            del self._last_use[idle]
            self._runs.pop(idle, None)
            for place in [place for place in self._windows if place[0] == idle]:
                del self._windows[place]
        self._look_at_call = min(self._last_use.values()) + self._two_rounds  # none is idle before
