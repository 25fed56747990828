"""Data that cannot be read: the run stops at it and names the place, or leaves it out and says so."""

from __future__ import annotations

import gzip
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from elastictrain.data import LaneReader, Source, fingerprint_difference, open_source, tokenizers
from elastictrain.errors import DataError
from elastictrain.job import Data
from tests.unit.data.test_formats import column_of, opened, table_of, write, write_arrow_file, write_arrow_stream
from tests.unit.data.test_source import TEXTS, tokens_of


def flip(path: Path, place: int) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 0x55
    path.write_bytes(bytes(content))


def cut(path: Path, by: int) -> None:
    path.write_bytes(path.read_bytes()[:-by])


def last_byte_of(file: Path, group: int) -> int:
    """Where the first column's values of a row group end."""
    column = pq.read_metadata(file).row_group(group).column(0)
    return int(column.data_page_offset + column.total_compressed_size) - 1


def damage_parquet_group(folder: Path) -> str:
    """Flips a byte in a page of row group 1 of a file of 4; says which rows are lost."""
    table = pa.table({"x": np.arange(40), "text": [f"some text {i * 7919}" for i in range(40)]})
    file = folder / "0.parquet"
    pq.write_table(table, file, row_group_size=10, use_dictionary=False, compression="none", write_page_checksum=True)
    flip(file, last_byte_of(file, 1))
    return "0.parquet: corrupt Parquet file: row group 1 cannot be decoded"


def test_a_corrupt_row_group_stops_or_is_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    named = damage_parquet_group(tmp_path)
    whole = opened(tmp_path, "parquet", columns=("x",))
    with pytest.raises(DataError, match=named):
        whole.read_block(1)
    caplog.set_level(logging.WARNING)
    source = opened(tmp_path, "parquet", columns=("x",), on_corrupt="skip")
    reader = LaneReader(source)
    got = sorted(int(reader.batch(step, 0)["x"][0]) for step in range(source.steps_per_epoch))
    assert got == [*range(10), *range(20, 40)]
    (hole,) = source.describe()["holes"]
    assert (hole["file"], hole["block"]) == ("0.parquet", 1)
    assert named in hole["why"]
    assert "Left out as corrupt (data.on_corrupt: skip): 0.parquet, block 1" in caplog.text
    again = opened(tmp_path, "parquet", columns=("x",), on_corrupt="skip")
    assert (again.describe(), again.fingerprint) == (source.describe(), source.fingerprint), "also from the cache"
    assert "0 corrupt blocks or files were left out and now are 1 (data.on_corrupt)" in fingerprint_difference(
        whole.fingerprint, source.fingerprint
    )


def test_a_hole_in_text_takes_its_tokens_with_it(tmp_path: Path) -> None:
    table = pa.table({"text": [f"some text {i * 7919}" for i in range(40)]})
    file = tmp_path / "0.parquet"
    pq.write_table(table, file, row_group_size=10, use_dictionary=False, compression="none", write_page_checksum=True)
    flip(file, last_byte_of(file, 2))
    spec: dict[str, Any] = {"text_column": "text", "sequence_length": 8, "on_corrupt": "skip"}
    source = opened(tmp_path, "parquet", **spec)
    kept = table.column("text").to_pylist()
    assert source.describe()["tokens"] == len(tokens_of(kept[:20] + kept[30:]))
    assert source.describe()["holes"][0]["block"] == 2


TRUNCATED = [
    ("parquet", 30, r"1\.parquet: not a whole Parquet file"),
    ("arrow file", 5, r"1\.arrow: corrupt Arrow IPC file: it has no end \(truncated, or of another format\)"),
    ("arrow stream", 5, r"1\.arrow: corrupt Arrow IPC file: it has no end \(truncated, or of another format\)"),
    ("jsonl", 9, r"1\.jsonl, line 22: not valid JSON"),
    ("jsonl.gz", 20, r"1\.jsonl\.gz: corrupt or truncated compressed file \(Truncated compressed stream\)"),
    ("jsonl.zst", 3, r"1\.jsonl\.zst: corrupt or truncated compressed file \(Truncated compressed stream\)"),
    ("csv.gz", 20, r"1\.csv\.gz: corrupt or truncated compressed file"),
    ("tar", 10_300, r"1\.tar: corrupt or truncated tar file"),
]


@pytest.mark.parametrize(("name", "by", "expected"), TRUNCATED)
def test_a_truncated_file_stops_or_is_left_out(tmp_path: Path, name: str, by: int, expected: str) -> None:
    kind = write(tmp_path, name)
    (last,) = [path for path in tmp_path.iterdir() if path.name.startswith("1.")]
    cut(last, by)
    x = column_of(kind, "x")
    with pytest.raises(DataError, match=expected):
        opened(tmp_path, kind, columns=(x,))
    source = opened(tmp_path, kind, columns=(x,), on_corrupt="skip")
    assert source.describe()["holes"][0]["file"] == last.name
    reader = LaneReader(source)
    got = {int(reader.batch(step, 0)[x][0]) for step in range(source.steps_per_epoch)}
    assert set(range(21)) <= got, "the other file is there"
    assert len(got) < 43


