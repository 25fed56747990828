"""Tokenizers: `bytes`, a Hugging Face `tokenizers` JSON file, or what `elastictrain data prepare` has tokenised.

A tokenizer turns a column of documents into one array of tokens, every document followed by the
end-of-document token; an empty or null document gives that token alone.
"""

from __future__ import annotations

import hashlib
import json
from itertools import pairwise
from typing import Any, Protocol

import fsspec
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from elastictrain.data.buffers import of_blocks
from elastictrain.data.byte_tokens import END_OF_DOCUMENT, STANDS_FOR_END
from elastictrain.data.columns import is_documents, own_copy
from elastictrain.data.packing import TokenArray
from elastictrain.errors import DataError

# Names that widely used vocabularies give to the end of a document, the most specific first.
END_OF_DOCUMENT_NAMES = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "[SEP]")


_LONG_DOCUMENT_BYTES = 2048
"""From this length on, on average, a copy for each document is cheaper than a mask over all tokens."""


class Tokenizer(Protocol):
    """What a source needs of a tokenizer."""

    name: str
    fingerprint: str  # changes whenever any document could give other tokens
    vocabulary_size: int  # all tokens are below this, the end of a document included
    end_of_document: int

    def encode(self, documents: pa.ChunkedArray) -> TokenArray:
        """Return the tokens of all documents in order; shape [tokens]."""

    def encode_with_offsets(self, documents: pa.ChunkedArray) -> tuple[TokenArray, npt.NDArray[np.int64]]:
        """Return `encode`'s tokens, and where every document begins; shape [documents + 1], the last is the end."""


class BytesTokenizer:
    """UTF-8 bytes as tokens 0 … 255, the end of a document as 256; one pass over Arrow's buffers."""

    name = "bytes"
    fingerprint = "bytes-1"
    vocabulary_size = END_OF_DOCUMENT + 1
    end_of_document = END_OF_DOCUMENT

    def encode(self, documents: pa.ChunkedArray) -> TokenArray:
        """Return uint16 tokens; see the class."""
        return self.encode_with_offsets(documents)[0]

    def encode_with_offsets(self, documents: pa.ChunkedArray) -> tuple[TokenArray, npt.NDArray[np.int64]]:
        """See `Tokenizer`."""
        data, starts = self._bytes_of(documents)
        tokens: npt.NDArray[np.uint16] = of_blocks.take(2 * int(starts[-1])).view(np.uint16)
        _fill(tokens, data, starts[1:] - 1, self.end_of_document)
        return tokens, starts

    def join(self, documents: pa.ChunkedArray) -> npt.NDArray[np.uint8]:
        """Return `encode`'s tokens in a byte each (see `data.byte_tokens`). With the byte in the documents that stands
        for the end of one they are others, which their checksum tells: nobody looks for it here.
        """
        column = _one_array(documents)
        data, starts = _data_of(column)
        if not len(column):
            return np.zeros(0, dtype=np.uint8)
        if len(data) >= _LONG_DOCUMENT_BYTES * len(column):
            return _join_long(data, starts)
        column = column.cast(pa.large_binary())
        # One call for all documents: a copy for each would wait for the interpreter's lock each time, where another
        # thread makes batches meanwhile.
        whole = pa.LargeListArray.from_arrays(_from_numpy(pa.int64(), 2, np.array([0, len(column)])), column)
        joined = pc.binary_join(whole, _SEPARATOR)[0].as_buffer()
        tokens = of_blocks.take(joined.size + 1)
        tokens[:-1] = np.frombuffer(joined, dtype=np.uint8) if joined.size else 0
        tokens[-1] = STANDS_FOR_END
        return tokens

    def _bytes_of(self, documents: pa.ChunkedArray) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]]:
        """Return the joined bytes of all documents, and where each begins once an end follows every one of them."""
        column = _one_array(documents)
        data, starts = _data_of(column)
        return data, starts + np.arange(len(column) + 1)


def _join_long(data: npt.NDArray[np.uint8], starts: npt.NDArray[np.int64]) -> npt.NDArray[np.uint8]:
    """Documents in a byte each, as `join`, by a copy for each into memory that is used again: Arrow's call takes fresh
    memory, which costs several times as much. A copy of a memoryview does not give the interpreter's lock away, as
    NumPy's does, so nobody waits for it each time.
    """
    count = len(starts) - 1
    tokens = of_blocks.take(len(data) + count)
    source, target = data.data, tokens.data
    for number, (first, last) in enumerate(pairwise(starts.tolist())):
        target[first + number : last + number] = source[first:last]
    tokens[starts[1:] + np.arange(count)] = STANDS_FOR_END
    return tokens


