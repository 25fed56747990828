"""The index of a source: where its blocks are, how much each holds, and the tails of packing.

Making it may take a pass over all the data, so it is kept in `$XDG_CACHE_HOME/elastictrain`, keyed by what it
was made from. The cache is only ever a shortcut: a file that is broken, or cannot be written, is not an error.
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
import os
import tempfile
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import xxhash

from elastictrain.data.best_fit import cut_documents, gather, lay_out
from elastictrain.data.byte_tokens import narrow
from elastictrain.data.columns import Schema, is_documents, is_text
from elastictrain.data.meter import timed
from elastictrain.data.packing import TokenArray, tail_of_block
from elastictrain.data.tokenizers import BytesTokenizer, StoredTokens, Tokenizer
from elastictrain.errors import DataError, DataMismatch, StoreFailed

INDEX_VERSION = 2

Progress = Callable[[str, int, int], None]
"""Called as `progress(what, done, total)` while the index is made."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class BlockTable:
    """The blocks of a source in file order; every field has shape [blocks]."""

    file: npt.NDArray[np.int64]  # number of the file
    number: npt.NDArray[np.int64]  # number of the block in its file
    rows: npt.NDArray[np.int64]
    start: npt.NDArray[np.int64]  # byte range in the file (JSON lines) or [0, size of the row group)
    stop: npt.NDArray[np.int64]
    checksum: npt.NDArray[np.uint64]  # of the block's bytes (JSON lines) or of the file's footer (Parquet)

    def __len__(self) -> int:
        return len(self.rows)

    @classmethod
    def of(cls, entries: list[tuple[int, int, int, int, int, int]]) -> BlockTable:
        """Make a table of (file, number, rows, start, stop, checksum) entries."""
        file, number, rows, start, stop, checksum = zip(*entries, strict=True) if entries else ((),) * 6
        int64 = [np.asarray(column, dtype=np.int64) for column in (file, number, rows, start, stop)]
        return cls(int64[0], int64[1], int64[2], int64[3], int64[4], np.asarray(checksum, dtype=np.uint64))


class Hole(NamedTuple):
    """Data that could not be read and are left out (`data.on_corrupt: skip`): a block of a file, or (-1) all of it."""

    file: str
    block: int
    why: str


NEVER_A_HOLE = (StoreFailed, DataMismatch)
"""Nothing is known of the content, or nothing is wrong with it: such data are not left out."""


class BlockFormat(Protocol):
    """A file format that is read block by block."""

    blocks: BlockTable
    schema: Schema  # of the columns that are read
    holes: tuple[Hole, ...]

    def read(self, block: int) -> pa.Table:
        """Return a block's columns. Raises DataError if it is corrupt or has changed."""

    def where(self, block: int) -> str:
        """Say where a block is, for error messages: its file and its row group or lines."""

    def close(self) -> None:
        """Close all files."""


@dataclass(frozen=True)
class TokenIndex:
    """What packing must know of a tokenised source; `tails` are the joined tails of all blocks."""

    tokens: npt.NDArray[np.int64]  # per block
    rows: npt.NDArray[np.int64]  # packed rows per block, without the tails
    checksum: npt.NDArray[np.uint64]  # of each block's tokens
    tails: TokenArray
    tail_lengths: npt.NDArray[np.int64]  # of the pieces of documents that the tails consist of
    tail_pieces: npt.NDArray[np.int64]  # how many of them are of each block
    null_documents: int
    byte_checksum: npt.NDArray[np.uint64] | None = None
    """Of each block's tokens in a byte each, of the tokenizer `bytes` (see `data.byte_tokens`), 0 where they cannot be
    kept so: it is found in a third of the time. None of another tokenizer, and in indexes of older versions."""

    def arrays(self) -> dict[str, npt.NDArray[Any]]:
        """Return what `restore` takes, with the notes {"null_documents": …}."""
        return {f"token_{name}": value for name, value in vars(self).items() if isinstance(value, np.ndarray)}

    @classmethod
    def restore(cls, arrays: dict[str, npt.NDArray[Any]], notes: dict[str, Any]) -> TokenIndex:
        """Take over an index that was stored."""
        names = [n for n in cls.__dataclass_fields__ if n != "null_documents" and f"token_{n}" in arrays]
        return cls(**{name: arrays[f"token_{name}"] for name in names}, null_documents=int(notes["null_documents"]))


