"""A source: the files of a job's data, their index, their order, and the decoding of one block."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from elastictrain.data.columns import Schema, stack
from elastictrain.data.files import FileSet, find_files
from elastictrain.data.fingerprint import seal_fingerprint
from elastictrain.data.index import (
    BlockFormat,
    Progress,
    TokenIndex,
    cache_path,
    checksum_of,
    encode_block,
    index_tokens,
    load_cached,
    read_texts,
    store_cached,
)
from elastictrain.data.jsonl_format import JsonLines
from elastictrain.data.locate import Part, SampleLocation, TailMap
from elastictrain.data.order import ORDER_VERSION, LaneOrder, Window
from elastictrain.data.packing import (
    PACKING_VERSION,
    TAIL_BLOCK_ROWS,
    Tails,
    pack_tails,
    rows_of_block,
    rows_per_block,
)
from elastictrain.data.parquet_format import ParquetFiles
from elastictrain.data.tokenizers import Tokenizer, load_tokenizer
from elastictrain.errors import DataError

if TYPE_CHECKING:
    from elastictrain.data_settings import Data

Arrays = dict[str, npt.NDArray[Any]]
TOKENS = "tokens"


class Source:
    """Blocks of samples in a fixed order. Made by `open_source`; not thread-safe (`LaneReader` is).

    Token mode (`data.text_column` is set): a sample is a row of `sequence_length + 1` tokens, and the blocks of
    packed tails follow the blocks of the files. Table mode: a sample is a row of the table.
    """

    def __init__(
        self,
        spec: Data,
        files: FileSet,
        blocks: BlockFormat,
        order: LaneOrder,
        *,
        tokenizer: Tokenizer | None,
        token_index: TokenIndex | None,
        tails: Tails | None,
    ) -> None:
        self.spec, self.order = spec, order
        self._files, self._blocks = files, blocks
        self._tokenizer, self._token_index, self._tails = tokenizer, token_index, tails
        self._tail_map: TailMap | None = None
        self.fingerprint: dict[str, Any] = self._make_fingerprint()

    @property
    def steps_per_epoch(self) -> int:
        return self.order.steps_per_epoch

    @property
    def samples(self) -> int:
        return self.order.samples

    @property
    def columns(self) -> Schema:
        """Name and type of the columns that are read."""
        return self._blocks.schema

    @property
    def tokenizer_fingerprint(self) -> str | None:
        """Says which tokens a text becomes; None in table mode."""
        return self._tokenizer.fingerprint if self._tokenizer else None

    @property
    def lanes(self) -> int:
        return self.order.lanes

    @property
    def vocabulary_size(self) -> int | None:
        """All tokens are below this; None in table mode."""
        return self._tokenizer.vocabulary_size if self._tokenizer else None

    @property
    def end_of_document(self) -> int | None:
        """The token that follows every document; None in table mode."""
        return self._tokenizer.end_of_document if self._tokenizer else None

    def describe(self) -> dict[str, Any]:
        """Return what a user wants to know of the source; JSON."""
        about: dict[str, Any] = {
            "kind": self.spec.kind,
            "files": len(self._files.files),
            "bytes": sum(file.size_bytes for file in self._files.files),
            "blocks": len(self._blocks.blocks),
            "rows": int(self._blocks.blocks.rows.sum()),
            "samples": self.order.samples,
            "steps_per_epoch": self.order.steps_per_epoch,
            "samples_dropped_per_epoch": self.order.dropped_per_epoch,
            "columns": dict(self._blocks.schema),
            "fingerprint": self.fingerprint["hash"],
        }
        if self._token_index is not None and self._tokenizer is not None and self._tails is not None:
            about |= {
                "tokenizer": self._tokenizer.name,
                "vocabulary_size": self._tokenizer.vocabulary_size,
                "tokens": int(self._token_index.tokens.sum()),
                "null_documents": self._token_index.null_documents,
                "tail_samples": len(self._tails.rows),
                "padding_tokens": self._tails.padding,
            }
        return about

    def read_block(self, block: int) -> Arrays:
        """Decode a block: {"tokens": [rows, sequence_length + 1]}, or every column stacked to [rows, …].

        Raises DataError: the block is corrupt, has changed since the source was opened, or cannot be stacked.
        """
        own = len(self._blocks.blocks)
        if self._tokenizer is None or self._token_index is None or self._tails is None:
            table = self._blocks.read(block)
            where = self._blocks.where(block)
            return {name: stack(table.column(name), f"{where}, column {name!r}") for name in table.column_names}
        if block >= own:
            return {TOKENS: self._tails.block(block - own)}
        tokens, _ = encode_block(self._blocks, block, str(self.spec.text_column), self._tokenizer)
        if checksum_of(tokens) != int(self._token_index.checksum[block]):
            raise DataError(
                f"{self._blocks.where(block)}: its text is not what was there when the run opened it. Data must not "
                "be written to while a run reads them: restore the file, or write to a new data.path"
            )
        return {TOKENS: rows_of_block(tokens, int(self.spec.sequence_length or 0))}

    def spans(self, step: int, lane: int) -> Iterator[tuple[Window, int, int]]:
        """Yield the windows that batch `step` of `lane` touches, each with its `[start, stop)` in the window."""
        return self.order.spans(step, lane)

    def finish(self, step: int, lane: int, batch: Arrays) -> Arrays:
        """Turn the gathered rows of a batch, arrays of its own, into what a recipe gets."""
        del step, lane
        if self._tokenizer is not None:  # embeddings and losses expect int64; windows stay narrow
            batch[TOKENS] = batch[TOKENS].astype(np.int64)
        return batch

    def locate(self, step: int, lane: int) -> list[SampleLocation]:
        """Say where every sample of batch `step` of `lane` lies, in the batch's order. Reads no data."""
        epoch, _ = self.order.locate_step(step)
        blocks, rows = self.order.samples_of(step, lane)
        return [self.location(int(b), int(r), epoch) for b, r in zip(blocks, rows, strict=True)]

    def location(self, block: int, row: int, epoch: int = 0) -> SampleLocation:
        """Say where sample `row` of `block` lies. Reads no data."""
        own = len(self._blocks.blocks)
        if self._token_index is None:
            return SampleLocation("", epoch, block, row, (self._part(block, (row, row + 1), None),))
        width = int(self.spec.sequence_length or 0) + 1
        if block < own:
            return SampleLocation("", epoch, block, row, (self._part(block, None, (row * width, (row + 1) * width)),))
        if self._tail_map is None:
            self._tail_map = TailMap.of(self._token_index.tokens, width - 1)
        first = ((block - own) * TAIL_BLOCK_ROWS + row) * width
        parts = tuple(
            self._part(b, None, (start, stop)) for b, start, stop in self._tail_map.pieces(first, first + width)
        )
        filler = width - sum(part.tokens[1] - part.tokens[0] for part in parts if part.tokens)
        return SampleLocation("", epoch, block, row, parts, filler)

    def _part(self, block: int, rows: tuple[int, int] | None, tokens: tuple[int, int] | None) -> Part:
        table = self._blocks.blocks
        return Part(self._files.files[int(table.file[block])].name, int(table.number[block]), block, rows, tokens)

    def rows_of(self, part: Part) -> tuple[int, int]:
        """Return the rows `[first, end)` of its row group that a part comes from; a packed one is read for it."""
        if part.rows is not None or part.tokens is None or self._tokenizer is None:
            assert part.rows is not None
            return part.rows
        texts = read_texts(self._blocks, part.block, str(self.spec.text_column))
        _, starts = self._tokenizer.encode_with_offsets(texts)
        first, last = np.searchsorted(starts, (part.tokens[0], part.tokens[1] - 1), side="right") - 1
        return int(first), int(last) + 1

    def where(self, block: int, row: int) -> str:
        """Say where a sample comes from."""
        own = len(self._blocks.blocks)
        if block >= own:
            return f"packed tails, block {block - own}, sample {row}"
        return f"{self._blocks.where(block)}, {'sample' if self._tokenizer else 'row'} {row}"

    def close(self) -> None:
        """Close all files."""
        self._blocks.close()

    def _make_fingerprint(self) -> dict[str, Any]:
        blocks, tokens, spec = self._blocks.blocks, self._token_index, self.spec
        files = []
        for number, file in enumerate(self._files.files):
            mine = blocks.file == number
            content = [blocks.rows[mine], blocks.stop[mine] - blocks.start[mine], blocks.checksum[mine]]
            if tokens is not None:  # what is trained on, and not how the file is compressed
                content += [tokens.tokens[mine], tokens.checksum[mine]]
            files.append(
                {
                    "name": file.name,
                    "bytes": file.size_bytes,
                    "rows": int(blocks.rows[mine].sum()),
                    "blocks": int(mine.sum()),
                    "hash": f"{checksum_of(b''.join(part.astype('<u8').tobytes() for part in content)):016x}",
                }
            )
        content_of_source = {
            "version": 1,
            "kind": spec.kind,
            "text_column": spec.text_column,
            "schema": [list(pair) for pair in self._blocks.schema],
            "rows_per_block": spec.rows_per_block if spec.kind == "jsonl" else None,
            "tokenizer": self._tokenizer.fingerprint if self._tokenizer else None,
            "packing": {"version": PACKING_VERSION, "sequence_length": spec.sequence_length}
            if self._tokenizer
            else None,
            "samples": self.order.samples,
            "lanes": self.order.lanes,
            "lane_batch_size": self.order.lane_batch_size,
            "shuffle": spec.shuffle,
            "window_row_groups": spec.window_row_groups,
            "order_version": ORDER_VERSION,
        }
        return seal_fingerprint(content_of_source, files)


