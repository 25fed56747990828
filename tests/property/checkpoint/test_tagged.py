"""The tree comes back exactly: values, types and order."""

from __future__ import annotations

import enum
import json
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from elastictrain_checkpoint import InvalidPiece, tagged

leaves = st.none() | st.booleans() | st.integers(-(10**30), 10**30) | st.floats() | st.text() | st.binary(max_size=9)
keys = (
    st.text(max_size=4)
    | st.sampled_from(["$tuple", "$", "$dict"])
    | st.integers()
    | st.booleans()
    | st.tuples(st.integers(), st.text(max_size=2))
)
trees = st.recursive(
    leaves,
    lambda inner: (
        st.lists(inner, max_size=4) | st.lists(inner, max_size=4).map(tuple) | st.dictionaries(keys, inner, max_size=4)
    ),
    max_leaves=12,
)


def same(one: Any, two: Any) -> bool:
    if type(one) is not type(two):
        return False
    if isinstance(one, float):
        return (math.isnan(one) and math.isnan(two)) or (one == two and math.copysign(1, one) == math.copysign(1, two))
    if isinstance(one, dict):
        return len(one) == len(two) and all(same(a, b) and same(one[a], two[b]) for a, b in zip(one, two, strict=True))
    if isinstance(one, list | tuple):
        return len(one) == len(two) and all(same(a, b) for a, b in zip(one, two, strict=True))
    return bool(one == two)


@given(trees)
def test_round_trip_through_strict_json(tree: Any) -> None:
    text = json.dumps(tagged.encode(tree), allow_nan=False)
    assert same(tagged.decode(json.loads(text)), tree)


@given(trees)
def test_no_number_in_the_text_is_beyond_what_json_readers_keep(tree: Any) -> None:
    def numbers(value: Any) -> list[Any]:
        if isinstance(value, list | dict):
            return [n for item in (value.values() if isinstance(value, dict) else value) for n in numbers(item)]
        return [value]

    assert all(abs(n) <= 2**53 for n in numbers(tagged.encode(tree)) if type(n) is int)


class Colour(enum.IntEnum):
    RED = 1


@pytest.mark.parametrize("value", [np.float64(1), np.int32(1), {1, 2}, object(), Colour.RED, np.zeros(2), 1j])
def test_what_cannot_come_back_is_refused_with_its_place(value: Any) -> None:
    with pytest.raises(InvalidPiece, match=r"^tree\.a\[1\] is a .*the tree holds None, bool"):
        tagged.encode({"a": [0, value]})


def test_a_cycle_is_refused() -> None:
    ring: list[Any] = []
    ring.append(ring)
    with pytest.raises(InvalidPiece, match="nested deeper than 100 levels"):
        tagged.encode(ring)


@pytest.mark.parametrize(
    "value",
    [
        {"$what": 1},
        {"$int": 5},
        {"$tuple": [], "x": 1},
        {"$float": "1.5"},
        {"$dict": [1]},
        {"$bytes": "#"},
        {"$int": "five"},
    ],
)
def test_unknown_tags_are_refused(value: Any) -> None:
    with pytest.raises(ValueError, match=r"unknown or malformed tag|beside other keys|not base64|invalid literal"):
        tagged.decode(value)


@given(st.sampled_from([2**53 - 1, 2**53, 2**53 + 1, 2**4095, 2**4096, 2**20_000 + 7]), st.sampled_from([1, -1]))
def test_whole_numbers_of_any_size_come_back(size: int, sign: int) -> None:
    text = json.dumps(tagged.encode({size * sign: size * sign}), allow_nan=False)
    assert same(tagged.decode(json.loads(text)), {size * sign: size * sign})


def test_the_deepest_tree_that_is_taken_comes_back() -> None:
    tree: Any = 0
    for _ in range(tagged.MAX_DEPTH):
        tree = {1: tree}
    assert tagged.decode(json.loads(json.dumps(tagged.encode(tree)))) == tree
    with pytest.raises(InvalidPiece, match="nested deeper than 100 levels"):
        tagged.encode([tree])
