"""Which class reads which `data.kind`, and the index of a source: made, or taken from the cache."""

from __future__ import annotations

import itertools
import logging
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq

from elastictrain.data.arrow_format import ArrowBatches
from elastictrain.data.best_fit import BEST_FIT_VERSION
from elastictrain.data.byte_format import ByteBlocks
from elastictrain.data.csv_format import CsvRecords
from elastictrain.data.files import FileSet
from elastictrain.data.index import (
    BlockFormat,
    Hole,
    Progress,
    TokenIndex,
    cache_path,
    index_tokens,
    load_cached,
    store_cached,
)
from elastictrain.data.jsonl_format import JsonLines
from elastictrain.data.packing import PACKING_VERSION
from elastictrain.data.parquet_format import ParquetFiles
from elastictrain.data.tar_format import TarSamples
from elastictrain.data.text_format import TextFiles, TextLines
from elastictrain.data.tokenizers import Tokenizer
from elastictrain.data.unpacked import with_unpacking
from elastictrain.errors import DataError

if TYPE_CHECKING:
    from elastictrain.data_settings import Data

CUT_BY_ROWS = ("jsonl", "csv", "text", "webdataset")
"""Kinds whose blocks have `rows_per_block` rows; the others have groups of their own."""

_BYTE_FORMATS: dict[str, type[ByteBlocks]] = {
    "jsonl": JsonLines,
    "csv": CsvRecords,
    "text": TextLines,
    "webdataset": TarSamples,
    "arrow": ArrowBatches,
    "huggingface": ArrowBatches,
}
_FEW_FILES = 32
_log = logging.getLogger(__name__)


def open_blocks(
    spec: Data, files: FileSet, tokenizer: Tokenizer | None, progress: Progress | None
) -> tuple[BlockFormat, TokenIndex | None]:
    """Open the format and make its index, or take it from the cache. Raises DataError; see `open_source`."""
    key: dict[str, Any] = {
        "files": [[file.path, file.size_bytes, file.version] for file in files.files],
        "kind": spec.kind,
        "document": spec.document,
        "text_column": spec.text_column,
        "columns": spec.columns,
        "on_corrupt": spec.on_corrupt,
        "rows_per_block": spec.rows_per_block if spec.kind in CUT_BY_ROWS else None,
        "tokenizer": tokenizer.fingerprint if tokenizer else None,
        "packing": [PACKING_VERSION, spec.sequence_length, spec.packing, BEST_FIT_VERSION],
        "max_document_bytes": spec.max_document_bytes,
    }
    blocks: ParquetFiles | ByteBlocks
    if spec.kind == "parquet":
        blocks = ParquetFiles(files, text_column=spec.text_column, columns=spec.columns, on_corrupt=spec.on_corrupt)
    else:
        blocks = byte_blocks(spec, files)
    if tokenizer is None and spec.kind == "parquet" and spec.on_corrupt == "stop" and len(files.files) <= _FEW_FILES:
        blocks.index(progress)  # a few footers are read as fast as the cache
        return blocks, None
    # A store that tells nothing of a file but its size could hand out an old index for new data.
    path = cache_path(key) if all(file.version for file in files.files) else None
    cached = load_cached(path) if path else None
    if cached is not None:
        blocks.restore(*cached)
        tokens = TokenIndex.restore(*cached) if tokenizer else None
    else:
        tokens = _make_index(spec, blocks, tokenizer, progress)
        arrays, notes = blocks.save()
        if tokens is not None:
            arrays, notes = arrays | tokens.arrays(), notes | {"null_documents": tokens.null_documents}
        if path:
            store_cached(path, arrays, notes)
    _tell(blocks.holes)
    return blocks, tokens


def first_schema(spec: Data, files: FileSet) -> pa.Schema:
    """Return all columns of the first block that has rows, whatever the job would read of them. Raises DataError."""
    if spec.kind == "parquet":
        with files.open(0) as handle:
            try:
                return pq.read_schema(handle)
            except (pa.ArrowException, OSError) as error:
                raise DataError(f"{files.files[0].path}: not a Parquet file ({error})") from error
    if spec.kind == "text":
        return pa.schema([("text", pa.string())])
    blocks = byte_blocks(spec.model_copy(update={"text_column": None, "columns": None}), files)
    for number in range(len(files.files)):
        for start, stop in itertools.islice(blocks.ranges(number), 1):
            table = blocks.parse(blocks.bytes_of(number, start, stop), number, start, None)
            if table.num_rows:
                return table.schema
    raise DataError(f"{files.files[0].path}: no rows in any of {len(files.files)} file(s)")


def byte_blocks(spec: Data, files: FileSet) -> ByteBlocks:
    """Return what reads the files of any format but Parquet; nothing is read yet."""
    kind = TextFiles if spec.kind == "text" and spec.document == "file" else _BYTE_FORMATS[spec.kind]
    return kind(
        with_unpacking(files, cache_path({}).parent),
        text_column=spec.text_column,
        columns=spec.columns,
        rows_per_block=spec.rows_per_block,
        on_corrupt=spec.on_corrupt,
        max_document_bytes=spec.max_document_bytes,
    )


def _make_index(
    spec: Data, blocks: ParquetFiles | ByteBlocks, tokenizer: Tokenizer | None, progress: Progress | None
) -> TokenIndex | None:
    blocks.index(progress)
    if tokenizer is None:
        return None
    return index_tokens(
        blocks,
        str(spec.text_column),
        tokenizer,
        int(spec.sequence_length or 0),
        progress,
        packing=spec.packing,
        max_document_bytes=spec.max_document_bytes,
    )


def _tell(holes: tuple[Hole, ...]) -> None:
    for hole in holes[:5]:
        what = "the whole file" if hole.block < 0 else f"block {hole.block}"
        _log.warning("Left out as corrupt (data.on_corrupt: skip): %s, %s: %s", hole.file, what, hole.why)
    if len(holes) > 5:
        _log.warning("Left out as corrupt: %d more; `describe` names all of them", len(holes) - 5)