def test_everything_corrupt_is_an_error_whatever_the_policy(tmp_path: Path) -> None:
    (tmp_path / "a.parquet").write_bytes(b"PAR1 nothing of the kind")
    with pytest.raises(DataError, match=r"data.path: no file can be read; a.parquet: .*not a whole Parquet file"):
        opened(tmp_path, "parquet", on_corrupt="skip")
    (tmp_path / "a.jsonl").write_bytes(b"{\n")
    with pytest.raises(DataError, match=r"data.path: no rows in 1 file.*1 corrupt.*a.jsonl, line 1: not valid JSON"):
        opened(tmp_path, "jsonl", on_corrupt="skip")


@pytest.mark.parametrize("writer", [write_arrow_file, write_arrow_stream])
def test_a_flipped_byte_in_a_record_batch(tmp_path: Path, writer: Callable[..., None]) -> None:
    """A compressed one cannot be unpacked; a plain one is noticed once its checksum is known."""
    writer(tmp_path / "a.arrow", table_of(range(20)).select(["x"]), "zstd")
    content = (tmp_path / "a.arrow").read_bytes()
    flip(tmp_path / "a.arrow", content.index(b"\x28\xb5\x2f\xfd") + 1)  # the magic of a zstd frame
    with pytest.raises(DataError, match=r"a\.arrow: corrupt Arrow IPC file: the record batch at bytes \d+ to \d+"):
        opened(tmp_path, "arrow")
    source = opened(tmp_path, "arrow", on_corrupt="skip")
    assert source.describe()["rows"] == 15
    writer(tmp_path / "a.arrow", table_of(range(20)).select(["x"]))
    source = opened(tmp_path, "arrow")
    place = (tmp_path / "a.arrow").read_bytes().index(np.arange(5, 10).astype("<i8").tobytes())
    flip(tmp_path / "a.arrow", place)
    with pytest.raises(DataError, match=r"a\.arrow, bytes \d+ to \d+: changed since the run opened it"):
        source.read_block(1)


@pytest.mark.parametrize("policy", ["stop", "skip"])
def test_another_schema_in_one_of_many_files_is_never_left_out(tmp_path: Path, policy: str) -> None:
    for number in range(5):
        column = "y" if number == 3 else "x"
        write_arrow_stream(tmp_path / f"{number}.arrow", pa.table({column: [1, 2, 3]}))
    with pytest.raises(DataError, match=r"3\.arrow: its columns differ from those .* Got y: int64; expected x: int64"):
        opened(tmp_path, "arrow", on_corrupt=policy)
    with pytest.raises(DataError, match=r"3\.arrow: data.columns names 'x', which is not there"):
        opened(tmp_path, "arrow", columns=("x",), on_corrupt=policy)
    for number in range(3):
        (tmp_path / f"{number}.csv").write_text("a,c\n1,2\n" if number == 1 else "a,b\n1,2\n")
    with pytest.raises(DataError, match=r"1\.csv: data.columns names 'b', which is not there. The columns are: a, c"):
        opened(tmp_path, "csv", columns=("a", "b"), on_corrupt=policy)


