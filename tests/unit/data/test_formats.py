"""The same rows from every format: tables and texts, plain and compressed, local and from a store."""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import tarfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.feather as feather
import pyarrow.parquet as pq
import pytest

from elastictrain.data import LaneReader, Source, fingerprint_difference, open_source
from elastictrain.errors import ConfigError, DataError
from elastictrain.job import Data
from tests.unit.data.test_source import TEXTS, tokens_of

ROWS = 43
FILES = 2


def table_of(numbers: range) -> pa.Table:
    images = pa.array([[n + 0.5, -float(n)] for n in numbers], pa.list_(pa.float32(), 2))
    return pa.table({"text": [TEXTS[n] for n in numbers], "x": pa.array(list(numbers), pa.int64()), "image": images})


def write_parquet(path: Path, table: pa.Table) -> None:
    pq.write_table(table, path, row_group_size=5)


def write_arrow_file(path: Path, table: pa.Table, codec: str | None = None) -> None:
    with pa.ipc.new_file(path, table.schema, options=pa.ipc.IpcWriteOptions(compression=codec)) as writer:
        writer.write_table(table, max_chunksize=5)


def write_arrow_stream(path: Path, table: pa.Table, codec: str | None = None) -> None:
    with pa.ipc.new_stream(path, table.schema, options=pa.ipc.IpcWriteOptions(compression=codec)) as writer:
        writer.write_table(table, max_chunksize=5)


def write_feather(path: Path, table: pa.Table) -> None:
    feather.write_feather(table, path, chunksize=5)


def jsonl_bytes(table: pa.Table) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in table.to_pylist()).encode()


def csv_bytes(table: pa.Table) -> bytes:
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["text", "x"])
    writer.writerows([[row["text"], row["x"]] for row in table.to_pylist()])
    return out.getvalue().encode()


def text_bytes(table: pa.Table) -> bytes:
    return "\r\n".join(table.column("text").to_pylist()).encode()


def tar_bytes(table: pa.Table) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        for row in table.to_pylist():
            image = io.BytesIO()
            np.save(image, np.asarray(row["image"], dtype=np.float32))
            parts = (("text.txt", row["text"].encode()), ("cls", str(row["x"]).encode()), ("img.npy", image.getvalue()))
            for column, body in parts:
                member = tarfile.TarInfo(f"part.a/{row['x']:04d}.{column}")
                member.size = len(body)
                tar.addfile(member, io.BytesIO(body))
    return out.getvalue()


def zstd(content: bytes) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(content)
    return bytes(sink.getvalue().to_pybytes())


def lz4(content: bytes) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "lz4") as stream:
        stream.write(content)
    return bytes(sink.getvalue().to_pybytes())


def plain(
    make: Callable[[pa.Table], bytes], pack: Callable[[bytes], bytes] = bytes
) -> Callable[[Path, pa.Table], None]:
    return lambda path, table: path.write_bytes(pack(make(table))) and None


Writer = Callable[[Path, pa.Table], None]
FORMATS: dict[str, tuple[str, str, Writer]] = {
    "parquet": ("parquet", ".parquet", write_parquet),
    "arrow file": ("arrow", ".arrow", write_arrow_file),
    "arrow file, zstd": ("arrow", ".arrow", lambda p, t: write_arrow_file(p, t, "zstd")),
    "arrow stream": ("arrow", ".arrow", write_arrow_stream),
    "arrow stream, lz4": ("arrow", ".arrows", lambda p, t: write_arrow_stream(p, t, "lz4")),
    "feather": ("arrow", ".feather", write_feather),
    "jsonl": ("jsonl", ".jsonl", plain(jsonl_bytes)),
    "jsonl.gz": ("jsonl", ".jsonl.gz", plain(jsonl_bytes, gzip.compress)),
    "jsonl.zst": ("jsonl", ".jsonl.zst", plain(jsonl_bytes, zstd)),
    "jsonl.bz2": ("jsonl", ".jsonl.bz2", plain(jsonl_bytes, bz2.compress)),
    "jsonl.lz4": ("jsonl", ".jsonl.lz4", plain(jsonl_bytes, lz4)),
    "csv": ("csv", ".csv", plain(csv_bytes)),
    "csv.gz": ("csv", ".csv.gz", plain(csv_bytes, gzip.compress)),
    "tar": ("webdataset", ".tar", plain(tar_bytes)),
    "tgz": ("webdataset", ".tgz", plain(tar_bytes, gzip.compress)),
    "text": ("text", ".txt", plain(text_bytes)),
    "text.zst": ("text", ".txt.zst", plain(text_bytes, zstd)),
}
TABLES = [name for name, (kind, _, _) in FORMATS.items() if kind != "text"]


