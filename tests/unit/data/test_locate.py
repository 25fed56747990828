"""Where a sample lies: what `locate` says is what the reader gives."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from elastictrain.data import LaneReader, Source, open_source, packing
from elastictrain.job import Data
from tests.unit.data.test_source import TEXTS, text_source, tokens_of, write_texts


def texts_of(folder: Path, file: str, group: int) -> list[str]:
    column = pq.ParquetFile(folder / file).read_row_group(group, columns=["text"]).column(0)
    return [str(text) for text in column.to_pylist()]


def rebuilt(source: Source, folder: Path, step: int, lane: int) -> list[list[int]]:
    """A batch put together from the files alone, by what `locate` says."""
    rows = []
    for sample in source.locate(step, lane):
        tokens: list[int] = []
        for part in sample.parts:
            assert part.tokens is not None
            tokens += tokens_of(list(texts_of(folder, part.file, part.row_group)))[slice(*part.tokens)]
        rows.append(tokens + [256] * sample.filler_tokens)
    return rows


def test_packed_samples_lie_where_locate_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packing, "TAIL_BLOCK_ROWS", 2)
    monkeypatch.setattr("elastictrain.data.packed.TAIL_BLOCK_ROWS", 2)
    folder = write_texts(tmp_path / "data", "parquet")
    source = text_source(folder, lanes=2, lane_batch_size=2)
    reader = LaneReader(source)
    parts = []
    for step in range(source.steps_per_epoch + 2):
        for lane in range(2):
            assert rebuilt(source, folder, step, lane) == reader.batch(step, lane)["tokens"].tolist()
            parts.append(max(len(sample.parts) for sample in source.locate(step, lane)))
    assert max(parts) > 1  # a sample of several tails was among them
    assert {s.epoch for s in source.locate(source.steps_per_epoch, 0)} == {1}


def test_the_rows_of_a_part_hold_its_tokens_and_no_row_is_superfluous(tmp_path: Path) -> None:
    folder = write_texts(tmp_path / "data", "parquet")
    source = text_source(folder)
    for sample in source.locate(1, 2) + source.locate(3, 0):
        for part in sample.parts:
            first, end = source.rows_of(part)
            texts = texts_of(folder, part.file, part.row_group)
            before = len(tokens_of(list(texts[:first])))
            assert part.tokens is not None
            assert before <= part.tokens[0] < before + len(tokens_of([texts[first]]))
            assert len(tokens_of(list(texts[: end - 1]))) < part.tokens[1] <= len(tokens_of(list(texts[:end])))


def test_table_samples_lie_where_locate_says(tmp_path: Path) -> None:
    for n in range(2):
        pq.write_table(pa.table({"x": np.arange(20) + 20 * n}), tmp_path / f"{n}.parquet", row_group_size=6)
    source = open_source(Data(kind="parquet", path=str(tmp_path)), seed=3, lanes=2, lane_batch_size=3)
    reader = LaneReader(source)
    for step in (0, 4, source.steps_per_epoch + 1):
        expected = []
        for sample in source.locate(step, 1):
            (part,) = sample.parts
            first, end = source.rows_of(part)
            assert end == first + 1
            expected.append(20 * int(part.file[0]) + 6 * part.row_group + first)
        assert reader.batch(step, 1)["x"].tolist() == expected


def test_rows_of_a_hugging_face_tokenizer(tmp_path: Path) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    model = tokenizers.models.WordLevel({"<unk>": 0, "Dokument": 1, "</s>": 2}, unk_token="<unk>")
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    folder = write_texts(tmp_path / "data", "parquet")
    source = text_source(folder, tokenizer=str(tmp_path / "tokenizer.json"), sequence_length=4)
    words = tokenizers.pre_tokenizers.Whitespace().pre_tokenize_str
    part = source.locate(0, 0)[0].parts[0]
    first, end = source.rows_of(part)
    counts = [len(words(text)) + 1 for text in texts_of(folder, part.file, part.row_group)]
    starts = np.cumsum([0, *counts])
    assert part.tokens is not None
    assert starts[first] <= part.tokens[0] < starts[first + 1]
    assert starts[end - 1] < part.tokens[1] <= starts[end]
    assert len(TEXTS) == 120
