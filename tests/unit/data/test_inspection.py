"""What `data inspect` finds, what it advises, and what it draws."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

import elastictrain as et
from elastictrain.cli import app
from elastictrain.data.inspection import (
    BLOCKS_READ,
    Inspection,
    Sizes,
    Texts,
    advice,
    estimate,
    histogram,
    inspect_data,
    mixing_of,
    quantiles,
)
from elastictrain.data.order import LaneOrder
from elastictrain.data.quality import mixing
from elastictrain.errors import DataError
from elastictrain.job import Job, dump_job, parse_job

LENGTHS = [3, 0, 40, 7]


def write(folder: Path, name: str = "a.parquet", group: int = 2, **columns: Any) -> str:
    folder.mkdir(exist_ok=True)
    columns = columns or {"text": ["x" * n for n in LENGTHS], "id": [1, 2, 3, 4]}
    pq.write_table(pa.table(columns), folder / name, row_group_size=group)
    return str(folder)


def job_of(path: str, **changes: Any) -> Job:
    data = {"kind": "parquet", "path": path, "text_column": "text", "sequence_length": 10}
    return parse_job({"recipe": "a:B", "data": data, "lanes": 2, "steps": 6} | changes)


def facts(**changes: Any) -> Inspection:
    texts = Texts("text", "bytes", True, 1100, 100, 0, 0, 50.0, np.full(100, 10))
    plain = Inspection("parquet", 1, 10, 100, 64, (), Sizes(1, 2, 3), Sizes(1 << 21, 1 << 24, 1 << 25), texts, ())
    return dataclasses.replace(plain, **changes)


def test_all_of_small_data_is_read(tmp_path: Path) -> None:
    found = inspect_data(write(tmp_path / "d"))
    assert (found.kind, found.files, found.rows, found.blocks) == ("parquet", 1, 4, 2)
    assert found.schema == (("text", "string"), ("id", "int64"))
    assert found.block_rows == Sizes(2, 2, 2)
    assert found.texts is not None
    assert found.texts.lengths.tolist() == LENGTHS
    assert (found.texts.tokens, found.texts.is_whole, found.texts.documents_read) == (54, True, 4)
    assert (found.texts.nulls, found.texts.empty) == (0, 1)
    assert len(found.samples) == 2
    assert json.loads(json.dumps(found.as_json()))["texts"]["lengths"]["max"] == 40


def test_of_many_row_groups_some_are_read_and_tokens_are_an_estimate(tmp_path: Path) -> None:
    texts = ["y" * 9] * (3 * BLOCKS_READ)
    path = write(tmp_path / "d", group=1, text=texts)
    part, whole = inspect_data(path), inspect_data(path, everything=True)
    assert part.texts is not None
    assert whole.texts is not None
    assert (part.texts.documents_read, part.texts.is_whole) == (BLOCKS_READ, False)
    assert (whole.texts.documents_read, whole.texts.is_whole) == (len(texts), True)
    assert part.texts.tokens == whole.texts.tokens == 10 * len(texts)


def test_json_lines_and_tables_and_the_column_that_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"body": "ab", "note": "abcd"}\n{"body": null, "note": "x"}\n')
    found = inspect_data(str(tmp_path / "a.jsonl"))
    assert found.texts is not None
    assert (found.texts.column, found.texts.nulls, found.texts.empty) == ("body", 1, 0)
    other = inspect_data(str(tmp_path / "a.jsonl"), text_column="note")
    assert other.texts is not None
    assert other.texts.lengths.tolist() == [4, 1]
    table = inspect_data(write(tmp_path / "t", x=[1.0, 2.0], y=[1, 2]))
    assert (table.texts, table.samples, table.rows) == (None, (), 2)


def test_a_job_says_how_its_files_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "lines").mkdir()
    (tmp_path / "lines" / "a.jsonl").write_text('{"text": "words"}\n' * 20 + "broken\n" + '{"text": "words"}\n' * 4)
    spec = et.data.jsonl(
        str(tmp_path / "lines"), text_column="text", sequence_length=8, rows_per_block=5, on_corrupt="skip"
    )
    found = inspect_data(spec.path, kind="jsonl", text_column="text", settings=spec)
    assert (found.rows, found.blocks, found.block_rows.most) == (20, 5, 5)
    (tmp_path / "files").mkdir()
    for number in range(3):
        (tmp_path / "files" / f"{number}.txt").write_text("a line\n" * 7)
    whole = et.data.text(str(tmp_path / "files"), sequence_length=8, document="file")
    assert inspect_data(whole.path, kind="text", text_column="text", settings=whole).rows == 3
    monkeypatch.chdir(tmp_path)
    job = job_of(str(tmp_path / "lines"), lanes=1, steps=4).model_copy(update={"data": spec})
    (tmp_path / "job.yaml").write_text(dump_job(job))
    record = json.loads(CliRunner().invoke(app, ["data", "inspect", "job.yaml", "--json"]).output)
    assert (record["rows"], record["blocks"]) == (20, 5)


def test_what_cannot_be_inspected_says_why(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no column .txt. .did you mean .text."):
        inspect_data(write(tmp_path / "d"), text_column="txt")
    (tmp_path / "d" / "b.jsonl").write_text("{}\n")
    with pytest.raises(DataError, match=r"several formats .*choose one with --kind"):
        inspect_data(str(tmp_path / "d"))
    assert inspect_data(str(tmp_path / "d"), kind="parquet").files == 1
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="holds no file"):
        inspect_data(str(tmp_path / "empty"))


def test_the_estimate() -> None:
    told = estimate(facts(), job_of("x"), tokens_per_s=4.0)
    assert (told.samples, told.steps_per_epoch, told.tokens) == (100, 50, 120)
    assert (told.epochs, told.read_s, told.train_s) == (0.12, 2.4, 30.0)
    table = estimate(facts(texts=None), job_of("x", data={"kind": "parquet", "path": "x"}))
    assert (table.samples, table.tokens, table.read_s, table.train_s) == (100, 0, None, None)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"block_bytes": Sizes(1 << 25, 1 << 25, 1 << 30)}, "takes 1024 MiB decoded, and a lane holds 2"),
        ({"block_bytes": Sizes(10, 1 << 18, 1 << 21)}, "half of the row groups are below 1 MiB"),
        ({"files": 20_000}, "20000 files"),
        ({"block_rows": Sizes(0, 2, 3)}, "some of the row groups are empty"),
        ({"blocks": 3}, "3 row groups for 2 lanes with windows of 2: .* have at least 4"),
        ({"texts": Texts("t", "bytes", True, 12, 4, 1, 2, 1.0, np.full(4, 9))}, "1 of 4 documents are null"),
        ({"texts": Texts("t", "bytes", True, 12, 4, 1, 2, 1.0, np.full(4, 9))}, "2 of 4 documents are empty"),
        ({"texts": Texts("t", "bytes", True, 900, 4, 0, 0, 1.0, np.full(99, 1))}, "100% of the documents are shorter"),
        (
            {"texts": Texts("t", "bytes", True, 12, 4, 0, 0, 1.0, np.full(4, 9))},
            "1 samples are fewer than a step",
        ),
    ],
)
def test_advice(changes: dict[str, Any], words: str) -> None:
    assert advice(facts(), job_of("x")) == []
    assert re.search(words, "\n".join(advice(facts(**changes), job_of("x"))))


def test_how_well_a_job_mixes_is_shown_with_what_is_good(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = write(tmp_path / "d", group=10, n=list(range(2000)))
    table = {"kind": "parquet", "path": path}

    def record(*arguments: str, **changes: Any) -> str:
        job = job_of(path, **{"data": table, "lanes": 2, "lane_batch_size": 32} | changes)
        (tmp_path / "job.yaml").write_text(dump_job(job))
        return CliRunner().invoke(app, ["data", "inspect", "job.yaml", *arguments]).output

    shown = json.loads(record("--json"))["mixing"]
    order = LaneOrder([10] * 200, seed=job_of(path).seed, lanes=2, lane_batch_size=32)
    assert shown == {"quality": mixing(order).quality, **dataclasses.asdict(mixing(order))}
    assert shown["quality"] < 0.5
    little = " ".join(record().split())
    assert f"mixing {shown['quality']:.2f} of a full shuffle" in little
    assert "1 is best, 0.5 or more is good). It is little: raise data.window_row_groups" in little
    assert "is good). It is good" in " ".join(record(data=table | {"window_row_groups": 40}).split())
    assert "mixing" not in record(data=table | {"shuffle": "none"})
    assert "mixing" not in record(lanes=64), "no step is filled"
    assert json.loads(record("--json", data=table | {"shuffle": "none"}))["mixing"] is None


def test_the_mixing_of_text_goes_by_the_sequences_that_its_documents_make() -> None:
    found = facts(rows_of_blocks=np.full(64, 100), rows=6400, texts=dataclasses.replace(facts().texts, tokens=70_400))
    job = job_of("x", lanes=4, lane_batch_size=8)
    order = LaneOrder([100] * 64, seed=job.seed, lanes=4, lane_batch_size=8)  # eleven tokens a document, and a row
    assert mixing_of(found, job) == mixing(order)
    few = dataclasses.replace(found, texts=dataclasses.replace(found.texts, tokens=1408))
    order = LaneOrder([2] * 64, seed=job.seed, lanes=4, lane_batch_size=8)
    assert mixing_of(few, job) == mixing(order) != mixing_of(found, job)


def test_lengths_are_counted_once_each() -> None:
    lengths = np.asarray([0, 1, 1, 5, 900, 123_456])
    edges, counts = histogram(lengths)
    assert counts.sum() == len(lengths)
    assert edges[0] == 1
    assert edges[-1] > lengths.max()
    assert (np.diff(edges) > 0).all()
    assert quantiles(lengths)["p50"] == 3
    assert quantiles(lengths[:0]) == {}
    assert histogram(lengths[:0])[1].sum() == 0


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = write(tmp_path / "d")
    result = CliRunner().invoke(app, ["data", "inspect", path])
    assert result.exit_code == 0, result.output
    for words in ("1 parquet file(s)", "text: string, id: int64", "54 of 'text'", "advice: ", "tokens of a document"):
        assert words in result.output
    (tmp_path / "job.yaml").write_text(dump_job(job_of(path, lanes=1, steps=4)))
    arguments = ["data", "inspect", "job.yaml", "--json", "--tokens-per-s", "2", "--out", "lengths.png"]
    record = json.loads(CliRunner().invoke(app, arguments).output)
    assert record["estimate"] == {"samples": 4, "steps_per_epoch": 4, "epochs": 1.0, "tokens": 40,
                                  "read_s": record["estimate"]["read_s"], "train_s": 20.0}  # fmt: skip
    assert Path(record["picture"]).read_bytes().startswith(b"\x89PNG")
    missing = CliRunner().invoke(app, ["data", "inspect", "nowhere"])
    assert missing.exit_code == 2
    assert "does not exist" in missing.output


def test_the_picture_shows_all_documents_and_the_sequence_length(tmp_path: Path) -> None:
    from elastictrain.errors import ClusterError, ConfigError
    from elastictrain.observe.lengths_plot import draw_lengths, plot_lengths

    lengths = np.asarray([1, 10, 10, 500, 4000])
    panel, share = draw_lengths(lengths, title="a", sequence_length=100).axes
    assert sum(panel.patches[0].get_data().values) == 5
    assert "sequence length 100" in [text.get_text() for text in panel.texts]
    assert share.lines[0].get_ydata()[-1] == 100
    assert len(draw_lengths(lengths, title="a", sequence_length=10**6).axes[0].texts) == 2
    with pytest.raises(ConfigError, match="no documents"):
        plot_lengths(lengths[:0], tmp_path / "a.png", title="a")
    with pytest.raises(ClusterError, match="cannot be written"):
        plot_lengths(lengths, tmp_path / "no" / "a.png", title="a")


def test_every_format_can_be_inspected(tmp_path: Path) -> None:
    import gzip

    import pyarrow.feather as feather

    places = {kind: tmp_path / kind for kind in ("csv", "arrow", "text", "gz")}
    for place in places.values():
        place.mkdir()
    (places["csv"] / "a.csv").write_text("text,n\n" + "".join(f"word {n},{n}\n" for n in range(9)))
    feather.write_feather(
        pa.table({"n": [1, 2, 3], "text": ["a", "bb", "c"]}), places["arrow"] / "a.arrow", compression="uncompressed"
    )
    (places["text"] / "a.txt").write_text("one\ntwo\n")
    (places["gz"] / "a.jsonl.gz").write_bytes(gzip.compress(b'{"text": "ab"}\n{"text": "c"}\n'))
    found = {name: inspect_data(str(place)) for name, place in places.items()}
    assert {name: (one.kind, one.rows) for name, one in found.items()} == {
        "csv": ("csv", 9), "arrow": ("arrow", 3), "text": ("text", 2), "gz": ("jsonl", 2),
    }  # fmt: skip
    assert all(one.texts is not None and one.texts.column == "text" for one in found.values())
    assert found["arrow"].schema == (("n", "int64"), ("text", "string"))
    (places["csv"] / "README.md").write_text("what these are\n")
    assert inspect_data(str(places["csv"])).kind == "csv"
