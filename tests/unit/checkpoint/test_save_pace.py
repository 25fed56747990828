"""A saver learns how long the state stays as it is, and writes past the page cache only while nobody waits."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable, Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from elastictrain_checkpoint import Piece, Store, lazy
from elastictrain_checkpoint import running as running_module
from elastictrain_checkpoint.errors import SaveTimeout
from elastictrain_checkpoint.handle import SaveHandle
from elastictrain_checkpoint.lazy import LazySaver
from elastictrain_checkpoint.store import _backend
from tests.unit.checkpoint.build import memory_store

MB = 1 << 20


class Asking:
    """Storage that asks a stream before every block, and takes none of the blocks from `stop` on before it may."""

    def __init__(self, url: str) -> None:
        self._inner: Any = _backend(url, {})
        self.told: list[bool] = []
        self.stop, self.reached, self.go_on = 99, threading.Event(), threading.Event()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def create(self, path: str, blocks: Iterable[memoryview]) -> int:
        stream: Any = blocks
        assert stream.size_bytes > 4 * MB

        def asked() -> Iterator[memoryview]:
            for number, block in enumerate(blocks):
                if number >= self.stop:
                    self.reached.set()
                    assert self.go_on.wait(30)
                self.told.append(stream.past_cache())
                yield block

        return int(self._inner.create(path, asked()))


class Scene:
    def __init__(self, max_copy: float) -> None:
        url = memory_store().url
        self.disk = Asking(url)
        self.saver = LazySaver(Store(url, backend=self.disk), max_copy=max_copy)
        self.data = np.zeros(4 * MB, dtype=np.uint8)

    def save(self, step: int) -> SaveHandle:
        return self.saver.save([Piece("w", "U8", (4 * MB,), 0, self.data)], step=step, attempt="a", writer="w0")


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[float]]:
    """Time that only moves when it is told to."""
    now = [100.0]
    monkeypatch.setattr(running_module.time, "perf_counter", lambda: now[0])
    yield now
    monkeypatch.undo()


def test_the_first_save_is_in_a_hurry_and_the_next_knows_its_time(clock: list[float]) -> None:
    scene = Scene(1.0)
    for step, expected in ((1, [False] * 4), (2, [True] * 4)):
        scene.disk.told.clear()
        handle = scene.save(step)
        assert handle._ended.wait(30)  # not `wait`: nobody is in a hurry
        assert scene.disk.told[:4] == expected, "the last unit is not live any more: all of it is taken"
        clock[0] += 2.0
        scene.saver.before_mutation()
        clock[0] += 50.0
        scene.saver.before_mutation()  # the time to the first change is what counts
    assert list(scene.saver._pace.windows_s) == [2.0, 2.0]


def test_only_the_last_few_windows_are_remembered(clock: list[float]) -> None:
    scene = Scene(1.0)
    for step in range(1, 8):
        assert scene.save(step)._ended.wait(30)
        clock[0] += step
        scene.saver.before_mutation()
    assert list(scene.saver._pace.windows_s) == [4.0, 5.0, 6.0, 7.0]


def test_while_a_change_waits_the_rest_is_read_as_fast_as_can_be(clock: list[float]) -> None:
    scene = Scene(0.0)  # nothing may be copied, so the change waits for every unit
    assert scene.save(1)._ended.wait(30)
    clock[0] += 10.0
    scene.saver.before_mutation()
    scene.disk.told.clear()
    scene.disk.stop = 2
    handle = scene.save(2)
    assert scene.disk.reached.wait(30)
    changing = threading.Thread(target=scene.saver.before_mutation)
    changing.start()
    job = scene.saver._jobs[-1]
    while not job.touched:
        changing.join(0.01)
    scene.disk.go_on.set()
    changing.join(30)
    assert handle._ended.wait(30)
    assert scene.disk.told[:4] == [True, True, False, False]
    assert not changing.is_alive()


def test_what_is_copied_has_all_the_time_there_is(clock: list[float]) -> None:
    scene = Scene(1.0)
    scene.disk.stop = 2
    handle = scene.save(1)
    assert scene.disk.reached.wait(30)
    scene.saver.before_mutation()  # copies the rest
    scene.disk.go_on.set()
    assert handle._ended.wait(30)
    assert scene.disk.told == [False, False, True, True, True]


def test_whoever_waits_for_the_outcome_has_no_time() -> None:
    scene = Scene(1.0)
    scene.disk.stop = 2
    handle = scene.save(1)
    assert scene.disk.reached.wait(30)
    scene.saver.before_mutation()  # copies the rest
    with pytest.raises(SaveTimeout):
        handle.wait(0.01)
    scene.disk.go_on.set()
    assert handle._ended.wait(30)
    assert scene.disk.told == [False] * 5


def test_whoever_has_begun_a_save_goes_on_before_it_is_planned(monkeypatch: pytest.MonkeyPatch) -> None:
    scene, order, may = Scene(1.0), [], threading.Event()
    plan = lazy.plan_units

    def rests(seconds: float) -> None:
        order.append(seconds)
        assert may.wait(30)

    def planned(*facts: Any) -> Any:
        order.append("planned")
        return plan(*facts)

    with monkeypatch.context() as patch:
        patch.setattr(lazy, "time", SimpleNamespace(sleep=rests, perf_counter=time.perf_counter))
        patch.setattr(lazy, "plan_units", planned)
        handle = scene.save(1)
        may.set()
        assert handle._ended.wait(30)
    assert order == [pytest.approx(lazy.YIELD_S, rel=0.1), "planned"]
