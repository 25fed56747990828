"""Windows read ahead: the ones needed first come first, within the budget, and nothing but time depends on them."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from elastictrain.data import LaneReader, open_source
from elastictrain.data.ahead import Ahead, Ended
from elastictrain.data.feeder import Feeder
from elastictrain.data.order import LaneOrder, Window
from elastictrain.data.windows import Block, Loaded, key_of, place_of
from elastictrain.errors import DataError
from elastictrain.job import Data
from tests.support.panic import Panic

BLOCK_BYTES = 80
LANES, BLOCKS = 3, 24
Name = tuple[int, tuple[int, int]]
"""Lane, and epoch and number of a window."""


def name_of(window: Window) -> Name:
    return window.lane, key_of(window)


class FakeLoaded:
    def __init__(self, window: Window) -> None:
        self.window = window
        arrays = {"x": np.zeros(BLOCK_BYTES // 8)}
        self.blocks = [Block(piece.block, arrays) for piece in window.pieces]


class Files:
    """Windows of an order of 24 blocks of 10 rows; reading one in `gates` waits, one in `broken` fails."""

    def __init__(self) -> None:
        self.order = LaneOrder([10] * BLOCKS, seed=1, lanes=LANES, lane_batch_size=2, window_blocks=2)
        self.reads: list[Name] = []
        self.gates: dict[Name, threading.Event] = {}
        self.broken: set[Name] = set()
        self.error: type[BaseException] = DataError
        self.progress = threading.Condition()
        self.ahead: Ahead | None = None

    def load(self, window: Window) -> Loaded:
        with self.progress:
            self.reads.append(name_of(window))
            self.progress.notify_all()
        if name_of(window) in self.gates:
            assert self.gates[name_of(window)].wait(30)
        if name_of(window) in self.broken:
            raise self.error("broken")
        assert self.ahead is not None
        self.ahead.check()
        return FakeLoaded(window)  # type: ignore[return-value]

    def steps_of(self, window: Window, step: int) -> float:
        del step
        return (window.stop - window.start) / 2

    def wait_for_reads(self, count: int) -> list[Name]:
        with self.progress:
            assert self.progress.wait_for(lambda: len(self.reads) >= count, timeout=30)
            return list(self.reads)

    def first(self, lane: int) -> Window:
        return self.order.window_at(0, lane, 0)


@contextmanager
def reading(windows: float, prepare: Callable[[Files], Any] = lambda _: None) -> Iterator[tuple[Files, Ahead]]:
    """Files, and what reads ahead of them with room for so many windows of two blocks."""
    files = Files()
    prepare(files)
    ahead = files.ahead = Ahead(files.load, files.order.after, files.steps_of, int(windows * 2 * BLOCK_BYTES))
    try:
        yield files, ahead
    finally:
        for gate in files.gates.values():
            gate.set()
        ahead.close()
        assert ahead._thread is None or not ahead._thread.is_alive()


def until_ready(ahead: Ahead, count: int) -> list[Name]:
    with ahead._changed:
        ready = lambda: [c for c in ahead._all() if c.loaded is not None]  # noqa: E731
        assert ahead._changed.wait_for(lambda: len(ready()) >= count, timeout=30)
        return sorted(name_of(coming.window) for coming in ready())


def test_what_is_needed_first_is_read_first_and_then_what_follows() -> None:
    with reading(6) as (files, ahead):
        ahead.expect([(7, files.first(2)), (5, files.first(0)), (6, files.first(1))], range(LANES))
        until_ready(ahead, 6)
        firsts, followers = files.reads[-6:][:3], files.reads[3:6]
        assert files.reads[:3] in ([(2, (0, 0)), (0, (0, 0)), (1, (0, 0))], [(0, (0, 0)), (1, (0, 0)), (2, (0, 0))])
        assert firsts == files.reads[:3]
        assert [lane for lane, _ in followers] == [0, 1, 2], "the lane whose window ends first goes on first"


def test_what_no_step_needs_any_more_is_not_read() -> None:
    with reading(24) as (files, ahead):
        ahead.expect([(0, files.first(lane)) for lane in range(LANES)], range(LANES), until=20)
        assert until_ready(ahead, 6) == [(lane, (0, number)) for lane in range(LANES) for number in (0, 1)]
        with ahead._changed:
            assert len(ahead._all()) == 6, "two windows of a lane are twenty steps"


def test_no_more_is_read_than_the_budget_and_what_is_taken_makes_room() -> None:
    with reading(3) as (files, ahead):
        window = files.first(0)
        ahead.follow(window, 10.0)
        until_ready(ahead, 3)
        for _ in range(6):
            window = files.order.after(window)
            ready = {block.number: block.bytes for one in ahead.ready for block in one.blocks}
            assert sum(ready.values()) <= 3 * 2 * BLOCK_BYTES
            assert ahead.take(window) is not None
            until_ready(ahead, 3)
        assert len(files.reads) == len(set(files.reads)) == 9, "each once"


def test_no_more_than_four_windows_of_a_lane_lie_ready() -> None:
    with reading(1000) as (files, ahead):
        window = files.first(0)
        ahead.follow(window, 10.0)
        until_ready(ahead, 4)
        for _ in range(5):
            window = files.order.after(window)
            assert ahead.take(window) is not None
            assert len(until_ready(ahead, 4)) == 4
        ahead.follow(files.first(1), 10.0)
        until_ready(ahead, 8)
        assert len(files.reads) == 13


def test_a_window_that_was_used_up_lives_nowhere() -> None:
    with reading(0.1) as (files, ahead):
        ahead.follow(files.first(1), 3.0)
        until_ready(ahead, 1)
        taken = ahead.take(files.order.after(files.first(1)))
        assert taken is not None
        block = weakref.ref(taken.blocks[0])
        until_ready(ahead, 1)  # the thread has read another one since
        ahead.expect([], [])
        del taken
        assert block() is None


def test_one_window_is_read_whatever_the_budget() -> None:
    with reading(0.1) as (files, ahead):
        ahead.follow(files.first(1), 3.0)
        assert until_ready(ahead, 1) == [(1, (0, 1))]
        assert ahead.take(files.order.after(files.first(1))) is not None
        assert until_ready(ahead, 1) == [(1, (0, 2))]


def test_a_window_that_is_being_read_is_waited_for_and_one_that_is_not_is_left_to_the_caller() -> None:
    gate = threading.Event()
    with reading(6, lambda files: files.gates.update({(0, (0, 0)): gate})) as (files, ahead):
        ahead.expect([(0, files.first(0)), (1, files.first(1))], range(LANES))
        files.wait_for_reads(1)
        assert ahead.take(files.first(1)) is None
        opener = threading.Thread(target=gate.set)
        found: list[Loaded | None] = []
        taker = threading.Thread(target=lambda: found.append(ahead.take(files.first(0))))
        taker.start()
        opener.start()
        taker.join(30)
        opener.join(30)
        assert found[0] is not None
        assert name_of(found[0].window) == (0, (0, 0))  # type: ignore[attr-defined]
        until_ready(ahead, 3)
        assert (1, (0, 0)) not in files.reads, "the caller has it"


@pytest.mark.parametrize("error", [DataError, Panic, SystemExit])
def test_what_cannot_be_read_is_left_to_the_caller_and_the_rest_goes_on(error: type[BaseException]) -> None:
    with reading(100, lambda files: files.broken.add((0, (0, 0)))) as (files, ahead):
        files.error = error
        ahead.expect([(0, files.first(0)), (1, files.first(1))], range(LANES))
        assert (1, (0, 0)) in until_ready(ahead, 2)
        assert ahead.take(files.first(0)) is None
        ahead.follow(files.first(0), 2.0)
        with ahead._changed:
            here = ahead._coming[place_of(files.first(0))]
            assert ahead._changed.wait_for(lambda: (0, 1) in here and here[0, 1].loaded is not None, timeout=30)


def test_where_nothing_follows_what_was_read_is_of_use_all_the_same() -> None:
    files = Files()
    last = files.order.after(files.first(0))

    def after(window: Window) -> Window:
        if window == last:
            raise DataError("nobody knows yet")
        return files.order.after(window)

    ahead = files.ahead = Ahead(files.load, after, files.steps_of, 1 << 20)
    try:
        ahead.follow(files.first(0), 3.0)
        assert until_ready(ahead, 1) == [(0, (0, 1))]
        assert ahead.take(last) is not None
        ahead.follow(last, 9.0)
        assert not ahead.ready
    finally:
        ahead.close()


def test_nothing_is_kept_of_lanes_that_left() -> None:
    gate = threading.Event()
    with reading(6, lambda files: files.gates.update({(2, (0, 0)): gate})) as (files, ahead):
        ahead.expect([(0, files.first(0))], range(LANES))
        until_ready(ahead, 2)
        ahead.expect([(0, files.first(2))], [1, 2])
        assert all(place[0] != 0 for place in ahead._coming)
        files.wait_for_reads(len(files.reads))
        ahead.expect([], [1])  # the lane leaves while its window is being read, or before
        gate.set()
        ahead.expect([(0, files.first(1))], [1])
        assert {lane for lane, _ in until_ready(ahead, 3)} == {1}


def test_a_lane_that_jumps_drops_what_lay_ready_for_where_it_was() -> None:
    with reading(3) as (files, ahead):
        ahead.follow(files.first(0), 5.0)
        until_ready(ahead, 3)
        far = files.order.window_at(4, 0, 40)
        ahead.follow(far, 200.0)
        found = until_ready(ahead, 3)
        assert all(key > key_of(far) for _, key in found)


def test_windows_that_were_passed_over_are_dropped() -> None:
    with reading(4) as (files, ahead):
        ahead.follow(files.first(0), 5.0)
        until_ready(ahead, 4)
        third = files.order.after(files.order.after(files.order.after(files.first(0))))
        assert ahead.take(third) is not None
        assert all(key > key_of(third) for key in ahead._coming[place_of(third)])


def test_closing_ends_a_read_that_asks() -> None:
    gate = threading.Event()
    files = Files()
    files.gates[0, (0, 0)] = gate
    ahead = files.ahead = Ahead(files.load, files.order.after, files.steps_of, 1000)
    ahead.expect([(0, files.first(0))], [0])
    files.wait_for_reads(1)
    closer = threading.Thread(target=ahead.close)
    closer.start()
    with ahead._changed:
        assert ahead._changed.wait_for(lambda: ahead._ended, timeout=30)
    with pytest.raises(Ended):
        ahead.check()
    gate.set()
    closer.join(30)
    assert not closer.is_alive()
    assert ahead.take(files.first(0)) is None
    ahead.follow(files.first(0), 1.0)
    ahead.close()
    assert files.reads == [(0, (0, 0))], "nothing is read any more"


def test_the_budget_must_be_positive() -> None:
    files = Files()
    with pytest.raises(ValueError, match="budget_bytes is 0"):
        Ahead(files.load, files.order.after, files.steps_of, 0)


# --- in a reader ---


def source_of(folder: Path, lanes: int = LANES) -> Any:
    pq.write_table(pa.table({"n": np.arange(BLOCKS * 20)}), folder / "a.parquet", row_group_size=20)
    return open_source(Data(kind="parquet", path=str(folder / "a.parquet")), seed=3, lanes=lanes, lane_batch_size=2)


def test_a_reader_finds_its_next_windows_decoded(tmp_path: Path) -> None:
    reader = LaneReader(source_of(tmp_path), ahead_bytes=1 << 20)
    decode, by = reader.source.read_block, {}

    def recorded(block: int) -> Any:
        by[block] = threading.current_thread().name
        return decode(block)

    reader.source.read_block = recorded  # type: ignore[method-assign]
    for lane in range(LANES):
        reader.batch(0, lane)
    assert reader._ahead is not None
    until_ready(reader._ahead, 2 * LANES)
    mine = {block for block, thread in by.items() if thread == threading.current_thread().name}
    for step in range(1, 2 * reader.source.steps_per_epoch):
        for lane in range(LANES):
            reader.batch(step, lane)
    assert set(by) == set(range(BLOCKS))
    assert len(mine) < BLOCKS
    reader.close()
    assert not reader._living


def test_an_error_ahead_is_raised_by_the_batch_that_needs_the_block_and_not_once_it_can_be_read(tmp_path: Path) -> None:
    plain = LaneReader(source_of(tmp_path))
    reader = LaneReader(plain.source, ahead_bytes=1 << 20)
    decode = reader.source.read_block
    window = reader.source.order.window_at(0, 1, reader.source.samples - 1 - reader.source.samples * 2 // 3)
    broken = {piece.block for piece in window.pieces}
    failed = threading.Event()

    def failing(block: int) -> Any:
        if block in broken:
            failed.set()
            raise DataError(f"block {block} is broken")
        return decode(block)

    reader.source.read_block = failing  # type: ignore[method-assign]
    steps = reader.source.steps_per_epoch
    last = steps - 1
    reader.expect([(step, 1) for step in range(steps)])
    assert reader.batch(0, 1)["n"].tolist() == reader.batch(0, 1)["n"].tolist()
    with pytest.raises(DataError, match="is broken"):
        reader.batch(last, 1)
    assert failed.is_set()
    broken.clear()
    found = reader.batch(last, 1)["n"].tolist()
    reader.end_ahead()
    assert found == plain.batch(last, 1)["n"].tolist()
    reader.close()


def test_places_that_do_not_exist_are_an_error_of_the_batch_and_not_of_expecting_it(tmp_path: Path) -> None:
    with Feeder.of(source_of(tmp_path)) as feeder:
        feeder.expect([(0, LANES), (-1, 0), (0, 1)])
        assert feeder.batch(0, 1)["n"].shape == (2,)
        with pytest.raises(IndexError):
            feeder.batch(0, LANES)


def test_blocks_that_lie_ready_stay_within_the_budget(tmp_path: Path) -> None:
    source = source_of(tmp_path)
    reader = LaneReader(source, ahead_bytes=4 * 160)  # two windows of two blocks of 20 numbers
    assert reader._ahead is not None
    most = 0
    for step in range(3 * source.steps_per_epoch):
        for lane in range(LANES):
            reader.batch(step, lane)
            ready = {block.number: block.bytes for one in reader._ahead.ready for block in one.blocks}
            most = max(most, sum(ready.values()))
    assert 0 < most <= 5 * 160, "a window is of three blocks where it is cut within one"
    reader.close()


def test_the_end_of_a_feeder_ends_reading_ahead(tmp_path: Path) -> None:
    source = source_of(tmp_path)
    with Feeder.of(source) as feeder:
        reader = feeder._reader
        feeder.expect([(step, lane) for step in range(9) for lane in range(LANES)])
        feeder.batch(0, 0)
        assert reader._ahead is not None
        until_ready(reader._ahead, 1)
        thread = reader._ahead._thread
    assert thread is not None
    assert not thread.is_alive()
    assert reader.batch(1, 1)["n"].shape == (2,), "the reader stays open"
    reader.close()


def test_a_window_whose_length_cannot_be_told_does_not_end_the_reading() -> None:
    def unknown(window: Window, step: int) -> float:
        if window.lane == 0:
            raise DataError("not just now")
        return (window.stop - window.start) / 2

    def prepare(files: Files) -> None:
        files.steps_of = unknown  # type: ignore[method-assign]

    with reading(4, prepare) as (files, ahead):
        ahead.expect([(1, files.first(0))], range(LANES))
        files.wait_for_reads(1)
        ahead.expect([(2, files.first(1))], range(LANES))
        assert (1, (0, 0)) in until_ready(ahead, 2)
