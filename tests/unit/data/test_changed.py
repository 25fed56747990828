"""Data that have changed and become a new stage of a stream: where it begins, what goes on, what is said before."""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import elastictrain as et
from elastictrain.data.changed import Left, changed_sources, left_of, used_of_epoch, used_of_source
from elastictrain.data.fingerprint import fingerprint_difference, identity
from elastictrain.data.mixture import with_new_names
from elastictrain.data.seeds import stage_seed
from elastictrain.data.stream_state import parse_state
from elastictrain.data.streaming import Stream
from elastictrain.errors import DataError
from tests.unit.data.live_place import Place


def write(folder: Path, first: int, count: int = 40, name: str = "a") -> None:
    folder.mkdir(exist_ok=True)
    pq.write_table(pa.table({"x": np.arange(first, first + count)}), folder / f"{name}.parquet", row_group_size=7)


def single(folder: Path, *, seed: int = 3, **settings: Any) -> Stream:
    return et.data.stream(et.data.parquet(str(folder)), batch_size=4, lanes=4, seed=seed, **settings)


def mixed(folder: Path, names: str = "ab", **settings: Any) -> Stream:
    sources = {name: et.data.parquet(str(folder / name)) for name in names}
    shares = et.data.mixture(sources, weights=dict.fromkeys(names, 1))
    return et.data.stream(shares, batch_size=4, lanes=2, seed=3, **settings)


def rows(stream: Iterator[Any] | Stream, steps: int) -> list[list[int]]:
    return [batch["x"].tolist() for batch in islice(iter(stream), steps)]


def test_a_new_stage_is_a_new_order_of_the_new_data_from_there_on(tmp_path: Path) -> None:
    write(tmp_path / "data", 0)
    stream = single(tmp_path / "data")
    rows(stream, 3)
    state = stream.state()
    write(tmp_path / "data", 1000, 48)
    went_on = single(tmp_path / "data")
    went_on.resume(state, data_changed="new_stage")
    assert went_on.step == 3
    whole = single(tmp_path / "data", seed=stage_seed(3, 1))
    expected = rows(whole, 20)
    assert rows(went_on, 4) == expected[:4]
    later = went_on.state()
    assert len(later) <= 256
    parts = [single(tmp_path / "data", rank=rank, world=3) for rank in range(3)]
    for part in parts:
        part.resume(later)
    got = [[x for piece in pieces for x in piece] for pieces in zip(*(rows(part, 16) for part in parts), strict=True)]
    assert got == expected[4:20], "whoever resumes later needs to choose no more, and gets the same samples"
    write(tmp_path / "data", 2000, 44)
    with pytest.raises(DataError, match="another stream: the data changed"):
        single(tmp_path / "data").resume(later)
    again = single(tmp_path / "data", epochs=1)
    again.resume(later, data_changed="new_stage")
    of_third = rows(again, 100)
    assert of_third == rows(single(tmp_path / "data", seed=stage_seed(3, 2)), 11), "an epoch of the newest data"
    assert sorted(x for row in of_third for x in row) == list(range(2000, 2044))


@pytest.mark.parametrize("choice", ["fail", "new_stage"])
def test_data_that_change_while_a_stream_is_open_are_not_taken_unseen(tmp_path: Path, choice: Any) -> None:
    for name, first in (("a", 0), ("b", 100)):
        write(tmp_path / name, first)
    one, two = single(tmp_path / "a"), mixed(tmp_path)
    states = [one.state(), two.state()]
    source = one.source
    for name in "ab":
        write(tmp_path / name, 1000, 44)
    one.resume(states[0], data_changed=choice)
    assert one.source is source, "what was compared"
    with pytest.raises(DataError, match="the data have changed since this stream was opened; open it again"):
        two.resume(states[1], data_changed=choice)


def test_an_unchanged_stream_ignores_the_choice(tmp_path: Path) -> None:
    write(tmp_path / "data", 0)
    stream = single(tmp_path / "data")
    rows(stream, 3)
    other = single(tmp_path / "data")
    other.resume(stream.state(), data_changed="new_stage")
    assert other.state() == stream.state()
    assert json.loads(stream.state())["v"] == 1, "what older versions read"


def test_of_a_mixture_the_changed_source_begins_anew_and_the_others_go_on(tmp_path: Path) -> None:
    for name, first in (("a", 0), ("b", 100)):
        write(tmp_path / name, first)
    stream = mixed(tmp_path)
    before, state = rows(stream, 5), stream.state()
    undisturbed = [x for row in before + rows(stream, 15) for x in row if x < 100]
    write(tmp_path / "b", 1000, 44)
    with pytest.raises(DataError, match=r"source 'b' changed.*of 'b'; other sources go on where they were"):
        mixed(tmp_path).resume(state)
    other = mixed(tmp_path)
    other.resume(state, data_changed="new_stage")
    after = rows(other, 15)
    of_a = [x for row in before + after for x in row if x < 100]
    assert of_a == undisturbed, "nothing of what stays is lost or repeated"
    new = [x for row in after for x in row if x >= 100]
    assert len(new) == 30
    assert len(set(new)) == 30
    assert min(new) >= 1000
    half = mixed(tmp_path)
    half.resume(state, data_changed="new_stage")
    assert rows(half, 7) == after[:7]
    resumed = mixed(tmp_path)
    resumed.resume(half.state())
    assert rows(resumed, 8) == after[7:]
    resumed.resume(half.state())
    assert rows(resumed, 8) == after[7:], "also when it has resumed before"
    with pytest.raises(DataError, match="source 'b' changed"):
        resumed.resume(state)
    write(tmp_path / "b", 3000, 44)
    third = mixed(tmp_path)
    third.resume(half.state(), data_changed="new_stage")
    assert min(x for row in rows(third, 8) for x in row if x >= 100) >= 3000
    assert parse_state(third.state())["renamed"] == {"b": "b@2"}


