"""The choices of order in a job's data: what a reader then gives, and fingerprints that tell them apart."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from elastictrain.data import LaneReader, fingerprint_difference, open_source
from elastictrain.errors import DataError
from elastictrain.job import Data


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for n in range(3):
        pq.write_table(pa.table({"x": np.arange(10) + 10 * n}), tmp_path / f"{n}.parquet", row_group_size=4)
    return tmp_path


def opened(folder: Path, lanes: int = 2, size: int = 4, **settings: Any) -> LaneReader:
    spec = Data(kind="parquet", path=str(folder), **settings)
    return LaneReader(open_source(spec, seed=1, lanes=lanes, lane_batch_size=size))


def steps(reader: LaneReader, count: int) -> list[list[int]]:
    return [[x for lane in range(reader.source.lanes) for x in reader.batch(step, lane)["x"]] for step in range(count)]


def test_strict_order(folder: Path) -> None:
    got = steps(opened(folder, shuffle="strict"), 4)
    assert got == [list(range(8)), list(range(8, 16)), list(range(16, 24)), list(range(8))]


def test_strict_order_reads_every_block_once_on_one_worker(folder: Path) -> None:
    reader = opened(folder, shuffle="strict")
    steps(reader, 3)
    assert reader.blocks_decoded == 7  # of 4, 4, 2 rows a file; the last two hold the end that is left out


def test_ragged_ends_that_repeat(folder: Path) -> None:
    got = steps(opened(folder, shuffle="strict", ragged="repeat"), 5)
    assert got[3] == [24, 25, 26, 27, 28, 29, 0, 1]
    assert got[4] == got[0]
    about = opened(folder, ragged="repeat").source.describe()
    assert (about["samples_dropped_per_epoch"], about["samples_repeated_per_epoch"]) == (0, 2)


def test_fewer_rows_than_a_step_needs(folder: Path) -> None:
    with pytest.raises(DataError, match=r"holds 30 rows; one step needs .* = 8 x 5 = 40.*data.ragged: repeat"):
        opened(folder, lanes=8, size=5)
    got = steps(opened(folder, lanes=8, size=5, ragged="repeat"), 1)
    assert sorted(Counter(got[0]).values()) == [1] * 20 + [2] * 10
    assert set(got[0]) == set(range(30))


def test_no_rows_at_all_are_refused_whatever_the_policy(tmp_path: Path) -> None:
    pq.write_table(pa.table({"x": np.zeros(0, dtype=np.int64)}), tmp_path / "empty.parquet")
    with pytest.raises(DataError, match=r"data.path: no rows in 1 file"):
        opened(tmp_path, ragged="repeat")


def test_choices_are_part_of_the_fingerprint_and_the_default_is_what_it_was(folder: Path) -> None:
    plain = opened(folder).source.fingerprint
    assert "ragged" not in plain
    assert fingerprint_difference(plain, opened(folder, shuffle="strict").source.fingerprint) == [
        "the order was window and is now strict (data.shuffle)"
    ]
    assert fingerprint_difference(plain, opened(folder, ragged="repeat").source.fingerprint) == [
        "the end of an epoch that fills no step was drop and is now repeat (data.ragged)"
    ]
