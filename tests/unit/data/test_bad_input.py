"""Bad data: each with an error that says what was got, what was expected, and which setting to change."""

from __future__ import annotations

import builtins
import json
import lzma
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from elastictrain.data import LaneReader, Source, open_source
from elastictrain.errors import DataError
from elastictrain.job import Data


def opened(path: Path | str | tuple[str, ...], kind: str = "parquet", **changes: Any) -> Source:
    settings: dict[str, Any] = {"seed": 0, "lanes": 2, "lane_batch_size": 2}
    settings |= {key: changes.pop(key) for key in list(changes) if key in settings}
    spec = {"text_column": "text", "sequence_length": 8, "shuffle": "none", "rows_per_block": 10, **changes}
    where = path if isinstance(path, tuple) else str(path)
    return open_source(Data(kind=kind, path=where, **spec), **settings)


def write(path: Path, **columns: Any) -> Path:
    path.parent.mkdir(exist_ok=True)
    pq.write_table(pa.table(columns or {"text": ["some text"] * 50}), path, row_group_size=10)
    return path


def write_lines(path: Path, lines: list[str]) -> Path:
    path.write_text("\n".join(lines) + "\n")
    return path


def refused(action: Callable[[], object], *parts: str) -> str:
    with pytest.raises(DataError) as caught:
        action()
    message = str(caught.value)
    for part in parts:
        assert part in message
    return message


GOOD = [json.dumps({"text": f"line {i}"}) for i in range(35)]


def test_missing(tmp_path: Path) -> None:
    refused(lambda: opened(tmp_path / "nowhere"), "data.path", "nowhere' does not exist")
    refused(lambda: opened(tmp_path / "*.parquet"), "no file matches", "*.parquet")
    refused(lambda: opened("nosuchscheme://x/y"), "cannot be opened", "data.storage_options")
    refused(lambda: opened(()), "data.path is an empty list")


def test_folder_without_data(tmp_path: Path) -> None:
    refused(lambda: opened(tmp_path), "holds no file ending in .parquet or .pq", "it holds nothing")
    write_lines(tmp_path / "a.jsonl", GOOD)
    write(tmp_path / "_hidden.parquet")
    message = refused(lambda: opened(tmp_path), "holds no file ending in .parquet", "a.jsonl", "data.kind")
    assert message.count("a.jsonl") == 1


def test_empty_files(tmp_path: Path) -> None:
    (tmp_path / "a.parquet").touch()
    refused(lambda: opened(tmp_path), "a.parquet: an empty or cut-off file of 0 bytes")
    write(tmp_path / "a.parquet", text=pa.array([], pa.string()))
    refused(lambda: opened(tmp_path), "no rows in 1 file(s)", "a.parquet")
    (tmp_path / "a.jsonl").touch()
    refused(lambda: opened(tmp_path, "jsonl"), "no rows in 1 file(s)", "a.jsonl")


def test_empty_files_among_others_are_fine(tmp_path: Path) -> None:
    write(tmp_path / "a.parquet", text=pa.array([], pa.string()))
    write(tmp_path / "b.parquet")
    assert opened(tmp_path).describe()["rows"] == 50
    (tmp_path / "a.jsonl").touch()
    write_lines(tmp_path / "b.jsonl", GOOD)
    assert opened(tmp_path, "jsonl").describe()["rows"] == 35


def test_a_file_named_twice(tmp_path: Path) -> None:
    file = str(write(tmp_path / "a.parquet"))
    refused(lambda: opened((file, str(tmp_path))), "a.parquet twice")
    (tmp_path / "sub").mkdir()
    other_way = f"{tmp_path}/sub/../a.parquet"
    refused(lambda: opened((file, other_way)), "a.parquet twice")
    (tmp_path / "b.parquet").symlink_to(file)
    refused(lambda: opened(tmp_path), f"{file} twice, as {file} and as {tmp_path}/b.parquet")


def test_wrong_schema_in_one_of_many_files(tmp_path: Path) -> None:
    for number in range(4):
        write(tmp_path / f"{number}.parquet", x=[1.0] * 20, y=[1] * 20)
    write(tmp_path / "2.parquet", x=["1"] * 20, y=[1] * 20)
    table: dict[str, Any] = {"text_column": None, "sequence_length": None}
    refused(
        lambda: opened(tmp_path, **table),
        "2.parquet: its columns differ",
        "Got x: string, y: int64",
        "expected x: double, y: int64",
        "0.parquet",
    )
    write(tmp_path / "2.parquet", x=[1.0] * 20)
    refused(lambda: opened(tmp_path, **table), "2.parquet: its columns differ", "Got x: double;")
    assert opened(tmp_path, columns=("x",), **table).describe()["rows"] == 80
    write(tmp_path / "2.parquet", text=[1] * 20)
    refused(lambda: opened(tmp_path / "2.parquet"), "2.parquet: data.text_column 'text' has type int64")


