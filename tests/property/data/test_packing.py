"""Packing loses no token, invents only the stated padding, and needs one block for one row."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
from hypothesis import given
from hypothesis import strategies as st

from elastictrain.data.packing import pack_tails, rows_of_block, rows_per_block, tail_of_block
from elastictrain.data.tokenizers import BytesTokenizer

token_blocks = st.lists(st.lists(st.integers(0, 256), max_size=60), min_size=1, max_size=8)


@given(token_blocks, st.integers(1, 17))
def test_every_token_is_in_exactly_one_row(blocks: list[list[int]], sequence_length: int) -> None:
    arrays = [np.asarray(block, dtype=np.uint16) for block in blocks]
    rows = [rows_of_block(array, sequence_length) for array in arrays]
    tails = [tail_of_block(array, sequence_length) for array in arrays]
    packed = pack_tails(np.concatenate(tails), sequence_length, 256)

    for array, row, tail in zip(arrays, rows, tails, strict=True):
        assert row.shape[1] == sequence_length + 1
        assert len(tail) <= sequence_length
        assert np.concatenate([row.ravel(), tail]).tolist() == array.tolist()
    flat = packed.rows.ravel()
    kept = len(flat) - packed.padding
    assert flat[:kept].tolist() == np.concatenate(tails).tolist()
    assert flat[kept:].tolist() == [256] * packed.padding
    assert packed.padding <= sequence_length

    counts = rows_per_block([len(array) for array in arrays], packed)
    assert counts[: len(blocks)].tolist() == [len(row) for row in rows]
    assert counts[len(blocks) :].tolist() == [len(packed.block(n)) for n in range(packed.blocks)]
    assert counts[len(blocks) :].sum() == len(packed.rows)


def test_tails_are_cut_into_blocks_without_loss() -> None:
    tails = np.arange(3 * 2500 - 1, dtype=np.int32)
    packed = pack_tails(tails, 2, -1)
    assert packed.blocks == 3
    joined = np.concatenate([packed.block(n).ravel() for n in range(packed.blocks)])
    assert joined.tolist() == [*tails.tolist(), -1]


documents = st.lists(st.one_of(st.none(), st.text(max_size=20)), max_size=12)


KINDS = {str(kind): kind for kind in (pa.string(), pa.large_string(), pa.binary(), pa.large_binary())}


@given(documents, st.none() | st.integers(0, 12), st.integers(0, 3), st.sampled_from(sorted(KINDS)))
def test_bytes_tokenizer_is_the_plain_loop(texts: list[str | None], cut: int | None, skip: int, kind: str) -> None:
    expected = [token for text in texts[skip:] for token in [*(text or "").encode(), 256]]
    array = pa.array(texts, pa.string()).cast(KINDS[kind])
    column = pa.chunked_array([array] if cut is None else [array[:cut], array[cut:]])
    got = BytesTokenizer().encode(column.slice(skip))
    assert got.dtype == np.uint16
    assert got.tolist() == expected
