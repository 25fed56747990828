"""Near-duplicates: signatures estimate similarity, and families are found however the work is cut."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from elastictrain.data.preparing import near
from elastictrain.data.preparing.near import (
    band_keys,
    bands_for,
    cut_slots,
    is_among,
    pairs_of,
    shingles_of,
    signatures_of,
    those_that_go,
)

PLACES = st.integers(0, 40)
PAIRS = st.lists(st.tuples(PLACES, PLACES), max_size=60)


def words_of(values: list[int]) -> np.ndarray:
    return np.asarray(values, dtype=np.uint64)


def signed(*texts: str, ngram: int = 1, permutations: int = 512) -> np.ndarray:
    return signatures_of(pa.chunked_array([pa.array(texts)]), ngram, permutations)[0]


@given(st.integers(1, 60), st.integers(0, 60), st.integers(0, 60))
def test_equal_values_estimate_the_similarity_of_sets(common: int, mine: int, other: int) -> None:
    both = [f"both{n}" for n in range(common)]
    one = " ".join([*both, *(f"mine{n}" for n in range(mine))])
    two = " ".join([*(f"other{n}" for n in range(other)), *reversed(both)])
    signatures = signed(one, two)
    estimate = float((signatures[0] == signatures[1]).mean())
    assert estimate == pytest.approx(common / (common + mine + other), abs=0.15)  # seven standard errors


@given(st.lists(st.sampled_from(["lorem", "ipsum", "dolor", "sit", "amet"]), max_size=12), st.integers(1, 4))
def test_shingles_are_runs_of_words(words: list[str], ngram: int) -> None:
    found = shingles_of(" ".join(words).encode(), ngram)
    runs = [tuple(words[at : at + ngram]) for at in range(max(1, len(words) - ngram + 1))] if words else []
    assert len(found) == len(runs)
    assert len(set(found.tolist())) == len(set(runs))
    spaced = ("\n\t " + "  ".join(word.upper() for word in words)).encode()
    assert shingles_of(spaced, ngram).tolist() == found.tolist()


@given(st.lists(st.text("ab ", max_size=30), min_size=1, max_size=5), st.integers(1, 3), st.integers(1, 9))
def test_a_signature_does_not_depend_on_company_nor_on_how_many_shingles_are_looked_at_at_once(
    texts: list[str], ngram: int, at_once: int
) -> None:
    whole, has = signatures_of(pa.chunked_array([pa.array(texts)]), ngram, 7)
    assert has.tolist() == [bool(text.split()) for text in texts]
    before, near._AT_ONCE = near._AT_ONCE, at_once
    try:
        alone = np.concatenate([signed(text, ngram=ngram, permutations=7) for text in texts])
    finally:
        near._AT_ONCE = before
    assert np.array_equal(whole, alone)
    more = signed(*texts, ngram=ngram, permutations=9)
    assert np.array_equal(more[:, :7], whole)


def families(pairs: list[tuple[int, int]]) -> list[set[int]]:
    found: list[set[int]] = []
    for pair in pairs:
        touched = [family for family in found if family & set(pair)]
        found = [family for family in found if family not in touched] + [set(pair).union(*touched)]
    return found


@given(PAIRS)
def test_of_each_family_the_lowest_one_stays(pairs: list[tuple[int, int]]) -> None:
    array = np.asarray(pairs, dtype=np.uint64).reshape(-1, 2)
    expected = sorted(place for family in families(pairs) for place in family - {min(family)})
    assert those_that_go(array).tolist() == expected
    assert those_that_go(array[::-1, ::-1]).tolist() == expected


def test_a_long_chain_is_one_family() -> None:
    places = np.random.default_rng(3).permutation(3000).astype(np.uint64)
    chain = np.stack([places[:-1], places[1:]], axis=1)
    assert those_that_go(chain).tolist() == list(range(1, 3000))


@given(st.lists(st.tuples(st.integers(0, 15), PLACES), max_size=60), st.integers(1, 16))
def test_pairs_are_of_places_that_share_a_key_and_ranges_of_keys_find_them_all(
    held: list[tuple[int, int]], cuts: int
) -> None:
    keys, places = (words_of([one[i] for one in held]) for i in range(2))
    expected = {
        (min(p for k, p in held if k == key), place)
        for key, place in held
        if place != min(p for k, p in held if k == key)
    }
    assert {tuple(pair) for pair in pairs_of(keys, places).tolist()} == expected
    ranges = cut_slots(16, cuts)
    assert [slot for first, end in ranges for slot in range(first, end)] == list(range(16))
    parts = [pairs_of(keys[mine], places[mine]) for first, end in ranges for mine in [(keys >= first) & (keys < end)]]
    assert those_that_go(np.concatenate(parts)).tolist() == those_that_go(pairs_of(keys, places)).tolist()


@given(st.lists(PLACES), st.lists(PLACES, unique=True))
def test_membership(places: list[int], others: list[int]) -> None:
    assert is_among(words_of(places), words_of(sorted(others))).tolist() == [place in others for place in places]


@given(st.integers(5, 95), st.integers(1, 256))
def test_bands_fit_into_a_signature(percent: int, permutations: int) -> None:
    bands, rows = bands_for(percent / 100, permutations)
    assert bands >= 1
    assert rows >= 1
    assert bands * rows <= permutations
    signatures = signed("a b c", "a b d", "a b c", permutations=permutations)
    keys = band_keys(signatures, bands, rows)
    assert keys.shape == (3, bands)
    assert keys[0].tolist() == keys[2].tolist()
    agree = [bool((signatures[0, b * rows : (b + 1) * rows] == signatures[1, b * rows : (b + 1) * rows]).all())
             for b in range(bands)]  # fmt: skip
    assert (keys[0] == keys[1]).tolist() == agree


@pytest.mark.parametrize("percent", [30, 50, 60, 70, 80, 90])
def test_bands_tell_similarities_apart(percent: int) -> None:
    bands, rows = bands_for(percent / 100, 128)

    def found(similarity: float) -> float:
        return float(1 - (1 - similarity**rows) ** bands)

    assert found(percent / 100 + 0.5 * (1 - percent / 100)) > 0.8
    assert found(percent / 200) < 0.15


SHINGLES = ["570709e275bb5d74", "2408ecc7bf49e3d0", "9a4df92506b4ab1c", "f0e4849fdf48061b"]
SIGNATURE = ["1fd809f5", "406b723a", "2588a076", "46764460"]
KEYS = ["c02a61972678d6ef", "47e6114eecff33f9"]
BANDS = [(25, 5), (9, 14), (5, 24)]


def test_vectors_of_the_specification() -> None:
    assert [f"{one:016x}" for one in shingles_of(b"To be,  or NOT to be", 3).tolist()] == SHINGLES
    signatures = signed("To be, or not to be", ngram=3, permutations=4)
    assert [f"{one:08x}" for one in signatures[0].tolist()] == SIGNATURE
    assert [f"{one:016x}" for one in band_keys(signatures, 2, 2)[0].tolist()] == KEYS
    assert [bands_for(threshold, 128) for threshold in (0.5, 0.8, 0.9)] == BANDS