def test_missing_text_column(tmp_path: Path) -> None:
    write(tmp_path / "a.parquet", content=["x"] * 20, texts=["x"] * 20)
    refused(
        lambda: opened(tmp_path),
        "data.text_column names 'text' (did you mean 'texts'?)",
        "content: string, texts: string",
    )
    write_lines(tmp_path / "a.jsonl", GOOD)
    write_lines(tmp_path / "b.jsonl", ['{"txt": "x", "n": 1}'] * 30)
    refused(lambda: opened(tmp_path, "jsonl"), "b.jsonl: ", "did you mean 'txt'", "first line are: txt, n")


def test_a_column_that_cannot_be_stacked(tmp_path: Path) -> None:
    table: dict[str, Any] = {"text_column": None, "sequence_length": None}
    write(tmp_path / "a.parquet", x=[1] * 20, name=["n"] * 20)
    refused(lambda: opened(tmp_path, **table), "column 'name' has type string", "data.columns")
    refused(lambda: opened(tmp_path, columns=("z",), **table), "data.columns names 'z'", "x: int64")
    write(tmp_path / "a.parquet", x=[[1], [1, 2]] * 10)
    source = opened(tmp_path, **table)
    refused(lambda: source.read_block(0), "a.parquet, row group 0, column 'x': lists of 1 to 2 elements")
    write(tmp_path / "a.parquet", x=[[1]] * 10 + [[1, 2]] * 10)
    reader = LaneReader(opened(tmp_path, lanes=1, lane_batch_size=20, **table))
    refused(
        lambda: reader.batch(0, 0),
        "column 'x': rows of different shapes [(1,), (2,)]",
        "a.parquet, row group 0",
        "a.parquet, row group 1",
    )


def test_nulls_in_a_table(tmp_path: Path) -> None:
    table: dict[str, Any] = {"text_column": None, "sequence_length": None}
    write(tmp_path / "a.parquet", x=[1] * 15 + [None] + [1] * 4)
    source = opened(tmp_path, **table)
    refused(lambda: source.read_block(1), "row group 1, column 'x': 1 null value(s)", "data.columns")
    write(tmp_path / "a.parquet", x=[[1.0, None]] * 10)
    source = opened(tmp_path, **table)
    refused(lambda: source.read_block(0), "10 null value(s)")


def test_truncated_parquet(tmp_path: Path) -> None:
    file = write(tmp_path / "a.parquet")
    whole = file.read_bytes()
    file.write_bytes(whole[:-20])
    refused(lambda: opened(tmp_path), "a.parquet: not a whole Parquet file", "truncated", "data.kind")
    file.write_bytes(whole[:-8] + (10).to_bytes(4, "little") + b"PAR1")
    refused(lambda: opened(tmp_path), "a.parquet: corrupt Parquet file: its footer cannot be read")
    file.write_bytes(b"not parquet at all, but long enough")
    refused(lambda: opened(tmp_path), "a.parquet: not a whole Parquet file")


def test_corrupt_row_group_is_named(tmp_path: Path) -> None:
    table = pa.table({"text": [f"some text {i * 7919}" for i in range(400)]})
    file = tmp_path / "a.parquet"
    # Plain bytes: but for the page's checksum, a flipped one is just another text.
    pq.write_table(table, file, row_group_size=100, use_dictionary=False, compression="none", write_page_checksum=True)
    offset = pq.read_metadata(file).row_group(2).column(0).data_page_offset
    content = bytearray(file.read_bytes())
    content[offset + 200] ^= 0x55
    file.write_bytes(bytes(content))
    refused(lambda: opened(tmp_path), "a.parquet: corrupt Parquet file: row group 2 cannot be decoded")


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ('{"text": "cut', "not valid JSON"),
        ("[1, 2]", "got a JSON list, expected an object"),
        ('{"text": "a"} {"text": "b"}', "not valid JSON"),
        ('{"text": 7}', "'text' is a int, expected a string"),
    ],
)
def test_invalid_json_line_is_named(tmp_path: Path, line: str, words: str) -> None:
    write_lines(tmp_path / "a.jsonl", GOOD)
    write_lines(tmp_path / "b.jsonl", [*GOOD[:25], "", line, *GOOD[25:]])
    refused(lambda: opened(tmp_path, "jsonl"), "b.jsonl, line 27: ", words)


