"""Storage that waits until it is told to go on, and a saver on it."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from elastictrain_checkpoint import Part, Piece, Reader, Store, commit, newest
from elastictrain_checkpoint.lazy import LazySaver
from elastictrain_checkpoint.store import _backend
from tests.unit.checkpoint.build import memory_store

MB = 1 << 20


class Gate:
    """Storage that takes no block before it is opened; `blocks` it may take even so."""

    def __init__(self, url: str, blocks: int = 0) -> None:
        self._inner: Any = _backend(url, {})
        self.free, self.reached, self.opened = blocks, threading.Event(), threading.Event()
        self.stops: dict[int, threading.Event] = {}
        self.error: OSError | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def create(self, path: str, blocks: Iterable[memoryview]) -> int:
        def gated() -> Iterator[memoryview]:
            for number, block in enumerate(blocks):
                if number in self.stops:
                    self.reached.set()
                    assert self.stops[number].wait(30)
                if number == self.free:
                    self.reached.set()
                    assert self.opened.wait(30)
                if self.error is not None:
                    raise self.error
                yield block

        size = int(self._inner.create(path, gated()))
        if self.free > 100:  # everything is taken: the last thing before the file is there
            self.reached.set()
            assert self.opened.wait(30)
        return size


class Scene:
    def __init__(self, blocks: int = 0, **settings: Any) -> None:
        url = memory_store().url
        self.gate = Gate(url, blocks)
        self.store = Store(url, backend=self.gate)
        self.saver = LazySaver(self.store, **settings)
        self.data = np.zeros(4 * MB, dtype=np.uint8)

    def save(self, step: int, **more: Any) -> Any:
        def finish(part: Part) -> Any:
            return commit(self.store, step=step, attempt="a", generation=1, parts=[part])

        return self.saver.save(
            [Piece("t", "U8", self.data.shape, 0, self.data.data)],
            step=step,
            attempt="a",
            writer="w",
            finish=finish,
            **more,
        )

    def stored(self, step: int) -> set[int]:
        manifest = newest(self.store)
        assert manifest is not None
        assert manifest.step == step
        return set(np.unique(Reader(self.store, manifest).read("t")).tolist())
