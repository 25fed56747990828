"""Bytes as tokens: long and short documents the same way, and memory that is used again only when nobody has it."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from elastictrain.data import open_source, packed, tokenizers
from elastictrain.data.byte_tokens import BYTE_TOKENS, alike, checksum_of_widened, narrow, widen
from elastictrain.data.index import checksum_of
from elastictrain.data.tokenizers import BytesTokenizer
from elastictrain.errors import DataError
from elastictrain.job import Data

DOCUMENTS = st.lists(st.none() | st.text(max_size=20) | st.text(min_size=200, max_size=300), max_size=12)


@pytest.mark.parametrize("long_from", [0, 100, 1 << 30])
@pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), pa.binary()])
@given(documents=DOCUMENTS, cut=st.integers(0, 5))
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_tokens_are_the_bytes_and_an_end_after_each_document(
    monkeypatch: pytest.MonkeyPatch, long_from: int, kind: Any, documents: list[str | None], cut: int
) -> None:
    monkeypatch.setattr(tokenizers, "_LONG_DOCUMENT_BYTES", long_from)
    raw = [None if text is None else text.encode() for text in documents]
    chunks = pa.chunked_array([pa.array(raw, pa.binary()).cast(kind), pa.array(raw[:3], pa.binary()).cast(kind)])
    column, expected = chunks.slice(cut), [*raw, *raw[:3]][cut:]
    tokens, starts = BytesTokenizer().encode_with_offsets(column)
    assert tokens.dtype == np.uint16
    assert tokens.tolist() == [token for text in expected for token in [*(text or b""), 256]]
    assert starts.tolist() == np.cumsum([0, *(len(text or b"") + 1 for text in expected)]).tolist()
    kept = BytesTokenizer().join(column)
    assert kept.dtype == np.uint8
    assert np.array_equal(widened(kept), tokens)
    assert checksum_of_widened(kept) == checksum_of(tokens)
    whole = column.chunk(0)
    if not whole.null_count:  # not copied on the way
        part = BytesTokenizer().join(pa.chunked_array([whole]))
        assert np.array_equal(part, kept[: len(part)])
        assert len(part) == sum(len(text or b"") + 1 for text in expected[: len(whole)])


def widened(kept: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    wide = np.empty(kept.shape, dtype=np.int64)
    widen(kept, wide)
    return wide


@pytest.mark.parametrize("count", [0, 1, 65_535, (1 << 20) - 1, 1 << 20, (1 << 20) + 1])
def test_a_checksum_of_tokens_in_a_byte_each_is_that_of_the_tokens(count: int) -> None:
    tokens = (np.arange(count) % 255).astype(np.uint16)
    tokens[::1000] = 256
    kept = narrow(tokens)
    assert kept is not None
    assert checksum_of_widened(kept) == checksum_of(tokens)
    assert np.array_equal(widened(kept.reshape(-1, 1)), tokens.reshape(-1, 1))


def test_bytes_that_no_text_has_are_not_taken_for_the_end_of_a_document() -> None:
    column = pa.chunked_array([pa.array([b"ab\xff", b"c"], pa.binary())])
    tokens = BytesTokenizer().encode(column)
    assert tokens.tolist() == [97, 98, 255, 256, 99, 256]
    assert checksum_of_widened(BytesTokenizer().join(column)) != checksum_of(tokens), "it is found by that"
    assert narrow(np.asarray([1, 255], dtype=np.uint16)) is None


def test_blocks_of_both_kinds_meet_as_wide_ones() -> None:
    tokens = np.asarray([[1, 256], [256, 2]], dtype=np.uint16)
    kept = narrow(tokens)
    assert kept is not None
    one, other = {BYTE_TOKENS: kept}, {"tokens": tokens + 10}
    first, second = alike([one, other])
    assert first["tokens"].tolist() == tokens.tolist()
    assert first["tokens"].dtype == np.uint16
    assert second is other
    assert alike([one, one])[0] is one


def test_tokens_of_one_block_stay_while_the_next_ones_come() -> None:
    tokenizer = BytesTokenizer()
    columns = [pa.chunked_array([["ab" * n, "c"]]) for n in range(1, 9)]
    kept = [tokenizer.encode(column) for column in columns]
    assert [tokens.tolist() for tokens in kept] == [BytesTokenizer().encode(column).tolist() for column in columns]


@pytest.mark.parametrize("long_from", [0, 1 << 30])
def test_what_lies_under_a_null_is_no_text(monkeypatch: pytest.MonkeyPatch, long_from: int) -> None:
    monkeypatch.setattr(tokenizers, "_LONG_DOCUMENT_BYTES", long_from)
    buffers = pa.array(["abc", "hidden", "de"]).buffers()
    column = pa.chunked_array([pa.Array.from_buffers(pa.string(), 3, [pa.py_buffer(b"\x05"), *buffers[1:]])])
    assert column.to_pylist() == ["abc", None, "de"]
    tokens, starts = BytesTokenizer().encode_with_offsets(column)
    assert tokens.tolist() == [*b"abc", 256, 256, *b"de", 256]
    assert starts.tolist() == [0, 4, 5, 8]


def test_a_block_is_checked_by_its_bytes_and_with_an_older_index_by_its_tokens(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Text that looks like the end of a document in a byte each is read all the same, and other text is found."""
    documents = [[b"ab" * 40, b"c" * 50], [b"d\xffe" * 30, b"f" * 40]]
    table = pa.table({"text": pa.array([text for block in documents for text in block], pa.binary())})
    pq.write_table(table, tmp_path / "t.parquet", row_group_size=2)
    data = Data(kind="parquet", path=str(tmp_path / "t.parquet"), text_column="text", sequence_length=15)
    spies = []
    for name in ("checksum_of_widened", "checksum_of"):
        monkeypatch.setattr(packed, name, spy := Mock(side_effect=getattr(packed, name)))
        spies.append(spy)

    def tokens(*, old: bool = False, first: int | None = None) -> list[list[int]]:
        source = open_source(data, seed=1, lanes=1, lane_batch_size=1)
        index = source._packed._index
        index = replace(index, byte_checksum=None) if old else index
        if first is not None:
            index.byte_checksum[0] = index.checksum[0] = first
        source._packed._index = index
        found = [source.read_block(block) for block in range(2)]
        assert [BYTE_TOKENS in arrays for arrays in found] == [True, False]
        wide = [widened(found[0][BYTE_TOKENS]), found[1]["tokens"]]
        source.close()
        return [block.reshape(-1).tolist() for block in wide]

    expected = [[token for text in block for token in [*text, 256]] for block in documents]
    assert tokens() == [block[: len(block) // 16 * 16] for block in expected]
    assert [spy.call_count for spy in spies] == [0, 3], "the second block's bytes, and then its tokens"
    assert tokens(old=True) == tokens()
    assert spies[0].call_count == 2
    with pytest.raises(DataError, match="its text is not what was there when the run opened it"):
        tokens(first=17)


FIRST_BATCH = """
import sys
from elastictrain.data import stream
from elastictrain.job import Data
data = Data(kind="parquet", path=sys.argv[1], text_column="text", sequence_length=8, tokenizer="bytes")
next(iter(stream(data, batch_size=2)))
print("pandas" in sys.modules)
"""


def test_the_first_batch_imports_no_pandas(tmp_path: Path) -> None:
    """In a process of its own: this one has it already, or whoever wrote the file."""
    pytest.importorskip("pandas")
    pq.write_table(pa.table({"text": ["a text that is long enough"] * 40}), tmp_path / "t.parquet")
    code = [sys.executable, "-c", FIRST_BATCH, str(tmp_path / "t.parquet")]
    done = subprocess.run(code, capture_output=True, text=True, timeout=100, check=False)
    assert (done.returncode, done.stdout.strip()) == (0, "False"), done.stdout + done.stderr
