"""`elastictrain data prepare` with near-duplicates: which documents stay, and that it does not depend on how."""

from __future__ import annotations

import json
import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from elastictrain.data.preparing.driver import NewFileMaker, NewPairMaker, in_this_process, prepare_data
from elastictrain.data.segments import SegmentLog
from elastictrain.errors import ConfigError, DataError
from elastictrain.prepare_settings import Preparation
from tests.support.preparing import Interrupted, StopsAfter, backwards, bytes_in, rows_in, settings_for

FAMILIES, EACH = 20, 6
WORDS = 80


def document(family: int, member: int) -> str:
    """Members of a family differ in one word of eighty (a Jaccard similarity of 0.88 and more of runs of five)."""
    words = [f"w{number}" for number in np.random.default_rng(family).integers(0, 10**6, WORDS)]
    if member:
        words[(member * 13) % WORDS] = f"changed{member}"
    return " ".join(words)


def write_families(folder: Path) -> Path:
    """Row `n` is member `n // FAMILIES` of family `n % FAMILIES`; then documents without words, which are no family."""
    folder.mkdir()
    texts: list[str | None] = [document(n % FAMILIES, n // FAMILIES) for n in range(FAMILIES * EACH)]
    texts += ["", "  ", None, ""]
    table = pa.table({"text": pa.array(texts), "n": list(range(len(texts)))})
    for file, first in enumerate(range(0, len(texts), 50)):
        pq.write_table(table.slice(first, 50), folder / f"{file}.parquet", row_group_size=10)
    return folder


EXPECTED = [*range(FAMILIES), *range(FAMILIES * EACH, FAMILIES * EACH + 4)]


def near_settings(path: Path, out: Path, **more: Any) -> Preparation:
    return settings_for(
        path, out, **{"near_duplicates": {"threshold": 0.5}, "part_bytes": 4000, "file_bytes": 20_000, **more}
    )


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_families(tmp_path / "in")


def test_of_documents_that_are_nearly_the_same_the_first_one_stays(tmp_path: Path, source: Path) -> None:
    index = prepare_data(near_settings(source, tmp_path / "out"))
    rows = rows_in(tmp_path / "out")
    assert sorted(row["n"] for row in rows) == EXPECTED
    assert [row["n"] for row in rows] != EXPECTED
    assert index["counts"]["near_duplicates"] == FAMILIES * (EACH - 1)
    assert index["counts"]["duplicates"] == 0
    assert index["counts"]["rows"] == len(EXPECTED)
    assert len(index["plan"]["parts"]) > 5
    assert not (tmp_path / "out" / "_work").exists()
    strict = prepare_data(near_settings(source, tmp_path / "strict", near_duplicates={"threshold": 0.99, "ngram": 20}))
    assert strict["counts"]["near_duplicates"] < FAMILIES
    without = prepare_data(near_settings(source, tmp_path / "without", near_duplicates=None))
    assert without["counts"].keys() == index["counts"].keys() - {"near_duplicates"}
    assert without["counts"]["rows"] == FAMILIES * EACH + 4


@pytest.mark.parametrize(
    "more",
    [{"part_bytes": 1500}, {"part_bytes": 1 << 20}, {"file_bytes": 1 << 20}, {"batch_rows": 3}, {"seed": 9},
     {"shuffle": "none"}, {"deduplicate": "exact"}, {"tokenizer": "bytes"}],
)  # fmt: skip
def test_which_ones_stay_does_not_depend_on_how_it_is_done(tmp_path: Path, source: Path, more: dict[str, Any]) -> None:
    index = prepare_data(near_settings(source, tmp_path / "out", **more))
    equal = 3 if more.get("deduplicate") else 0  # of the four without words one stays then, or two: "" and "  "
    kept = sorted(row["n"] for row in rows_in(tmp_path / "out"))
    assert kept[:FAMILIES] == EXPECTED[:FAMILIES]
    assert len(kept) == len(EXPECTED) - (index["counts"]["duplicates"] if equal else 0)
    assert index["counts"]["near_duplicates"] == FAMILIES * (EACH - 1)


def test_the_same_bytes_whatever_the_order_of_the_work_and_wherever_it_is_interrupted(
    tmp_path: Path, source: Path
) -> None:
    settings = near_settings(source, tmp_path / "a")
    units = []

    def counting(new_maker: Any, numbers: Sequence[int]) -> Any:
        for record in in_this_process(new_maker, numbers):
            units.append(record)
            yield record

    prepare_data(settings, counting)
    wanted = bytes_in(tmp_path / "a")
    assert any("pairs" in unit for unit in units)
    prepare_data(settings.model_copy(update={"out": str(tmp_path / "b")}), backwards)
    assert bytes_in(tmp_path / "b") == wanted
    torn = settings.model_copy(update={"out": str(tmp_path / "c")})
    interrupted = 0
    for _ in range(len(units)):
        try:
            prepare_data(torn, StopsAfter(1), resume=True)
            break
        except Interrupted:
            interrupted += 1
    prepare_data(torn, resume=True)
    assert interrupted > len(units) // 2
    assert bytes_in(tmp_path / "c") == wanted


def stopped_before_files(settings: Preparation) -> Path:
    """Everything is there but the files; the folder of the work."""

    def without_files(new_maker: Any, numbers: Sequence[int]) -> Any:
        if isinstance(new_maker, NewFileMaker):
            raise Interrupted
        yield from in_this_process(new_maker, numbers)

    with pytest.raises(Interrupted):
        prepare_data(settings, without_files)
    return Path(settings.out) / "_work"


@pytest.mark.parametrize("what", ["gone", "pairs", "near", "cut gone", "cut pairs"])
def test_what_was_lost_since_is_made_again(tmp_path: Path, source: Path, what: str) -> None:
    settings = near_settings(source, tmp_path / "out")
    prepare_data(settings.model_copy(update={"out": str(tmp_path / "whole")}))
    work = stopped_before_files(settings)
    pattern = {"gone": "gone-*.u64", "pairs": "pairs-*.u64", "near": "part-000001-*.near"}[what.removeprefix("cut ")]
    (file, *_) = sorted(work.glob(pattern))
    if what != "gone" and "gone" not in what:  # whoever needs it finds that it is not there
        (work / "gone-000000.json").unlink()
    if what == "near":
        for record in work.glob("pairs-*.json"):
            record.unlink()
    if what.startswith("cut"):
        file.write_bytes(file.read_bytes()[:-8] if file.stat().st_size else b"12345678")
    else:
        file.unlink()
    prepare_data(settings, resume=True)
    assert bytes_in(tmp_path / "out") == bytes_in(tmp_path / "whole")


def test_what_is_damaged_is_an_error_that_says_what_to_do(tmp_path: Path, source: Path) -> None:
    settings = near_settings(source, tmp_path / "out")
    work = stopped_before_files(settings)
    (file,) = work.glob("gone-*.u64")
    content = file.read_bytes()
    file.write_bytes(bytes([content[0] ^ 1]) + content[1:])
    with pytest.raises(
        DataError, match=r"gone-.*\.u64: an intermediate file is missing or damaged .*_work/gone\*\.json"
    ):
        prepare_data(settings, resume=True)
    (work / "gone-000000.json").unlink()
    index = prepare_data(settings, resume=True)
    assert index["counts"]["near_duplicates"] == FAMILIES * (EACH - 1)


def test_a_file_that_loses_all_its_rows_is_not_there(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    texts = [document(0, n % 5) for n in range(40)] + [document(1, 0)]
    pq.write_table(pa.table({"text": texts, "n": list(range(41))}), tmp_path / "in" / "a.parquet", row_group_size=5)
    told: list[str] = []
    settings = near_settings(tmp_path / "in", tmp_path / "out", file_bytes=3000, segments=True)
    index = prepare_data(settings, finished=lambda record: told.append(record["name"]))
    assert sorted(row["n"] for row in rows_in(tmp_path / "out")) == [0, 40]
    assert 1 <= len(index["files"]) <= 2
    names = [file["name"] for file in index["files"]]
    assert told == names == sorted(path.name for path in (tmp_path / "out").glob("*.parquet"))
    assert [segment.name for segment in SegmentLog(tmp_path / "out").segments()] == names
    assert json.loads((tmp_path / "out" / "_index.json").read_text())["counts"]["rows"] == 2
    assert prepare_data(settings, resume=True) == index


def test_makers_travel(tmp_path: Path, source: Path) -> None:
    seen: list[type] = []

    def travelling(new_maker: Any, numbers: Sequence[int]) -> Any:
        seen.append(type(new_maker))
        yield from in_this_process(pickle.loads(pickle.dumps(new_maker)), numbers)

    prepare_data(near_settings(source, tmp_path / "out"), travelling)
    assert NewPairMaker in seen
    assert sorted(row["n"] for row in rows_in(tmp_path / "out")) == EXPECTED


def test_dictionaries_are_texts_too(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    texts = pa.array([document(n % 2, n // 2) for n in range(8)]).dictionary_encode()
    pq.write_table(pa.table({"text": texts, "n": list(range(8))}), tmp_path / "in" / "a.parquet")
    prepare_data(near_settings(tmp_path / "in", tmp_path / "out"))
    assert sorted(row["n"] for row in rows_in(tmp_path / "out")) == [0, 1]


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"text_column": None, "near_duplicates": {}}, "near_duplicates is about documents; set text_column"),
        ({"near_duplicates": {"threshold": 1.0}}, r"near_duplicates\.threshold"),
        ({"near_duplicates": {"threshold": 0}}, r"near_duplicates\.threshold"),
        ({"near_duplicates": {"ngram": 0}}, r"near_duplicates\.ngram"),
        ({"near_duplicates": {"permutations": 513}}, r"near_duplicates\.permutations"),
        ({"near_duplicates": True}, "near_duplicates"),
    ],
)
def test_settings_that_cannot_be(tmp_path: Path, more: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        settings_for(tmp_path, tmp_path / "out", **more)


def test_other_settings_are_another_preparation(tmp_path: Path, source: Path) -> None:
    settings = near_settings(source, tmp_path / "out")
    stopped_before_files(settings)
    with pytest.raises(ConfigError, match=r"near_duplicates was \{.*0\.5.*\} and is now \{.*0\.8"):
        prepare_data(near_settings(source, tmp_path / "out", near_duplicates={"threshold": 0.8}), resume=True)
