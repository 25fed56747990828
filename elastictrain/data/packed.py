"""A source of text, packed: decoding one block into rows, where a row's tokens lie, and the batch of it."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from elastictrain.data.batch_types import BatchTypes
from elastictrain.data.best_fit import (
    Layout,
    Pieces,
    cut_documents,
    fill,
    ids_of_joined,
    lay_out,
    lay_out_tails,
    positions_and_mask,
)
from elastictrain.data.buffers import of_batches
from elastictrain.data.byte_tokens import BYTE_TOKENS, TOKENS, checksum_of_widened, narrow, widen
from elastictrain.data.index import BlockFormat, TokenIndex, checksum_of, encode_documents, read_texts
from elastictrain.data.locate import TailMap
from elastictrain.data.meter import timed
from elastictrain.data.packing import TAIL_BLOCK_ROWS, Tails, TokenArray, pack_tails, rows_of_block
from elastictrain.data.tokenizers import BytesTokenizer, Tokenizer
from elastictrain.errors import DataError

if TYPE_CHECKING:
    from elastictrain.data_settings import Data

Arrays = dict[str, npt.NDArray[Any]]
DOCUMENT_IDS = "document_ids"
POSITION_IDS = "position_ids"
LOSS_MASK = "loss_mask"
INTEGERS = frozenset({TOKENS, DOCUMENT_IDS, POSITION_IDS})
"""What of a batch has the types of `data.batch_dtype`."""
_WIDE = BatchTypes()

Piece = tuple[int, tuple[int, int] | None, tuple[int, int]]
"""(block, rows of it if they are known, tokens of it)"""


class PackedText:
    """The rows of a source of text: those of the files' blocks first, then blocks of packed tails."""

    def __init__(self, spec: Data, blocks: BlockFormat, tokenizer: Tokenizer, index: TokenIndex, tails: Tails) -> None:
        self._spec, self._blocks, self._tokenizer, self._index, self._tails = spec, blocks, tokenizer, index, tails
        self.width = int(spec.sequence_length or 0) + 1
        self._tail_map: TailMap | None = None
        self._tail_layout: Layout | None = None
        self._last_layout: tuple[int, Layout] | None = None

    def read_block(self, block: int) -> Arrays:
        """Decode a block, as `Source.read_block`."""
        own = len(self._blocks.blocks)
        if block >= own:
            return self._tail_block(block - own)
        if not self._has_ids:
            return self._joined(block)
        tokens, starts = self._documents(block)
        if self._spec.packing == "best_fit":
            layout = lay_out(cut_documents(starts, self.width), self.width, keep_tail=True)
            filled, ids = fill(tokens, layout, self.width, self._tokenizer.end_of_document)
            return {TOKENS: filled, DOCUMENT_IDS: ids}
        whole = len(tokens) // self.width * self.width
        ids = ids_of_joined(starts[starts < whole], whole, self.width, len(tokens))
        return {TOKENS: rows_of_block(tokens, self.width - 1), DOCUMENT_IDS: ids}

    def _tail_block(self, number: int) -> Arrays:
        rows = self._tails.block(number)
        if self._tails.ids is not None:
            return {TOKENS: rows, DOCUMENT_IDS: self._tails.block_ids(number)}
        narrowed = narrow(rows) if isinstance(self._tokenizer, BytesTokenizer) else None
        return {TOKENS: rows} if narrowed is None else {BYTE_TOKENS: narrowed}

    def _joined(self, block: int) -> Arrays:
        texts = read_texts(self._blocks, block, str(self._spec.text_column))
        if isinstance(self._tokenizer, BytesTokenizer):
            with timed("tokenise"):
                narrowed = self._tokenizer.join(texts)
                # Text with the byte that stands for the end of a document in it has other tokens than these.
                is_right = self._is_of(block, narrowed)
            if is_right:
                return {BYTE_TOKENS: rows_of_block(narrowed, self.width - 1)}
        with timed("tokenise"):
            tokens = self._tokenizer.encode(texts)
        self._check(block, checksum_of(tokens))
        return {TOKENS: rows_of_block(tokens, self.width - 1)}

    def _is_of(self, block: int, narrowed: npt.NDArray[np.uint8]) -> bool:
        """Whether tokens in a byte each are those of a block."""
        known = self._index.byte_checksum
        if known is None:
            return checksum_of_widened(narrowed) == int(self._index.checksum[block])
        return checksum_of(narrowed) == int(known[block])

    def pieces(self, block: int, row: int) -> list[Piece]:
        """Say which tokens of which blocks a row consists of."""
        own = len(self._blocks.blocks)
        if self._spec.packing == "best_fit":
            return self._pieces_of_best_fit(block, row)
        if block < own:
            return [(block, None, (row * self.width, (row + 1) * self.width))]
        if self._tail_map is None:
            self._tail_map = TailMap.of(self._index.tokens, self.width - 1)
        first = ((block - own) * TAIL_BLOCK_ROWS + row) * self.width
        return [(home, None, (start, stop)) for home, start, stop in self._tail_map.pieces(first, first + self.width)]

    @property
    def _has_ids(self) -> bool:
        return self._spec.document_ids or self._spec.packing == "best_fit"

    def _documents(self, block: int) -> tuple[TokenArray, npt.NDArray[np.int64]]:
        """Return a block's tokens and where its documents begin."""
        tokens, starts, _ = encode_documents(self._blocks, block, str(self._spec.text_column), self._tokenizer)
        self._check(block, checksum_of(tokens))
        return tokens, starts

    def _check(self, block: int, checksum: int) -> None:
        if checksum != int(self._index.checksum[block]):
            raise DataError(
                f"{self._blocks.where(block)}: its text is not what was there when the run opened it, or the tokenizer "
                f"gives other tokens than then ({self._tokenizer.name}). Data must not be written to while a run reads "
                "them: restore the file or the tokenizer's version, or write to a new data.path"
            )

    def _pieces_of_best_fit(self, block: int, row: int) -> list[Piece]:
        """A row's pieces follow from the lengths of the documents, which the index does not hold: read for it."""
        own = len(self._blocks.blocks)
        if block < own:
            layout = self._layout(block)
            mine = layout.pieces.take(np.flatnonzero(layout.row == row))
            return [_piece(block, mine, i) for i in range(len(mine.start))]
        if self._tail_layout is None:
            self._tail_layout = lay_out_tails(self._index.tail_lengths, self.width)
        ends = np.cumsum(self._index.tail_pieces)
        found = []
        for number in self._tail_layout.pieces.document[
            self._tail_layout.row == (block - own) * TAIL_BLOCK_ROWS + row
        ].tolist():
            home = int(np.searchsorted(ends, number, side="right"))
            before = number - int(ends[home] - self._index.tail_pieces[home])
            found.append(_piece(home, self._layout(home).tail, before))
        return found

    def _layout(self, block: int) -> Layout:
        if self._last_layout is None or self._last_layout[0] != block:
            _, starts = self._documents(block)
            self._last_layout = (block, lay_out(cut_documents(starts, self.width), self.width, keep_tail=True))
        return self._last_layout[1]