def write(folder: Path, name: str) -> str:
    kind, suffix, writer = FORMATS[name]
    for number in range(FILES):
        writer(folder / f"{number}{suffix}", table_of(range(number * ROWS // FILES, (number + 1) * ROWS // FILES)))
    return kind


def opened(path: Path | str, kind: str, *, lanes: int = 1, size: int = 1, **settings: Any) -> Source:
    spec = Data(kind=kind, path=str(path), rows_per_block=5, **settings)  # type: ignore[arg-type]
    return open_source(spec, seed=3, lanes=lanes, lane_batch_size=size)


def column_of(kind: str, name: str) -> str:
    return {"text": "text.txt", "x": "cls", "image": "img.npy"}[name] if kind == "webdataset" else name


@pytest.mark.parametrize("name", TABLES)
def test_numbers_of_every_format_come_once_an_epoch(tmp_path: Path, name: str) -> None:
    kind = write(tmp_path, name)
    x = column_of(kind, "x")
    source = opened(tmp_path, kind, columns=(x,))
    reader = LaneReader(source)
    got = [reader.batch(step, 0)[x].tolist() for step in range(source.steps_per_epoch)]
    assert sorted(value for batch in got for value in batch) == list(range(ROWS))
    assert len(source._blocks.blocks) >= 8, "not one block for everything"
    assert source.describe()["columns"] == {x: "int64"}


@pytest.mark.parametrize("name", [name for name in TABLES if not name.startswith("csv")])
def test_arrays_of_every_format_are_those_of_their_row(tmp_path: Path, name: str) -> None:
    kind = write(tmp_path, name)
    x, image = column_of(kind, "x"), column_of(kind, "image")
    batch = LaneReader(opened(tmp_path, kind, size=7, columns=(x, image))).batch(2, 0)
    assert batch[image].shape == (7, 2)
    assert batch[image].tolist() == [[n + 0.5, -float(n)] for n in batch[x].tolist()]


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("packing", ["concatenate", "best_fit"])
def test_texts_of_every_format_hold_the_same_tokens(tmp_path: Path, name: str, packing: str) -> None:
    kind = write(tmp_path, name)
    source = opened(tmp_path, kind, text_column=column_of(kind, "text"), sequence_length=16, packing=packing)
    reader = LaneReader(source)
    got = Counter(t for step in range(source.steps_per_epoch) for t in reader.batch(step, 0)["tokens"].ravel().tolist())
    got[256] -= source.describe()["padding_tokens"]
    assert got == Counter(tokens_of(list(TEXTS[:ROWS])))


@pytest.mark.parametrize("name", FORMATS)
def test_an_index_from_the_cache_gives_the_same(tmp_path: Path, name: str) -> None:
    (tmp_path / "data").mkdir()
    kind = write(tmp_path / "data", name)
    spec = {"text_column": column_of(kind, "text"), "sequence_length": 16}
    first, again = (opened(tmp_path / "data", kind, **spec) for _ in range(2))
    assert first.fingerprint == again.fingerprint
    for step in range(0, first.steps_per_epoch, 3):
        assert (
            LaneReader(again).batch(step, 0)["tokens"].tolist() == LaneReader(first).batch(step, 0)["tokens"].tolist()
        )


@pytest.mark.parametrize("name", FORMATS)
def test_a_store_that_tells_only_sizes(tmp_path: Path, name: str) -> None:
    (tmp_path / "data").mkdir()
    kind = write(tmp_path / "data", name)
    memory = fsspec.filesystem("memory")
    for file in (tmp_path / "data").iterdir():
        memory.pipe(f"/formats-{tmp_path.name}/{file.name}", file.read_bytes())
    spec = {"text_column": column_of(kind, "text"), "sequence_length": 16}
    remote = opened(f"memory://formats-{tmp_path.name}", kind, **spec)
    local = opened(tmp_path / "data", kind, **spec)
    assert fingerprint_difference(local.fingerprint, remote.fingerprint) == []
    assert LaneReader(remote).batch(4, 0)["tokens"].tolist() == LaneReader(local).batch(4, 0)["tokens"].tolist()


def test_whole_files_as_documents(tmp_path: Path) -> None:
    for number, text in enumerate(TEXTS[:6]):
        (tmp_path / f"{number}.md").write_text(f"# {text}\n\nand more\n", encoding="utf-8")
    (tmp_path / "empty.txt").write_bytes(b"")
    source = opened(tmp_path, "text", text_column="text", sequence_length=8, document="file")
    expected = tokens_of([f"# {text}\n\nand more\n" for text in TEXTS[:6]])
    assert source.describe()["tokens"] == len(expected)
    lines = opened(tmp_path, "text", text_column="text", sequence_length=8)
    assert "a document was a file and is now a line (data.document)" in fingerprint_difference(
        source.fingerprint, lines.fingerprint
    )


def save_to_disk(folder: Path, *, indices: bool = False) -> None:
    """As `datasets.Dataset.save_to_disk` lays it out."""
    folder.mkdir(parents=True)
    files = []
    for number in range(FILES):
        name = f"data-{number:05d}-of-{FILES:05d}.arrow"
        write_arrow_stream(folder / name, table_of(range(number * ROWS // FILES, (number + 1) * ROWS // FILES)))
        files.append({"filename": name})
    state = {"_data_files": files, "_fingerprint": "f", "_split": "train"}
    (folder / "state.json").write_text(json.dumps(state | ({"_indices_files": [{"filename": "i"}]} if indices else {})))
    (folder / "dataset_info.json").write_text("{}")
    (folder / "cache-1234.arrow").write_bytes(b"something else")


def test_a_saved_hugging_face_dataset(tmp_path: Path) -> None:
    save_to_disk(tmp_path / "d" / "train")
    source = opened(tmp_path / "d" / "train", "huggingface", columns=("x",))
    reader = LaneReader(source)
    assert sorted(int(reader.batch(step, 0)["x"][0]) for step in range(ROWS)) == list(range(ROWS))
    (tmp_path / "d" / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    with pytest.raises(
        DataError, match=r"holds several datasets \(train, test\); name the folder of one, as in .*d/train$"
    ):
        opened(tmp_path / "d", "huggingface")
    save_to_disk(tmp_path / "selected", indices=True)
    with pytest.raises(DataError, match=r"is a selection whose rows lie elsewhere. Call flatten_indices\(\)"):
        opened(tmp_path / "selected", "huggingface")
    (tmp_path / "d" / "train" / "data-00001-of-00002.arrow").unlink()
    with pytest.raises(DataError, match=r"data-00001-of-00002.arrow is missing; save it again"):
        opened(tmp_path / "d" / "train", "huggingface")
    (tmp_path / "plain").mkdir()
    with pytest.raises(DataError, match=r"has no state.json; .* For loose Arrow files set data.kind: arrow"):
        opened(tmp_path / "plain", "huggingface")


def test_quoted_newlines_and_commas_in_csv(tmp_path: Path) -> None:
    texts = [f'line one {n}\nline "two", {n}' for n in range(40)]
    with (tmp_path / "a.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["x", "the, text"])
        writer.writerows([[n, text] for n, text in enumerate(texts)])
    source = opened(tmp_path, "csv", text_column="the, text", sequence_length=8)
    assert source.describe()["tokens"] == len(tokens_of(list(texts)))
    assert len(source._blocks.blocks) == 9


def test_csv_numbers_become_as_wide_as_they_must(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("x,y\n" + "1,2\n" * 7 + "1.5,2\n", encoding="utf-8-sig")
    batch = LaneReader(opened(tmp_path, "csv", size=8, shuffle="none")).batch(0, 0)
    assert batch["x"].tolist() == [1.0] * 7 + [1.5]
    assert batch["y"].dtype == np.int64


def test_unpacked_files_are_made_again_and_shared(tmp_path: Path, index_cache: Path) -> None:
    (tmp_path / "data").mkdir()
    write(tmp_path / "data", "jsonl.gz")
    spec = {"text_column": "text", "sequence_length": 16}
    before = LaneReader(opened(tmp_path / "data", "jsonl", **spec)).batch(1, 0)["tokens"].tolist()
    unpacked = [file for file in index_cache.iterdir() if file.name.startswith("unpacked-")]
    assert len(unpacked) == FILES
    reader = LaneReader(opened(tmp_path / "data", "jsonl", **spec))
    for file in unpacked:
        file.unlink()
    assert reader.batch(1, 0)["tokens"].tolist() == before
    (tmp_path / "data" / "0.jsonl.gz").write_bytes(gzip.compress(b'{"text": "other"}\n' * 99))
    changed = opened(tmp_path / "data", "jsonl", **spec)
    assert changed.describe()["rows"] == 99 + ROWS - ROWS // FILES
    assert not [file for file in index_cache.iterdir() if file.name.startswith(".")], "nothing half-written stays"


def test_many_files_are_not_opened_at_the_next_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(40):
        pq.write_table(pa.table({"x": [number] * 3}), tmp_path / f"{number:03d}.parquet", row_group_size=2)
    first = opened(tmp_path, "parquet")
    from elastictrain.data.files import FileSet

    opens: list[int] = []
    original = FileSet.open
    monkeypatch.setattr(FileSet, "open", lambda self, number: opens.append(number) or original(self, number))
    again = opened(tmp_path, "parquet")
    assert opens == []
    assert again.fingerprint == first.fingerprint
    assert LaneReader(again).batch(5, 0)["x"].tolist() == LaneReader(first).batch(5, 0)["x"].tolist()
    assert len(set(opens)) <= 4


def test_raw_text_has_one_column() -> None:
    with pytest.raises(ConfigError, match=r"data.kind: text has one column, called text; set data.text_column: text"):
        Data(kind="text", path="x")
