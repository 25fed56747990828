"""`elastictrain data prepare` without Ray: what is written, and that it does not depend on how."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import elastictrain as et
from elastictrain.data import LaneReader, open_data
from elastictrain.data.preparing.driver import in_this_process, prepare_data
from elastictrain.data.tokenizers import BytesTokenizer
from elastictrain.errors import DataError
from tests.support.preparing import (
    DIFFERENT,
    DOCUMENTS,
    Interrupted,
    StopsAfter,
    backwards,
    bytes_in,
    rows_in,
    settings_for,
    text_of,
    write_input,
)

HERE = "tests.support.preparing"


def test_every_row_is_written_once_in_another_order(tmp_path: Path) -> None:
    settings = settings_for(write_input(tmp_path / "in"), tmp_path / "out")
    index = prepare_data(settings)
    rows = rows_in(tmp_path / "out")
    assert sorted(row["n"] for row in rows) == list(range(DOCUMENTS))
    assert all(row["text"] == text_of(row["n"]) for row in rows)
    order = [row["n"] for row in rows]
    assert order != sorted(order)
    # Uniformly shuffled: neighbours are a third of the rows apart in the mean, with 3 % of standard error.
    assert 0.27 < np.abs(np.diff(order)).mean() / DOCUMENTS < 0.40
    assert index["counts"]["read"] == index["counts"]["rows"] == DOCUMENTS
    assert len(index["files"]) > 3
    assert len(index["plan"]["parts"]) > 3
    assert not (tmp_path / "out" / "_work").exists()
    assert json.loads((tmp_path / "out" / "_index.json").read_text()) == index
    assert [file["name"] for file in index["files"]] == sorted(p.name for p in (tmp_path / "out").glob("*.parquet"))


def test_the_seed_decides_the_order_and_the_size_of_parts_does_not(tmp_path: Path) -> None:
    source = write_input(tmp_path / "in")
    orders = []
    for number, more in enumerate(({}, {"part_bytes": 700}, {"part_bytes": 1 << 20}, {"batch_rows": 3}, {"seed": 6})):
        prepare_data(settings_for(source, tmp_path / str(number), **more))
        orders.append([row["n"] for row in rows_in(tmp_path / str(number))])
    assert orders[0] == orders[1] == orders[2] == orders[3] != orders[4]


@pytest.mark.parametrize("deduplicate", ["no", "exact"])
def test_the_same_bytes_whatever_the_order_of_the_work(tmp_path: Path, deduplicate: str) -> None:
    source, out = write_input(tmp_path / "in"), tmp_path / "out"
    settings = settings_for(source, out, deduplicate=deduplicate, tokenizer="bytes")
    prepare_data(settings)
    out.rename(tmp_path / "first")
    prepare_data(settings, backwards)
    assert bytes_in(out) == bytes_in(tmp_path / "first")


def test_interrupted_after_any_unit_and_taken_up_it_writes_the_same_bytes(tmp_path: Path) -> None:
    source, out = write_input(tmp_path / "in"), tmp_path / "out"
    settings = settings_for(source, out, deduplicate="exact", map=f"{HERE}:lower", part_bytes=4000, file_bytes=6000)
    index = prepare_data(settings)
    out.rename(tmp_path / "undisturbed")
    units = len(index["plan"]["parts"]) + len(index["files"])
    assert units > 5
    for after in range(units):
        with pytest.raises(Interrupted):
            prepare_data(settings, StopsAfter(after))
        done: list[int] = []

        def counting(new_maker: Any, numbers: Any, done: list[int] = done) -> Any:
            done.extend(numbers)
            return in_this_process(new_maker, numbers)

        assert prepare_data(settings, counting, resume=True)["digest"] == index["digest"]
        assert len(done) == units - after, "only what was unfinished is done"
        assert bytes_in(out) == bytes_in(tmp_path / "undisturbed")
        out.rename(tmp_path / f"after-{after}")


def test_a_finished_preparation_taken_up_is_left_as_it_is(tmp_path: Path) -> None:
    settings = settings_for(write_input(tmp_path / "in"), tmp_path / "out")
    index = prepare_data(settings)
    before = bytes_in(tmp_path / "out")

    def nothing(*_: Any) -> Any:
        raise AssertionError("there is nothing to do")

    assert prepare_data(settings, nothing, resume=True) == index
    assert bytes_in(tmp_path / "out") == before


def test_what_was_lost_since_is_made_again(tmp_path: Path) -> None:
    settings = settings_for(write_input(tmp_path / "in"), tmp_path / "out")
    index = prepare_data(settings)
    (tmp_path / "out").rename(tmp_path / "undisturbed")
    parts = len(index["plan"]["parts"])
    with pytest.raises(Interrupted):
        prepare_data(settings, StopsAfter(parts + 2))
    next((tmp_path / "out" / "_work").glob("*.run")).unlink()
    (tmp_path / "out" / "part-000001.parquet").write_bytes(b"cut short")
    prepare_data(settings, resume=True)
    assert bytes_in(tmp_path / "out") == bytes_in(tmp_path / "undisturbed")


def test_a_damaged_run_is_an_error_that_says_what_to_do(tmp_path: Path) -> None:
    settings = settings_for(write_input(tmp_path / "in"), tmp_path / "out")
    parts = prepare_data(settings.model_copy(update={"out": str(tmp_path / "plan")}))["plan"]["parts"]
    with pytest.raises(Interrupted):
        prepare_data(settings, StopsAfter(len(parts)))
    run = sorted((tmp_path / "out" / "_work").glob("*.run"))[0]
    content = bytearray(run.read_bytes())
    content[-20] ^= 1
    run.write_bytes(content)
    with pytest.raises(
        DataError, match=r"\.run: an intermediate file is missing or damaged \(slot \d+ differs from"
    ) as e:
        prepare_data(settings, resume=True)
    record = re.search(r"Remove the record of its part \((\S+)\)", str(e.value))
    assert record is not None
    (tmp_path / "out" / record[1]).unlink()
    prepare_data(settings, resume=True)
    assert sorted(row["n"] for row in rows_in(tmp_path / "out")) == list(range(DOCUMENTS))


def test_a_part_that_two_tasks_make_is_there_once(tmp_path: Path) -> None:
    """Ray begins a unit again that it believes to be lost: its first task may still be at work."""

    def each_twice(new_maker: Any, numbers: Any) -> Any:
        one, other = new_maker(), new_maker()
        for number in numbers:
            first = one.make(number)
            assert other.make(number) == first
            yield first

    settings = settings_for(write_input(tmp_path / "in"), tmp_path / "a", deduplicate="exact")
    prepare_data(settings, each_twice)
    prepare_data(settings.model_copy(update={"out": str(tmp_path / "b")}))
    assert bytes_in(tmp_path / "a") == bytes_in(tmp_path / "b")


def test_of_equal_documents_the_first_one_stays(tmp_path: Path) -> None:
    settings = settings_for(write_input(tmp_path / "in"), tmp_path / "out", deduplicate="exact")
    index = prepare_data(settings)
    rows = rows_in(tmp_path / "out")
    assert sorted(row["n"] for row in rows) == list(range(DIFFERENT))
    assert index["counts"]["duplicates"] == DOCUMENTS - DIFFERENT


def test_what_map_makes_equal_is_one_document(tmp_path: Path) -> None:
    source = tmp_path / "in"
    source.mkdir()
    pq.write_table(pa.table({"text": ["A", "a", None, "", "b"], "n": [0, 1, 2, 3, 4]}), source / "a.parquet")
    prepare_data(settings_for(source, tmp_path / "out", deduplicate="exact", map=f"{HERE}:lower"))
    assert sorted(row["n"] for row in rows_in(tmp_path / "out")) == [0, 2, 4], "a null counts as an empty text"


def test_filters_and_maps_that_make_more_rows(tmp_path: Path) -> None:
    source = write_input(tmp_path / "in")
    index = prepare_data(settings_for(source, tmp_path / "a", filter=f"{HERE}:even", map=f"{HERE}:twice"))
    found = [row["n"] for row in rows_in(tmp_path / "a")]
    assert sorted(found) == sorted([*range(0, DOCUMENTS, 2)] * 2)
    assert index["counts"] | {"bytes": 0} == {
        "read": DOCUMENTS, "filtered": DOCUMENTS, "duplicates": 0, "rows": DOCUMENTS, "tokens": None, "bytes": 0,
    }  # fmt: skip
    prepare_data(settings_for(source, tmp_path / "b", filter=f"{HERE}:DropsThrees"))
    assert sorted(row["n"] for row in rows_in(tmp_path / "b")) == [n for n in range(DOCUMENTS) if n % 3]


def test_without_a_shuffle_the_order_stays(tmp_path: Path) -> None:
    settings = settings_for(write_input(tmp_path / "in"), tmp_path / "out", shuffle="none", filter=f"{HERE}:even")
    assert len(prepare_data(settings)["files"]) > 1
    assert [row["n"] for row in rows_in(tmp_path / "out")] == list(range(0, DOCUMENTS, 2))


def test_tokens_are_those_of_the_tokenizer_and_can_be_trained_on(tmp_path: Path) -> None:
    source, out = write_input(tmp_path / "in"), tmp_path / "out"
    prepare_data(settings_for(source, out, tokenizer="bytes"))
    rows = rows_in(out)
    assert set(rows[0]) == {"tokens", "n"}
    for row in rows:
        assert row["tokens"] == [*text_of(row["n"]).encode(), 256]
    raw = tmp_path / "raw"
    raw.mkdir()
    for path in sorted(out.glob("*.parquet")):  # the same documents in the same row groups, as text
        table = pq.read_table(path)
        texts = pa.array([text_of(n) for n in table.column("n").to_pylist()])
        size = pq.ParquetFile(path).metadata.row_group(0).num_rows
        pq.write_table(pa.table({"text": texts}), raw / path.name, row_group_size=size)
    common = {"sequence_length": 32, "packing": "best_fit"}
    tokenised = et.data.parquet(str(out), text_column="tokens", tokenizer=str(out / "_tokenizer.json"), **common)
    with_text = et.data.parquet(str(raw), text_column="text", **common)
    readers = [LaneReader(open_data(d, seed=1, lanes=2, lane_batch_size=3)) for d in (tokenised, with_text)]
    for step in range(readers[0].source.steps_per_epoch):
        for lane in range(2):
            one, other = (reader.batch(step, lane) for reader in readers)
            assert one.keys() == other.keys()
            assert all(np.array_equal(one[name], other[name]) for name in one)


def test_tokens_of_another_tokenizer_are_refused(tmp_path: Path) -> None:
    out = tmp_path / "out"
    prepare_data(settings_for(write_input(tmp_path / "in"), out, tokenizer="bytes"))
    path = out / "_tokenizer.json"
    right = json.loads(path.read_text())

    def opened(tokenizer: str = str(path)) -> None:
        data = et.data.parquet(str(out), text_column="tokens", tokenizer=tokenizer, sequence_length=32)
        open_data(data, seed=1, lanes=2, lane_batch_size=3).close()

    path.write_text(json.dumps(right | {"end_of_document": 7}))
    with pytest.raises(DataError, match=r"a document does not end with token 7; data\.tokenizer \S+ is not the one"):
        opened()
    path.write_text(json.dumps(right | {"vocabulary_size": 100, "end_of_document": 256}))
    with pytest.raises(DataError, match=r"tokens from 32 to 256, but data\.tokenizer \S+ has 100"):
        opened()
    path.write_text(json.dumps({"elastictrain_tokens": 1}))
    with pytest.raises(DataError, match=r"is damaged \(KeyError\('vocabulary_size'\)\); prepare the data again"):
        opened()
    with pytest.raises(
        DataError, match=r"the documents are tokens already \(.*\), and data\.tokenizer is bytes; set it"
    ):
        opened("bytes")
    path.write_text(json.dumps(right))
    data = et.data.parquet(str(tmp_path / "in"), text_column="text", tokenizer=str(path), sequence_length=32)
    with pytest.raises(
        DataError, match=r"data\.text_column has type string, and data\.tokenizer \S+ says that it holds"
    ):
        open_data(data, seed=1, lanes=2, lane_batch_size=3)


def test_sizes_of_row_groups_and_files(tmp_path: Path) -> None:
    prepare_data(settings_for(write_input(tmp_path / "in"), tmp_path / "out", file_bytes=4000, row_group_bytes=1000))
    for path in (tmp_path / "out").glob("*.parquet"):
        file = pq.ParquetFile(path)
        assert pq.read_table(path).nbytes <= 4200
        rows = [file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)]
        assert max(rows[:-1], default=rows[0]) == min(rows[:-1], default=rows[0]) >= rows[-1]
        assert all(file.read_row_group(group).nbytes < 1500 for group in range(file.num_row_groups))


def test_files_are_told_in_order_as_soon_as_all_before_them_are_there(tmp_path: Path) -> None:
    told: list[str] = []
    settings = settings_for(write_input(tmp_path / "in"), tmp_path / "out")
    there_when_told: list[bool] = []

    def finished(record: dict[str, Any]) -> None:
        told.append(record["name"])
        there_when_told.append((tmp_path / "out" / record["name"]).stat().st_size == record["bytes"])

    index = prepare_data(settings, backwards, finished=finished)
    assert told == [file["name"] for file in index["files"]]
    assert all(there_when_told)
    first: list[str] = []
    prepare_data(
        settings.model_copy(update={"out": str(tmp_path / "b")}), finished=lambda record: first.append(record["name"])
    )
    assert first == told


def test_memory_is_given_up_in_runs_when_a_part_grows(tmp_path: Path) -> None:
    """A part whose rows take more than `part_bytes` in memory has several runs, and the same rows come out."""
    source = write_input(tmp_path / "in")
    settings = settings_for(source, tmp_path / "a", part_bytes=1000, map=f"{HERE}:twice")
    with pytest.raises(Interrupted):
        prepare_data(settings, StopsAfter(1))
    record = json.loads((tmp_path / "a" / "_work" / "part-000000.json").read_text())
    assert len(record["runs"]) > 1
    prepare_data(settings, resume=True)
    prepare_data(settings_for(source, tmp_path / "b", part_bytes=1 << 20, map=f"{HERE}:twice"))
    assert rows_in(tmp_path / "a") == rows_in(tmp_path / "b")


def test_rows_of_a_table_are_prepared_too(tmp_path: Path) -> None:
    source = tmp_path / "in"
    source.mkdir()
    pq.write_table(pa.table({"x": np.arange(50.0), "tag": ["a", "b"] * 25}), source / "a.parquet", row_group_size=10)
    settings = settings_for(source, tmp_path / "out", text_column=None, columns=None)
    prepare_data(settings)
    rows = rows_in(tmp_path / "out")
    assert sorted(row["x"] for row in rows) == list(range(50))
    assert all(row["tag"] == "ab"[int(row["x"]) % 2] for row in rows)


def test_dictionaries_become_their_values(tmp_path: Path) -> None:
    source = tmp_path / "in"
    source.mkdir()
    texts = pa.array(["b", "a", "b", None]).dictionary_encode()
    pq.write_table(pa.table({"text": texts, "n": range(4)}), source / "a.parquet")
    prepare_data(settings_for(source, tmp_path / "out", tokenizer="bytes"))
    found = {row["n"]: row["tokens"] for row in rows_in(tmp_path / "out")}
    assert found == {0: [98, 256], 1: [97, 256], 2: [98, 256], 3: [256]}
    assert BytesTokenizer.end_of_document == 256


_IN_A_PROCESS_OF_ITS_OWN = """
import sys
import pyarrow as pa
from elastictrain.data.preparing.driver import prepare_data
from elastictrain.prepare_settings import parse_preparation

