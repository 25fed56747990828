"""Columns of text: strings are UTF-8 with any tokenizer and policy, bytes are what the tokenizer makes of them."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from elastictrain.data.tokenizers import BytesTokenizer, tokens_record
from elastictrain.errors import DataError
from tests.unit.data.test_formats import opened, write_arrow_file

ROWS = 40
BAD = 22
SPEC: dict[str, Any] = {"text_column": "text", "sequence_length": 4}


@pytest.fixture
def words(tmp_path: Path) -> str:
    tokenizers = pytest.importorskip("tokenizers")
    model = tokenizers.models.WordLevel({"<unk>": 0, "</s>": 1, "fine": 2}, unk_token="<unk>")
    tokenizers.Tokenizer(model).save(str(tmp_path / "tokenizer.json"))
    return str(tmp_path / "tokenizer.json")


def write_bad(folder: Path, kind: str) -> None:
    """`ROWS` texts, of which number `BAD` is no UTF-8."""
    folder.mkdir()
    texts = [b"fine \xff" if row == BAD else b"fine" for row in range(ROWS)]
    table = pa.table({"text": pa.array(texts, pa.binary()).view(pa.string())})
    if kind == "parquet":
        pq.write_table(table, folder / "a.parquet", row_group_size=5)
    elif kind == "arrow":
        write_arrow_file(folder / "a.arrow", table)
    elif kind == "jsonl":
        (folder / "a.jsonl").write_bytes(b"".join(b'{"text": "%s"}\n' % text for text in texts))
    elif kind == "csv":
        (folder / "a.csv").write_bytes(b"text,x\n" + b"".join(b"%s,1\n" % text for text in texts))
    elif kind == "text":
        (folder / "a.txt").write_bytes(b"\n".join(texts))
    else:
        with tarfile.open(folder / "a.tar", "w") as tar:
            for number, text in enumerate(texts):
                member = tarfile.TarInfo(f"{number}.text")
                member.size = len(text)
                tar.addfile(member, io.BytesIO(text))


@pytest.mark.parametrize("kind", ["parquet", "arrow", "jsonl", "csv", "text", "webdataset"])
def test_strings_that_are_no_utf8_stop_or_are_left_out_in_every_format(tmp_path: Path, kind: str) -> None:
    write_bad(tmp_path / "data", kind)
    with pytest.raises(DataError, match=r"a\.[a-z]+(, |: )"):
        opened(tmp_path / "data", kind, **SPEC)
    source = opened(tmp_path / "data", kind, on_corrupt="skip", **SPEC)
    (hole,) = source.describe()["holes"]
    assert hole["block"] == 4
    assert source.describe()["rows"] == ROWS - 5


@pytest.mark.parametrize("kind", ["parquet", "webdataset"])
def test_a_column_of_bytes_with_a_tokenizer_of_words(tmp_path: Path, words: str, kind: str) -> None:
    (tmp_path / "data").mkdir()
    texts = [b"fine fine"] * ROWS
    if kind == "parquet":
        pq.write_table(pa.table({"html": pa.array(texts, pa.binary())}), tmp_path / "data" / "a.parquet")
    else:
        with tarfile.open(tmp_path / "data" / "a.tar", "w") as tar:
            for number, text in enumerate(texts):
                member = tarfile.TarInfo(f"{number}.html")
                member.size = len(text)
                tar.addfile(member, io.BytesIO(text))
    spec: dict[str, Any] = {"text_column": "html", "sequence_length": 4}
    source = opened(tmp_path / "data", kind, tokenizer=words, **spec)
    assert source.describe()["tokens"] == ROWS * 2
    assert opened(tmp_path / "data", kind, **spec).describe()["tokens"] == ROWS * 10


def test_bytes_that_are_no_utf8(tmp_path: Path, words: str) -> None:
    (tmp_path / "data").mkdir()
    texts = pa.array([b"fine", b"\xff"] * ROWS, pa.binary())
    pq.write_table(pa.table({"text": texts}), tmp_path / "data" / "a.parquet", row_group_size=10)
    assert opened(tmp_path / "data", "parquet", **SPEC).describe()["tokens"] == ROWS * 7
    expected = r"a\.parquet, row group 0: a text is not valid UTF-8 .* which the tokenizer .* needs"
    with pytest.raises(DataError, match=expected):
        opened(tmp_path / "data", "parquet", tokenizer=words, **SPEC)


@pytest.mark.parametrize("bad", [[1, None, 256], [1, 2]])
def test_tokens_that_are_not_what_was_stored_are_named(tmp_path: Path, bad: list[int | None]) -> None:
    (tmp_path / "data").mkdir()
    tokens = [bad if row == BAD else [1, 256] for row in range(ROWS)]
    table = pa.table({"text": pa.array(tokens, pa.list_(pa.int32()))})
    pq.write_table(table, tmp_path / "data" / "a.parquet", row_group_size=10)
    (tmp_path / "_tokenizer.json").write_text(json.dumps(tokens_record(BytesTokenizer())))
    with pytest.raises(DataError, match=r"a\.parquet, row group 2: (1 null\(s\) among the tokens|a document does not)"):
        opened(tmp_path / "data", "parquet", tokenizer=str(tmp_path / "_tokenizer.json"), **SPEC)