def _from_numpy(kind: pa.DataType, length: int, *buffers: npt.NDArray[Any]) -> pa.Array:
    """An array without nulls. (`pa.array` and `pa.scalar` import pandas to look for its types, where it is installed: a
    third of a second of every worker's start.)
    """
    return pa.Array.from_buffers(kind, length, [None, *map(pa.py_buffer, buffers)])


_SEPARATOR = _from_numpy(pa.large_binary(), 1, np.array([0, 1]), np.array([STANDS_FOR_END], dtype=np.uint8))[0]


_WIDTHS = {pa.string(): np.int32, pa.binary(): np.int32, pa.large_string(): np.int64, pa.large_binary(): np.int64}
"""Of the offsets of texts."""


def _one_array(documents: pa.ChunkedArray) -> pa.Array:
    """Return documents as one array of texts or bytes without nulls, those being empty."""
    if documents.num_chunks == 1 and not documents.null_count and documents.type in _WIDTHS:
        return documents.chunk(0)  # a cast copies
    column = documents.cast(pa.large_binary())
    if column.null_count:  # what lies under a null is no text
        column = pc.fill_null(column, b"")
    column = column.combine_chunks()
    if isinstance(column, pa.ChunkedArray):  # an empty chunked array stays chunked in some versions
        column = pa.concat_arrays(column.chunks) if column.num_chunks else pa.array([], pa.large_binary())
    return column


def _data_of(column: pa.Array) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]]:
    """Return the bytes of all documents, a view, and where each begins in them and the last one ends."""
    count = len(column)
    if count == 0:
        return np.zeros(0, dtype=np.uint8), np.zeros(1, dtype=np.int64)
    _, offsets_buffer, data_buffer = column.buffers()
    offsets = np.frombuffer(offsets_buffer, dtype=_WIDTHS[column.type])[column.offset : column.offset + count + 1]
    first, last = int(offsets[0]), int(offsets[-1])
    data = np.frombuffer(data_buffer, dtype=np.uint8)[first:last] if last > first else np.zeros(0, np.uint8)
    return data, offsets.astype(np.int64) - first


def _fill(
    tokens: npt.NDArray[np.uint16],
    data: npt.NDArray[np.uint8],
    ends: npt.NDArray[np.int64],
    end_of_document: int,
) -> None:
    """Write the bytes of all documents as tokens, each document followed by its end, which lie at `ends`."""
    if len(data) < _LONG_DOCUMENT_BYTES * len(ends):
        is_byte = np.ones(len(tokens), dtype=bool)
        is_byte[ends] = False
        tokens[is_byte] = data
    else:  # a copy for each document: it touches no memory but that of the tokens
        begin = 0
        for number, end in enumerate(ends.tolist()):
            tokens[begin:end] = data[begin - number : end - number]
            begin = end + 1
    tokens[ends] = end_of_document


class HuggingFaceTokenizer:
    """A `tokenizers` JSON file. Special tokens are not added; truncation and padding are switched off.

    The end of a document is the first of `END_OF_DOCUMENT_NAMES` that the vocabulary has; if it has none,
    a token is added behind the vocabulary.
    """

    def __init__(self, path: str, storage_options: dict[str, Any]) -> None:
        try:
            from tokenizers import Tokenizer as RustTokenizer
        except ImportError as error:
            raise DataError(
                f"data.tokenizer is {path!r}, a tokenizers file, but the package 'tokenizers' is not installed. "
                "Install it with: pip install 'elastictrain[tokenizers]', or set data.tokenizer: bytes"
            ) from error
        content = _read_tokenizer_file(path, storage_options)
        try:
            self._tokenizer = RustTokenizer.from_buffer(content)
        except Exception as error:  # the package raises bare Exception
            raise DataError(
                f"data.tokenizer: {path!r} is not a Hugging Face tokenizers JSON file ({error}). "
                "Expected a file written by Tokenizer.save, usually called tokenizer.json"
            ) from error
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        vocabulary: dict[str, int] = self._tokenizer.get_vocab(with_added_tokens=True)
        size = max(vocabulary.values(), default=-1) + 1
        known = [vocabulary[name] for name in END_OF_DOCUMENT_NAMES if name in vocabulary]
        self.end_of_document = known[0] if known else size
        self.vocabulary_size = max(size, self.end_of_document + 1)
        self.name = path
        self.fingerprint = "huggingface-1-" + hashlib.sha256(content).hexdigest()

    def encode(self, documents: pa.ChunkedArray) -> TokenArray:
        """Return int32 tokens; see the class."""
        return self.encode_with_offsets(documents)[0]

    def encode_with_offsets(self, documents: pa.ChunkedArray) -> tuple[TokenArray, npt.NDArray[np.int64]]:
        """See `Tokenizer`."""
        found = documents.to_pylist()
        texts = [text.decode("utf-8") if isinstance(text, bytes) else text or "" for text in found]
        encodings = self._tokenizer.encode_batch(texts, add_special_tokens=False)
        end = np.asarray([self.end_of_document], dtype=np.int32)
        parts = [part for e in encodings for part in (np.asarray(e.ids, dtype=np.int32), end)]
        starts = np.zeros(len(texts) + 1, dtype=np.int64)
        np.cumsum([len(e.ids) + 1 for e in encodings], out=starts[1:])
        return (np.concatenate(parts) if parts else np.zeros(0, dtype=np.int32)), starts