def cut_rows(batch: Arrays, length: int) -> Arrays:
    """Cut packed rows, {"tokens": [rows, S + 1]}, into rows of `length` targets each; `length` divides S.

    Neighbours share a token, the last target of the one and the first input of the other: so the shorter rows hold
    the same pairs of input and target as the long one.
    """
    tokens = batch[TOKENS]
    pieces = (tokens.shape[1] - 1) // length
    places = np.arange(pieces)[:, None] * length + np.arange(length + 1)
    return {**batch, TOKENS: tokens[:, places].reshape(-1, length + 1)}


def open_source(spec: Data, *, seed: int, lanes: int, lane_batch_size: int, progress: Progress | None = None) -> Source:
    """Open a job's data: list the files, check them, make or load the index, lay down the order.

    Raises DataError: missing, empty, of the wrong schema, corrupt, a tokenizer that cannot be loaded, or fewer
    samples than one step of all lanes needs. Each message names the file and the setting to change.
    """
    files = find_files(spec.path, spec.kind, spec.storage_options)
    tokenizer = load_tokenizer(spec.tokenizer, spec.storage_options) if spec.text_column else None
    blocks, token_index = _open_blocks(spec, files, tokenizer, progress)
    rows: npt.NDArray[np.int64] = blocks.blocks.rows
    tails = None
    if not rows.sum():
        raise DataError(
            f"data.path: no rows in {len(files.files)} file(s), the first being {files.files[0].path}. "
            "Expected at least lanes x lane_batch_size samples"
        )
    if token_index is not None and tokenizer is not None:
        tails = pack_tails(token_index.tails, int(spec.sequence_length or 0), tokenizer.end_of_document)
        rows = rows_per_block(token_index.tokens, tails)
    order = LaneOrder(
        rows,
        seed=seed,
        lanes=lanes,
        lane_batch_size=lane_batch_size,
        window_blocks=spec.window_row_groups,
        shuffle=spec.shuffle == "window",
    )
    if order.steps_per_epoch == 0:
        what = f"sequences of {spec.sequence_length} tokens" if tokenizer else "rows"
        smaller = ", lower data.sequence_length" if tokenizer else ""
        raise DataError(
            f"data.path holds {order.samples} {what}; one step needs lanes x lane_batch_size = {lanes} x "
            f"{lane_batch_size} = {lanes * lane_batch_size}. Add data, lower lanes or lane_batch_size{smaller}"
        )
    return Source(spec, files, blocks, order, tokenizer=tokenizer, token_index=token_index, tails=tails)