before = pa.default_memory_pool().max_memory()
index = prepare_data(parse_preparation({
    "kind": "parquet", "path": sys.argv[1], "out": sys.argv[2], "text_column": "text", "tokenizer": "bytes",
    "deduplicate": "exact", "file_bytes": 8 << 20, "part_bytes": 8 << 20, "row_group_bytes": 1 << 19, "batch_rows": 64,
}))
print(pa.default_memory_pool().max_memory() - before, len(index["plan"]["parts"]), len(index["files"]))
"""


def test_memory_goes_with_the_size_of_parts_and_files_and_not_with_that_of_the_data(tmp_path: Path) -> None:
    source = tmp_path / "in"
    source.mkdir()
    rng = np.random.default_rng(1)
    for number in range(3):
        letters = rng.integers(97, 123, size=16 << 20, dtype=np.uint8)
        offsets = np.arange(0, (16 << 20) + 1, 4 << 10, dtype=np.int32)
        texts = pa.StringArray.from_buffers(len(offsets) - 1, pa.py_buffer(offsets), pa.py_buffer(letters))
        pq.write_table(pa.table({"text": texts}), source / f"{number}.parquet", row_group_size=256)
    command = [sys.executable, "-c", _IN_A_PROCESS_OF_ITS_OWN, str(source), str(tmp_path / "out")]
    said = subprocess.run(command, capture_output=True, text=True, check=True, timeout=100).stdout.split()
    peak_bytes, parts, files = map(int, said)
    assert parts >= 6
    assert files > 10, "two bytes a token"
    # A part or a file, once more in order, and what is compressed of it.
    assert peak_bytes < 5 * (8 << 20), f"{peak_bytes / (8 << 20):.1f} times the size of a part"
