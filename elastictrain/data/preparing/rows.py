"""Keys of rows: what decides their order, and which of them are the same. Pure.

Every row has a *place*, the number of its block and its own number in it (as a sample id, see `data.ids`), a *key* of
64 bits, by which rows are sorted, and a *twin* of 64 bits. Without deduplication the key is a hash of seed and place.
With it, key and twin together are a hash of 128 bits of the seed and the text: equal texts have equal keys, so they
meet in one slot, next to each other, and the one with the lowest place stays. (BLAKE2b with a key: two texts that
differ, and share 128 bits of it, are not to be expected, not even among texts that somebody has chosen.)
"""

from __future__ import annotations

import hashlib

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from elastictrain.data.ids import sample_ids
from elastictrain.data.order import derive_key

Words = npt.NDArray[np.uint64]

_GAMMA = np.uint64(0x9E3779B97F4A7C15)
_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2 = np.uint64(0x94D049BB133111EB)


def places_of(block: int, first: int, count: int) -> Words:
    """Return the places of the rows `[first, first + count)` of a block."""
    return sample_ids(np.full(count, block, dtype=np.int64), np.arange(first, first + count, dtype=np.int64))


def keys_of_places(seed: int, places: Words) -> Words:
    """Return a key for each place: SplitMix64's finaliser over it, twice, keyed by the seed."""
    with np.errstate(over="ignore"):  # arithmetic modulo 2**64 is what SplitMix64 asks for
        return mixed(
            mixed(places * _GAMMA + np.uint64(derive_key("prepare", seed))) + np.uint64(derive_key("again", seed))
        )


def keys_in_order(block: int, blocks: int, count: int) -> Words:
    """Return the keys of a block's rows where nothing is shuffled: they rise with the block."""
    return np.full(count, (block << 64) // max(1, blocks), dtype=np.uint64)


def keys_of_texts(seed: int, texts: pa.ChunkedArray) -> tuple[Words, Words]:
    """Return (key, twin) of every text; a null counts as an empty one. Shapes [texts]."""
    secret = derive_key("documents", seed).to_bytes(8, "little")
    found = np.empty((len(texts), 2), dtype="<u8")
    at = 0
    for chunk in pc.fill_null(texts.cast(pa.large_binary()), b"").chunks:
        offsets = np.frombuffer(chunk.buffers()[1], dtype=np.int64)[chunk.offset : chunk.offset + len(chunk) + 1]
        content = memoryview(chunk.buffers()[2] or b"")
        for start, stop in zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True):
            digest = hashlib.blake2b(content[start:stop], digest_size=16, key=secret).digest()
            found[at] = np.frombuffer(digest, dtype="<u8")
            at += 1
    words = found.astype(np.uint64)
    return np.ascontiguousarray(words[:, 0]), np.ascontiguousarray(words[:, 1])


def sorted_rows(keys: Words, twins: Words | None, places: Words) -> tuple[npt.NDArray[np.int64], int]:
    """Return (the rows in order of key, twin and place, without all but the first of each key and twin; how many
    were left out). `twins` None: no row is the same as another one.
    """
    if twins is None:
        return np.lexsort((places, keys)).astype(np.int64), 0
    order = np.lexsort((places, twins, keys)).astype(np.int64)
    if not len(order):
        return order, 0
    by_key, by_twin = keys[order], twins[order]
    is_first = np.ones(len(order), dtype=bool)
    is_first[1:] = (by_key[1:] != by_key[:-1]) | (by_twin[1:] != by_twin[:-1])
    kept = order[is_first]
    return kept, len(order) - len(kept)


def slot_edges(sorted_keys: Words, slots: int) -> npt.NDArray[np.int64]:
    """Return where each slot begins in keys that are sorted, and where the last one ends; shape [slots + 1]."""
    bits = slots.bit_length() - 1
    numbers = (sorted_keys >> np.uint64(64 - bits)) if bits else np.zeros(len(sorted_keys), dtype=np.uint64)
    return np.searchsorted(numbers, np.arange(slots + 1, dtype=np.uint64), side="left").astype(np.int64)


def mixed(z: Words) -> Words:
    """Return SplitMix64's finaliser of each word (see `data.order`)."""
    z = z ^ (z >> np.uint64(30))
    z *= _MIX_1
    shifted = z >> np.uint64(27)
    z ^= shifted
    z *= _MIX_2
    z ^= np.right_shift(z, np.uint64(31), out=shifted)
    return z
