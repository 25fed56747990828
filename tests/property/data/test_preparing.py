"""The plan of a preparation, its keys and its runs, against plain definitions of what they must be."""

from __future__ import annotations

import hashlib
import tempfile
from itertools import pairwise
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from elastictrain.data.preparing.plan import (
    MAX_SLOTS,
    SLOTS_PER_FILE,
    Plan,
    count_slots,
    cut_parts,
    group_slots,
    plan_differences,
    row_group_rows,
)
from elastictrain.data.preparing.rows import (
    keys_in_order,
    keys_of_places,
    keys_of_texts,
    places_of,
    slot_edges,
    sorted_rows,
)
from elastictrain.data.preparing.runs import read_slots, run_content
from elastictrain.errors import DataError
from elastictrain_checkpoint.store import Store

SIZES = st.lists(st.integers(0, 50), max_size=40)
WORDS = st.integers(0, 2**64 - 1)


@given(SIZES, st.integers(1, 100))
def test_every_block_is_in_one_part_and_parts_are_as_large_as_they_may_be(sizes: list[int], limit: int) -> None:
    parts = cut_parts(sizes, limit)
    assert [block for first, end in parts for block in range(first, end)] == list(range(len(sizes)))
    for first, end in parts:
        assert end > first
        assert end - first == 1 or sum(sizes[first:end]) <= limit
    for (first, end), _ in pairwise(parts):
        assert sum(sizes[first : end + 1]) > limit, "the next block would not have fitted"


@given(SIZES, st.integers(1, 100))
def test_every_slot_with_rows_is_in_one_file_and_no_file_is_empty(sizes: list[int], limit: int) -> None:
    files = group_slots(np.asarray(sizes, dtype=np.int64), limit)
    covered = [slot for first, end in files for slot in range(first, end)]
    assert covered == sorted(set(covered))
    assert {slot for slot, size in enumerate(sizes) if size} <= set(covered)
    for first, end in files:
        held = [size for size in sizes[first:end] if size]
        assert held
        assert len(held) == 1 or sum(held) <= limit
    for (first, _), (after, end) in pairwise(files):
        next_size = next(size for size in sizes[after:end] if size)
        assert sum(sizes[first:after]) + next_size > limit


