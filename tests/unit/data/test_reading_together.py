"""Several threads read at once: different blocks beside each other, the same block once; who waits reads on."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from elastictrain.data import LaneReader, open_source
from elastictrain.data.ahead import Ahead
from elastictrain.data.order import Window
from elastictrain.data.warm import WarmCache
from elastictrain.data.windows import Block, Loaded, key_of
from elastictrain.errors import DataError
from elastictrain.job import Data
from tests.unit.data.test_ahead import BLOCK_BYTES, Files, name_of, until_ready

WAIT_S = 30


class Worker(threading.Thread):
    """Runs one call; `result` waits for what it returned or raises what it raised."""

    def __init__(self, call: Callable[[], Any]) -> None:
        super().__init__(daemon=True)
        self._call, self._found, self._error = call, None, None
        self.start()

    def run(self) -> None:
        try:
            self._found = self._call()
        except BaseException as error:
            self._error = error

    def result(self) -> Any:
        self.join(WAIT_S)
        assert not self.is_alive()
        if self._error is not None:
            raise self._error
        return self._found


def ahead_of(files: Files, *, windows: float, helps: bool) -> Ahead:
    budget_bytes = int(windows * 2 * BLOCK_BYTES)
    ahead = files.ahead = Ahead(files.load, files.order.after, files.steps_of, budget_bytes, helps=helps)
    return ahead


def close(files: Files, ahead: Ahead) -> None:
    for gate in files.gates.values():
        gate.set()
    ahead.close()


def test_who_waits_for_a_window_reads_the_next_one_meanwhile() -> None:
    files, readers = Files(), {}
    first, gate = files.first(0), threading.Event()
    files.gates[0, (0, 0)] = gate
    ahead, load = ahead_of(files, windows=100, helps=True), files.load

    def recorded(window: Window) -> Loaded:
        readers[name_of(window)] = threading.get_ident()
        found = load(window)
        if window.lane == 2:
            gate.set()
        return found

    ahead._load = recorded
    try:
        ahead.expect([(0, first)], range(3))
        files.wait_for_reads(1)
        ahead.expect([(0, first), (1, files.first(1)), (2, files.first(2))], range(3))
        taker = Worker(lambda: ahead.take(first))
        found = taker.result()  # its window comes only when that of lane 2 was read
        assert name_of(found.window) == (0, (0, 0))
        assert readers[1, (0, 0)] == readers[2, (0, 0)] == taker.ident
        assert readers[0, (0, 0)] not in (taker.ident, threading.get_ident())
        read = files.reads[1:3]
        assert read == [(1, (0, 0)), (2, (0, 0))], "that which is needed first comes first"
        assert ahead.take(files.first(1)) is not None, "what was read meanwhile lies ready"
    finally:
        close(files, ahead)


@pytest.mark.parametrize(("windows", "helps"), [(1.4, True), (100, False)])
def test_who_waits_reads_nothing_beyond_the_budget_and_nothing_where_that_might_last(
    windows: float, helps: bool
) -> None:
    files, gate = Files(), threading.Event()
    first = files.first(0)
    second = files.order.after(first)
    files.gates[0, key_of(second)] = gate
    ahead = ahead_of(files, windows=windows, helps=helps)
    try:
        ahead.expect([(0, first)], range(3))
        until_ready(ahead, 1)
        assert ahead.take(first) is not None  # from then on it is known how large blocks are
        files.wait_for_reads(2)
        assert files.reads[1] == (0, key_of(second))
        ahead.expect([(1, second), (2, files.first(1))], range(3))
        waits, wait = threading.Event(), ahead._changed.wait
        ahead._changed.wait = lambda timeout=None: [waits.set(), wait(timeout)][1]  # type: ignore[method-assign]
        taker = Worker(lambda: ahead.take(second))
        assert waits.wait(WAIT_S)
        assert len(files.reads) == 2
        gate.set()
        assert taker.result() is not None
    finally:
        close(files, ahead)


def test_a_window_that_cannot_be_read_meanwhile_is_left_to_who_needs_it() -> None:
    files, gate = Files(), threading.Event()
    files.gates[0, (0, 0)] = gate
    files.broken.add((1, (0, 0)))
    ahead = ahead_of(files, windows=100, helps=True)
    try:
        ahead.expect([(0, files.first(0)), (1, files.first(1))], range(3))
        files.wait_for_reads(1)
        taker = Worker(lambda: ahead.take(files.first(0)))
        with files.progress:
            assert files.progress.wait_for(lambda: (1, (0, 0)) in files.reads, WAIT_S)
        gate.set()
        assert taker.result() is not None
        assert ahead.take(files.first(1)) is None
    finally:
        close(files, ahead)


def test_what_is_read_meanwhile_is_read_by_nobody_else() -> None:
    files = Files()
    files.gates = {(lane, (0, 0)): threading.Event() for lane in (0, 1)}
    ahead = ahead_of(files, windows=100, helps=True)
    try:
        ahead.expect([(0, files.first(0))], range(3))
        files.wait_for_reads(1)
        ahead.expect([(0, files.first(0)), (1, files.first(1)), (2, files.first(2))], range(3))
        taker = Worker(lambda: ahead.take(files.first(0)))
        files.wait_for_reads(2)
        files.gates[0, (0, 0)].set()  # the thread goes on, while lane 1 is being read by the other one
        until_ready(ahead, 8)  # all that may lie ready of lanes 0 and 2
        files.gates[1, (0, 0)].set()
        assert taker.result() is not None
        assert len(files.reads) == len(set(files.reads))
    finally:
        close(files, ahead)


def test_a_window_is_not_being_read_for_ever_when_its_reader_is_interrupted() -> None:
    files, gate = Files(), threading.Event()
    files.gates[0, (0, 0)] = gate
    ahead, load = ahead_of(files, windows=100, helps=True), files.load

    def interrupted(window: Window) -> Loaded:
        if window.lane == 1:
            raise KeyboardInterrupt
        return load(window)

    ahead._load = interrupted
    try:
        ahead.expect([(0, files.first(0))], range(3))
        files.wait_for_reads(1)
        ahead.expect([(0, files.first(0)), (1, files.first(1))], range(3))
        with pytest.raises(KeyboardInterrupt):
            Worker(lambda: ahead.take(files.first(0))).result()
        assert Worker(lambda: ahead.take(files.first(1))).result() is None
    finally:
        close(files, ahead)


# --- in a reader ---


def reader_of(folder: Path, **settings: Any) -> LaneReader:
    pq.write_table(pa.table({"n": np.arange(120)}), folder / "a.parquet", row_group_size=20)
    spec = Data(kind="parquet", path=str(folder / "a.parquet"), **settings)
    return LaneReader(open_source(spec, seed=3, lanes=2, lane_batch_size=2))


def test_different_blocks_are_decoded_at_once(tmp_path: Path) -> None:
    reader = reader_of(tmp_path)
    decode, both = reader.source.read_block, threading.Barrier(2)

    def together(block: int) -> Any:
        both.wait(WAIT_S)  # breaks unless another one is in here too
        return decode(block)

    reader.source.read_block = together  # type: ignore[method-assign]
    found: list[Block] = [worker.result() for worker in [Worker(lambda n=n: reader._block(n)) for n in (1, 4)]]
    assert [block.arrays["n"][0] for block in found] == [20, 80]
    assert reader.blocks_decoded == 2
    reader.close()


def test_a_block_is_decoded_once_for_all_who_want_it_and_its_error_is_each_ones_own(tmp_path: Path) -> None:
    reader = reader_of(tmp_path)
    decode, gate, calls = reader.source.read_block, threading.Event(), []
    begun = threading.Semaphore(0)

    def counted(block: int) -> Any:
        calls.append(block)
        begun.release()
        assert gate.wait(WAIT_S)
        if len(calls) < 3:
            raise DataError(f"try {len(calls)}")
        return decode(block)

    reader.source.read_block = counted  # type: ignore[method-assign]
    workers = [Worker(lambda: reader._block(2)) for _ in range(2)]
    assert begun.acquire(timeout=WAIT_S)
    assert calls == [2], "the other one waits"
    gate.set()
    for worker in workers:
        with pytest.raises(DataError, match="try"):
            worker.result()
    assert calls == [2, 2], "who has waited has tried for itself"
    gate.clear()
    workers = [Worker(lambda: reader._block(2)) for _ in range(3)]
    assert begun.acquire(timeout=WAIT_S)
    assert begun.acquire(timeout=WAIT_S)
    gate.set()
    first, *others = [worker.result() for worker in workers]
    assert all(other is first for other in others)
    assert calls == [2, 2, 2]
    assert not reader._in_reading
    reader.close()


def test_closing_waits_for_what_is_being_read(tmp_path: Path) -> None:
    reader = reader_of(tmp_path)
    decode, gate, begun = reader.source.read_block, threading.Event(), threading.Event()
    closed_before: list[bool] = []

    def slow(block: int) -> Any:
        begun.set()
        assert gate.wait(WAIT_S)
        closed_before.append(reader.closed_files)  # type: ignore[attr-defined]
        return decode(block)

    reader.closed_files = False  # type: ignore[attr-defined]
    close_source = reader.source.close

    def closing() -> None:
        reader.closed_files = True  # type: ignore[attr-defined]
        close_source()

    reader.source.read_block = slow  # type: ignore[method-assign]
    reader.source.close = closing  # type: ignore[method-assign]
    worker = Worker(lambda: reader._block(0))
    assert begun.wait(WAIT_S)
    closer = Worker(reader.close)
    with reader._blocks_changed:
        assert reader._in_reading == {0}
    gate.set()
    worker.result()
    closer.result()
    assert closed_before == [False]


def test_only_data_of_the_own_disk_are_read_while_waiting(tmp_path: Path) -> None:
    source = reader_of(tmp_path).source
    near = LaneReader(source, ahead_bytes=1)
    source.spec = source.spec.model_copy(update={"path": "s3://far/away.parquet"})
    far = LaneReader(source, ahead_bytes=1)
    assert near._ahead is not None
    assert far._ahead is not None
    assert (near._ahead._helps, far._ahead._helps) == (True, False)


# --- files ---


def open_descriptors(path: Path) -> int:
    links = [Path("/proc/self/fd") / name for name in os.listdir("/proc/self/fd")]  # noqa: PTH208
    return sum(link.exists() and link.resolve() == path.resolve() for link in links)


def test_each_who_reads_a_file_has_it_to_itself_and_one_stays_open(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reader = reader_of(tmp_path)
    blocks, place = reader.source._blocks, tmp_path / "a.parquet"  # type: ignore[union-attr]
    both, used, read_row_group = threading.Barrier(2), [], pq.ParquetFile.read_row_group

    def together(self: pq.ParquetFile, *args: Any, **kwargs: Any) -> Any:
        used.append(self)
        both.wait(WAIT_S)
        return read_row_group(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(pq.ParquetFile, "read_row_group", together)
        workers = [Worker(lambda n=n: blocks.read(n)["n"].to_pylist()) for n in (0, 5)]
        assert [worker.result() for worker in workers] == [list(range(20)), list(range(100, 120))]
    assert used[0] is not used[1]
    used.clear()
    workers.clear()
    assert open_descriptors(place) == 1
    reader.close()
    assert open_descriptors(place) == 0
    assert blocks.read(3)["n"].to_pylist() == list(range(60, 80)), "it is opened again"
    blocks.close()


def test_many_threads_read_all_blocks_of_more_files_than_stay_open(tmp_path: Path) -> None:
    for part in range(20):
        table = pa.table({"n": np.arange(part * 40, part * 40 + 40)})
        pq.write_table(table, tmp_path / f"{part:02d}.parquet", row_group_size=10)
    source = open_source(Data(kind="parquet", path=str(tmp_path)), seed=1, lanes=1, lane_batch_size=1)

    def read(start: int) -> list[int]:
        numbers = [(start + n * 7) % 80 for n in range(80)]
        return [int(source.read_block(n)["n"][0]) - n * 10 for n in numbers]

    for worker in [Worker(lambda s=s: read(s)) for s in range(4)]:
        assert set(worker.result()) == {0}
    assert len(source._blocks._open) <= 16  # type: ignore[attr-defined]
    source.close()
    assert sum(open_descriptors(path) for path in tmp_path.iterdir()) == 0


def test_a_warm_cache_is_filled_and_read_by_several_threads(tmp_path: Path) -> None:
    warm = WarmCache(tmp_path / "warm", {"files_hash": "a"}, 1 << 30)

    def use(start: int) -> None:
        for number in [(start + n) % 40 for n in range(40)]:
            arrays = {"x": np.full(100, number)}
            assert warm.store(number, arrays)
            found = warm.load(number)
            assert found is not None
            assert found["x"].tolist() == [number] * 100

    for worker in [Worker(lambda s=s: use(s)) for s in (0, 10, 20)]:
        worker.result()
    assert warm.hits == warm.stored == 120
    assert warm.damaged == 0
