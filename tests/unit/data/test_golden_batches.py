"""The bits of batches, pinned: whatever reads, decodes, tokenises, packs and gathers them, a run gets these.

A digest is over two epochs of all lanes in order, then over some batches out of order: arrays by name, dtype and shape,
and the ids of the samples. It was taken from the first version that read row by row.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from elastictrain.data import LaneReader, open_data
from elastictrain.data.holes import Hole, HoledOrder
from elastictrain.data.packed import INTEGERS
from elastictrain.data.reader import Batch
from elastictrain.job import Data, Mixture
from tests.unit.data.test_formats import FORMATS, table_of

ROWS, LANES = 200, 3
PLACES = [(5, 2), (0, 0), (5, 2), (17, 1), (3, 0), (2, 0), (3, 0), (40, 1)]
"""Steps and lanes out of order, some of them twice."""


def texts() -> list[str | None]:
    """Short, long, empty and missing ones, and some that are longer than a row."""
    found: list[str | None] = [f"Dokument Nr. {n}, ähnlich wie {n * n} " * (n * 7919 % 5) for n in range(ROWS)]
    found[::17] = ["langes Stück " * (40 + n) for n in range(len(found[::17]))]
    found[5::31] = [None] * len(found[5::31])
    return found


def write(folder: Path) -> Path:
    numbers = pa.array(range(ROWS), pa.int32())
    pairs = pa.array([[n / 2, -float(n)] for n in range(ROWS)], pa.list_(pa.float32(), 2))
    table = pa.table({"text": texts(), "n": numbers, "pair": pairs, "even": [n % 2 == 0 for n in range(ROWS)]})
    (folder / "p").mkdir()
    for part, size in enumerate((16, 7, 40)):
        rows = table.slice(part * 70, 70)
        pq.write_table(rows, folder / "p" / f"{part}.parquet", row_group_size=size, use_dictionary=part != 1)
    return folder / "p"


def add(digest: Any, batch: Batch) -> None:
    for name in sorted(batch):
        array = batch[name].astype(np.int64) if name in INTEGERS else batch[name]
        digest.update(f"{name} {array.dtype.str} {array.shape}".encode() + array.tobytes())
    digest.update(batch.ids.astype("<u8").tobytes())


def digest_of(spec: Data | Mixture, *, size: int = 4, holes: bool = False, ahead_bytes: int = 0) -> str:
    source = open_data(spec, seed=11, lanes=LANES, lane_batch_size=size)
    if holes:
        source.order = HoledOrder(source.order, HOLES)  # type: ignore[union-attr, assignment, arg-type]
    found, digest = LaneReader(source, ahead_bytes=ahead_bytes), hashlib.sha256()
    steps = 30 if isinstance(spec, Mixture) else 2 * source.steps_per_epoch  # type: ignore[union-attr]
    for step in range(steps):
        if step % 7 == 0:
            found.expect([(step, lane) for lane in range(LANES)])
        for lane in range(LANES):
            add(digest, found.batch(step, lane))
    for place in PLACES:
        add(digest, found.batch(*place))
    found.close()
    return digest.hexdigest()[:16]


TEXT = {"text_column": "text", "sequence_length": 32}
SETTINGS: dict[str, dict[str, Any]] = {
    "text": TEXT,
    "text, none": {**TEXT, "shuffle": "none"},
    "text, strict": {**TEXT, "shuffle": "strict"},
    "text, repeat": {**TEXT, "ragged": "repeat"},
    "text, window of 5": {**TEXT, "window_row_groups": 5},
    "text, window of 1": {**TEXT, "window_row_groups": 1},
    "document ids": {**TEXT, "document_ids": True},
    "best fit": {**TEXT, "packing": "best_fit"},
    "best fit, strict": {**TEXT, "packing": "best_fit", "shuffle": "strict"},
    "table": {"columns": ("n", "pair", "even")},
    "table, none": {"columns": ("n", "pair"), "shuffle": "none"},
    "table, strict": {"columns": ("n", "pair"), "shuffle": "strict"},
    "table, repeat": {"columns": ("n",), "ragged": "repeat"},
}
HOLES = [Hole(3, 2, 9, 0), Hole(7, 0, 40, 6), Hole(8, 1, 2, 9)]
GOLDEN: dict[str, str] = {
    "text": "a28af49d2e2082b3",
    "text, none": "da95bafce76ab4d9",
    "text, strict": "e9f68b398e2aa0a5",
    "text, repeat": "829becc3fbacc7d9",
    "text, window of 5": "9ef2009825f77645",
    "text, window of 1": "fe9c88f0f058874e",
    "document ids": "4495cd105b2a094e",
    "best fit": "0b1d8dd263be2d93",
    "best fit, strict": "1370d2716187b89f",
    "table": "6056b517c152e294",
    "table, none": "7f7a67419c44526c",
    "table, strict": "40fdd66b4ce92d0d",
    "table, repeat": "793d7dbf44e6d584",
}
_CSV = ("5265455a0f9e4fc4", "e124ec1a10d7357b")  # the header is a line of the first block
_TAR = ("b00b8d2d38906f52", "3cbde8f8508ed45e")  # the columns have other names
_TEXT = ("b00b8d2d38906f52",)
GOLDEN_FORMATS: dict[str, tuple[str, ...]] = dict.fromkeys(FORMATS, ("b00b8d2d38906f52", "e09fba48c5bbbc84"))
GOLDEN_FORMATS |= {"csv": _CSV, "csv.gz": _CSV, "tar": _TAR, "tgz": _TAR, "text": _TEXT, "text.zst": _TEXT}
GOLDEN_HOLES: dict[str, str] = {
    "text": "6022d02ac71aec07",
    "table": "cb90a5385785fdc1",
}
GOLDEN_MIXTURES: dict[str, str] = {
    "text": "8cc4c3a59f59f81b",
    "best fit": "ca415b0309214c24",
    "table": "d260695592674d61",
}


@pytest.mark.parametrize("name", SETTINGS)
def test_batches_of_parquet_are_these_bits(tmp_path: Path, name: str) -> None:
    spec = Data(kind="parquet", path=str(write(tmp_path)), **SETTINGS[name])
    assert digest_of(spec) == GOLDEN[name]


@pytest.mark.parametrize("name", ["text", "table"])
def test_batches_of_an_order_with_holes_are_these_bits(tmp_path: Path, name: str) -> None:
    spec = Data(kind="parquet", path=str(write(tmp_path)), **SETTINGS[name])
    assert digest_of(spec, holes=True) == GOLDEN_HOLES[name]


@pytest.mark.parametrize("ahead_bytes", [1, 20_000, 1 << 30])
@pytest.mark.parametrize("name", ["text", "text, strict", "document ids", "table, repeat"])
def test_they_are_so_however_much_is_read_ahead(tmp_path: Path, name: str, ahead_bytes: int) -> None:
    spec = Data(kind="parquet", path=str(write(tmp_path)), **SETTINGS[name])
    assert digest_of(spec, ahead_bytes=ahead_bytes) == GOLDEN[name]
    assert digest_of(mixture_of("text", tmp_path / "p"), ahead_bytes=ahead_bytes) == GOLDEN_MIXTURES["text"]
    if name == "text":
        assert digest_of(spec, ahead_bytes=ahead_bytes, holes=True) == GOLDEN_HOLES["text"]


@pytest.mark.parametrize("finished", [1, 3000, 1 << 30])
@pytest.mark.parametrize("gathered", [1, 700, 1 << 30])
def test_they_are_so_however_many_are_made_in_one_go(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, finished: int, gathered: int
) -> None:
    monkeypatch.setattr("elastictrain.data.reader._FINISHED_BYTES", finished)
    monkeypatch.setattr("elastictrain.data.windows.GATHER_BYTES", gathered)
    folder = write(tmp_path)
    for name in ("text", "document ids", "table"):
        spec = Data(kind="parquet", path=str(folder), **SETTINGS[name])
        assert digest_of(spec) == GOLDEN[name]
        if name != "document ids":
            assert digest_of(spec, holes=True) == GOLDEN_HOLES[name]
    assert digest_of(mixture_of("text", folder)) == GOLDEN_MIXTURES["text"]


@pytest.mark.parametrize("name", ["text", "table"])
def test_they_are_so_from_the_warm_cache(tmp_path: Path, name: str) -> None:
    spec = Data(kind="parquet", path=str(write(tmp_path)), warm_cache_bytes=1 << 30, **SETTINGS[name])
    assert [digest_of(spec, ahead_bytes=ahead) for ahead in (0, 0, 1 << 30)] == [GOLDEN[name]] * 3


def mixture_of(name: str, folder: Path) -> Mixture:
    one = {"kind": "parquet", "path": str(folder)}
    if name == "table":
        sources = {"a": {**one, "columns": ("n",)}, "b": {**one, "columns": ("n",), "shuffle": "none"}}
        return Mixture.model_validate({"sources": sources, "weights": {"a": 3, "b": 1}})
    extra = {"packing": "best_fit"} if name == "best fit" else {}
    sources = {"a": {**one, "text_column": "text", **extra}, "b": {**one, "text_column": "text", **extra}}
    stages = [{"from_step": 9, "weights": {"a": 1, "b": 5}, "sequence_length": 8}]
    return Mixture.model_validate({"sources": sources, "sequence_length": 32, "temperature": 2, "stages": stages})


@pytest.mark.parametrize("name", ["text", "best fit", "table"])
def test_batches_of_mixtures_are_these_bits(tmp_path: Path, name: str) -> None:
    assert digest_of(mixture_of(name, write(tmp_path))) == GOLDEN_MIXTURES[name]


def specs_of(name: str, folder: Path) -> list[Data]:
    kind, suffix, writer = FORMATS[name]
    columns = ("cls", "img.npy") if kind == "webdataset" else ("x",)
    text = "text.txt" if kind == "webdataset" else "text"
    folder.mkdir()
    for part in range(2):
        writer(folder / f"{part}{suffix}", table_of(range(part * 21, part * 21 + 22)))
    one = {"kind": kind, "path": str(folder), "rows_per_block": 5}
    both = [Data.model_validate({**one, "text_column": text, "sequence_length": 15})]
    return both if kind == "text" else [*both, Data.model_validate({**one, "columns": columns})]


@pytest.mark.parametrize("name", FORMATS)
def test_batches_of_all_formats_are_these_bits(tmp_path: Path, name: str) -> None:
    specs = specs_of(name, tmp_path / "data")
    assert tuple(digest_of(spec, size=2) for spec in specs) == GOLDEN_FORMATS[name]
    narrow = specs[0].model_copy(update={"batch_dtype": "narrow"})
    assert digest_of(narrow, size=2) == GOLDEN_FORMATS[name][0]


@pytest.mark.parametrize("batch_dtype", ["int32", "narrow"])
def test_batches_of_narrow_integers_are_these_bits_once_they_are_widened(tmp_path: Path, batch_dtype: str) -> None:
    folder = write(tmp_path)
    of_text = [name for name, settings in SETTINGS.items() if "text_column" in settings]
    for name in of_text:
        spec = Data(kind="parquet", path=str(folder), batch_dtype=batch_dtype, **SETTINGS[name])
        assert digest_of(spec, ahead_bytes=1 << 20) == GOLDEN[name]
    for name in ("text", "best fit"):
        mixture = mixture_of(name, folder).model_copy(update={"batch_dtype": batch_dtype})
        assert digest_of(mixture) == GOLDEN_MIXTURES[name]
