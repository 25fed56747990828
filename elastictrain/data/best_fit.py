"""Packing documents into rows without crossing their borders: best fit, decreasing. Pure: NumPy only.

The documents of one block, each with its end-of-document token, are cut into pieces of at most a row's width; the
pieces, the longest first, go to the row with the least room that still takes them. ("Fewer Truncations Improve
Language Modeling", Ding et al., arXiv 2404.10830; best fit decreasing needs at most 11/9 of the best possible number
of rows and 6 more, Johnson 1973.) Rows are then put in the order of their first documents.

What is left of a row is filler. At most one row of a block is less than half full, as two such rows would have become
one: it is the block's *tail*. The tails of all blocks are packed together, so that small blocks waste nothing either.
All this follows from the lengths of one block's documents, so any row is found by reading one block.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from elastictrain.data.packing import TokenArray

BEST_FIT_VERSION = 1

Int64Array = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Pieces:
    """Pieces of documents: tokens `[start, start + length)` of document `document`; shapes [pieces]."""

    document: Int64Array
    start: Int64Array
    length: Int64Array

    def take(self, chosen: Int64Array) -> Pieces:
        """Return some of the pieces, in that order."""
        return Pieces(self.document[chosen], self.start[chosen], self.length[chosen])


@dataclass(frozen=True)
class Layout:
    """Where pieces lie: piece `i` in row `row[i]` from column `column[i]` on; `tail` are those in no row."""

    pieces: Pieces
    row: Int64Array
    column: Int64Array
    rows: int
    tail: Pieces


def cut_documents(starts: Int64Array, width: int) -> Pieces:
    """Cut documents into pieces of at most `width` tokens; `starts` has shape [documents + 1], the last is the end."""
    lengths = np.diff(starts)
    counts = -(-lengths // width)
    document = np.repeat(np.arange(len(lengths), dtype=np.int64), counts)
    number = np.arange(len(document), dtype=np.int64) - np.repeat(np.cumsum(counts) - counts, counts)
    start = starts[document] + number * width
    return Pieces(document, start, np.minimum(width, starts[document + 1] - start))


def best_fit(lengths: Int64Array, width: int) -> Int64Array:
    """Return the bin of every piece of `lengths` (1 … width tokens), none fuller than `width`; shape [pieces].

    Among bins with the same room the one that was changed last is taken.
    """
    bins = np.zeros(len(lengths), dtype=np.int64)
    by_room: list[list[int]] = [[] for _ in range(width + 1)]
    rooms: list[int] = []  # those that some bin has, ascending
    count = 0
    order = np.argsort(-lengths, kind="stable")
    for piece, length in zip(order.tolist(), lengths[order].tolist(), strict=True):
        place = bisect_left(rooms, length)
        if place == len(rooms):
            room, chosen, count = width, count, count + 1
        else:
            room = rooms[place]
            chosen = by_room[room].pop()
            if not by_room[room]:
                del rooms[place]
        bins[piece] = chosen
        left = room - length
        if left:
            if not by_room[left]:
                insort(rooms, left)
            by_room[left].append(chosen)
    return bins


def lay_out(pieces: Pieces, width: int, *, keep_tail: bool) -> Layout:
    """Pack pieces into rows. `keep_tail`: a row that is less than half full is not made; its pieces are the tail."""
    bins = best_fit(pieces.length, width)
    count = int(bins.max()) + 1 if len(bins) else 0
    used = np.bincount(bins, weights=pieces.length, minlength=count).astype(np.int64)
    stays = (2 * used >= width) | (not keep_tail)
    in_tail = ~stays[bins] if count else np.zeros(0, dtype=bool)
    kept = pieces.take(np.flatnonzero(~in_tail))
    _, first, inverse = np.unique(bins[~in_tail], return_index=True, return_inverse=True)
    number = np.empty(len(first), dtype=np.int64)
    number[np.argsort(first, kind="stable")] = np.arange(len(first))
    row = number[inverse] if len(first) else np.zeros(0, dtype=np.int64)
    order = np.argsort(row, kind="stable")
    ends = np.cumsum(kept.length[order])
    begins = ends - kept.length[order]
    row_begins = begins[np.searchsorted(row[order], row[order])]
    return Layout(kept.take(order), row[order], begins - row_begins, len(first), pieces.take(np.flatnonzero(in_tail)))


def lay_out_tails(lengths: Int64Array, width: int) -> Layout:
    """Pack the joined tails of all blocks, whose pieces have these lengths; `document` is the number of the piece."""
    starts = np.zeros(len(lengths) + 1, dtype=np.int64)
    np.cumsum(lengths, out=starts[1:])
    return lay_out(cut_documents(starts, width), width, keep_tail=False)


def gather(tokens: TokenArray, pieces: Pieces) -> TokenArray:
    """Return the tokens of the pieces, joined; shape [sum of lengths]."""
    return tokens[_ranges(pieces.start, pieces.length)]


def fill(
    tokens: TokenArray, layout: Layout, width: int, filler: int
) -> tuple[TokenArray, npt.NDArray[np.uint16 | np.int32]]:
    """Return the rows' tokens and the number of the document in its row, from 1 on, 0 for filler; [rows, width] each.

    Pieces of one document that meet in a row are documents of their own: what came before the cut is elsewhere.
    """
    rows = np.full(layout.rows * width, filler, dtype=tokens.dtype)
    ids = np.zeros(layout.rows * width, dtype=id_dtype(width))
    targets = _ranges(layout.row * width + layout.column, layout.pieces.length)
    rows[targets] = gather(tokens, layout.pieces)
    order = np.arange(len(layout.row), dtype=np.int64)
    in_row = order - np.searchsorted(layout.row, layout.row) + 1
    ids[targets] = np.repeat(in_row, layout.pieces.length)
    return rows.reshape(-1, width), ids.reshape(-1, width)


def id_dtype(width: int) -> type[np.uint16 | np.int32]:
    """Return the narrowest type for the numbers of documents in a row; a window of them lies in memory."""
    return np.uint16 if width < 1 << 16 else np.int32


def _ranges(start: Int64Array, length: Int64Array) -> Int64Array:
    """Return `start[0], start[0]+1, …` for every range, joined."""
    ends = np.cumsum(length)
    total = int(ends[-1]) if len(ends) else 0
    places: Int64Array = np.arange(total, dtype=np.int64) + np.repeat(start - (ends - length), length)
    return places


def ids_of_joined(starts: Int64Array, total: int, width: int, tokens: int) -> npt.NDArray[np.uint16 | np.int32]:
    """Return the number of the document in its row, from 1 on, of joined documents that are cut into rows.

    `starts`: where documents begin; `total`, a multiple of `width`: how many places the rows have; those from
    `tokens` on are filler. Shape [total / width, width].
    """
    place = np.arange(total, dtype=np.int64)
    document = np.searchsorted(starts, place, side="right").reshape(-1, width)
    numbered = document - document[:, :1] + 1
    numbered[place.reshape(-1, width) >= tokens] = 0
    return numbered.astype(id_dtype(width))


def positions_and_mask(ids: npt.NDArray[np.int64]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.bool_]]:
    """Return the inputs' positions in their documents, and which of them have a target in the same document.

    `ids`: [rows, S + 1], 0 for filler; both results: [rows, S].
    """
    columns = np.arange(ids.shape[1], dtype=np.int64)
    begins = np.ones(ids.shape, dtype=bool)
    begins[:, 1:] = ids[:, 1:] != ids[:, :-1]
    positions = columns - np.maximum.accumulate(np.where(begins, columns, 0), axis=1)
    mask = (ids[:, :-1] == ids[:, 1:]) & (ids[:, :-1] > 0)
    return np.asarray(positions[:, :-1]), mask
