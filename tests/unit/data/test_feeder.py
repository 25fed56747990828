"""The feeder: the same bits with and without reading ahead, whatever was expected and however lanes move."""

from __future__ import annotations

import threading
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from elastictrain.data import LaneReader, open_source
from elastictrain.data.feeder import Feeder, Place
from elastictrain.data.ids import sample_ids
from elastictrain.data.meter import Meter, timed
from elastictrain.data.runs import Batch, Run
from elastictrain.errors import DataError
from elastictrain.job import Data
from tests.support.panic import Panic

BATCH_BYTES = 16  # of the fake's: two int64


class FakeReader:
    """Counts reads; a read of a place in `gates` waits for its gate, one in `broken` fails."""

    def __init__(self) -> None:
        self.reads: list[Place] = []
        self.gates: dict[Place, threading.Event] = {}
        self.broken: set[Place] = set()
        self.panics = self.cannot_make = False
        self.progress = threading.Condition()

    def batch(self, step: int, lane: int) -> Batch:
        with self.progress:
            self.reads.append((step, lane))
            self.progress.notify_all()
        if (step, lane) in self.gates:
            assert self.gates[step, lane].wait(30)
        if (step, lane) in self.broken:
            raise Panic if self.panics else DataError(f"broken at {step}, {lane}")
        return Batch({"x": np.asarray([step, lane])}, sample_ids([step], [lane]))

    def take(self, step: int, lane: int) -> tuple[Run, int]:
        batch = self.batch(step, lane)
        return Run(step, lane, 1, dict(batch), batch.ids), 0

    def made(self, places: Iterable[Place], count: int) -> list[tuple[Run, int]]:
        if self.cannot_make:
            raise TypeError("no tensor can be made of these")
        return []

    def wait_for_reads(self, count: int) -> None:
        with self.progress:
            assert self.progress.wait_for(lambda: len(self.reads) >= count, timeout=30)


def feeder_of(reader: FakeReader, **settings: Any) -> Feeder:
    return Feeder(reader, **settings)  # type: ignore[arg-type]


def test_bits_are_the_same_with_and_without_reading_ahead(tmp_path: Path) -> None:
    table = pa.table({"text": [f"document {i}" for i in range(200)]})
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=20)
    spec = Data(kind="parquet", path=str(tmp_path), text_column="text", sequence_length=16)

    def reader() -> LaneReader:
        return LaneReader(open_source(spec, seed=1, lanes=4, lane_batch_size=2))

    plain = reader()
    steps = 2 * plain.source.steps_per_epoch
    places = [(step, lane) for step in range(steps) for lane in range(4)]
    expected = [plain.batch(*place)["tokens"].tobytes() for place in places]
    with Feeder(reader()) as feeder:
        got = []
        for at, place in enumerate(places):
            if at % 3 == 0:
                feeder.expect(places[at : at + 9])
            batch = feeder.batch(*place)["tokens"]
            assert batch.dtype == torch.int64
            got.append(batch.numpy().tobytes())
    assert got == expected


def test_expected_batches_are_read_once_in_order_and_no_more_than_the_budget() -> None:
    reader = FakeReader()
    with feeder_of(reader, budget_bytes=3 * BATCH_BYTES) as feeder:
        feeder.expect([(0, lane) for lane in range(8)])
        reader.wait_for_reads(3)
        assert reader.reads == [(0, 0), (0, 1), (0, 2)]
        for lane in range(8):
            assert feeder.batch(0, lane)["x"].tolist() == [0, lane]
    assert sorted(reader.reads) == [(0, lane) for lane in range(8)]


