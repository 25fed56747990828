"""Batches as torch tensors, read ahead in one background thread."""

from __future__ import annotations

import math
import threading
import time
from collections import deque
from collections.abc import Iterable
from contextlib import suppress
from types import TracebackType
from typing import Any, Self

import torch

from elastictrain.data.block_client import BlockClient
from elastictrain.data.ids import SampleIds, lane_hash
from elastictrain.data.meter import Meter, waited_for
from elastictrain.data.packed import INTEGERS
from elastictrain.data.reader import LaneReader
from elastictrain.data.runs import Run
from elastictrain.data.sharing import share_bytes
from elastictrain.data.sources import AnySource
from elastictrain.errors import DataError

Place = tuple[int, int]
"""(step, lane)"""

PREFETCH_BYTES = 64 << 20
_PATIENCE_S = 0.001
"""Whoever finds nothing ready sleeps this long before the thread wakes it up for a batch. Small batches are read in
microseconds, and to be woken for each of them takes longer than to read it."""
_AT_ONCE = 32
"""Batches that are made already are put with those that lie ready so many at a time."""


def _split(prefetch_bytes: int) -> tuple[int, int]:
    """Bytes for batches that lie ready, and for decoded windows."""
    quarter = max(1, prefetch_bytes // 4)
    return quarter, max(1, prefetch_bytes - quarter)


class Tensors(dict[str, torch.Tensor]):
    """A batch's tensors by name.

    `waited`: seconds that whoever got it had to wait for it, by stage of `data.meter`. `copied`: on CUDA, when its copy
    is complete.
    """

    __slots__ = ("_ids", "_lane", "bytes", "copied", "waited")
    _ids: SampleIds
    _lane: int
    bytes: int
    copied: torch.cuda.Event | None
    waited: dict[str, float]

    @classmethod
    def of(cls, run: Run) -> list[Self]:
        """Return all batches of a run on the CPU, views of its arrays: Python takes less time for all in one go."""
        made = [cls() for _ in range(run.count)]
        for name, array in run.arrays.items():
            for batch, view in zip(made, torch.from_numpy(array).unbind(0), strict=True):
                batch[name] = view
        lane, size_bytes = run.lane, run.bytes // run.count
        for batch, ids in zip(made, run.ids, strict=True):
            batch._lane, batch._ids, batch.bytes, batch.copied, batch.waited = lane, ids, size_bytes, None, {}
        return made

    @property
    def samples_hash(self) -> int:
        """The hash of its lane and the ids of its samples (see `data.ids`)."""
        return lane_hash(self._lane, self._ids)

    def widen(self) -> None:
        """Make int64 of the integers of a batch of text (see `data.batch_types`)."""
        for name in INTEGERS & self.keys():
            self[name] = self[name].long()


class Feeder:
    """Hands out `(step, lane)` as tensors on `device`; what `expect` names is read ahead.

    Reading ahead changes when a batch is read and never what is in it. A batch that nobody expected is read by
    the caller. An error in the thread is raised by the `batch` call that wanted its result, and by no other.
    On CUDA a batch is copied from pinned memory on a stream of its own, beside the computation.
    """

    @classmethod
    def of(
        cls,
        source: AnySource,
        device: torch.device | str = "cpu",
        client: BlockClient | None = None,
        *,
        widen: bool = False,
    ) -> Self:
        """A feeder with a reader of its own that together keep to `data.prefetch_bytes`: a quarter for batches that lie
        ready, for a batch takes several times as much as the tokens that it is made of, the rest for decoded windows.
        `client`: of the node's feeder, with whose other workers that budget is shared. `widen`: see the class's own.
        """
        quarter, ahead_bytes = _split(source.spec.prefetch_bytes)
        reader = LaneReader(source, ahead_bytes=ahead_bytes, shared=None if client is None else client.of(source))
        feeder = cls(reader, device, budget_bytes=quarter, widen=widen and source.spec.batch_dtype != "int64")
        if client is not None:
            client.listen(lambda workers: feeder.limit(share_bytes(source.spec.prefetch_bytes, workers)))
        return feeder

    def __init__(
        self,
        reader: LaneReader,
        device: torch.device | str = "cpu",
        *,
        budget_bytes: int = PREFETCH_BYTES,
        deadline_s: float = 600.0,
        widen: bool = False,
    ) -> None:
        """Start the thread. `budget_bytes`: what batches that lie ready may take, on the device; one may always lie
        ready, whatever its size. `deadline_s`: longest wait for one batch. `widen`: batches are of text, and their
        narrow integers become int64 when they are handed out, on the device.
        """
        if budget_bytes < 1:
            raise ValueError(f"budget_bytes is {budget_bytes}; expected at least 1")
        self._reader, self._device = reader, torch.device(device)
        self._budget_bytes, self._deadline_s, self._widens = budget_bytes, deadline_s, widen
        self.meter: Meter = getattr(reader, "meter", None) or Meter()
        self._stream = torch.cuda.Stream(self._device) if self._device.type == "cuda" else None  # type: ignore[no-untyped-call]
        self._lock = threading.RLock()  # taken for every batch: entering the condition itself takes longer
        self._changed = threading.Condition(self._lock)
        self._wanted: deque[Place] = deque()
        self._ready: dict[Place, Tensors | BaseException] = {}
        self._ready_bytes = self._usual_bytes = 0
        self._rests = False  # the thread, since the budget is used up
        self._impatient = 0  # callers that are to be woken up
        self._awaited: list[Place] = []
        self._in_flight: Place | None = None
        self._keep_in_flight = True
        self._closed = False
        self._thread = threading.Thread(target=self._read_ahead, name="elastictrain-feeder", daemon=True)
        self._thread.start()

    def limit(self, prefetch_bytes: int) -> None:
        """From now on keep to so many bytes with what is read ahead; what is ready stays."""
        quarter, ahead_bytes = _split(prefetch_bytes)
        with self._changed:
            self._budget_bytes = quarter
            self._changed.notify_all()
        if isinstance(self._reader, LaneReader):
            self._reader.limit_ahead(ahead_bytes)

    def expect(self, upcoming: Iterable[Place], until: float = math.inf) -> None:
        """Say which batches come next, in order; replaces what was expected before. `until`: the step from which
        on none will be asked for, where that is known; nothing is decoded for those.

        When lanes move, only the work done ahead for places that are no longer named is thrown away; never that for a
        batch which somebody waits for.
        """
        places = dict.fromkeys(upcoming)
        if isinstance(self._reader, LaneReader):
            self._reader.expect(places, until)
        with self._lock:
            for place in [place for place in self._ready if place not in places and place not in self._awaited]:
                self._take(place)
            self._keep_in_flight = self._in_flight in places or self._in_flight in self._awaited
            self._wanted = deque(
                place
                for place in places
                if place not in self._ready and not (self._keep_in_flight and place == self._in_flight)
            )
            self._changed.notify_all()

    def forget(self, places: Iterable[Place]) -> None:
        """Nobody will ask for these, although they were expected; what lies ready of them makes room."""
        gone = set(places)
        with self._lock:
            for place in gone:
                self._take(place)
            self._keep_in_flight = self._keep_in_flight and self._in_flight not in gone
            if not gone.isdisjoint(self._wanted):
                self._wanted = deque(place for place in self._wanted if place not in gone)
            self._changed.notify_all()

    def ready(self, step: int, lane: int) -> bool:
        """Whether that batch lies ready, so that nobody would wait for it."""
        with self._lock:
            return isinstance(self._ready.get((step, lane)), Tensors)

    def batch(self, step: int, lane: int) -> Tensors:
        """Return batch `step` of `lane` on the device; a batch is handed out once per reading.

        Raises what `LaneReader.batch` raises, and DataError if reading takes longer than the deadline.
        """
        place = (step, lane)
        with self._lock:
            if self._closed:
                raise RuntimeError("the Feeder is closed")
            result = self._take(place)
            if result is None:
                self._awaited.append(place)
            elif self._rests and not self._is_full():
                self._changed.notify_all()
        if result is None:
            begun_s, before = time.monotonic(), self.meter.read()
            result = self._wait_for(place, begun_s + self._deadline_s)
            if isinstance(result, Tensors):
                result.waited = waited_for(before, self.meter.read(), time.monotonic() - begun_s)
        if isinstance(result, BaseException):
            raise result
        if result.copied is not None:  # what computes waits for the copy; the host does not
            current = torch.cuda.current_stream(self._device)
            current.wait_event(result.copied)
            for tensor in result.values():
                tensor.record_stream(current)
        if self._widens:
            result.widen()
        return result

    def _wait_for(self, place: Place, deadline: float) -> Tensors | BaseException:
        """Wait for a batch that is being read, or read one that is not."""
        with self._lock:
            try:
                self._wait_while_in_flight(place, deadline)
            finally:
                self._awaited.remove(place)
            result = self._take(place)
            if result is None and place in self._wanted:
                self._wanted.remove(place)  # asked for out of turn: no need to wait for those before it
            self._changed.notify_all()
        return self._read(place) if result is None else result

    def _wait_while_in_flight(self, place: Place, deadline: float) -> None:
        patient = True
        while place not in self._ready and place == self._in_flight and self._keep_in_flight:
            remaining = deadline - time.monotonic()
            if remaining <= 0 or self._closed:
                raise DataError(
                    f"step {place[0]}, lane {place[1]}: the data were not read within {self._deadline_s:.0f} s. "
                    "Look at the storage behind data.path"
                )
            self._impatient += not patient
            self._changed.wait(min(remaining, _PATIENCE_S) if patient else remaining)
            self._impatient -= not patient
            patient = False

    def close(self) -> None:
        """Stop the thread and wait for it; may be called twice. The reader stays open, but reads no more ahead."""
        with self._lock:
            self._closed = True
            self._wanted.clear()
            self._ready.clear()
            self._ready_bytes = 0
            self._changed.notify_all()
        if isinstance(self._reader, LaneReader):
            self._reader.end_ahead()
        self._thread.join(self._deadline_s)
        if self._thread.is_alive():
            raise DataError(f"a read did not end within {self._deadline_s:.0f} s. Look at the storage behind data.path")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _take(self, place: Place) -> Tensors | BaseException | None:
        result = self._ready.pop(place, None)
        if isinstance(result, Tensors):
            self._ready_bytes -= result.bytes
        return result

    def _put(self, place: Place, result: Tensors | BaseException) -> None:
        self._ready[place] = result
        if isinstance(result, Tensors):
            self._ready_bytes += result.bytes
            self._usual_bytes = result.bytes

    def _read(self, place: Place) -> Tensors:
        return self._tensors(*self._reader.take(*place))

    def _tensors(self, run: Run, number: int) -> Tensors:
        """A batch of a run as tensors on the device."""
        made: list[Any] = Tensors.of(run) if run.tensors is None else run.tensors
        run.tensors = made  # several threads may come for batches of one run: each takes others
        batch: Tensors = made[number]
        made[number] = None  # what becomes of it, on a device or widened, goes with whoever has it
        if self._stream is not None:
            with self.meter.stage("copy"), torch.cuda.stream(self._stream):
                pinned = {name: tensor.pin_memory() for name, tensor in batch.items()}
                # Torch's allocator does not give pinned memory out again before the copy from it is complete.
                batch.update({name: tensor.to(self._device, non_blocking=True) for name, tensor in pinned.items()})
                batch.copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
                batch.copied.record(self._stream)
        return batch

    def _is_full(self) -> bool:
        """Whether one more batch, of the size of the last, would take the batches that lie ready over the budget. Once
        it would, there is room again when half of them have gone: the thread is not woken for every batch.
        """
        if not self._ready:
            return False
        return self._ready_bytes + (self._ready_bytes if self._rests else self._usual_bytes) > self._budget_bytes

    def _read_ahead(self) -> None:
        while (place := self._next_place()) is not None:
            result: Tensors | BaseException
            try:
                result = self._read(place)
            except BaseException as error:  # also a panic in Rust, which is no Exception: somebody waits for it
                result = error
            with self._lock:
                if self._keep_in_flight and not self._closed:
                    self._put(place, result)
                self._in_flight = None
                if self._impatient:
                    self._changed.notify_all()
                with suppress(BaseException):  # who asks for such a batch gets its error; this thread goes on
                    self._put_what_is_made()

    def _next_place(self) -> Place | None:
        """Wait for a place that is to be read; None when closed."""
        with self._lock:
            while not self._closed and (not self._wanted or self._is_full()):
                self._rests = bool(self._wanted)
                self._changed.wait()  # ended by expect, batch or close; nothing of the run hangs on it
            self._rests = False
            if self._closed:
                return None
            self._in_flight, self._keep_in_flight = self._wanted.popleft(), True
            return self._in_flight

    def _put_what_is_made(self) -> None:
        """Put the next batches, those that the reader has made already, with those that lie ready. A copy to a device
        takes longer than whoever wants the lock should wait.
        """
        while self._stream is None and self._wanted and not self._closed and not self._is_full():
            room = max(1, (self._budget_bytes - self._ready_bytes) // max(1, self._usual_bytes))
            found = self._reader.made(self._wanted, min(room, _AT_ONCE))
            for run, number in found:
                self._put(self._wanted.popleft(), self._tensors(run, number))
            if len(found) < _AT_ONCE:
                return
