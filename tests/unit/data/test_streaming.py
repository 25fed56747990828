"""The stream without a job: the same samples for every number of ranks, resumed from a few bytes."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from torch.utils.data import DataLoader

import elastictrain as et
from elastictrain.data.order import Window
from elastictrain.data.reader import LaneReader
from elastictrain.data.streaming import Stream
from elastictrain.data.windows import Loaded
from elastictrain.errors import ConfigError, DataError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for number in range(3):
        table = pa.table({"x": np.arange(40) + 40 * number})
        pq.write_table(table, tmp_path / f"{number}.parquet", row_group_size=7)
    return tmp_path


def opened(folder: Path, **settings: Any) -> Stream:
    return et.data.stream(et.data.parquet(str(folder)), **{"batch_size": 12, "seed": 3, **settings})


def taken(stream: Stream, steps: int) -> list[list[int]]:
    return [batch["x"].tolist() for batch in itertools.islice(stream, steps)]


@pytest.mark.parametrize("world", [1, 2, 3, 5, 7, 12])
def test_a_step_is_the_same_for_every_number_of_ranks(folder: Path, world: int) -> None:
    alone = taken(opened(folder), 14)
    ranks = [taken(opened(folder, rank=rank, world=world), 14) for rank in range(world)]
    assert [[x for rank in ranks for x in rank[step]] for step in range(14)] == alone


def test_resuming_anywhere_with_another_world(folder: Path) -> None:
    whole = taken(opened(folder), 25)
    for done in (1, 9, 10, 17):
        first = opened(folder, rank=1, world=3)
        taken(first, done)
        state = first.state()
        assert len(state) <= 256
        rest = []
        for rank in range(5):
            resumed = opened(folder, rank=rank, world=5)
            resumed.resume(state)
            assert resumed.step == done
            rest.append(taken(resumed, 25 - done))
        assert [[x for rank in rest for x in rank[step]] for step in range(25 - done)] == whole[done:]


def test_the_state_is_small_wherever_the_stream_is(folder: Path) -> None:
    stream = opened(folder)
    stream._step = 10**15
    assert len(stream.state()) <= 256


def test_epochs_end_and_hold_every_sample_once(folder: Path) -> None:
    values = [x for batch in opened(folder, epochs=2) for x in batch["x"].tolist()]
    assert sorted(values[:120]) == sorted(values[120:]) == list(range(120))
    assert len(values) == 240


def test_nothing_is_read_ahead_of_epochs_that_do_not_come(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    epochs, load = [], LaneReader._load_ahead

    def noted(reader: LaneReader, window: Window) -> Loaded:
        epochs.append(window.epoch)
        return load(reader, window)

    monkeypatch.setattr(LaneReader, "_load_ahead", noted)
    assert len(list(opened(folder, epochs=2))) == 20
    assert max(epochs) == 1


def test_it_is_a_dataset_of_torch(folder: Path) -> None:
    loader = DataLoader(opened(folder, epochs=1), batch_size=None)
    batches = list(loader)
    assert len(batches) == 10
    assert all(isinstance(batch["x"], torch.Tensor) for batch in batches)


def test_worker_processes_of_a_loader_are_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("elastictrain.data.streaming.get_worker_info", lambda: object())
    with pytest.raises(ConfigError, match=r"use it with num_workers=0"):
        next(iter(opened(folder)))


def test_a_state_of_other_data_or_settings_is_refused(folder: Path) -> None:
    state = opened(folder).state()
    with pytest.raises(DataError, match=r"another stream: seed was 3 and is now 4.*start anew"):
        opened(folder, seed=4).resume(state)
    with pytest.raises(DataError, match=r"lanes was 12 and is now 6; size was 1 and is now 2"):
        opened(folder, lanes=6).resume(state)
    with pytest.raises(DataError, match=r"^this is no state of a stream"):
        opened(folder).resume(b"\x00")
    with pytest.raises(DataError, match=r"^this state has version 9; this version of elastictrain reads 1"):
        opened(folder).resume(b'{"v": 9}')
    pq.write_table(pa.table({"x": np.arange(41)}), folder / "1.parquet")
    with pytest.raises(DataError, match=r"another stream: the data changed"):
        opened(folder).resume(state)


def mixed(folder: Path, **settings: Any) -> Stream:
    sources = {str(n): et.data.parquet(str(folder / f"{n}.parquet")) for n in range(3)}
    return et.data.stream(et.data.mixture(sources, **settings), batch_size=4, seed=1)


def test_a_mixture_goes_on_with_other_proportions(folder: Path) -> None:
    before = mixed(folder, weights={"0": 1, "1": 1})
    old = taken(before, 6)
    after = mixed(folder, weights={"0": 1, "1": 1, "2": 2})
    after.resume(before.state())
    new = taken(after, 6)
    whole = taken(mixed(folder, weights={"0": 1, "1": 1}), 12)
    for first in (0, 40):
        of_source = [[x for batch in run for x in batch if first <= x < first + 40] for run in (old, new, whole)]
        for lane in range(4):
            of_lane = [[batch[lane] for batch in run if first <= batch[lane] < first + 40] for run in (old, new, whole)]
            assert of_lane[0] + of_lane[1] == of_lane[2][: len(of_lane[0] + of_lane[1])]
        assert len(of_source[0]) == 12
    assert sum(x >= 80 for batch in new for x in batch) == 12
    again = mixed(folder, weights={"0": 1, "1": 1, "2": 2})
    again.resume(after.state())
    assert (again.step, again._plans) == (12, after._plans)
    assert len(before.state()) <= 256
    with pytest.raises(DataError, match=r"another stream"):
        opened(folder, batch_size=4, seed=1).resume(before.state())


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"lanes": 5}, r"batch_size=12 is not a multiple of lanes=5"),
        ({"batch_size": 0}, r"batch_size=0, lanes=\d+: expected at least 1 of each"),
        ({"lanes": 0}, r"lanes=0: expected at least 1 of each"),
        ({"lanes": 2, "world": 3}, r"rank=0, world=3, lanes=2: expected rank < world <= lanes"),
        ({"rank": 2, "world": 2}, r"rank=2, world=2"),
    ],
)
def test_settings_that_do_not_fit(folder: Path, settings: dict[str, Any], expected: str) -> None:
    with pytest.raises(ConfigError, match=expected):
        opened(folder, **settings)


def test_epochs_of_a_mixture_are_refused(folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"epochs: the sources of a mixture have epochs of their own"):
        et.data.stream(et.data.mixture({"a": et.data.parquet(str(folder))}), batch_size=4, epochs=1)


def test_sources_of_a_mixture_may_be_settings_as_in_a_job_file(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a few words of text\n" * 40, encoding="utf-8")
    made = et.data.text(str(tmp_path / "a.txt"), sequence_length=8)
    plain = {"kind": "text", "path": str(tmp_path / "a.txt"), "text_column": "text"}
    mixed = et.data.mixture({"a": plain, "b": made}, sequence_length=8)
    assert mixed == et.data.mixture({"a": made, "b": made}, sequence_length=8)
    assert next(iter(et.data.stream(mixed, batch_size=4, lanes=2)))["tokens"].shape == (4, 9)
