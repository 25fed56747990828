"""Sources: the same samples from Parquet and JSON lines, whole epochs, fingerprints, the index cache."""

from __future__ import annotations

import json
import os
from collections import Counter
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from elastictrain.data import LaneReader, Source, fingerprint_difference, open_source, packing
from elastictrain.data.index import store_cached
from elastictrain.job import Data

TEXTS = [f"Dokument {i} {'äöü' * (i % 7)}" for i in range(120)]


def write_texts(folder: Path, kind: str, files: int = 3, texts: list[Any] | None = None) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    texts = TEXTS if texts is None else texts
    for number in range(files):
        mine = texts[number::files]
        if kind == "parquet":
            table = pa.table({"text": pa.array(mine, pa.string()), "id": list(range(len(mine)))})
            pq.write_table(table, folder / f"{number}.parquet", row_group_size=11)
        else:
            lines = [json.dumps({"id": i, "text": text}) for i, text in enumerate(mine)]
            (folder / f"{number}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


def text_source(path: Path | str, kind: str = "parquet", **changes: Any) -> Source:
    settings: dict[str, Any] = {"seed": 5, "lanes": 4, "lane_batch_size": 2}
    settings |= {key: changes.pop(key) for key in list(changes) if key in settings}
    spec = {"text_column": "text", "sequence_length": 16, "rows_per_block": 11, **changes}
    return open_source(Data(kind=kind, path=str(path), **spec), **settings)


def tokens_of(texts: list[str | None]) -> list[int]:
    return [token for text in texts for token in [*(text or "").encode(), 256]]


@pytest.mark.parametrize("kind", ["parquet", "jsonl"])
def test_an_epoch_holds_all_tokens(tmp_path: Path, kind: str) -> None:
    folder = write_texts(tmp_path / "data", kind)
    source = text_source(folder, kind, lanes=1, lane_batch_size=1)
    reader = LaneReader(source)
    rows = [reader.batch(step, 0)["tokens"] for step in range(source.steps_per_epoch)]
    assert all(row.dtype == np.int64 and row.shape == (1, 17) for row in rows)
    about = source.describe()
    assert about["samples_dropped_per_epoch"] == 0
    got = Counter(token for row in rows for token in row.ravel().tolist())
    got[256] -= about["padding_tokens"]
    assert got == Counter(tokens_of(list(TEXTS)))
    assert about["tokens"] == len(tokens_of(list(TEXTS)))
    reader.close()


def rows_of(source: Source, block: int) -> np.ndarray[Any, Any]:
    """Of a block that is not read for a batch, made of the texts themselves."""
    own = len(source._blocks.blocks)
    if block >= own:
        assert source._tails is not None
        return np.asarray(source._tails.block(block - own))
    texts = source._blocks.read(block).column("text").to_pylist()
    tokens = tokens_of(texts)
    return np.asarray(tokens[: len(tokens) // 17 * 17]).reshape(-1, 17)


@pytest.mark.parametrize("kind", ["parquet", "jsonl"])
def test_batches_are_the_rows_that_the_order_names(tmp_path: Path, kind: str) -> None:
    source = text_source(write_texts(tmp_path / "data", kind), kind)
    reader = LaneReader(source)
    for step in (0, 1, source.steps_per_epoch - 1, source.steps_per_epoch, 3 * source.steps_per_epoch + 1):
        for lane in range(4):
            blocks, rows = source.order.samples_of(step, lane)
            expected = [rows_of(source, int(b))[r].tolist() for b, r in zip(blocks, rows, strict=True)]
            assert reader.batch(step, lane)["tokens"].tolist() == expected


def test_bytes_that_are_no_utf8_come_as_they_are_beside_others(tmp_path: Path) -> None:
    texts = [b"abc" * n + (b"\xff" if n % 5 == 0 else b"") for n in range(1, 60)]
    tmp_path.joinpath("data").mkdir()
    table = pa.table({"text": pa.array(texts, pa.binary())})
    pq.write_table(table, tmp_path / "data" / "0.parquet", row_group_size=3)
    source = text_source(tmp_path / "data", lane_batch_size=3, ragged="repeat", sequence_length=7)
    kinds = {name for block in range(len(source.order.block_rows)) for name in source.read_block(block)}
    assert kinds == {"tokens", "byte_tokens"}
    reader = LaneReader(source)
    got: Counter[int] = Counter()
    for step in range(source.steps_per_epoch):
        for lane in range(4):
            got.update(reader.batch(step, lane)["tokens"].ravel().tolist())
    reader.close()
    expected = Counter(token for text in texts for token in [*text, 256])
    assert got[255] >= expected[255] == 11
    assert got.keys() == expected.keys()


def test_resuming_anywhere_equals_the_tail_of_an_undisturbed_pass(tmp_path: Path) -> None:
    folder = write_texts(tmp_path / "data", "parquet")
    whole = LaneReader(text_source(folder))
    steps = 2 * whole.source.steps_per_epoch + 3
    undisturbed = [[whole.batch(s, lane)["tokens"].tobytes() for lane in range(4)] for s in range(steps)]
    for start in range(0, steps, 3):
        resumed = LaneReader(text_source(folder))
        tail = [[resumed.batch(s, lane)["tokens"].tobytes() for lane in (3, 1, 0, 2)] for s in range(start, steps)]
        assert tail == [[row[lane] for lane in (3, 1, 0, 2)] for row in undisturbed[start:]]


def test_a_pass_reads_a_block_about_once(tmp_path: Path) -> None:
    source = text_source(write_texts(tmp_path / "data", "parquet"), lanes=3, lane_batch_size=1)
    reader = LaneReader(source)
    for step in range(source.steps_per_epoch):
        for lane in range(3):
            reader.batch(step, lane)
    filled = int(np.count_nonzero(source.order.block_rows))
    assert filled <= reader.blocks_decoded <= filled + 3 - 1  # a border between lanes may cut a block in two


def test_a_lane_that_moved_away_is_forgotten(tmp_path: Path) -> None:
    reader = LaneReader(text_source(write_texts(tmp_path / "data", "parquet")))
    reader.batch(0, 0)
    for step in range(10):
        reader.batch(step, 1)
    assert {lane for lane, _ in reader._windows} == {1}


def test_batches_belong_to_the_caller(tmp_path: Path) -> None:
    reader = LaneReader(text_source(write_texts(tmp_path / "data", "parquet")))
    before = reader.batch(0, 0)["tokens"].copy()
    reader.batch(0, 0)["tokens"][:] = -1
    assert reader.batch(0, 0)["tokens"].tolist() == before.tolist()


def test_table_batches_belong_to_the_caller(tmp_path: Path) -> None:
    pq.write_table(pa.table({"x": list(range(20))}), tmp_path / "a.parquet")
    spec = Data(kind="parquet", path=str(tmp_path))
    reader = LaneReader(open_source(spec, seed=0, lanes=1, lane_batch_size=5))
    before = reader.batch(0, 0)["x"].copy()
    reader.batch(0, 0)["x"][:] = -1
    assert reader.batch(0, 0)["x"].tolist() == before.tolist()


def test_tails_in_several_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packing, "TAIL_BLOCK_ROWS", 2)
    source = text_source(write_texts(tmp_path / "data", "parquet"), lanes=1, lane_batch_size=1)
    assert source.describe()["tail_samples"] > 4
    reader = LaneReader(source)
    got = Counter(
        token for step in range(source.steps_per_epoch) for token in reader.batch(step, 0)["tokens"].ravel().tolist()
    )
    got[256] -= source.describe()["padding_tokens"]
    assert got == Counter(tokens_of(list(TEXTS)))


def test_null_documents_count_as_empty_ones(tmp_path: Path) -> None:
    texts = [*TEXTS[:60], None, "", None, *TEXTS[60:]]
    for kind in ("parquet", "jsonl"):
        source = text_source(write_texts(tmp_path / kind, kind, texts=texts), kind)
        assert source.describe()["null_documents"] == 2
        assert source.describe()["tokens"] == len(tokens_of(texts))


def test_dictionary_encoded_text(tmp_path: Path) -> None:
    table = pa.table({"text": pa.array(["one", "two", None] * 40).dictionary_encode()})
    pq.write_table(table, tmp_path / "a.parquet")
    assert text_source(tmp_path / "a.parquet").describe()["tokens"] == 40 * 9


@pytest.mark.parametrize("kind", ["parquet", "jsonl"])
def test_table_mode_stacks_columns(tmp_path: Path, kind: str) -> None:
    images = [[[i + 0.5, i], [-i, 1.0]] for i in range(40)]
    if kind == "parquet":
        columns = {
            "image": pa.array(images, pa.list_(pa.list_(pa.float32()))),
            "label": pa.array(range(40), pa.int16()),
        }
        pq.write_table(pa.table({**columns, "name": ["x"] * 40}), tmp_path / "a.parquet", row_group_size=7)
    else:
        lines = [json.dumps({"image": image, "label": i, "name": "x"}) for i, image in enumerate(images)]
        (tmp_path / "a.jsonl").write_text("\n".join(lines))  # and no newline at the end
    spec = Data(kind=kind, path=str(tmp_path), columns=("label", "image"), rows_per_block=7)
    reader = LaneReader(open_source(spec, seed=1, lanes=2, lane_batch_size=4))
    labels = []
    for step in range(reader.source.steps_per_epoch):
        for lane in range(2):
            batch = reader.batch(step, lane)
            assert list(batch) == ["label", "image"]
            assert batch["image"].shape == (4, 2, 2)
            assert batch["image"][:, 0, 0].tolist() == [label + 0.5 for label in batch["label"].tolist()]
            labels += batch["label"].tolist()
    assert sorted(labels) == list(range(40))
    assert labels != list(range(40))


def test_jsonl_integers_become_floats_where_both_occur(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"x": 1}\r\n{"x": 2}\r\n\r\n{"x": 2.5}\r\n{"x": 4}\r\n')
    spec = Data(kind="jsonl", path=str(tmp_path), rows_per_block=2, shuffle="none")
    reader = LaneReader(open_source(spec, seed=1, lanes=1, lane_batch_size=4))
    batch = reader.batch(0, 0)["x"]
    assert batch.dtype == np.float64
    assert batch.tolist() == [1, 2, 2.5, 4]


def test_a_file_a_glob_a_list_and_a_url_are_the_same_source(tmp_path: Path) -> None:
    folder = write_texts(tmp_path / "data", "parquet")
    hashes = {
        text_source(folder).fingerprint["hash"],
        text_source(folder / "*.parquet").fingerprint["hash"],
        text_source(f"file://{folder}").fingerprint["hash"],
        open_source(
            Data(
                kind="parquet",
                path=tuple(str(folder / f"{n}.parquet") for n in (2, 0, 1)),
                text_column="text",
                sequence_length=16,
                rows_per_block=11,
            ),
            seed=99,
            lanes=4,
            lane_batch_size=2,
        ).fingerprint["hash"],
    }
    assert len(hashes) == 1


def test_an_object_store_without_times_works_and_is_not_cached(tmp_path: Path, index_cache: Path) -> None:
    folder = write_texts(tmp_path / "data", "parquet")
    memory = fsspec.filesystem("memory")
    for file in folder.iterdir():
        memory.pipe(f"/texts/{file.name}", file.read_bytes())
    source = text_source("memory://texts")
    assert source.fingerprint["hash"] == text_source(folder).fingerprint["hash"]
    reader, local = LaneReader(source), LaneReader(text_source(folder))
    assert reader.batch(7, 2)["tokens"].tolist() == local.batch(7, 2)["tokens"].tolist()


@pytest.mark.parametrize("kind", ["parquet", "jsonl"])
def test_the_index_cache_is_used_and_a_broken_one_is_made_again(
    tmp_path: Path, index_cache: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_texts(tmp_path / "data", kind)
    first = text_source(folder, kind).fingerprint
    (cached,) = index_cache.iterdir()
    told: list[str] = []
    spec = Data(kind=kind, path=str(folder), text_column="text", sequence_length=16, rows_per_block=11)

    def reopen() -> dict[str, Any]:
        told.clear()
        source = open_source(
            spec, seed=5, lanes=4, lane_batch_size=2, progress=lambda what, done, total: told.append(what)
        )
        return source.fingerprint

    assert reopen() == first
    assert "counting tokens" not in told
    whole = cached.read_bytes()
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 1
    for broken in (whole[: len(whole) // 2], b"", b"no zip", bytes(flipped)):
        cached.write_bytes(broken)
        assert reopen() == first
        assert "counting tokens" in told
        assert reopen() == first
        assert "counting tokens" not in told


def test_a_cache_that_cannot_be_written_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("not a folder")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert text_source(write_texts(tmp_path / "data", "parquet")).steps_per_epoch > 0


def test_an_interrupted_cache_write_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(np, "savez", fail)
    with pytest.raises(KeyboardInterrupt):
        store_cached(tmp_path / "sub" / "x.npz", {}, {})
    assert list((tmp_path / "sub").iterdir()) == []


def test_moved_and_touched_data_keep_their_fingerprint(tmp_path: Path) -> None:
    folder = write_texts(tmp_path / "data", "parquet")
    before = text_source(folder).fingerprint
    os.utime(folder / "0.parquet", (1, 1))
    assert text_source(folder.rename(tmp_path / "elsewhere")).fingerprint == before


def test_the_difference_of_fingerprints_in_words(tmp_path: Path) -> None:
    folder = write_texts(tmp_path / "data", "parquet")
    old = text_source(folder).fingerprint
    json.dumps(old)
    assert fingerprint_difference(old, text_source(folder, seed=6).fingerprint) == []
    assert fingerprint_difference(old, text_source(folder, lanes=8).fingerprint) == [
        "the number of lanes was 4 and is now 8 (lanes)"
    ]
    assert any(
        "sequence_length 16" in sentence and "sequence_length 20" in sentence
        for sentence in fingerprint_difference(old, text_source(folder, sequence_length=20).fingerprint)
    )
    (folder / "0.parquet").rename(folder / "9.parquet")
    pq.write_table(pa.table({"text": TEXTS[:30], "id": range(30)}), folder / "1.parquet")
    text = "\n".join(fingerprint_difference(old, text_source(folder).fingerprint))
    assert "0.parquet is missing" in text
    assert "9.parquet is new" in text
    assert "1.parquet has changed" in text
    assert "40 rows, now 30" in text
    assert "2.parquet" not in text


def test_other_text_of_the_same_size_is_another_fingerprint(tmp_path: Path) -> None:
    folder = write_texts(tmp_path / "data", "jsonl")
    old = text_source(folder, "jsonl").fingerprint
    file = folder / "1.jsonl"
    file.write_text(file.read_text().replace("Dokument", "dokument"))
    new = text_source(folder, "jsonl").fingerprint
    assert fingerprint_difference(old, new) == ["1.jsonl has changed (other content of the same size)"]
    # What is to be ignored must not make the rest equal, and a fingerprint that went through JSON is the same.
    stored = json.loads(json.dumps(old))
    other_lanes = text_source(folder, "jsonl", lanes=8).fingerprint
    assert fingerprint_difference(stored, other_lanes, ignoring=("lanes",)) == fingerprint_difference(old, new)
    assert fingerprint_difference(json.loads(json.dumps(new)), other_lanes, ignoring=("lanes",)) == []


def test_hugging_face_tokenizer(tmp_path: Path) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    model = tokenizers.models.WordLevel({"<unk>": 0, "Dokument": 1, "</s>": 2}, unk_token="<unk>")
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.enable_truncation(2)
    tokenizer.enable_padding()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    folder = write_texts(tmp_path / "data", "parquet")
    source = text_source(folder, tokenizer=str(tmp_path / "tokenizer.json"), sequence_length=4)
    assert (source.vocabulary_size, source.end_of_document) == (3, 2)
    tokens = LaneReader(source).batch(0, 0)["tokens"]
    assert tokens.dtype == np.int64
    words = sum(len(tokenizers.pre_tokenizers.Whitespace().pre_tokenize_str(text)) for text in TEXTS)
    assert source.describe()["tokens"] == words + len(TEXTS)
    other = fingerprint_difference(text_source(folder).fingerprint, source.fingerprint)
    assert any("the tokenizer was bytes-1 and is now huggingface-1-" in sentence for sentence in other)