@given(st.integers(0, 1 << 50), st.integers(1, 1 << 32))
def test_slots_are_a_power_of_two_and_enough_of_them(size: int, file_bytes: int) -> None:
    slots = count_slots(size, file_bytes)
    assert slots & (slots - 1) == 0
    assert slots == MAX_SLOTS or slots * file_bytes >= size * SLOTS_PER_FILE
    assert slots <= MAX_SLOTS
    assert slots <= 2 * SLOTS_PER_FILE * max(1, -(-size // file_bytes))


@given(st.integers(1, 10_000), st.integers(1, 1 << 30), st.integers(1, 1 << 26))
def test_row_groups_are_even(rows: int, size: int, limit: int) -> None:
    group = row_group_rows(rows, size, limit)
    assert 1 <= group <= rows
    assert group == 1 or size / rows * (group - 1) <= limit


ROWS = st.lists(st.tuples(st.integers(0, 5) | WORDS, st.integers(0, 2)), max_size=60)


@given(ROWS, st.randoms(use_true_random=False))
def test_of_equal_rows_the_one_with_the_lowest_place_stays(rows: list[tuple[int, int]], random: Any) -> None:
    places = list(range(len(rows)))
    random.shuffle(places)
    keys, twins = (np.asarray([row[i] for row in rows], dtype=np.uint64) for i in range(2))
    found, left_out = sorted_rows(keys, twins, np.asarray(places, dtype=np.uint64))
    first: dict[tuple[int, int], int] = {}
    for number in sorted(range(len(rows)), key=lambda n: places[n]):
        first.setdefault(rows[number], number)
    assert found.tolist() == [first[row] for row in sorted(first)]
    assert left_out == len(rows) - len(first)
    everything, none = sorted_rows(keys, None, np.asarray(places, dtype=np.uint64))
    assert none == 0
    assert everything.tolist() == sorted(range(len(rows)), key=lambda n: (rows[n][0], places[n]))


@given(st.lists(WORDS, max_size=60), st.integers(0, 8))
def test_slots_are_ranges_of_the_key(keys: list[int], bits: int) -> None:
    ordered = np.sort(np.asarray(keys, dtype=np.uint64))
    edges = slot_edges(ordered, 1 << bits)
    assert edges[0] == 0
    assert edges[-1] == len(keys)
    for slot, (first, end) in enumerate(pairwise(edges.tolist())):
        assert all((key * (1 << bits)) >> 64 == slot for key in ordered[first:end].tolist())


@given(st.lists(st.binary(max_size=12) | st.none(), max_size=30), st.integers(0, 3), st.integers(1, 5))
def test_keys_of_texts_are_a_keyed_hash_of_their_bytes(texts: list[bytes | None], seed: int, chunk: int) -> None:
    column = pa.chunked_array([texts[i : i + chunk] for i in range(0, len(texts), chunk)], pa.binary())
    keys, twins = keys_of_texts(seed, column)
    again = keys_of_texts(seed, pa.chunked_array([pa.array(texts, pa.large_binary())]).slice(0))
    assert keys.tolist() == again[0].tolist()
    pairs = list(zip(keys.tolist(), twins.tolist(), strict=True))
    assert len(set(pairs)) == len({text or b"" for text in texts})
    by_text = {text or b"": pair for text, pair in zip(texts, pairs, strict=True)}
    assert pairs == [by_text[text or b""] for text in texts]
    if texts:
        assert keys.tolist() != keys_of_texts(seed + 1, column)[0].tolist()
        tail = keys_of_texts(seed, column.slice(1))
        assert tail[0].tolist() == keys.tolist()[1:]


def test_keys_are_the_specified_ones() -> None:
    """Prepared data of the same settings stay the same bytes over versions."""
    places = np.concatenate([places_of(0, 0, 2), places_of(3, 7, 1)])
    assert places.tolist() == [0, 1, 3 << 32 | 7]
    assert [f"{key:016x}" for key in keys_of_places(5, places).tolist()] == GOLDEN_PLACES
    keys, twins = keys_of_texts(5, pa.chunked_array([["", "a", "é"]]))
    assert [f"{a:016x}{b:016x}" for a, b in zip(keys.tolist(), twins.tolist(), strict=True)] == GOLDEN_TEXTS
    assert keys_in_order(2, 4, 1).tolist() == [1 << 63]


GOLDEN_PLACES = ["1ce8531c31c7ffc9", "fde4674dd082737b", "1af96874b9eabdea"]
GOLDEN_TEXTS = [
    "f63fb05a83c50678e0b48b5ac1fae3b5",
    "983e105f11410e8b8df9a55c4126d824",
    "6095e052ab97c77b4b1a9e3dad2a06bf",
]


def test_keys_of_places_are_spread_evenly() -> None:
    keys = keys_of_places(1, places_of(0, 0, 1 << 16))
    counts = np.bincount((keys >> np.uint64(56)).astype(np.int64), minlength=256)
    expected = (1 << 16) / 256
    chi_square = float(((counts - expected) ** 2 / expected).sum())
    assert 255 - 5 * 22.6 < chi_square < 255 + 5 * 22.6  # 255 degrees of freedom: standard deviation 22.6
    assert len(np.unique(keys)) == 1 << 16


@given(st.lists(WORDS, max_size=40), st.integers(0, 5), st.data())
def test_a_range_of_slots_is_read_as_it_was_written(keys: list[int], bits: int, data: st.DataObject) -> None:
    ordered = np.sort(np.asarray(keys, dtype=np.uint64))
    table = pa.table({"k": pa.array(ordered), "t": [f"row {key}" for key in ordered.tolist()]})
    slots = 1 << bits
    edges = slot_edges(ordered, slots)
    first = data.draw(st.integers(0, slots - 1))
    end = data.draw(st.integers(first + 1, slots))
    with tempfile.TemporaryDirectory() as folder:
        store = Store(folder)
        shuffled = table.take(np.arange(len(keys))[::-1])
        blocks, sizes = run_content(shuffled, np.arange(len(keys))[::-1], edges, without=["k"])
        assert (sizes > 0).tolist() == (np.diff(edges) > 0).tolist()
        store.create("a.run", blocks)
        found = read_slots(store, "a.run", slots, first, end)
        rows = [row for one in found for row in one.to_pylist()]
        assert rows == table.slice(int(edges[first]), int(edges[end] - edges[first])).to_pylist()
        with pytest.raises(DataError, match=r"it is no run of"):
            read_slots(store, "a.run", 2 * slots, first, end)


@given(st.data())
def test_a_run_that_is_damaged_is_noticed_or_the_damage_is_elsewhere(data: st.DataObject) -> None:
    keys = np.sort(np.frombuffer(hashlib.sha512(b"keys").digest(), dtype=np.uint64))
    table = pa.table({"k": pa.array(keys)})
    edges = slot_edges(keys, 4)
    content = bytearray(b"".join(run_content(table, np.arange(len(keys)), edges)[0]))
    with tempfile.TemporaryDirectory() as folder:
        at = data.draw(st.integers(0, len(content) - 1))
        if data.draw(st.booleans()):
            content[at] ^= data.draw(st.integers(1, 255))
        else:
            del content[at:]
        store = Store(folder)
        store.create("a.run", [memoryview(bytes(content))])
        with pytest.raises(DataError, match=r"a\.run: an intermediate file is missing or damaged"):
            read_slots(store, "a.run", 4, 0, 4)


PLAN = Plan(
    settings={"seed": 1, "map": "a:f", "tokenizer": "t.json"},
    functions={"map": "aa"},
    tokenizer="tt",
    files=(("a", 1, "v"), ("b", 2, "v")),
    schema=(("text", "string"),),
    blocks=3,
    parts=((0, 3),),
    slots=4,
    pyarrow="21.0.0",
)

BEGUN_WITH_ANOTHER = (
    "it was begun with pyarrow 21.0.0, and this is pyarrow 22.0.0, whose files may have other bytes: install "
    "pyarrow==21.0.0 to go on"
)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"settings": {"seed": 2, "map": "a:f", "tokenizer": "t.json"}}, ["seed was 1 and is now 2"]),
        ({"functions": {"map": "bb"}}, ["the file of map (a:f) has changed"]),
        ({"settings": {"seed": 1, "map": "a:g", "tokenizer": "t.json"}, "functions": {"map": "bb"}},
         ["map was 'a:f' and is now 'a:g'"]),
        ({"tokenizer": "uu"}, ["the content of the tokenizer t.json has changed"]),
        ({"files": (("a", 1, "w"), ("c", 2, "v"))}, ["b is missing", "c is new", "a has changed"]),
        ({"parts": ((0, 1), (1, 3))}, ["the input is cut in another way (parts)"]),
        ({"slots": 8, "schema": ()}, ["the input is cut in another way (schema, slots)"]),
        ({"pyarrow": "22.0.0"},
         [BEGUN_WITH_ANOTHER]),
        ({}, []),
    ],
)  # fmt: skip
def test_what_differs_between_two_plans_is_said(change: dict[str, Any], words: list[str]) -> None:
    import json
    from dataclasses import replace

    other = replace(PLAN, **change)
    assert plan_differences(json.loads(json.dumps(PLAN.as_json())), other.as_json()) == words
    assert (PLAN.identity == other.identity) == (not words)
    old = PLAN.as_json() | {"v": 0}
    assert plan_differences(old, PLAN.as_json()) == ["it was begun by another version of elastictrain (plan 0, now 1)"]
    unsaid = {name: value for name, value in PLAN.as_json().items() if name != "pyarrow"}
    (words_of_old,) = plan_differences(unsaid, PLAN.as_json())
    assert words_of_old.startswith(
        "it was begun when the version of pyarrow was not recorded, and this is pyarrow 21.0.0"
    )
    assert plan_differences(unsaid, PLAN.as_json(), is_done=True) == []
