"""Bytes as tokens: long and short documents the same way, and memory that is used again only when nobody has it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from elastictrain.data import tokenizers
from elastictrain.data.tokenizers import Buffers, BytesTokenizer

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


def address(array: np.ndarray[Any, Any]) -> int:
    return int(array.__array_interface__["data"][0])


def test_memory_is_used_again_once_every_view_of_it_has_gone() -> None:
    buffers = Buffers()
    first = buffers.take(1000)
    where, view = address(first), first.view(np.uint16)[100:].reshape(2, -1)[1]
    del first
    other = buffers.take(1000)
    assert address(other) != where, "a view of it is in use"
    del view
    again = buffers.take(990)
    assert address(again) == where
    again[:] = 1
    other[:] = 2
    assert set(again.tolist()) == {1}


def test_memory_that_does_not_fit_is_not_used_and_little_lies_free() -> None:
    buffers = Buffers(kept=2)
    several = [buffers.take(1000) for _ in range(4)]
    several.clear()
    assert len(buffers._free) == 2
    assert len(buffers.take(5000)) == 5000
    small = buffers.take(10)
    assert small.nbytes == 10
    assert small.base is not None
    assert len(small.base) < 1000, "a small array does not keep a large one"


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
