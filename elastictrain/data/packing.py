"""Packing documents into rows of equal length. Pure: NumPy only.

The tokens of one block (row group) are joined, every document followed by the end-of-document token, and cut
into rows of `sequence_length + 1` tokens without overlap: a row is a training sample whose inputs are its first
and whose targets are its last `sequence_length` tokens. Every token is in exactly one row. (The alternative,
rows that overlap by one token, would train on one transition more per row and use a token twice.)

The tokens left over at the end of a block, its *tail*, are kept: the tails of all blocks are joined in order
and cut in the same way into extra blocks of `TAIL_BLOCK_ROWS` rows. The very last row is filled up with
end-of-document tokens. No token is lost, and a row of a block needs that block alone: any row is found in
O(log blocks), as in Megatron-LM's sample index, but from one number per block.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

PACKING_VERSION = 1
TAIL_BLOCK_ROWS = 1024

TokenArray = npt.NDArray[np.integer[Any]]


def rows_of_block(tokens: TokenArray, sequence_length: int) -> TokenArray:
    """Cut a block's tokens, shape [n], into its full rows, shape [n // (S+1), S+1]; a view, nothing is copied."""
    width = sequence_length + 1
    rows = len(tokens) // width
    return tokens[: rows * width].reshape(rows, width)


def tail_of_block(tokens: TokenArray, sequence_length: int) -> TokenArray:
    """Return the tokens after the last full row; fewer than `sequence_length + 1`."""
    return tokens[len(tokens) - len(tokens) % (sequence_length + 1) :]


@dataclass(frozen=True)
class Tails:
    """All tails, packed: `rows` has shape [tail rows, S+1]; `padding` of their tokens are filler.

    `ids`, of the same shape, says which document of its row a token is of; None if nobody asks.
    """

    rows: TokenArray
    padding: int
    ids: npt.NDArray[Any] | None = None

    @property
    def blocks(self) -> int:
        return -(-len(self.rows) // TAIL_BLOCK_ROWS)

    def block(self, number: int) -> TokenArray:
        """Return the rows of extra block `number`; shape [at most TAIL_BLOCK_ROWS, S+1]."""
        return self.rows[number * TAIL_BLOCK_ROWS : (number + 1) * TAIL_BLOCK_ROWS]

    def block_ids(self, number: int) -> npt.NDArray[Any]:
        """Return the document ids of extra block `number`."""
        assert self.ids is not None
        return self.ids[number * TAIL_BLOCK_ROWS : (number + 1) * TAIL_BLOCK_ROWS]


def pack_tails(tails: TokenArray, sequence_length: int, end_of_document: int) -> Tails:
    """Pack the joined tails of all blocks, shape [n]."""
    width = sequence_length + 1
    padding = -len(tails) % width
    filler = np.full(padding, end_of_document, dtype=tails.dtype)
    return Tails(np.concatenate([tails, filler]).reshape(-1, width), padding)


def rows_per_block(block_tokens: Sequence[int] | npt.NDArray[np.int64], tails: Tails) -> npt.NDArray[np.int64]:
    """Return the packed rows of every block, the extra blocks of the tails last; shape [blocks + tail blocks]."""
    width = tails.rows.shape[1]
    own = np.asarray(block_tokens, dtype=np.int64) // width
    return np.concatenate([own, rows_of_tails(tails)])


def rows_of_tails(tails: Tails) -> npt.NDArray[np.int64]:
    """Return the rows of every extra block."""
    return np.asarray([len(tails.block(n)) for n in range(tails.blocks)], dtype=np.int64)