def test_only_the_work_of_moved_lanes_is_thrown_away() -> None:
    reader = FakeReader()
    with feeder_of(reader, budget_bytes=4 * BATCH_BYTES) as feeder:
        feeder.expect([(5, 0), (5, 1), (5, 2), (5, 3)])
        reader.wait_for_reads(4)
        assert feeder.batch(5, 3)["x"].tolist() == [5, 3]  # the fourth is read: all four lay ready or were taken
        feeder.expect([(5, 0), (5, 1), (5, 7)])  # lane 2 has left, lane 7 has come
        for lane in (0, 1, 7):
            assert feeder.batch(5, lane)["x"].tolist() == [5, lane]
        assert reader.reads.count((5, 0)) == reader.reads.count((5, 1)) == reader.reads.count((5, 7)) == 1
        assert feeder.batch(5, 2)["x"].tolist() == [5, 2]
        assert reader.reads.count((5, 2)) == 2


def test_a_batch_in_flight_for_a_lane_that_left_is_dropped() -> None:
    reader = FakeReader()
    reader.gates[0, 0] = threading.Event()
    with feeder_of(reader) as feeder:
        feeder.expect([(0, 0)])
        reader.wait_for_reads(1)
        feeder.expect([(0, 1)])
        reader.gates[0, 0].set()
        assert feeder.batch(0, 1)["x"].tolist() == [0, 1]
        assert (0, 0) not in feeder._ready


def test_asked_for_out_of_turn_does_not_wait_for_the_rest() -> None:
    reader = FakeReader()
    reader.gates[0, 0] = threading.Event()
    with feeder_of(reader) as feeder:
        feeder.expect([(0, 0), (0, 1)])
        reader.wait_for_reads(1)
        assert feeder.batch(0, 1)["x"].tolist() == [0, 1]
        assert feeder.batch(9, 9)["x"].tolist() == [9, 9]  # expected by nobody
        reader.gates[0, 0].set()
        assert feeder.batch(0, 0)["x"].tolist() == [0, 0]
    assert reader.reads == [(0, 0), (0, 1), (9, 9)]


def test_an_error_in_the_thread_is_raised_by_its_batch_alone() -> None:
    reader = FakeReader()
    reader.broken.add((0, 1))
    with feeder_of(reader) as feeder:
        feeder.expect([(0, 0), (0, 1), (0, 2)])
        assert feeder.batch(0, 0)["x"].tolist() == [0, 0]
        with pytest.raises(DataError, match="broken at 0, 1"):
            feeder.batch(0, 1)
        assert feeder.batch(0, 2)["x"].tolist() == [0, 2]
        reader.broken.clear()  # the storage is back
        assert feeder.batch(0, 1)["x"].tolist() == [0, 1]


def test_a_read_that_hangs_is_an_error_after_the_deadline() -> None:
    reader = FakeReader()
    reader.gates[0, 0] = threading.Event()
    feeder = feeder_of(reader, deadline_s=0.05)
    feeder.expect([(0, 0)])
    reader.wait_for_reads(1)
    with pytest.raises(DataError, match="step 0, lane 0: the data were not read within"):
        feeder.batch(0, 0)
    with pytest.raises(DataError, match="did not end within"):
        feeder.close()
    reader.gates[0, 0].set()
    feeder.close()


def test_close_joins_and_may_be_called_twice() -> None:
    feeder = feeder_of(FakeReader())
    feeder.expect([(0, 0), (1, 0)])
    feeder.close()
    feeder.close()
    assert not feeder._thread.is_alive()
    with pytest.raises(RuntimeError, match="closed"):
        feeder.batch(0, 0)


def test_the_budget_must_be_positive() -> None:
    with pytest.raises(ValueError, match="budget_bytes is 0"):
        feeder_of(FakeReader(), budget_bytes=0)


def test_one_batch_lies_ready_whatever_its_size_and_no_second() -> None:
    reader = FakeReader()
    with feeder_of(reader, budget_bytes=1) as feeder:
        feeder.expect([(0, lane) for lane in range(4)])
        for lane in range(4):
            reader.wait_for_reads(lane + 1)
            assert len(reader.reads) == lane + 1
            assert feeder.batch(0, lane)["x"].tolist() == [0, lane]


