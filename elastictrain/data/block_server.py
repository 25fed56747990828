"""The feeder of a node without Ray: threads that read what the ledger says, and answers for workers.

What a block becomes when it is handed out is up to `put`: a reference into Ray's object store in a run, the arrays
themselves in a test.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

from elastictrain.data.meter import Meter
from elastictrain.data.sharing import Answer, Ask, Ledger, Look, readers_wanted
from elastictrain.data.sources import AnySource
from elastictrain.data.warm import Arrays, WarmCache, cache_key, cache_root, read_through

_LOOK_S = 0.5
"""How often a thread without work looks what may go."""
_CLOSE_S = 60.0
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 1.0, 60.0
"""Before another thread is tried after one that could not open the data, or found others; doubles each time."""


class BlockServer:
    """Reads blocks for the workers of one node. Thread-safe; must be closed."""

    def __init__(
        self,
        open_source: Callable[[], AnySource],
        put: Callable[[Arrays], object],
        *,
        limit_bytes: int,
        cpus: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`open_source`: called once in every thread that reads. `limit_bytes`: what blocks may take in the store."""
        self._open, self._put, self._cpus, self._clock = open_source, put, cpus, clock
        self._changed = threading.Condition()
        self._ledger = Ledger(limit_bytes)
        self._items: dict[int, object] = {}
        self._threads: list[threading.Thread] = []
        self._key: str | None = None
        self._error: BaseException | None = None
        self._pause_s, self._next_reader_s = 0.0, float("-inf")
        self._usual_s = 0.0
        self._counts = {"decoded": 0, "decoded_bytes": 0, "handed_out": 0, "refused": 0, "peak_bytes": 0}
        self._closed = False
        with self._changed:
            self._start_reader()

    def opened(self, timeout_s: float) -> str | None:
        """Wait until the data are open; None, or why they cannot be opened (or are not within `timeout_s`)."""
        with self._changed:
            self._changed.wait_for(lambda: self._key is not None or self._error is not None, timeout_s)
            if self._error is not None:
                return f"{type(self._error).__name__}: {self._error}"
            return None if self._key is not None else f"the data were not open within {timeout_s:g} s"

    @property
    def is_opening(self) -> bool:
        """Whether the data are not open yet, and may still come to be."""
        with self._changed:
            return self._key is None and self._error is None and not self._closed

    def ask(self, ask: Ask) -> Answer:
        """Answer a worker, within `ask.wait_s`."""
        until_s = self._clock() + ask.wait_s
        with self._changed:
            self._ledger.tell(ask)
            self._let_go()
            look = self._ask(ask)
            while look is Look.COMING and (left_s := until_s - self._clock()) > 0 and not self._closed:
                self._changed.wait(left_s)
                look = self._look(ask)
            item = None
            if look is Look.HERE:
                self._ledger.take(ask)
                item = self._items[ask.block]
            self._counts["handed_out"] += look is Look.HERE
            self._counts["refused"] += look is Look.FULL
            return Answer(look, max(1, self._ledger.workers), self._usual_s, item)

    def tell(self, ask: Ask) -> None:
        """Hear what a worker holds, which asks for nothing."""
        with self._changed:
            self._ledger.tell(ask)
            self._let_go()

    def forget(self, worker: int) -> None:
        """A worker is gone: what only it held goes."""
        with self._changed:
            self._ledger.forget(worker)
            self._let_go()

    def stats(self) -> dict[str, int]:
        """Blocks decoded here and their bytes, blocks handed out, questions for which there was no room, workers, and
        bytes in the store: now and at most.
        """
        with self._changed:
            live_bytes, workers = self._ledger.live_bytes, self._ledger.workers
            return {**self._counts, "live_bytes": live_bytes, "workers": workers, "readers": len(self._threads)}

    def close(self) -> None:
        """Stop the threads, wait for them and drop all blocks; may be called twice."""
        with self._changed:
            self._closed = True
            self._items.clear()
            self._changed.notify_all()
            threads = list(self._threads)
        for thread in threads:
            thread.join(_CLOSE_S)

    def _ask(self, ask: Ask) -> Look:
        if ask.key != self._key:
            return self._look(ask)
        look = self._ledger.ask(ask.block, ask.due, self._clock())
        if look is Look.COMING:
            wanted = readers_wanted(self._ledger.workers, self._cpus)
            if len(self._threads) < wanted and self._ledger.waiting > 1 and self._clock() >= self._next_reader_s:
                self._start_reader()
            self._changed.notify_all()
        return look

    def _look(self, ask: Ask) -> Look:
        if self._key is None and self._error is None:  # not open yet; it is asked again
            return Look.COMING
        if ask.key != self._key:
            return Look.NONE
        return self._ledger.look(ask.block)

    def _let_go(self) -> None:
        for block in self._ledger.let_go(self._clock()):
            self._items.pop(block, None)

    def _start_reader(self) -> None:
        name = f"elastictrain-blocks-{len(self._threads)}"
        self._threads.append(threading.Thread(target=self._serve, name=name, daemon=True))
        self._threads[-1].start()

    def _serve(self) -> None:
        try:
            source = self._open()
        except BaseException as error:  # also a panic in Rust, which is no Exception: workers wait for this thread
            self._give_up(error)
            return
        try:
            limit_bytes = source.spec.warm_cache_bytes
            warm = WarmCache(cache_root(), source.content, limit_bytes) if limit_bytes else None
            if not self._agrees(cache_key(source.content)):
                self._give_up(None)
                return
            while (block := self._wait_for_work()) is not None:
                self._read(source, warm, block)
        except BaseException as error:
            self._give_up(error)
        finally:
            source.close()

    def _agrees(self, key: str) -> bool:
        """Whether a thread that has just opened the data has those of the thread before it. Files may have come or gone
        in between, and then its block numbers mean other blocks than the workers'.
        """
        with self._changed:
            self._key = self._key or key
            self._changed.notify_all()
            return key == self._key

    def _give_up(self, error: BaseException | None) -> None:
        """The thread that calls this reads nothing; another one may be tried after a pause."""
        with self._changed:
            if self._key is None:
                self._error = self._error or error
            self._threads.remove(threading.current_thread())
            self._pause_s = min(_LONGEST_PAUSE_S, max(_FIRST_PAUSE_S, 2 * self._pause_s))
            self._next_reader_s = self._clock() + self._pause_s
            self._changed.notify_all()

    def _wait_for_work(self) -> int | None:
        with self._changed:
            while not self._closed:
                self._let_go()
                if (block := self._ledger.next(self._clock())) is not None:
                    return block
                self._changed.wait(_LOOK_S)
            return None

    def _read(self, source: AnySource, warm: WarmCache | None, block: int) -> None:
        begun_s = self._clock()
        try:
            arrays, decoded = read_through(warm, block, source.read_block, Meter())
            if any(array.dtype.hasobject for array in arrays.values()):
                raise TypeError(f"block {block} holds Python objects, which cannot be shared")
            if self._reserve(block, arrays, decoded):
                item = self._put(arrays)
                self._show(block, item, self._clock() - begun_s)
        except BaseException:  # who needs the block reads it, and gets the error if there still is one
            with self._changed:
                self._ledger.failed(block)
                self._changed.notify_all()

    def _reserve(self, block: int, arrays: dict[str, Any], decoded: bool) -> bool:
        size = sum(array.nbytes for array in arrays.values())
        with self._changed:
            if decoded:
                self._counts["decoded"] += 1
                self._counts["decoded_bytes"] += size
            fits = self._ledger.sized(block, max(1, size))
            self._counts["peak_bytes"] = max(self._counts["peak_bytes"], self._ledger.live_bytes)
            self._changed.notify_all()
            return fits

    def _show(self, block: int, item: object, took_s: float) -> None:
        with self._changed:
            self._usual_s = took_s if not self._usual_s else 0.75 * self._usual_s + 0.25 * took_s
            self._items[block] = item
            self._ledger.done(block, self._clock())
            self._changed.notify_all()