class StoredTokens:
    """Documents that are lists of tokens already, each with its end of document (`elastictrain data prepare`)."""

    def __init__(self, path: str, record: dict[str, Any]) -> None:
        """`record`: what `tokens_record` gave. Raises DataError if it is not whole."""
        try:
            self.vocabulary_size, self.end_of_document = int(record["vocabulary_size"]), int(record["end_of_document"])
            self.fingerprint = "stored-1-" + str(record["fingerprint"])
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(f"data.tokenizer: {path!r} is damaged ({error!r}); prepare the data again") from error
        self.name = path

    def encode(self, documents: pa.ChunkedArray) -> TokenArray:
        """Return the tokens as they are stored; see the class."""
        return self.encode_with_offsets(documents)[0]

    def encode_with_offsets(self, documents: pa.ChunkedArray) -> tuple[TokenArray, npt.NDArray[np.int64]]:
        """See `Tokenizer`. Raises DataError for tokens that are not of this tokenizer."""
        if not is_documents(documents.type):
            raise DataError(
                f"data.text_column has type {documents.type}, and data.tokenizer {self.name} says that it holds "
                "tokens; expected lists of whole numbers, as `elastictrain data prepare` writes them"
            )
        if documents.null_count:
            raise DataError(f"{documents.null_count} null(s) among documents that are tokenised already")
        parts = [chunk.flatten() for chunk in documents.chunks]
        if nulls := sum(part.null_count for part in parts):
            raise DataError(f"{nulls} null(s) among the tokens of documents that are tokenised already")
        tokens = np.zeros(0, dtype=np.int32)
        if parts:
            tokens = own_copy([np.asarray(part) for part in parts])
        starts = np.zeros(len(documents) + 1, dtype=np.int64)
        np.cumsum(np.asarray(pc.list_value_length(documents)), out=starts[1:])
        last = tokens[starts[1:] - 1] if len(tokens) else tokens
        if len(documents) and (not np.diff(starts).all() or (last != self.end_of_document).any()):
            raise DataError(
                f"a document does not end with token {self.end_of_document}; data.tokenizer {self.name} is not the one "
                "that these tokens were made with"
            )
        lowest = int(tokens.min()) if len(tokens) and tokens.dtype.kind != "u" else 0
        if len(tokens) and not 0 <= lowest <= int(tokens.max()) < self.vocabulary_size:
            raise DataError(
                f"tokens from {tokens.min()} to {tokens.max()}, but data.tokenizer {self.name} has "
                f"{self.vocabulary_size}; it is not the one that these tokens were made with"
            )
        return tokens, starts


def tokens_record(tokenizer: Tokenizer) -> dict[str, Any]:
    """Return what `StoredTokens` must know of the tokenizer that the tokens were made with; JSON."""
    return {
        _STORED: 1,
        "fingerprint": tokenizer.fingerprint,
        "vocabulary_size": tokenizer.vocabulary_size,
        "end_of_document": tokenizer.end_of_document,
    }


_STORED = "elastictrain_tokens"


def _stored(content: bytes) -> dict[str, Any] | None:
    if _STORED.encode() not in content[:256]:
        return None
    try:
        found = json.loads(content)
    except ValueError:
        return None
    return found if isinstance(found, dict) and _STORED in found else None


def _read_tokenizer_file(path: str, storage_options: dict[str, Any]) -> bytes:
    try:
        with fsspec.open(path, "rb", **storage_options) as file:
            content: bytes = file.read()
    except (OSError, ValueError) as error:
        raise DataError(
            f"data.tokenizer: {path!r} could not be read ({error}). "
            "Expected 'bytes' or the path of a Hugging Face tokenizers JSON file"
        ) from error
    return content


def load_tokenizer(name: str, storage_options: dict[str, Any] | None = None) -> Tokenizer:
    """Return the tokenizer that `data.tokenizer` names.

    Raises DataError: the file is missing or is no tokenizers file, or the package is not installed.
    """
    if name == "bytes":
        return BytesTokenizer()
    stored = _stored(_read_tokenizer_file(name, storage_options or {}))
    return HuggingFaceTokenizer(name, storage_options or {}) if stored is None else StoredTokens(name, stored)
