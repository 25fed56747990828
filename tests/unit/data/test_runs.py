"""Batches that are made in one go: each is handed out once, whoever asks and in whatever order."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from elastictrain.data import LaneReader, open_source
from elastictrain.data.feeder import Feeder
from elastictrain.data.ids import lane_hash
from elastictrain.data.runs import Run
from elastictrain.job import Data

LANES = 3


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    pq.write_table(pa.table({"n": np.arange(600)}), tmp_path / "a.parquet", row_group_size=50)
    return tmp_path


def reader_of(folder: Path, **settings: Any) -> LaneReader:
    spec = Data(kind="parquet", path=str(folder))
    return LaneReader(open_source(spec, seed=1, lanes=LANES, lane_batch_size=2), **settings)


def places(steps: int) -> list[tuple[int, int]]:
    return [(step, lane) for step in range(steps) for lane in range(LANES)]


def when_it_waits(feeder: Feeder, state: Callable[[], bool]) -> threading.Event:
    """Set when the thread has nothing to do in such a state."""
    plain, waits = feeder._changed.wait, threading.Event()

    def wait(timeout: float | None = None) -> bool:
        if state():
            waits.set()
        return plain(timeout)

    feeder._changed.wait = wait  # type: ignore[method-assign]
    return waits


def numbers(run: Run, number: int) -> list[int]:
    found: list[int] = run.batch(number)["n"].tolist()
    return found


def test_what_is_made_already_is_handed_out_in_order_and_once(folder: Path) -> None:
    plain, reader = reader_of(folder), reader_of(folder)
    expected = {place: plain.batch(*place)["n"].tolist() for place in places(70)}
    assert reader.made(places(1), 9) == []
    for place in places(2):  # how large a batch is shows the very first one, which is made alone
        assert numbers(*reader.take(*place)) == expected[place]
    wanted = places(70)[2 * LANES :]
    found = reader.made(wanted, 5)
    assert [numbers(*one) for one in found] == [expected[place] for place in wanted[:5]]
    assert reader.made(wanted, 5) == [], "those are handed out"
    more = reader.made(wanted[5:], 1000)
    assert 10 < len(more) < len(wanted) - 5, "as many as the first of them that ends has"
    assert [numbers(*one) for one in more] == [expected[place] for place in wanted[5 : 5 + len(more)]]
    again = places(70)
    assert [numbers(*reader.take(*place)) for place in again] == [expected[place] for place in again]


def test_nobody_waits_for_what_may_be_made(folder: Path) -> None:
    reader = reader_of(folder)
    for place in places(2):
        reader.take(*place)
    with reader._lock:  # as while somebody reads
        found: list[Any] = []
        asking = threading.Thread(target=lambda: found.append(reader.made([(2, 0)], 1)), daemon=True)
        asking.start()
        asking.join(30)
        assert found == [[]]
    assert len(reader.made([(2, 0)], 1)) == 1


def test_a_run_is_let_go_of_with_its_last_batch(folder: Path) -> None:
    reader = reader_of(folder)
    reader.take(0, 0)
    run, _ = reader.take(1, 0)
    assert run.count > 3
    for number in range(1, run.count):
        assert reader._runs[0] is run
        assert reader.take(1 + number, 0) == (run, number)
    assert 0 not in reader._runs


def test_a_feeder_asks_for_most_batches_where_they_are_made_already(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken: list[tuple[int, int]] = []
    take = LaneReader.take

    def noted(self: LaneReader, step: int, lane: int) -> tuple[Run, int]:
        taken.append((step, lane))
        return take(self, step, lane)

    plain = reader_of(folder)
    expected = [plain.batch(*place) for place in places(90)]
    monkeypatch.setattr(LaneReader, "take", noted)
    with Feeder(reader_of(folder)) as feeder:
        all_read = when_it_waits(feeder, lambda: len(feeder._ready) == len(places(90)))
        feeder.expect(places(90))
        assert all_read.wait(30)
        found = [feeder.batch(*place) for place in places(90)]
    assert [batch["n"].tolist() for batch in found] == [batch["n"].tolist() for batch in expected]
    hashes = [lane_hash(lane, batch.ids) for (_, lane), batch in zip(places(90), expected, strict=True)]
    assert [batch.samples_hash for batch in found] == hashes
    assert len(taken) < 90 * LANES // 3
    assert len(set(taken)) == len(taken)


def test_made_batches_keep_to_the_budget(folder: Path) -> None:
    batch_bytes = 16
    with Feeder(reader_of(folder), budget_bytes=7 * batch_bytes) as feeder:
        full = when_it_waits(feeder, lambda: feeder._rests)
        feeder.expect(places(30))
        assert full.wait(30)
        with feeder._lock:
            assert sorted(feeder._ready) == places(30)[:7]
            assert feeder._ready_bytes == 7 * batch_bytes


def test_a_reader_that_is_closed_hands_out_nothing_not_even_what_was_made(folder: Path) -> None:
    reader = reader_of(folder)
    for step in range(2):  # the very first one is made alone
        reader.batch(step, 0)
    assert reader.made([(2, 0)], 1), "more of the lane was made"
    reader.close()
    assert reader.made([(3, 0)], 1) == []
    for call in (reader.batch, reader.take):
        with pytest.raises(RuntimeError, match="the LaneReader is closed"):
            call(3, 0)


def test_what_becomes_of_a_batch_goes_with_whoever_has_it(folder: Path) -> None:
    reader = reader_of(folder)
    with Feeder(reader) as feeder:
        feeder.batch(0, 0)
        batch = feeder.batch(1, 0)
        assert reader._runs[0].count > 2, "more of the same run are to come"
        tensor = weakref.ref(batch["n"])
        del batch
        gc.collect()
        assert tensor() is None
        np.testing.assert_array_equal(feeder.batch(2, 0)["n"].numpy(), reader_of(folder).batch(2, 0)["n"])