def _open_blocks(
    spec: Data, files: FileSet, tokenizer: Tokenizer | None, progress: Progress | None
) -> tuple[BlockFormat, TokenIndex | None]:
    """Open the format and make its index, or take it from the cache."""
    blocks: ParquetFiles | JsonLines
    key: dict[str, Any] = {
        "files": [[file.path, file.size_bytes, file.version] for file in files.files],
        "kind": spec.kind,
        "text_column": spec.text_column,
        "columns": spec.columns,
        "tokenizer": tokenizer.fingerprint if tokenizer else None,
        "packing": [PACKING_VERSION, spec.sequence_length],
    }
    if spec.kind == "parquet":
        blocks = ParquetFiles(files, text_column=spec.text_column, columns=spec.columns, progress=progress)
        key["footers"] = [int(checksum) for checksum in blocks.blocks.checksum]
    else:
        blocks = JsonLines(
            files, text_column=spec.text_column, columns=spec.columns, rows_per_block=spec.rows_per_block
        )
        key["rows_per_block"] = spec.rows_per_block
    if tokenizer is None and isinstance(blocks, ParquetFiles):
        return blocks, None  # the footers are the index
    # A store that tells nothing of a file but its size could hand out an old index for new data.
    path = cache_path(key) if all(file.version for file in files.files) else None
    cached = load_cached(path) if path else None
    if cached is not None:
        arrays, notes = cached
        if isinstance(blocks, JsonLines):
            blocks.restore(arrays, notes)
        return blocks, _restore_tokens(arrays, notes) if tokenizer else None
    arrays, notes = {}, {}
    if isinstance(blocks, JsonLines):
        blocks.index(progress)
        arrays, notes = blocks.save()
    tokens = None
    if tokenizer is not None:
        tokens = index_tokens(blocks, str(spec.text_column), tokenizer, int(spec.sequence_length or 0), progress)
        arrays |= {"tokens": tokens.tokens, "token_checksum": tokens.checksum, "tails": tokens.tails}
        notes |= {"null_documents": tokens.null_documents}
    if path:
        store_cached(path, arrays, notes)
    return blocks, tokens


def _restore_tokens(arrays: Arrays, notes: dict[str, Any]) -> TokenIndex:
    return TokenIndex(arrays["tokens"], arrays["token_checksum"], arrays["tails"], int(notes["null_documents"]))