def _piece(block: int, pieces: Pieces, i: int) -> Piece:
    document, start = int(pieces.document[i]), int(pieces.start[i])
    return block, (document, document + 1), (start, start + int(pieces.length[i]))


def _as_type(name: str, rows: npt.NDArray[Any], types: BatchTypes) -> tuple[str, npt.NDArray[Any]]:
    """Return an array of a batch in its type; what has it already, or the same bits, is not copied."""
    kind = types.places if name == DOCUMENT_IDS else types.tokens
    if name != BYTE_TOKENS and rows.dtype.kind in "iu" and rows.dtype.itemsize == kind.itemsize:
        return name, rows.view(kind)
    found = of_batches.empty(rows.shape, kind)
    if name != BYTE_TOKENS:
        np.copyto(found, rows, casting="unsafe")
        return name, found
    widen(rows, found)
    return TOKENS, found


def finish_rows(batch: Arrays, length: int | None = None, types: BatchTypes = _WIDE) -> Arrays:
    """Turn packed rows, {"tokens": [rows, S + 1]} and maybe "document_ids" of that shape, into a batch of `types`; the
    rows are its own. The tokens may be those that are kept in a byte each (`data.byte_tokens`).

    `length`: cut every row into rows of so many targets; it divides S. Neighbours share a token, the last target of
    the one and the first input of the other: so the shorter rows hold the same pairs of input and target as the long
    one. With document ids come "position_ids" [rows, S] and "loss_mask" [rows, S], see `positions_and_mask`.
    """
    if length is not None:
        pieces = (next(iter(batch.values())).shape[1] - 1) // length
        places = np.arange(pieces)[:, None] * length + np.arange(length + 1)
        batch = {name: rows[:, places].reshape(-1, length + 1) for name, rows in batch.items()}
    batch = dict(_as_type(name, rows, types) for name, rows in batch.items())
    if DOCUMENT_IDS in batch:
        positions, mask = positions_and_mask(batch[DOCUMENT_IDS])
        batch[POSITION_IDS], batch[LOSS_MASK] = positions.astype(types.places, copy=False), mask
    return batch


def pack_all_tails(spec: Data, index: TokenIndex, end_of_document: int) -> Tails:
    width = int(spec.sequence_length or 0) + 1
    if spec.packing == "best_fit":
        rows, ids = fill(index.tails, lay_out_tails(index.tail_lengths, width), width, end_of_document)
        return Tails(rows, rows.size - len(index.tails), ids)
    tails = pack_tails(index.tails, width - 1, end_of_document)
    if not spec.document_ids:
        return tails
    starts = np.cumsum([0, *index.tail_lengths[:-1].tolist()]) if len(index.tails) else np.zeros(0, dtype=np.int64)
    return replace(tails, ids=ids_of_joined(starts, tails.rows.size, width, len(index.tails)))