def test_bytes_that_are_thrown_away_make_room_again() -> None:
    reader = FakeReader()
    with feeder_of(reader, budget_bytes=2 * BATCH_BYTES) as feeder:
        feeder.expect([(0, 0), (0, 1), (0, 2)])
        reader.wait_for_reads(2)
        feeder.expect([(0, 1), (0, 5), (0, 6)])
        reader.wait_for_reads(3)
        assert reader.reads[:3] == [(0, 0), (0, 1), (0, 5)]
        assert feeder.batch(0, 1)["x"].tolist() == [0, 1]
        reader.wait_for_reads(4)
        assert reader.reads[3:] == [(0, 6)]


def test_the_wait_for_a_batch_is_told_by_stage() -> None:
    class Slow(FakeReader):
        def __init__(self) -> None:
            super().__init__()
            self.now = 0.0
            self.meter = Meter(lambda: self.now)

        def batch(self, step: int, lane: int) -> Batch:
            with self.meter.stage("decode"):
                self.now += 3.0
                with timed("store"):
                    self.now += 1.0
            return super().batch(step, lane)

    reader = Slow()
    with feeder_of(reader) as feeder:
        waited = feeder.batch(0, 0).waited  # nobody expected it: all of it is waited for
        assert waited["decode"] == pytest.approx(3 * waited["store"])
        feeder.expect([(0, 1)])
        reader.wait_for_reads(2)
        assert set(feeder.batch(0, 1).waited) <= {"other"}, "it was read before anybody waited"


def test_the_thread_goes_on_when_half_of_what_lay_ready_has_gone() -> None:
    feeder = feeder_of(FakeReader(), budget_bytes=4 * BATCH_BYTES)
    feeder.close()
    batch = feeder._read((0, 0))
    assert batch.bytes == feeder._usual_bytes or feeder._usual_bytes == 0
    feeder._usual_bytes = batch.bytes
    full = {}
    for rests in (False, True):
        feeder._rests = rests
        for count in range(5):
            feeder._ready = {(0, lane): batch for lane in range(count)}
            feeder._ready_bytes = count * BATCH_BYTES
            full[rests, count] = feeder._is_full()
    assert [full[False, count] for count in range(5)] == [False, False, False, False, True]
    assert [full[True, count] for count in range(5)] == [False, False, False, True, True]


def when_it_waits(feeder: Feeder, attribute: str) -> threading.Event:
    """Set when somebody waits while `attribute` is set."""
    plain, waits = feeder._changed.wait, threading.Event()

    def wait(timeout: float | None = None) -> bool:
        if getattr(feeder, attribute):
            waits.set()
        return plain(timeout)

    feeder._changed.wait = wait  # type: ignore[method-assign]
    return waits


@pytest.mark.parametrize("cannot_make", [False, True])
def test_who_has_waited_for_a_while_is_woken_by_the_batch(cannot_make: bool) -> None:
    """Also if what lies ready of the next ones cannot be made; and the thread goes on."""
    reader = FakeReader()
    reader.gates[0, 0], reader.cannot_make = threading.Event(), cannot_make
    with feeder_of(reader) as feeder:
        sleeps = when_it_waits(feeder, "_impatient")
        feeder.expect([(0, 0), (0, 1)])
        reader.wait_for_reads(1)
        found: list[list[int]] = []
        caller = threading.Thread(target=lambda: found.append(feeder.batch(0, 0)["x"].tolist()), daemon=True)
        caller.start()
        assert sleeps.wait(30)
        reader.gates[0, 0].set()
        caller.join(30)
        assert found == [[0, 0]]
        assert feeder._impatient == 0
        reader.wait_for_reads(2)