def test_a_live_source_is_no_new_stage(tmp_path: Path) -> None:
    place = Place(tmp_path)
    place.add(64)
    stream = place.stream()
    rows(stream, 2)
    state = stream.state()
    other = Place(tmp_path / "other")
    other.add(64)
    with pytest.raises(DataError, match=r"manifest of segments was.*it is live, with one order for good"):
        other.stream().resume(state, data_changed="new_stage")


def test_what_a_new_stage_leaves_is_said_before(tmp_path: Path) -> None:
    for name, first in (("a", 0), ("b", 100)):
        write(tmp_path / "data", first, name=name)
    stream = single(tmp_path / "data")
    rows(stream, 23)  # an epoch has 20 steps
    state = stream.state()
    write(tmp_path / "data", 500, name="b")
    with pytest.raises(
        DataError,
        match=r"of the 80 samples of the epoch under way 68 have not been used and are left out; up to 12 that were "
        r"used lie in 1 unchanged file\(s\) and may come again",
    ):
        single(tmp_path / "data").resume(state)


def fingerprint(**more: Any) -> dict[str, Any]:
    files = [{"name": name, "rows": count, "hash": name} for name, count in (("a", 8), ("b", 92))]
    return {"kind": "parquet", "samples": 100, "lanes": 4, "lane_batch_size": 3, "files": files, **more}


@pytest.mark.parametrize(
    ("old", "position", "used"),
    [({}, 0, 0), ({}, 7, 84), ({}, 8, 0), ({}, 17, 12), ({"ragged": "repeat"}, 8, 96), ({"ragged": "repeat"}, 9, 0)],
)
def test_how_much_of_an_epoch_was_used(old: dict[str, Any], position: int, used: int) -> None:
    assert used_of_epoch(fingerprint(**old), position) == used


def test_how_much_of_a_source_of_a_mixture_was_used() -> None:
    assert used_of_source(fingerprint(), [3, 25, 26, 0]) == 4


@pytest.mark.parametrize(
    ("new", "left"),
    [
        ({}, Left("", 100, 70, 30, 2)),
        ({"files": [{"name": "a", "rows": 8, "hash": "a"}]}, Left("", 100, 70, 8, 1)),
        ({"files": [{"name": "a", "rows": 8, "hash": "?"}]}, Left("", 100, 70, 0, 0)),
        ({"files": None}, Left("", 100, 70, 30, None)),
    ],
)
def test_what_is_left(new: dict[str, Any], left: Left) -> None:
    assert left_of(fingerprint(), fingerprint(**new), 30) == left
    assert left.words().startswith("of the 100 samples of the epoch under way 70 have not been used and are left out")


def test_a_text_is_no_sample() -> None:
    new = fingerprint(files=[{"name": "a", "rows": 8, "hash": "a"}])
    assert left_of(fingerprint(text_column="t"), new, 30).may_repeat == 30


def test_names_of_sources_are_never_used_twice() -> None:
    assert with_new_names({}, ["a"], {"a", "b"}) == {"a": "a@1"}
    assert with_new_names({"a": "a@1"}, ["a@1"], {"a", "a@1", "b"}) == {"a": "a@2"}
    assert with_new_names({}, ["a"], {"a", "a@1", "a@2"}) == {"a": "a@3"}
    assert with_new_names({"b": "b@1"}, ["a"], {"a", "b@1"}) == {"b": "b@1", "a": "a@1"}


def test_which_sources_of_a_mixture_have_changed() -> None:
    one, other = fingerprint(files_hash="1"), fingerprint(files_hash="2")
    old = {"kind": "mixture", "mixture_version": 1, "sources": {"a": one, "b": one, "c": one}}
    assert changed_sources(old, {**old, "sources": {"a": one, "b": other, "d": one}}) == ["b"]
    assert changed_sources(old, {**old, "mixture_version": 2}) is None
    assert changed_sources(old, one) is None


def test_the_identity_of_data_is_not_how_they_are_dealt_out() -> None:
    one = fingerprint(hash="1")
    assert identity(one) == identity(fingerprint(hash="2", lanes=7, lane_batch_size=1, files=None))
    assert identity(one) != identity(fingerprint(samples=101))
    both = [{"kind": "mixture", "lanes": n, "sources": {"a": fingerprint(lanes=n)}} for n in (1, 2)]
    assert identity(both[0]) == identity(both[1])
    assert fingerprint_difference(both[0]["sources"]["a"], both[1]["sources"]["a"])
