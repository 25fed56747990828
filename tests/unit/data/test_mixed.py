"""Mixtures of files: exact shares, every row once per epoch of its source, changes that lose and repeat nothing."""

from __future__ import annotations

import json
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from elastictrain.data import LaneReader, MixedSource, Segment, fingerprint_difference, open_data, open_mixture
from elastictrain.data.packed import finish_rows
from elastictrain.errors import ConfigError, DataError
from elastictrain.job import Data, Mixture, dump_job, parse_job
from tests.unit.data.test_source import text_source, write_texts

SIZES = {"a": 90, "b": 40, "c": 12}


@pytest.fixture
def tables(tmp_path: Path) -> Path:
    """Sources a, b, c with rows 0 … in column `x`, the source's number in `who`."""
    for who, (name, size) in enumerate(SIZES.items()):
        (tmp_path / name).mkdir()
        table = pa.table({"x": np.arange(size), "who": np.full(size, who)})
        pq.write_table(table, tmp_path / name / "t.parquet", row_group_size=7)
    return tmp_path


def mixed(tables: Path, *, segments: list[Segment] | None = None, names: str = "abc", **settings: Any) -> MixedSource:
    sources = {name: Data(kind="parquet", path=str(tables / name)) for name in names}
    spec = Mixture(sources=sources, **settings)
    return open_mixture(spec, seed=4, lanes=3, lane_batch_size=4, segments=segments or ())


def drawn(source: MixedSource, steps: range, lane: int) -> list[tuple[str, int]]:
    reader = LaneReader(source)
    rows = []
    for step in steps:
        batch = reader.batch(step, lane)
        assert batch["x"].shape == (4,)
        rows += [("abc"[who], x) for who, x in zip(batch["who"].tolist(), batch["x"].tolist(), strict=True)]
    return rows