def test_json_keys_of_two_types(tmp_path: Path) -> None:
    table: dict[str, Any] = {"text_column": None, "sequence_length": None}
    lines = ['{"x": 1}'] * 15 + ['{"x": [1]}'] * 15
    write_lines(tmp_path / "a.jsonl", lines)
    refused(lambda: opened(tmp_path, "jsonl", **table), "a.jsonl, lines 11 to 21", "one type in all lines")
    write_lines(tmp_path / "a.jsonl", ['{"x": 1}'] * 10)
    write_lines(tmp_path / "b.jsonl", ['{"x": true}'] * 10)
    refused(lambda: opened(tmp_path, "jsonl", **table), "b.jsonl: its columns do not fit", "Got x: bool")


def test_compressed_json_lines(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl.xz").write_bytes(lzma.compress(b'{"text": "x"}\n'))
    refused(lambda: opened(tmp_path / "a.jsonl.xz", "jsonl"), "compressed JSON lines", "Parquet")


def test_fewer_samples_than_a_step(tmp_path: Path) -> None:
    write(tmp_path / "a.parquet", x=list(range(15)))
    table: dict[str, Any] = {"text_column": None, "sequence_length": None}
    assert opened(tmp_path, lanes=5, lane_batch_size=3, **table).steps_per_epoch == 1
    refused(
        lambda: opened(tmp_path, lanes=4, lane_batch_size=4, **table),
        "data.path holds 15 rows",
        "lanes x lane_batch_size = 4 x 4 = 16",
        "lower lanes or lane_batch_size",
    )
    write(tmp_path / "a.parquet")
    refused(lambda: opened(tmp_path, sequence_length=400), "holds 2 sequences of 400 tokens", "data.sequence_length")


@pytest.mark.parametrize("kind", ["parquet", "jsonl"])
def test_data_that_change_under_a_run(tmp_path: Path, kind: str) -> None:
    if kind == "parquet":
        file = write(tmp_path / "a.parquet", text=[f"text {i}" for i in range(50)])
    else:
        file = write_lines(tmp_path / "a.jsonl", GOOD)
    before = file.read_bytes()

    source = opened(tmp_path, kind)
    source.close()
    file.write_bytes(before + b"x")
    refused(lambda: source.read_block(0), "changed since the run opened it", f"expected {len(before)} bytes")
    if kind == "parquet":
        write(file, text=[f"TEXT {i}" for i in range(50)])
        os.truncate(file, len(before)) if file.stat().st_size > len(before) else None
    else:
        file.write_bytes(before.upper())
    refused(lambda: source.read_block(1), "changed since the run opened it")
    file.unlink()
    source.close()
    refused(lambda: source.read_block(2), "could not be read", "data.path")
    file.write_bytes(before)
    source.read_block(2)


def test_text_changed_behind_an_equal_footer(tmp_path: Path) -> None:
    """No statistics, no page checksums: only the tokens tell."""
    file = tmp_path / "a.parquet"
    table = pa.table({"text": ["old text"] * 50})
    pq.write_table(table, file, use_dictionary=False, write_statistics=False, compression="none")
    source = opened(tmp_path)
    source.close()
    file.write_bytes(file.read_bytes().replace(b"old text", b"new text"))
    refused(lambda: source.read_block(0), "row group 0", "its text is not what was there", "data.path")


def test_tokenizer_that_cannot_be_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "a.parquet")
    missing = str(tmp_path / "tokenizer.json")
    refused(lambda: opened(tmp_path, tokenizer=missing), "data.tokenizer", "could not be read", "'bytes'")
    Path(missing).write_text("{}")
    refused(lambda: opened(tmp_path, tokenizer=missing), "is not a Hugging Face tokenizers JSON file")

    real = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name == "tokenizers":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.delitem(sys.modules, "tokenizers", raising=False)
    monkeypatch.setattr(builtins, "__import__", without)
    refused(lambda: opened(tmp_path, tokenizer=missing), "pip install 'elastictrain[tokenizers]'")