def test_a_feeder_of_its_own_gives_the_same_bits_and_shares_the_budget(tmp_path: Path) -> None:
    pq.write_table(pa.table({"n": np.arange(400)}), tmp_path / "a.parquet", row_group_size=20)
    spec = Data(kind="parquet", path=str(tmp_path), prefetch_bytes=4000)
    source = open_source(spec, seed=1, lanes=3, lane_batch_size=2)
    plain = LaneReader(open_source(spec, seed=1, lanes=3, lane_batch_size=2))
    places = [(step, lane) for step in range(2 * source.steps_per_epoch) for lane in range(3)]
    with Feeder.of(source) as feeder:
        assert feeder._budget_bytes == 1000
        assert feeder._reader._ahead is not None
        assert feeder._reader._ahead._budget_bytes == 3000
        for at, place in enumerate(places):
            if at % 17 == 0:
                feeder.expect(places[at : at + 40])
            assert feeder.batch(*place)["n"].tolist() == plain.batch(*place)["n"].tolist()


def test_what_somebody_waits_for_is_not_thrown_away_when_lanes_move() -> None:
    reader = FakeReader()
    reader.gates[0, 0] = threading.Event()
    with feeder_of(reader) as feeder:
        waits = when_it_waits(feeder, "_awaited")
        feeder.expect([(0, 0), (0, 1)])
        reader.wait_for_reads(1)
        found: list[list[int]] = []
        caller = threading.Thread(target=lambda: found.append(feeder.batch(0, 0)["x"].tolist()), daemon=True)
        caller.start()
        assert waits.wait(30)
        feeder.expect([(0, 1)])
        reader.gates[0, 0].set()
        caller.join(30)
        assert found == [[0, 0]]
        assert feeder.batch(0, 1)["x"].tolist() == [0, 1]
        assert not feeder._awaited
    assert reader.reads == [(0, 0), (0, 1)]


def test_what_nobody_will_ask_for_makes_room() -> None:
    """Lanes that another one has computed, or that another one has not left to us."""
    reader = FakeReader()
    reader.gates[1, 2] = threading.Event()
    with feeder_of(reader, budget_bytes=3 * BATCH_BYTES) as feeder:
        feeder.expect([(1, 0), (1, 1), (1, 2), (2, 0), (2, 1), (2, 2)])
        reader.wait_for_reads(3)
        assert feeder.ready(1, 0)
        assert feeder.ready(1, 1)
        assert not feeder.ready(1, 2), "still being read"
        feeder.forget([(1, 1), (1, 2), (2, 0)])
        assert feeder.ready(1, 0)
        assert not feeder.ready(1, 1)
        reader.gates[1, 2].set()
        reader.wait_for_reads(5)
        assert feeder.batch(1, 0)["x"].tolist() == [1, 0]
        assert feeder.batch(2, 2)["x"].tolist() == [2, 2]
        assert not feeder.ready(1, 2)
        assert (2, 0) not in reader.reads
        assert feeder.batch(1, 1)["x"].tolist() == [1, 1], "and if it is asked for, it is read"


def test_a_batch_that_could_not_be_read_does_not_lie_ready() -> None:
    reader = FakeReader()
    reader.broken.add((1, 0))
    with feeder_of(reader) as feeder:
        feeder.expect([(1, 0), (1, 1)])
        reader.wait_for_reads(2)
        assert not feeder.ready(1, 0)
        with pytest.raises(DataError, match="broken at 1, 0"):
            feeder.batch(1, 0)


def test_a_panic_in_the_thread_is_raised_by_its_batch_and_the_thread_goes_on() -> None:
    reader = FakeReader()
    reader.broken, reader.panics = {(0, 1)}, True
    with feeder_of(reader, deadline_s=30.0) as feeder:
        feeder.expect([(0, 0), (0, 1), (0, 2)])
        reader.wait_for_reads(3)
        with pytest.raises(Panic):
            feeder.batch(0, 1)
        assert feeder.batch(0, 2)["x"].tolist() == [0, 2]
        assert len(reader.reads) == 3
