"""What a reader keeps: blocks are shared by the lanes that meet in them, and go when the last of these has passed."""

from __future__ import annotations

import gc
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from elastictrain.data import LaneReader, open_source
from elastictrain.data.tokenizers import BytesTokenizer, tokens_record
from elastictrain.job import Data

LANES = 6


def reader_of(folder: Path, groups: int = 12) -> LaneReader:
    pq.write_table(pa.table({"n": np.arange(groups * 20)}), folder / "a.parquet", row_group_size=20)
    spec = Data(kind="parquet", path=str(folder / "a.parquet"))
    return LaneReader(open_source(spec, seed=3, lanes=LANES, lane_batch_size=2))


def test_lanes_that_meet_in_a_block_share_it(tmp_path: Path) -> None:
    reader = reader_of(tmp_path, groups=3)  # two lanes in every block
    for lane in range(LANES):
        reader.batch(0, lane)
    assert reader.blocks_decoded == 3
    assert len(reader._living) == 3


def test_an_epoch_decodes_each_block_once_for_each_window_that_it_is_in(tmp_path: Path) -> None:
    reader = reader_of(tmp_path)
    for step in range(reader.source.steps_per_epoch):
        for lane in range(LANES):
            reader.batch(step, lane)
    assert 12 <= reader.blocks_decoded <= 12 + LANES


def test_no_more_blocks_live_than_windows_need(tmp_path: Path) -> None:
    reader = reader_of(tmp_path, groups=40)
    most = 0
    for step in range(20 * reader.source.steps_per_epoch):
        for lane in range(LANES):
            reader.batch(step, lane)
        most = max(most, len(reader._living))
    assert most <= 2 * LANES + 2, "two row groups for each lane, and two that were used last"
    reader.close()
    assert not reader._living


def test_a_batch_belongs_to_the_caller_also_when_rows_of_several_were_gathered(tmp_path: Path) -> None:
    reader, fresh = reader_of(tmp_path), reader_of(tmp_path)
    for step in range(2 * reader.source.steps_per_epoch):
        for lane in (0, 3):
            expected = fresh.batch(step, lane)["n"].copy()
            for _ in range(2):  # asked for a second time, it is as it was
                batch = reader.batch(step, lane)["n"]
                np.testing.assert_array_equal(batch, expected)
                batch[:] = -1


def test_batches_in_a_row_are_made_in_one_go_and_handed_out_at_their_own_steps(tmp_path: Path) -> None:
    reader, fresh = reader_of(tmp_path), reader_of(tmp_path)
    finish, calls = reader.source.finish, []

    def counted(step: int, lane: int, batch: Any) -> Any:
        calls.append((step, lane))
        return finish(step, lane, batch)

    reader.source.finish = counted  # type: ignore[method-assign, assignment]
    steps = reader.source.steps_per_epoch
    for step in range(steps):
        assert reader.batch(step, 1).ids.tolist() == fresh.batch(step, 1).ids.tolist()
    assert len(calls) < steps // 3
    jumps = [0, 2, 3, 1, 2, 5, 6, 6, 4, 0, 1, 3, 2, 2, 1, 0, 7, 9, 8]
    for step in jumps:
        expected = {lane: LaneReader(fresh.source).batch(step, lane) for lane in (0, 1)}
        for lane, batch in expected.items():
            found = reader.batch(step, lane)
            assert found.ids.tolist() == batch.ids.tolist(), (step, jumps)
            assert found["n"].tolist() == batch["n"].tolist()
    reader.close()
    assert not reader._runs


def test_prepared_batches_of_a_lane_that_left_are_forgotten(tmp_path: Path) -> None:
    reader = reader_of(tmp_path)
    for step in range(3):
        reader.batch(step, 4)
    assert 4 in reader._runs
    for step in range(3 * LANES):
        reader.batch(step % reader.source.steps_per_epoch, 0)
    assert set(reader._runs) <= {0}


@pytest.mark.parametrize("column", ["numbers", "rows", "tokens"])
def test_what_is_decoded_does_not_stay_in_arrows_memory(column: str, tmp_path: Path) -> None:
    numbers = np.arange(40_000, dtype=np.uint16) % 250
    columns = {
        "numbers": pa.array(numbers),
        "rows": pa.FixedSizeListArray.from_arrays(pa.array(numbers), 8),
        "tokens": pa.array([[*numbers[at : at + 99], 256] for at in range(0, 40_000, 100)], pa.list_(pa.uint16())),
    }
    pq.write_table(pa.table({column: columns[column]}), tmp_path / "a.parquet")
    (tmp_path / "_tokenizer.json").write_text(json.dumps(tokens_record(BytesTokenizer())))
    text = {"text_column": "tokens", "sequence_length": 99, "tokenizer": str(tmp_path / "_tokenizer.json")}
    spec = Data(kind="parquet", path=str(tmp_path / "*.parquet"), **(text if column == "tokens" else {}))
    source = open_source(spec, seed=3, lanes=1, lane_batch_size=2)
    source.read_block(0)
    gc.collect()
    before = pa.total_allocated_bytes()
    arrays = source.read_block(0)
    assert sum(array.nbytes for array in arrays.values()) > 70_000
    assert pa.total_allocated_bytes() - before < 10_000
    source.close()