def encode_documents(
    source: BlockFormat, block: int, text_column: str, tokenizer: Tokenizer, max_document_bytes: int | None = None
) -> tuple[TokenArray, npt.NDArray[np.int64], int]:
    """Return a block's tokens, where its documents begin (and the last one ends), and its number of null documents.

    `max_document_bytes`: given where the index is made, and texts are checked: later their tokens' checksum tells.
    Raises DataError for a document of more bytes than that, and for one that is no UTF-8 where it must be.
    """
    column = read_texts(source, block, text_column)
    lengths = _document_bytes(column, tokenizer, source.where(block))
    longest = pc.max(lengths).as_py() or 0
    if max_document_bytes is not None and is_text(column.type):
        check_utf8(column, source.where(block))
    if max_document_bytes is not None and longest > max_document_bytes:
        row = pc.index(lengths, longest).as_py()
        raise DataMismatch(
            f"{source.where(block)}: the text in row {row} has {longest} bytes, more than data.max_document_bytes="
            f"{max_document_bytes}. Cut or remove it, or raise the limit if there is memory for it"
        )
    try:
        with timed("tokenise"):
            tokens, starts = tokenizer.encode_with_offsets(column)
    except UnicodeDecodeError as error:
        raise DataError(
            f"{source.where(block)}: a text is not valid UTF-8 ({error.reason}, byte "
            f"0x{error.object[error.start]:02x}), which the tokenizer {tokenizer.name} needs. Write the file again, or "
            "set data.tokenizer: bytes"
        ) from error
    except DataMismatch:
        raise
    except DataError as error:  # of tokens that are stored
        raise DataError(f"{source.where(block)}: {error}") from error
    return tokens, starts, column.null_count


def check_utf8(column: pa.ChunkedArray, where: str) -> None:
    """Raise DataError, beginning with `where`, for a column of strings that is not valid UTF-8; one of bytes may hold
    anything.
    """
    try:
        column.validate(full=True)
    except pa.ArrowException as error:
        raise DataError(
            f"{where}: a text is not valid UTF-8 ({_first_bad(column) or error}), as a column of strings must be, "
            "whatever the tokenizer. Write the file again (a column of bytes may hold anything, with data.tokenizer: "
            "bytes), or set data.on_corrupt: skip"
        ) from error


def _first_bad(column: pa.ChunkedArray) -> str:
    for row, value in enumerate(column.cast(pa.large_binary()).to_pylist()):
        try:
            (value or b"").decode("utf-8")
        except UnicodeDecodeError as error:
            return f"row {row}: {error.reason}, byte 0x{value[error.start]:02x}"
    return ""