def test_shares_are_exact_and_every_row_comes_once_per_epoch_of_its_source(tables: Path) -> None:
    source = mixed(tables, weights={"a": 0.5, "b": 0.3, "c": 0.2})
    per_lane = {name: size // 3 for name, size in SIZES.items()}
    seen: dict[str, list[int]] = {name: [] for name in SIZES}
    for lane in range(3):
        rows = drawn(source, range(50), lane)
        counts = Counter(name for name, _ in rows)
        assert all(abs(counts[name] - 200 * share) < 4 for name, share in (("a", 0.5), ("b", 0.3), ("c", 0.2)))
        for name, size in per_lane.items():
            mine = [x for who, x in rows if who == name]
            first = mine[:size]
            assert len(set(first)) == size, "an epoch of a lane has no row twice"
            seen[name] += first
    for name, size in SIZES.items():
        assert len(set(seen[name])) == len(seen[name]) == size // 3 * 3


def test_locate_says_which_rows_a_batch_holds(tables: Path) -> None:
    source = mixed(tables, temperature=2.0)
    for step in (0, 7, 33):
        got = [(s.source, 7 * s.parts[0].row_group + source.rows_of(s.parts[0])[0]) for s in source.locate(step, 1)]
        assert got == drawn(source, range(step, step + 1), 1)
        assert {s.parts[0].source for s in source.locate(step, 1)} <= set("abc")


def test_changing_the_mixture_loses_and_repeats_nothing(tables: Path) -> None:
    before = [Segment(0, {"a": 1, "b": 1})]
    after = [*before, Segment(9, {"a": 1, "b": 3, "c": 1}), Segment(12, {"b": 1})]
    undisturbed = mixed(tables, segments=before, names="ab")
    changed = mixed(tables, segments=after)
    for lane in range(3):
        assert drawn(changed, range(9), lane) == drawn(undisturbed, range(9), lane), "the past is as it was"
        old, new = drawn(undisturbed, range(40), lane), drawn(changed, range(20), lane)
        for name in "ab":
            whole = [x for who, x in old if who == name]
            mine = [x for who, x in new if who == name]
            shared = min(len(whole), len(mine))
            assert mine[:shared] == whole[:shared], "a source goes on where it was"
        assert {who for who, _ in new[48:]} == {"b"}


def test_sources_without_a_word_are_seen_as_often_as_they_are_large(tables: Path) -> None:
    (segment,) = mixed(tables).plan
    assert segment.weights == SIZES
    (segment,) = mixed(tables, epochs={"a": 1, "c": 2.5}).plan
    assert segment.weights == {"a": 3, "c": 1}


def test_stages_of_the_settings_are_planned(tables: Path) -> None:
    stages = ({"from_step": 5, "weights": {"c": 1}}, {"from_step": 8, "epochs": {"a": 1, "b": 1}})
    source = mixed(tables, weights={"a": 1}, stages=stages)
    assert [segment.as_json() for segment in source.plan] == [
        {"from_step": 0, "weights": {"a": 1}},
        {"from_step": 5, "weights": {"c": 1}},
        {"from_step": 8, "weights": {"a": 9, "b": 4}},
    ]
    assert len(json.dumps(source.plan[-1].as_json())) < 60
    assert [{who for who, _ in drawn(source, range(step, step + 1), 0)} for step in (4, 5, 7)] == [{"a"}, {"c"}, {"c"}]
    assert json.loads(json.dumps(source.describe()))["segments"][2]["shares"]["a"] == pytest.approx(9 / 13)


def texts(tmp_path: Path, **settings: Any) -> MixedSource:
    sources = {}
    for name in ("one", "two"):
        write_texts(tmp_path / name, "parquet", texts=[f"{name} {'x' * (i % 50)} {i}" for i in range(90)])
        sources[name] = {"kind": "parquet", "path": str(tmp_path / name), "text_column": "text"}
    spec = Mixture(sources=sources, sequence_length=16, **settings)
    return open_mixture(spec, seed=1, lanes=2, lane_batch_size=3)


def test_a_curriculum_cuts_the_same_rows_shorter(tmp_path: Path) -> None:
    whole = LaneReader(texts(tmp_path))
    stages = ({"from_step": 4, "sequence_length": 4}, {"from_step": 6, "sequence_length": 16})
    staged = LaneReader(texts(tmp_path, stages=stages))
    for step in range(8):
        long, got = whole.batch(step, 1)["tokens"], staged.batch(step, 1)["tokens"]
        if step not in (4, 5):
            assert got.tolist() == long.tolist()
            continue
        assert got.shape == (12, 5)
        pairs = [(a, b) for row in long.tolist() for a, b in pairwise(row)]
        assert [(a, b) for row in got.tolist() for a, b in pairwise(row)] == pairs


def test_rows_share_the_token_at_their_border() -> None:
    cut = finish_rows({"tokens": np.arange(14).reshape(2, 7)}, 3)["tokens"]
    assert cut.tolist() == [[0, 1, 2, 3], [3, 4, 5, 6], [7, 8, 9, 10], [10, 11, 12, 13]]


def test_resuming_a_mixture_anywhere(tmp_path: Path) -> None:
    whole = LaneReader(texts(tmp_path, weights={"one": 2, "two": 1}))
    undisturbed = [whole.batch(step, lane)["tokens"].tobytes() for step in range(12) for lane in range(2)]
    for start in (3, 7, 11):
        resumed = LaneReader(texts(tmp_path, weights={"one": 2, "two": 1}))
        tail = [resumed.batch(step, lane)["tokens"].tobytes() for step in range(start, 12) for lane in range(2)]
        assert tail == undisturbed[2 * start :]


def test_a_rare_source_keeps_its_window(tables: Path) -> None:
    reader = LaneReader(mixed(tables, weights={"a": 50, "c": 1}))
    seen: set[tuple[int, int]] = set()
    for step in range(40):
        for lane in range(3):
            reader.batch(step, lane)
            seen |= set(reader._windows)
            assert seen == set(reader._windows), "no window was thrown away between two draws"
    assert len(seen) == 6


def test_the_fingerprint_names_the_source_that_changed(tables: Path) -> None:
    old = json.loads(json.dumps(mixed(tables).fingerprint))
    assert fingerprint_difference(old, mixed(tables, weights={"a": 1}).fingerprint) == []
    assert fingerprint_difference(old, mixed(tables, names="ab").fingerprint) == [], "a stage says that one went"
    pq.write_table(pa.table({"x": np.arange(41), "who": np.ones(41, np.int64)}), tables / "b" / "t.parquet")
    changes = fingerprint_difference(old, mixed(tables).fingerprint)
    assert "source 'b': there were 40 samples and are now 41" in changes
    assert all(change.startswith("source 'b'") for change in changes)
    single = open_data(Data(kind="parquet", path=str(tables / "a")), seed=0, lanes=3, lane_batch_size=4)
    assert any(
        "the format was mixture and is now parquet" in s for s in fingerprint_difference(old, single.fingerprint)
    )


def test_sources_that_do_not_fit_together(tables: Path, tmp_path: Path) -> None:
    write_texts(tmp_path / "texts", "parquet")
    pq.write_table(pa.table({"x": np.zeros(30)}), tmp_path / "f.parquet")

    def opened(**more: Data) -> None:
        sources = {"a": Data(kind="parquet", path=str(tables / "a")), **more}
        open_mixture(Mixture(sources=sources), seed=0, lanes=2, lane_batch_size=1)

    with pytest.raises(DataError, match=r"^data.sources.f: its columns \(x: double\) differ from those of 'a'"):
        opened(f=Data(kind="parquet", path=str(tmp_path / "f.parquet")))
    with pytest.raises(DataError, match=r"^data.sources.gone: data.path: .* does not exist"):
        opened(gone=Data(kind="parquet", path=str(tmp_path / "gone")))
    pq.write_table(pa.table({"x": [1], "who": [1]}), tmp_path / "tiny.parquet")
    with pytest.raises(DataError, match=r"^data.sources.tiny: .*one step needs lanes"):
        opened(tiny=Data(kind="parquet", path=str(tmp_path / "tiny.parquet")))
    one, other = text_source(tmp_path / "texts"), text_source(tmp_path / "texts", sequence_length=8)
    with pytest.raises(ConfigError, match=r"must all have data.sequence_length=None"):
        Mixture(sources={"one": one.spec, "other": other.spec})


def test_a_source_that_is_gone_cannot_be_read_again(tables: Path) -> None:
    source = mixed(tables, segments=[Segment(0, {"a": 1}), Segment(3, {"b": 1})], names="b")
    assert {who for who, _ in drawn(source, range(3, 5), 0)} == {"b"}
    with pytest.raises(DataError, match=r"^step 2 used source 'a', which data.sources does not name any more"):
        list(source.spans(2, 0))


WRONG = [
    ({"sources": {}}, "data.sources: Dictionary should have at least 1 item"),
    ({"sources": {"a": {"kind": "jsonl", "pth": "x"}}}, "unknown setting 'data.sources.a.pth'; did you mean 'path'"),
    ({"weigths": {"a": 1}}, "unknown setting 'data.weigths'; did you mean 'weights'"),
    ({"weights": {"z": 1}}, "data names 'z', which is no source; the sources are: a, b"),
    ({"weights": {"a": 1}, "temperature": 2}, "weights and temperature both say how much of each source to take"),
    ({"epochs": {"a": 0}}, "epochs are all 0"),
    ({"weights": {"a": -1}}, "data.weights.a: Input should be greater than or equal to 0 (got -1)"),
    ({"weights": {"a": True}}, "expected a number (got the switch True)"),
    ({"stages": [{"from_step": 3}, {"from_step": 3}]}, "data.stages: from_step 3, then 3; expected ascending"),
    ({"stages": [{"from_step": 3, "weights": {"q": 1}}]}, "data.stages.0 names 'q', which is no source"),
    ({"stages": [{"from_step": 3, "sequence_length": 3}]}, "data.stages.0.sequence_length=3 does not divide"),
    ({"stages": [{"from_step": 3, "weight": {}}]}, "unknown setting 'data.stages.0.weight'; did you mean 'weights'"),
]


@pytest.mark.parametrize(("changes", "expected"), WRONG)
def test_settings_that_are_wrong_are_named(changes: dict[str, Any], expected: str) -> None:
    data = {"sources": {name: {"kind": "jsonl", "path": name} for name in "ab"}, **changes}
    with pytest.raises(ConfigError) as caught:
        parse_job({"recipe": "mod:Class", "steps": 5, "data": data})
    assert expected in str(caught.value)


def test_a_job_with_a_mixture_is_written_down_and_read_back() -> None:
    data = {
        "sources": {n: {"kind": "jsonl", "path": n, "text_column": "t", "tokenizer": f"{n}.json"} for n in "ab"},
        "sequence_length": 64,
        "weights": {"a": 0.25, "b": 0.75},
        "stages": [{"from_step": 7, "sequence_length": 32}],
    }
    job = parse_job({"recipe": "mod:Class", "steps": 5, "data": data})
    import yaml

    assert parse_job(yaml.safe_load(dump_job(job))) == job
    assert isinstance(job.data, Mixture)
    assert job.data.sources["a"].sequence_length == 64
    assert (job.data.paths, job.data.tokenizer_paths, job.data.is_remote) == (("a", "b"), ("a.json", "b.json"), False)
    moved = job.data.relocated(lambda path: "s3://bucket/" + path)
    assert moved.paths == ("s3://bucket/a", "s3://bucket/b")
    assert moved.tokenizer_paths[1] == "s3://bucket/b.json"
    assert moved.is_remote
