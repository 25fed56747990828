"""States of streams: what is written is read back exactly, in few bytes, and so are those of older versions."""

from __future__ import annotations

import json
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

import elastictrain as et
from elastictrain.data.stream_state import dump_state, parse_state
from elastictrain.data.streaming import Stream
from elastictrain.errors import DataError

NAMES = st.text(min_size=0, max_size=6) | st.sampled_from(["web", "code", "a,b", ","])
HASHES = st.binary(min_size=8, max_size=8).map(bytes.hex)


@st.composite
def contents(draw: st.DrawFn) -> dict[str, Any]:
    numbers = st.integers(0, 1 << 48)
    content: dict[str, Any] = {key: draw(numbers) for key in ("step", "seed", "lanes", "size")}
    content["data"] = draw(st.dictionaries(NAMES, HASHES, min_size=1, max_size=5))
    weights = st.dictionaries(NAMES, st.integers(0, 1 << 20), max_size=5).map(lambda w: dict(sorted(w.items())))
    plain = st.fixed_dictionaries({"from_step": numbers, "weights": weights})
    cut = st.fixed_dictionaries({"from_step": numbers, "weights": weights, "sequence_length": st.integers(1, 9)})
    content["plans"] = draw(st.lists(st.tuples(numbers, st.lists(plain | cut, max_size=3)).map(list), max_size=3))
    if draw(st.booleans()):
        content["renamed"] = draw(st.dictionaries(NAMES, NAMES, max_size=2))
    return content


@given(content=contents())
def test_a_state_of_a_mixture_says_all_it_was_given(content: dict[str, Any]) -> None:
    read = parse_state(dump_state(content))
    assert {key: value for key, value in read.items() if key != "v"} == content
    assert list(read["data"]) == list(content["data"])


@pytest.mark.parametrize("more", [{}, {"begun": [2, 40]}, {"live": {"era": 3}}])
def test_a_state_of_one_source(more: dict[str, Any]) -> None:
    content = {"step": 4, "seed": 5, "lanes": 6, "size": 7, "data": {"": "0" * 16}, **more}
    shown = json.loads(dump_state(content))
    assert shown == {"v": 2 if "begun" in more else 1, **content}
    assert parse_state(dump_state(content)) == shown


def mixed(folder: Path, names: list[str], **settings: Any) -> Stream:
    sources = {name: et.data.parquet(str(folder / f"{name}.parquet")) for name in names}
    shares = et.data.mixture(sources, **settings)
    return et.data.stream(shares, batch_size=64, lanes=64, seed=1234567)


def test_a_mixture_of_eight_takes_256_bytes_at_most_and_older_states_go_on(tmp_path: Path) -> None:
    names = ["code", "docs", "math", "news", "poem", "talk", "test", "wiki"]
    for number, name in enumerate(names):
        table = pa.table({"x": np.arange(1000 * number, 1000 * number + 900 + number)})
        pq.write_table(table, tmp_path / f"{name}.parquet", row_group_size=50)
    stream = mixed(tmp_path, names, temperature=2.0)
    before = [batch["x"].tolist() for batch in islice(iter(stream), 3)]
    state = stream.state()
    assert len(state) <= 256, state
    stream._step = 10_000_000
    assert len(stream.state()) <= 256
    stream._step = 3
    content = {key: value for key, value in parse_state(state).items() if key != "v"}
    as_before = json.dumps({"v": 1, **content}).encode()
    after = [batch["x"].tolist() for batch in islice(iter(stream), 3)]
    for one in (state, as_before):
        other = mixed(tmp_path, names, temperature=2.0)
        other.resume(one)
        assert [batch["x"].tolist() for batch in islice(iter(other), 3)] == after != before


def test_a_state_of_a_newer_version_is_refused() -> None:
    with pytest.raises(DataError, match=r"^this state has version 4; this version of elastictrain reads 1 to 3$"):
        parse_state(b'{"v": 4}')