def _document_bytes(column: pa.ChunkedArray, tokenizer: Tokenizer, where: str) -> pa.ChunkedArray:
    if not is_documents(column.type):
        return pc.binary_length(column.cast(pa.large_binary()))
    if not isinstance(tokenizer, StoredTokens):
        raise DataError(
            f"{where}: the documents are tokens already ({column.type}), and data.tokenizer is {tokenizer.name}; set "
            "it to the _tokenizer.json that lies beside them, or name a column of strings in data.text_column"
        )
    return pc.multiply(pc.list_value_length(column), column.type.value_type.bit_width // 8)


def read_texts(source: BlockFormat, block: int, text_column: str) -> pa.ChunkedArray:
    """Return a block's documents as strings or bytes."""
    column = source.read(block).column(text_column)
    if pa.types.is_dictionary(column.type):
        column = pa.chunked_array([chunk.dictionary_decode() for chunk in column.chunks], column.type.value_type)
    return column


def checksum_of(array: npt.NDArray[Any] | bytes) -> int:
    """Return the 64-bit XXH3 of an array's bytes."""
    return xxhash.xxh3_64_intdigest(array if isinstance(array, bytes) else np.ascontiguousarray(array).data)


def index_tokens(
    source: BlockFormat,
    text_column: str,
    tokenizer: Tokenizer,
    sequence_length: int,
    progress: Progress | None,
    *,
    packing: str = "concatenate",
    max_document_bytes: int | None = None,
) -> TokenIndex:
    """Tokenise every block once; keep counts, checksums and tails. Raises DataError for a document that is too long."""
    count, width = len(source.blocks), sequence_length + 1
    tokens, rows, pieces = (np.zeros(count, dtype=np.int64) for _ in range(3))
    checksum = np.zeros(count, dtype=np.uint64)
    byte_checksum = np.zeros(count, dtype=np.uint64) if isinstance(tokenizer, BytesTokenizer) else None
    tails: list[TokenArray] = []
    lengths: list[npt.NDArray[np.int64]] = []
    nulls = 0
    for block in range(count):
        encoded, starts, null_count = encode_documents(source, block, text_column, tokenizer, max_document_bytes)
        tokens[block], checksum[block] = len(encoded), checksum_of(encoded)
        if byte_checksum is not None and (narrowed := narrow(encoded)) is not None:
            byte_checksum[block] = checksum_of(narrowed)
        if packing == "best_fit":
            layout = lay_out(cut_documents(starts, width), width, keep_tail=True)
            tail, rows[block], tail_lengths = gather(encoded, layout.tail), layout.rows, layout.tail.length
        else:
            tail, rows[block] = tail_of_block(encoded, sequence_length), len(encoded) // width
            tail_lengths = np.diff(np.unique(np.maximum(starts, len(encoded) - len(tail))))
        tails.append(tail.copy())
        lengths.append(tail_lengths)
        pieces[block] = len(tail_lengths)
        nulls += null_count
        if progress:
            progress("counting tokens", block + 1, count)
    joined = np.concatenate(tails) if tails else np.zeros(0, dtype=np.int32)
    all_lengths = np.concatenate(lengths) if lengths else np.zeros(0, dtype=np.int64)
    return TokenIndex(tokens, rows, checksum, joined, all_lengths, pieces, nulls, byte_checksum)


def cache_path(key: Any) -> Path:
    """Return the cache file of a JSON-able key."""
    digest = hashlib.sha256(json.dumps([INDEX_VERSION, key], sort_keys=True).encode()).hexdigest()
    base = os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser()
    return Path(base) / "elastictrain" / f"index-{digest[:32]}.npz"


def load_cached(path: Path) -> tuple[dict[str, npt.NDArray[Any]], dict[str, Any]] | None:
    """Return the arrays and the notes of a cache file; None if there is none or it is broken."""
    try:
        content = path.read_bytes()
        if checksum_of(content[8:]) != int.from_bytes(content[:8], "little"):
            raise ValueError("its checksum is another one")
        with np.load(io.BytesIO(content[8:]), allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
        notes = json.loads(arrays.pop("notes").tobytes())
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        _log.warning("The index cache %s is broken (%s) and is made again", path, error)
        return None
    except SystemError as error:  # CPython before 3.12 may say so where several threads parse headers of arrays at once
        _log.info("The index cache %s could not be read (%s); the index is made again", path, error)
        return None
    return arrays, notes


def store_cached(path: Path, arrays: dict[str, npt.NDArray[Any]], notes: dict[str, Any]) -> None:
    """Write a cache file in one move; a folder that cannot be written to is only logged."""
    content = {**arrays, "notes": np.frombuffer(json.dumps(notes).encode(), dtype=np.uint8)}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=".index-", suffix=".npz")
        try:
            with os.fdopen(descriptor, "wb") as file:
                packed = io.BytesIO()
                np.savez(packed, allow_pickle=False, **content)
                file.write(checksum_of(packed.getvalue()).to_bytes(8, "little"))
                file.write(packed.getbuffer())
            Path(temporary).replace(path)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise
    except OSError as error:
        _log.warning("The index cache %s cannot be written (%s); it is made anew by every worker", path, error)
