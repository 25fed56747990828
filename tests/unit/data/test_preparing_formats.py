"""`elastictrain data prepare` reads what training reads, and more of it: columns of any type."""

from __future__ import annotations

import gzip
import io
import json
import tarfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from elastictrain.data.preparing.driver import prepare_data
from elastictrain.errors import DataError
from elastictrain.prepare_settings import parse_preparation
from tests.support.preparing import Interrupted, StopsAfter, rows_in

ROWS = [{"text": f'row {n}, "quoted"', "score": n / 2, "tag": "ab"[n % 2]} for n in range(50)]


def prepared(tmp_path: Path, kind: str, path: Any, **more: Any) -> list[dict[str, Any]]:
    settings = {"kind": kind, "path": str(path), "out": str(tmp_path / "out"), "text_column": "text", "seed": 1,
                "columns": ["score", "tag"], "rows_per_block": 7, "part_bytes": 200, "file_bytes": 500}  # fmt: skip
    prepare_data(parse_preparation(settings | more))
    return rows_in(tmp_path / "out")


def sorted_rows(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return sorted(rows, key=lambda row: row["score"])


@pytest.mark.parametrize("packed", [False, True])
def test_json_lines(tmp_path: Path, packed: bool) -> None:
    content = "".join(json.dumps(row | {"more": 1}) + "\n" for row in ROWS).encode()
    path = tmp_path / ("a.jsonl.gz" if packed else "a.jsonl")
    path.write_bytes(gzip.compress(content) if packed else content)
    rows = prepared(tmp_path, "jsonl", path)
    assert sorted_rows(rows) == ROWS
    assert rows != ROWS


def test_csv(tmp_path: Path) -> None:
    def quoted(text: str) -> str:
        return '"' + text.replace('"', '""') + '"'

    lines = ["score,text,tag", *(f"{row['score']},{quoted(row['text'])},{row['tag']}" for row in ROWS)]
    (tmp_path / "a.csv").write_text("\n".join(lines) + "\n")
    assert sorted_rows(prepared(tmp_path, "csv", tmp_path / "a.csv")) == ROWS


def test_csv_whose_documents_look_like_numbers(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("text,score,tag\n" + "".join(f"{n},{n}.5,t\n" for n in range(20)) + "word,99,t\n")
    rows = sorted_rows(prepared(tmp_path, "csv", tmp_path / "a.csv"))
    assert [row["text"] for row in rows] == [*map(str, range(20)), "word"]


def test_arrow(tmp_path: Path) -> None:
    table = pa.Table.from_pylist(ROWS)
    with pa.ipc.new_file(tmp_path / "a.arrow", table.schema) as writer:
        writer.write_table(table, max_chunksize=6)
    assert sorted_rows(prepared(tmp_path, "arrow", tmp_path / "a.arrow")) == ROWS


def test_webdataset(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for n, row in enumerate(ROWS):
            for column, value in (("txt", row["text"]), ("cls", str(n))):
                member = tarfile.TarInfo(f"{n:04d}.{column}")
                member.size = len(value.encode())
                tar.addfile(member, io.BytesIO(value.encode()))
    rows = prepared(tmp_path, "webdataset", tmp_path / "a.tar", text_column="txt", columns=["cls"])
    assert sorted((row["cls"], row["txt"]) for row in rows) == [(n, row["text"]) for n, row in enumerate(ROWS)]


@pytest.mark.parametrize("document", ["line", "file"])
def test_raw_text(tmp_path: Path, document: str) -> None:
    (tmp_path / "in").mkdir()
    for n in range(6):
        (tmp_path / "in" / f"{n}.txt").write_text(f"first of {n}\nsecond of {n}\n")
    rows = prepared(tmp_path, "text", tmp_path / "in", columns=None, document=document)
    lines = [f"{which} of {n}" for n in range(6) for which in ("first", "second")]
    files = [f"first of {n}\nsecond of {n}\n" for n in range(6)]
    assert sorted(row["text"] for row in rows) == sorted(lines if document == "line" else files)


def test_huggingface_folder(tmp_path: Path) -> None:
    folder = tmp_path / "saved"
    folder.mkdir()
    table = pa.Table.from_pylist(ROWS)
    with pa.ipc.new_stream(folder / "data-00000-of-00001.arrow", table.schema) as writer:
        writer.write_table(table, max_chunksize=20)
    state = {"_data_files": [{"filename": "data-00000-of-00001.arrow"}], "_indices_files": None}
    (folder / "state.json").write_text(json.dumps(state))
    assert sorted_rows(prepared(tmp_path, "huggingface", folder)) == ROWS


def test_from_and_to_a_store_of_objects(tmp_path: Path) -> None:
    import fsspec

    memory = fsspec.filesystem("memory")
    try:
        sink = io.BytesIO()
        pq.write_table(pa.Table.from_pylist(ROWS), sink, row_group_size=9)
        memory.pipe("/prepare-in/a.parquet", sink.getvalue())
        settings = {"kind": "parquet", "path": "memory://prepare-in", "out": "memory://prepare-out", "seed": 1,
                    "text_column": "text", "columns": ["score", "tag"], "part_bytes": 300,
                    "file_bytes": 500}  # fmt: skip
        index = prepare_data(parse_preparation(settings))
        rows: list[dict[str, Any]] = []
        for file in index["files"]:
            rows += pq.read_table(io.BytesIO(memory.cat(f"/prepare-out/{file['name']}"))).to_pylist()
        assert sorted_rows(rows) == ROWS
        local = prepared(tmp_path, "parquet", _written(tmp_path), part_bytes=300)
        assert rows == local
    finally:
        for folder in ("/prepare-in", "/prepare-out"):
            if memory.exists(folder):
                memory.rm(folder, recursive=True)


def _written(tmp_path: Path) -> Path:
    pq.write_table(pa.Table.from_pylist(ROWS), tmp_path / "a.parquet", row_group_size=9)
    return tmp_path / "a.parquet"


def test_a_line_that_is_no_json_is_named_or_left_out(tmp_path: Path) -> None:
    lines = [json.dumps(row) for row in ROWS]
    lines[23] = '{"text": '
    (tmp_path / "a.jsonl").write_text("\n".join(lines) + "\n")
    with pytest.raises(DataError, match=r"a\.jsonl, line 24: not valid JSON"):
        prepared(tmp_path, "jsonl", tmp_path / "a.jsonl")
    (tmp_path / "skipping").mkdir()
    rows = prepared(tmp_path / "skipping", "jsonl", tmp_path / "a.jsonl", on_corrupt="skip")
    assert sorted_rows(rows) == [row for n, row in enumerate(ROWS) if not 21 <= n < 28], "its block of seven lines"


def test_columns_whose_type_changes_are_named(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [{"text": "a", "score": 1, "tag": "t"}] * 10 + [
        {"text": "b", "score": 1.5, "tag": "t"}
    ]
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(DataError, match=r"a\.jsonl, lines 8 to 12: the lines cannot be read as one table"):
        prepared(tmp_path, "jsonl", path)
    (tmp_path / "b").mkdir()
    found = prepared(tmp_path / "b", "jsonl", path, columns={"score": "double", "tag": "string"})
    assert sorted(row["score"] for row in found) == [1.0] * 10 + [1.5]


@pytest.mark.parametrize("kind", ["jsonl", "csv", "arrow"])
def test_a_column_that_is_missing_is_named(tmp_path: Path, kind: str) -> None:
    path = tmp_path / f"a.{kind}"
    if kind == "jsonl":
        path.write_text('{"text": "a"}\n')
    elif kind == "csv":
        path.write_text("text\na\n")
    else:
        table = pa.table({"text": ["a"]})
        with pa.ipc.new_file(path, table.schema) as writer:
            writer.write_table(table)
    with pytest.raises(DataError, match=rf"a\.{kind}: .*(columns|data\.columns) name.* '?score'?"):
        prepared(tmp_path, kind, path, columns=["score"])


def test_no_rows_at_all(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("\n\n")
    with pytest.raises(DataError, match=r"path: no rows in 1 file\(s\), the first being .*a\.jsonl"):
        prepared(tmp_path, "jsonl", tmp_path / "a.jsonl")


def test_from_and_to_s3_with_an_interruption(tmp_path: Path, bucket: str, options: dict[str, Any]) -> None:
    import fsspec

    _written(tmp_path)
    system = fsspec.filesystem("s3", **options)
    system.put(str(tmp_path / "a.parquet"), f"{bucket}/in/a.parquet")
    settings = parse_preparation(
        {"kind": "parquet", "path": f"s3://{bucket}/in", "out": f"s3://{bucket}/out", "text_column": "text", "seed": 1,
         "columns": ["score", "tag"], "part_bytes": 300, "file_bytes": 500, "storage_options": options,
         "out_options": options}
    )  # fmt: skip
    with pytest.raises(Interrupted):
        prepare_data(settings, StopsAfter(2))
    index = prepare_data(settings, resume=True)
    names = sorted(name.rpartition("/")[2] for name in system.find(f"{bucket}/out"))
    assert names == ["_index.json", *(file["name"] for file in index["files"])]
    rows: list[dict[str, Any]] = []
    for file in index["files"]:
        rows += pq.read_table(io.BytesIO(system.cat_file(f"{bucket}/out/{file['name']}"))).to_pylist()
    assert rows == prepared(tmp_path, "parquet", tmp_path / "a.parquet", part_bytes=300)
    assert "client_kwargs" not in json.dumps(index), "access is nobody's business"
