"""The integers of batches: as narrow as the setting says and the vocabulary allows, and always the same numbers."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

import elastictrain as et
from elastictrain.data import LaneReader, open_data, open_source
from elastictrain.data.batch_types import batch_types, narrowest
from elastictrain.data.live_feeder import open_feeder
from elastictrain.data.segments import SegmentWriter
from elastictrain.data.tokenizers import END_OF_DOCUMENT
from elastictrain.engine import planned
from elastictrain.engine.host import WorkerHost
from elastictrain.errors import ConfigError, DataError
from elastictrain.job import Data

TEXTS = [f"Dokument {n}, ähnlich wie {n * n} " * (1 + n % 5) for n in range(60)]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "texts").mkdir()
    pq.write_table(pa.table({"text": TEXTS, "n": range(60)}), tmp_path / "texts" / "a.parquet", row_group_size=9)
    return tmp_path / "texts"


def spec_of(folder: Path, **settings: Any) -> Data:
    return Data(kind="parquet", path=str(folder), text_column="text", sequence_length=16, **settings)


def stored(folder: Path, vocabulary_size: int, kind: pa.DataType) -> Data:
    """Documents that are tokens already, with those at both ends of a vocabulary among them."""
    last = vocabulary_size - 1
    documents = [[0, 1, last - 1, n, last] for n in range(60)]
    folder.mkdir()
    pq.write_table(pa.table({"text": pa.array(documents, pa.list_(kind))}), folder / "a.parquet", row_group_size=20)
    record = {"version": 1, "fingerprint": "f", "vocabulary_size": vocabulary_size, "end_of_document": last}
    (folder.parent / "tokens.json").write_text(json.dumps({"elastictrain_tokens": 1, **record}))
    return spec_of(folder, tokenizer=str(folder.parent / "tokens.json"))


@pytest.mark.parametrize(
    ("count", "kind"),
    [(1, "uint8"), (256, "uint8"), (257, "int16"), (1 << 15, "int16"), ((1 << 15) + 1, "uint16"), (1 << 16, "uint16"),
     ((1 << 16) + 1, "int32"), (1 << 31, "int32"), ((1 << 31) + 1, "int64")],
)  # fmt: skip
def test_the_narrowest_type_holds_all_tokens_and_no_narrower_one_does(count: int, kind: str) -> None:
    assert narrowest(count) == np.dtype(kind)


def test_the_types_of_all_that_a_batch_has(folder: Path) -> None:
    def types(**settings: Any) -> dict[str, str]:
        spec = spec_of(folder, document_ids=True, **settings)
        batch = LaneReader(open_source(spec, seed=1, lanes=2, lane_batch_size=3)).batch(0, 0)
        return {name: str(array.dtype) for name, array in batch.items()}

    names = ("tokens", "document_ids", "position_ids")
    assert types() == dict.fromkeys(names, "int64") | {"loss_mask": "bool"}
    assert types(batch_dtype="int32") == dict.fromkeys(names, "int32") | {"loss_mask": "bool"}
    few = {"tokens": "int16", "document_ids": "uint8", "position_ids": "uint8", "loss_mask": "bool"}
    assert types(batch_dtype="narrow") == few


@pytest.mark.parametrize(
    ("vocabulary_size", "kept", "narrow"),
    [(200, pa.uint8(), "uint8"), (200, pa.int64(), "uint8"), (30_000, pa.uint16(), "int16"),
     (50_257, pa.uint16(), "uint16"), (50_257, pa.int32(), "uint16"), (100_000, pa.int32(), "int32"),
     (100_000, pa.int64(), "int32")],
)  # fmt: skip
@pytest.mark.parametrize("packing", ["concatenate", "best_fit"])
def test_tokens_of_any_vocabulary_are_the_same_numbers(
    tmp_path: Path, vocabulary_size: int, kept: Any, narrow: str, packing: str
) -> None:
    spec = stored(tmp_path / "tokens", vocabulary_size, kept).model_copy(update={"packing": packing})

    def batches(**settings: Any) -> list[dict[str, Any]]:
        source = open_source(spec.model_copy(update=settings), seed=1, lanes=2, lane_batch_size=3)
        reader = LaneReader(source)
        return [dict(reader.batch(step, lane)) for step in range(2 * source.steps_per_epoch) for lane in range(2)]

    wide, thin, half = batches(), batches(batch_dtype="narrow"), batches(batch_dtype="int32")
    assert wide[0]["tokens"].dtype == np.int64
    assert thin[0]["tokens"].dtype == np.dtype(narrow)
    assert max(int(batch["tokens"].max()) for batch in wide) == vocabulary_size - 1
    for one, other, third in zip(wide, thin, half, strict=True):
        assert one.keys() == other.keys()
        for name, array in one.items():
            assert torch.equal(torch.from_numpy(other[name]).long(), torch.from_numpy(array).long())
            assert np.array_equal(third[name], array)


def test_a_stream_hands_out_what_the_setting_says(folder: Path) -> None:
    def batches(**settings: Any) -> list[Any]:
        stream = et.data.stream(spec_of(folder, **settings), batch_size=6, lanes=3, seed=4)
        return [batch["tokens"] for batch in itertools.islice(stream, 12)]

    wide, thin = batches(), batches(batch_dtype="narrow")
    assert (wide[0].dtype, thin[0].dtype) == (torch.int64, torch.int16)
    assert all(torch.equal(one, other.long()) for one, other in zip(wide, thin, strict=True))


def test_a_state_fits_whatever_the_integers_are(folder: Path) -> None:
    one = et.data.stream(spec_of(folder), batch_size=6, lanes=3)
    next(iter(one))
    other = et.data.stream(spec_of(folder, batch_dtype="narrow"), batch_size=6, lanes=3)
    other.resume(one.state())
    assert other.step == 1


@pytest.mark.parametrize("expected", [False, True])
def test_what_runs_hand_to_recipes_is_int64(folder: Path, expected: bool) -> None:
    plain = LaneReader(open_source(spec_of(folder, document_ids=True), seed=1, lanes=2, lane_batch_size=3))
    source = open_source(spec_of(folder, document_ids=True, batch_dtype="narrow"), seed=1, lanes=2, lane_batch_size=3)
    places = [(step, lane) for step in range(source.steps_per_epoch) for lane in range(2)]
    with open_feeder(source, "cpu", widen=True) as feeder:
        if expected:
            feeder.expect(places)
        for place in places:
            batch, wide = feeder.batch(*place), plain.batch(*place)
            assert {name: tensor.dtype for name, tensor in batch.items()} == {
                "tokens": torch.int64, "document_ids": torch.int64, "position_ids": torch.int64,
                "loss_mask": torch.bool,
            }  # fmt: skip
            assert all(np.array_equal(tensor.numpy(), wide[name]) for name, tensor in batch.items())


def test_workers_of_a_run_widen(folder: Path) -> None:
    source = open_source(spec_of(folder, batch_dtype="narrow"), seed=1, lanes=2, lane_batch_size=3)
    host = WorkerHost.__new__(WorkerHost)
    host._blocks = None
    with host._feeder(source, torch.device("cpu")) as feeder:
        assert feeder.batch(0, 0)["tokens"].dtype == torch.int64


def test_mixtures_and_live_sources_have_the_types_too(folder: Path, tmp_path: Path) -> None:
    mixed = et.data.mixture({"a": spec_of(folder)}, sequence_length=16, batch_dtype="narrow")
    live = spec_of(tmp_path / "live", batch_dtype="narrow", live={"record": str(tmp_path / "order"), "poll_s": 0.01})
    SegmentWriter(tmp_path / "live").append(folder / "a.parquet")
    for spec in (mixed, live):
        stream = et.data.stream(spec, batch_size=2, lanes=1)
        assert next(iter(stream))["tokens"].dtype == torch.int16
        source = open_data(spec, seed=1, lanes=1, lane_batch_size=2, record=str(tmp_path / "other"))
        with open_feeder(source, "cpu", widen=True) as feeder:
            assert feeder.batch(0, 0)["tokens"].dtype == torch.int64


def test_a_plan_looks_at_a_batch_as_the_recipe_gets_it(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planned, "describe", lambda job, batch: batch["tokens"].dtype)
    job = SimpleNamespace(data=spec_of(folder, batch_dtype="narrow"), seed=1, lanes=1, lane_batch_size=2)
    assert planned.look_at(job) == np.int64  # type: ignore[arg-type, comparison-overlap]


def test_blocks_of_the_warm_cache_serve_all_types(folder: Path) -> None:
    for batch_dtype, warm in (("int64", 0), ("narrow", 7), ("int32", 7)):
        spec = spec_of(folder, batch_dtype=batch_dtype, warm_cache_bytes=1 << 30, shuffle="none")
        reader = LaneReader(open_source(spec, seed=1, lanes=1, lane_batch_size=2))
        for step in range(reader.source.steps_per_epoch):  # type: ignore[union-attr]
            reader.batch(step, 0)
        assert reader.facts.warm >= warm
        assert (reader.facts.decoded == 0) == (warm > 0)


def test_what_does_not_fit_says_what_to_change(folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"data.batch_dtype=narrow is about text.*Leave it out, or set data.text_col"):
        Data(kind="parquet", path=str(folder), batch_dtype="narrow")
    with pytest.raises(ConfigError, match=r"data.batch_dtype=int32 is about text.*Leave it out"):
        et.data.mixture({"a": et.data.parquet(str(folder), columns=("n",))}, batch_dtype="int32")
    with pytest.raises(ConfigError, match=r"data.sources.a.batch_dtype is one for all sources: set data.batch_dtype"):
        et.data.mixture({"a": spec_of(folder, batch_dtype="narrow")}, sequence_length=16)
    with pytest.raises(ConfigError, match="batch_dtype"):
        spec_of(folder, batch_dtype="int8")
    with pytest.raises(
        DataError, match=r"tokens up to 2147483648, which it does not hold; set data.batch_dtype: int64"
    ):
        batch_types(spec_of(folder, batch_dtype="int32"), (1 << 31) + 1)
    assert batch_types(spec_of(folder, batch_dtype="int32"), 1 << 31).tokens == np.int32
    assert batch_types(spec_of(folder, batch_dtype="narrow"), (1 << 31) + 1).tokens == np.int64
    assert END_OF_DOCUMENT == 256
