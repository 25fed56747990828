"""Documents that are nearly the same: MinHash signatures, bands, and which document of each family stays. Pure.

A document is the set of its *shingles*, runs of `ngram` words. The share of equal values in the MinHash signatures of
two documents estimates the Jaccard similarity of their sets (Broder, "On the resemblance and containment of documents",
1997). A signature is cut into bands, and documents that agree in a whole band are candidates (Leskovec, Rajaraman and
Ullman, "Mining of Massive Datasets", section 3.4); as is usual for text, every candidate counts as a near-duplicate.
Families are the connected components, and the document with the lowest place of each stays.

**Specification** (`NEAR_VERSION` 1, held by test vectors):

- words: the text's bytes with ASCII letters made small, split at ASCII white space; `w` is a word's 64-bit XXH3;
- a shingle's hash: from 0, for each of its words `h = mix(h * 0x9E3779B97F4A7C15 + w)`, modulo 2**64, with `mix` as in
  `data.order`; a text with fewer than `ngram` words is one shingle, and one without words has none, and no twin;
- value `i` of the signature: the upper 32 bits of the least `mix(h ^ derive_key("minhash", i))` of all shingles;
- key of band `j` with `r` values: the 64-bit XXH3 of `j` and the values `[j * r, (j + 1) * r)`, as little-endian words
  of 64 and 32 bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from functools import lru_cache

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import xxhash

from elastictrain.data.order import derive_key
from elastictrain.data.preparing.plan import Range
from elastictrain.data.preparing.rows import Words, mixed

NEAR_VERSION = 1
_GAMMA = np.uint64(0x9E3779B97F4A7C15)
_AT_ONCE = 1 << 8  # shingles: their values for all permutations stay in a processor's cache
_GRID = 64  # steps of similarity between 0 and 1

Signatures = npt.NDArray[np.uint32]


@lru_cache
def bands_for(threshold: float, permutations: int) -> tuple[int, int]:
    """Return (bands, values of each) for which the fewest pairs are judged wrongly at a threshold.

    A pair of similarity `s` agrees in a band with probability `1 - (1 - s**r)**b`. Above the threshold what is missing
    to 1 is wrong, below it all of it; both are summed over similarities, in whole numbers, so that every machine
    chooses the same. Of two choices that are equally good the one with fewer values is taken.
    """
    best: tuple[Fraction, int, int] | None = None
    for rows in range(1, permutations + 1):
        for bands in {permutations // rows, max(1, permutations // rows // 2), 1}:
            wrong = 0
            for step in range(1, _GRID):
                missed = (_GRID**rows - step**rows) ** bands
                wrong += missed if step >= threshold * _GRID else _GRID ** (rows * bands) - missed
            found = (Fraction(wrong, _GRID ** (rows * bands)), rows * bands, rows)
            best = found if best is None or found < best else best
    assert best is not None, "there is at least one permutation"
    return best[1] // best[2], best[2]


def shingles_of(text: bytes, ngram: int) -> Words:
    """Return the hashes of a text's shingles, shape [shingles]; with repetitions."""
    words = np.asarray([xxhash.xxh3_64_intdigest(word) for word in text.lower().split()], dtype=np.uint64)
    count = max(0, len(words) - ngram + 1) or min(1, len(words))
    found = np.zeros(count, dtype=np.uint64)
    with np.errstate(over="ignore"):  # arithmetic modulo 2**64
        for at in range(min(ngram, len(words))):
            found = mixed(found * _GAMMA + words[at : at + count])
    return found


def signatures_of(texts: pa.ChunkedArray, ngram: int, permutations: int) -> tuple[Signatures, npt.NDArray[np.bool_]]:
    """Return (signatures, shape [texts, permutations]; which texts have one, shape [texts]). A null has none."""
    keys = _keys(permutations)
    found = np.full((len(texts), permutations), 0xFFFFFFFF, dtype=np.uint32)
    has = np.zeros(len(texts), dtype=bool)
    for row, text in enumerate(pc.fill_null(texts.cast(pa.large_binary()), b"").to_pylist()):
        shingles = shingles_of(text, ngram)
        has[row] = len(shingles) > 0
        for start in range(0, len(shingles), _AT_ONCE):
            values = mixed(shingles[start : start + _AT_ONCE, None] ^ keys).min(axis=0) >> np.uint64(32)
            np.minimum(found[row], values.astype(np.uint32), out=found[row])
    return found, has


def band_keys(signatures: Signatures, bands: int, rows: int) -> Words:
    """Return the keys of the bands of each signature; shape [signatures, bands]."""
    content = np.ascontiguousarray(signatures, dtype="<u4")
    found = np.empty((len(content), bands), dtype=np.uint64)
    for band in range(bands):
        head = band.to_bytes(8, "little")
        values = np.ascontiguousarray(content[:, band * rows : (band + 1) * rows])
        found[:, band] = [xxhash.xxh3_64_intdigest(head + one.tobytes()) for one in values]
    return found


def pairs_of(keys: Words, places: Words) -> Words:
    """Return [pairs, 2]: of places that share a key, the lowest one and each of the others; sorted, each once."""
    order = np.lexsort((places, keys))
    keys, places = keys[order], places[order]
    if not len(keys):
        return np.zeros((0, 2), dtype=np.uint64)
    begins = np.concatenate([[True], keys[1:] != keys[:-1]])
    lowest = places[np.flatnonzero(begins)][np.cumsum(begins) - 1]
    pairs = np.stack([lowest, places], axis=1)[lowest != places]
    return np.asarray(np.unique(pairs, axis=0), dtype=np.uint64)


def those_that_go(pairs: Words) -> Words:
    """Return the places of all that are connected by pairs, but the lowest one of each family; ascending."""
    if not len(pairs):
        return np.zeros(0, dtype=np.uint64)
    places, numbers = np.unique(pairs, return_inverse=True)
    one, other = numbers.reshape(-1, 2).T
    label = np.arange(len(places))
    while True:  # labels only fall; where nothing falls any more, they are the same in each family
        least = np.minimum(label[one], label[other])
        found = label.copy()
        for ends in (one, other, label[one], label[other]):
            np.minimum.at(found, ends, least)
        found = found[found]
        if np.array_equal(found, label):
            return np.asarray(places[label != np.arange(len(places))], dtype=np.uint64)
        label = found


def is_among(places: Words, ascending: Words) -> npt.NDArray[np.bool_]:
    """Return which places are among others that are sorted; shape [places]."""
    if not len(ascending):
        return np.zeros(len(places), dtype=bool)
    at = np.minimum(np.searchsorted(ascending, places), len(ascending) - 1)
    return np.asarray(ascending[at] == places)


def cut_slots(slots: int, count: int) -> tuple[Range, ...]:
    """Cut slots into at most `count` ranges of about as many."""
    count = max(1, min(slots, count))
    edges: Sequence[int] = [slots * number // count for number in range(count + 1)]
    return tuple((edges[number], edges[number + 1]) for number in range(count))


@lru_cache
def _keys(permutations: int) -> Words:
    return np.asarray([derive_key("minhash", number) for number in range(permutations)], dtype=np.uint64)
