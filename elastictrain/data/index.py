"""The index of a source: where its blocks are, how much each holds, and the tails of packing.

Making it may take a pass over all the data, so it is kept in `$XDG_CACHE_HOME/elastictrain`, keyed by what it
was made from. The cache is only ever a shortcut: a file that is broken, or cannot be written, is not an error.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import tempfile
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import xxhash

from elastictrain.data.columns import Schema
from elastictrain.data.packing import TokenArray, tail_of_block
from elastictrain.data.tokenizers import Tokenizer

INDEX_VERSION = 1

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


class BlockFormat(Protocol):
    """A file format that is read block by block."""

    blocks: BlockTable
    schema: Schema  # of the columns that are read

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
    checksum: npt.NDArray[np.uint64]  # of each block's tokens
    tails: TokenArray
    null_documents: int


def encode_block(source: BlockFormat, block: int, text_column: str, tokenizer: Tokenizer) -> tuple[TokenArray, int]:
    """Return a block's tokens and its number of null documents (which count as empty ones)."""
    column = read_texts(source, block, text_column)
    return tokenizer.encode(column), column.null_count


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
    source: BlockFormat, text_column: str, tokenizer: Tokenizer, sequence_length: int, progress: Progress | None
) -> TokenIndex:
    """Tokenise every block once; keep counts, checksums and tails."""
    count = len(source.blocks)
    tokens = np.zeros(count, dtype=np.int64)
    checksum = np.zeros(count, dtype=np.uint64)
    tails: list[TokenArray] = []
    nulls = 0
    for block in range(count):
        encoded, null_count = encode_block(source, block, text_column, tokenizer)
        tokens[block], checksum[block] = len(encoded), checksum_of(encoded)
        tails.append(tail_of_block(encoded, sequence_length).copy())
        nulls += null_count
        if progress:
            progress("counting tokens", block + 1, count)
    joined = np.concatenate(tails) if tails else np.zeros(0, dtype=np.int32)
    return TokenIndex(tokens, checksum, joined, nulls)


def cache_path(key: Any) -> Path:
    """Return the cache file of a JSON-able key."""
    digest = hashlib.sha256(json.dumps([INDEX_VERSION, key], sort_keys=True).encode()).hexdigest()
    base = os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser()
    return Path(base) / "elastictrain" / f"index-{digest[:32]}.npz"


def load_cached(path: Path) -> tuple[dict[str, npt.NDArray[Any]], dict[str, Any]] | None:
    """Return the arrays and the notes of a cache file; None if there is none or it is broken."""
    try:
        # A zip: reading a member checks its CRC. Opened here, because np.load leaks the handle of a broken file.
        with path.open("rb") as handle, np.load(handle, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
        notes = json.loads(arrays.pop("notes").tobytes())
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        _log.warning("The index cache %s is broken (%s) and is made again", path, error)
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
                np.savez(file, allow_pickle=False, **content)
            Path(temporary).replace(path)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise
    except OSError as error:
        _log.warning("The index cache %s cannot be written (%s); it is made anew by every worker", path, error)