def test_csv_that_is_none(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("a,b\n1,2\n3\n4,5\n")
    with pytest.raises(DataError, match=r"a\.csv, bytes 4 to 14: not valid CSV .*Expected UTF-8 records of 2 fields"):
        opened(tmp_path, "csv")
    (tmp_path / "a.csv").write_bytes(b"a,\xff\n1,2\n")
    with pytest.raises(DataError, match=r"a\.csv: its first record, which must name the columns, cannot be read"):
        opened(tmp_path, "csv")
    (tmp_path / "a.csv").write_bytes(b"a,text\n" + b"1,ok\n" * 9 + b"1,\xff\xfe\n")
    with pytest.raises(DataError, match=r"a\.csv, bytes .*not valid CSV .*UTF8"):
        opened(tmp_path, "csv", text_column="text", sequence_length=4)


def test_text_that_is_no_utf8(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"fine\n" * 12 + b"not \xff fine\n" + b"fine again\n" * 9)
    spec: dict[str, Any] = {"text_column": "text", "sequence_length": 4}
    with pytest.raises(DataError, match=r"a\.txt, line 13: not valid UTF-8 \(invalid start byte, byte 0xff\)"):
        opened(tmp_path, "text", **spec)
    source = opened(tmp_path, "text", on_corrupt="skip", **spec)
    assert source.describe()["holes"][0]["block"] == 2
    assert source.describe()["rows"] == 22 - 5


def test_text_that_is_no_utf8_in_parquet_and_a_tokenizer_that_needs_it(tmp_path: Path) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    model = tokenizers.models.WordLevel({"<unk>": 0, "</s>": 1}, unk_token="<unk>")
    tokenizers.Tokenizer(model).save(str(tmp_path / "tokenizer.json"))
    texts = pa.array([b"fine"] * 30 + [b"\xff"] + [b"fine"] * 9, pa.binary()).view(pa.string())
    (tmp_path / "data").mkdir()
    pq.write_table(pa.table({"text": texts}), tmp_path / "data" / "a.parquet", row_group_size=10)
    spec: dict[str, Any] = {"text_column": "text", "sequence_length": 4}
    with pytest.raises(DataError, match=r"a\.parquet, row group 3: a text is not valid UTF-8 \(row 0: .* byte 0xff"):
        opened(tmp_path / "data", "parquet", **spec)
    assert opened(tmp_path / "data", "parquet", on_corrupt="skip", **spec).describe()["rows"] == 30
    spec["tokenizer"] = str(tmp_path / "tokenizer.json")
    with pytest.raises(DataError, match=r"a\.parquet, row group 3: a text is not valid UTF-8 .*data.tokenizer: bytes"):
        opened(tmp_path / "data", "parquet", **spec)
    assert opened(tmp_path / "data", "parquet", on_corrupt="skip", **spec).describe()["rows"] == 30


def test_a_document_longer_than_allowed(tmp_path: Path) -> None:
    texts = [*TEXTS[:20], "x" * 5000, *TEXTS[20:30]]
    pq.write_table(pa.table({"text": texts}), tmp_path / "a.parquet", row_group_size=8)
    spec: dict[str, Any] = {"text_column": "text", "sequence_length": 4}
    expected = r"a\.parquet, row group 2: the text in row 4 has 5000 bytes, more than data.max_document_bytes=4999"
    with pytest.raises(DataError, match=expected):
        opened(tmp_path, "parquet", max_document_bytes=4999, **spec)
    opened(tmp_path, "parquet", max_document_bytes=5000, **spec)
    (tmp_path / "b.txt").write_text("y" * 300)
    with pytest.raises(DataError, match=r"b\.txt: has 300 bytes, more than data.max_document_bytes=100"):
        opened(tmp_path / "b.txt", "text", document="file", max_document_bytes=100, **spec)


def test_nulls_and_empty_row_groups(tmp_path: Path) -> None:
    with pq.ParquetWriter(tmp_path / "a.parquet", pa.schema([("text", pa.string())])) as writer:
        for texts in (TEXTS[:5], [], [None, None], TEXTS[5:9]):
            writer.write_table(pa.table({"text": pa.array(texts, pa.string())}))
    for packing in ("concatenate", "best_fit"):
        source = opened(tmp_path, "parquet", text_column="text", sequence_length=8, packing=packing)
        assert source.describe()["tokens"] == len(tokens_of([*TEXTS[:5], None, None, *TEXTS[5:9]]))
        assert source.describe()["null_documents"] == 2
    (tmp_path / "n.csv").write_text("x,y\n1,1\n,2\n3,3\n4,4\n5,5\n")
    reader = LaneReader(opened(tmp_path / "n.csv", "csv"))
    with pytest.raises(DataError, match=r"column 'x': 1 null value"):
        reader.batch(0, 0)


def test_a_shard_whose_samples_differ(tmp_path: Path) -> None:
    write(tmp_path, "tar")
    with pytest.raises(DataError, match=r"0\.tar: sample 'part.a/0000' has no file part.a/0000.jpg; it has"):
        opened(tmp_path, "webdataset", columns=("jpg",))
    with pytest.raises(DataError, match=r"column 'text.txt' has type string; expected numbers"):
        opened(tmp_path, "webdataset")


def test_a_dictionary_in_an_arrow_file_is_refused(tmp_path: Path) -> None:
    table = pa.table({"text": pa.array(["a", "b"] * 9).dictionary_encode()})
    write_arrow_file(tmp_path / "a.arrow", table)
    with pytest.raises(DataError, match=r"a\.arrow: column 'text' is dictionary-encoded .*Cast it to its values"):
        opened(tmp_path, "arrow", text_column="text", sequence_length=2)


def test_a_cache_that_cannot_hold_what_is_unpacked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(b'{"x": 1}\n' * 9))
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(DataError, match=r"a\.jsonl\.gz: compressed, and its content cannot be stored in"):
        opened(tmp_path / "a.jsonl.gz", "jsonl")


def test_a_tokenizer_that_gives_other_tokens_than_its_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As another version of a tokenizer's library does: the index says what a run began with."""
    write(tmp_path, "parquet")
    spec: dict[str, Any] = {"text_column": "text", "sequence_length": 8}
    opened(tmp_path, "parquet", **spec)
    original = tokenizers._one_array

    def other(documents: Any) -> Any:
        return pc.replace_substring(original(documents).cast(pa.large_string()), "e", "E").cast(pa.large_binary())

    monkeypatch.setattr(tokenizers, "_one_array", other)
    source: Source = opened(tmp_path, "parquet", **spec)  # the index is from the cache
    with pytest.raises(DataError, match=r"row group 0: its text is not .*, or the tokenizer gives other tokens"):
        source.read_block(0)
    assert open_source(Data(kind="parquet", path=str(tmp_path), columns=("x",)), seed=0, lanes=1, lane_batch_size=1)
