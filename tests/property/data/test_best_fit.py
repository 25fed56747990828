"""Best fit: no document crosses a row, every token is in one row, few tokens are filler."""

from __future__ import annotations

from bisect import bisect_left

import numpy as np
import numpy.typing as npt
from hypothesis import given
from hypothesis import strategies as st

from elastictrain.data.best_fit import (
    best_fit,
    cut_documents,
    fill,
    gather,
    ids_of_joined,
    lay_out,
    lay_out_tails,
    positions_and_mask,
)

document_lengths = st.lists(st.integers(1, 40), max_size=60)
Int64Array = npt.NDArray[np.int64]


def starts_of(lengths: list[int]) -> Int64Array:
    return np.cumsum([0, *lengths]).astype(np.int64)


@given(document_lengths, st.integers(1, 20))
def test_documents_are_cut_only_where_they_are_longer_than_a_row(lengths: list[int], width: int) -> None:
    pieces = cut_documents(starts_of(lengths), width)
    for number, length in enumerate(lengths):
        mine = pieces.length[pieces.document == number].tolist()
        assert mine == [width] * (length // width) + ([length % width] if length % width else [])
    assert pieces.start.tolist() == starts_of(pieces.length.tolist())[:-1].tolist(), "nothing left out, in order"


@given(st.lists(st.integers(1, 20), max_size=60))
def test_bins_are_those_of_a_plain_best_fit_decreasing(lengths: list[int]) -> None:
    """As many bins, each as full, as when bins are searched one by one."""
    bins = best_fit(np.asarray(lengths, dtype=np.int64), 20)
    rooms: list[int] = []
    for length in sorted(lengths, reverse=True):
        place = bisect_left(rooms, length)
        room = rooms.pop(place) if place < len(rooms) else 20
        rooms.insert(bisect_left(rooms, room - length), room - length)
    used = np.bincount(bins, weights=lengths).astype(int).tolist() if lengths else []
    assert sorted(used) == sorted(20 - room for room in rooms)


@given(document_lengths, st.integers(1, 20))
def test_every_token_is_in_one_row_or_in_the_tail(lengths: list[int], width: int) -> None:
    starts = starts_of(lengths)
    tokens = np.arange(starts[-1], dtype=np.int32)
    layout = lay_out(cut_documents(starts, width), width, keep_tail=True)
    rows, ids = fill(tokens, layout, width, -1)
    assert rows.shape == ids.shape == (layout.rows, width)
    assert ((ids == 0) == (rows == -1)).all()
    tail = gather(tokens, layout.tail)
    assert sorted([*rows[rows >= 0].tolist(), *tail.tolist()]) == tokens.tolist()
    assert 2 * len(tail) < width, "a row that is at least half full is made"
    assert all(2 * (row >= 0).sum() >= width for row in rows)
    first = [row[0] for row in rows.tolist()]
    assert first == sorted(first), "rows are in the order of their first documents"
    home = np.searchsorted(starts, rows, side="right")
    for row, row_ids, row_home in zip(rows, ids, home, strict=True):
        kept = row_ids > 0
        assert row_ids[kept].tolist() == sorted(row_ids[kept].tolist())
        for number in range(1, int(row_ids.max()) + 1):
            piece = row[row_ids == number]
            assert len(set(row_home[row_ids == number].tolist())) == 1, "one id, one document"
            assert piece.tolist() == list(range(piece[0], piece[0] + len(piece)))


@given(st.lists(document_lengths, max_size=5), st.integers(2, 20))
def test_tails_are_packed_without_loss(blocks: list[list[int]], width: int) -> None:
    tails, lengths = [], []
    for number, block in enumerate(blocks):
        starts = starts_of(block)
        layout = lay_out(cut_documents(starts, width), width, keep_tail=True)
        tails.append(gather(np.arange(starts[-1]) + 10_000 * number, layout.tail))
        lengths.append(layout.tail.length)
    joined = np.concatenate([np.zeros(0, dtype=np.int64), *tails])
    layout = lay_out_tails(np.concatenate([np.zeros(0, dtype=np.int64), *lengths]), width)
    rows, ids = fill(joined, layout, width, -1)
    assert len(layout.tail.length) == 0
    assert sorted(rows[rows >= 0].tolist()) == sorted(joined.tolist())
    assert (rows[ids == 0] == -1).all()


@given(document_lengths.filter(bool), st.integers(1, 12))
def test_ids_of_joined_documents_change_at_their_borders(lengths: list[int], width: int) -> None:
    starts, count = starts_of(lengths), sum(lengths)
    total = -(-count // width) * width
    ids = ids_of_joined(starts[:-1], total, width, count)
    home = np.repeat(np.arange(len(lengths)), lengths)
    for number, row in enumerate(ids.tolist()):
        mine = home[number * width : (number + 1) * width].tolist()
        assert row == [place - mine[0] + 1 for place in mine] + [0] * (width - len(mine))


@given(st.lists(st.integers(0, 3), min_size=2, max_size=30))
def test_positions_begin_anew_with_every_document(runs: list[int]) -> None:
    row = np.repeat(np.arange(1, len(runs) + 1), runs)
    ids = np.concatenate([row, np.zeros(3, dtype=np.int64)])[None]
    positions, mask = positions_and_mask(ids)
    expected = [place for run in runs for place in range(run)] + [0, 1]
    assert positions[0].tolist() == expected
    assert mask[0].tolist() == [bool(a == b and a) for a, b in zip(ids[0][:-1], ids[0][1:], strict=True)]


def test_golden_layout() -> None:
    """Runs that are resumed years later must find these rows: change them only with BEST_FIT_VERSION."""
    lengths = [5, 3, 11, 2, 8, 1, 7, 4, 3, 19, 1, 2]
    layout = lay_out(cut_documents(starts_of(lengths), 9), 9, keep_tail=True)
    rows = [[] for _ in range(layout.rows)]  # type: list[list[tuple[int, int]]]
    for row, document, length in zip(layout.row, layout.pieces.document, layout.pieces.length, strict=True):
        rows[row].append((int(document), int(length)))
    assert rows == GOLDEN_ROWS
    assert list(zip(layout.tail.document.tolist(), layout.tail.length.tolist(), strict=True)) == GOLDEN_TAIL


GOLDEN_ROWS = [
    [(0, 5), (7, 4)],
    [(1, 3), (3, 2), (5, 1), (8, 3)],
    [(2, 9)],
    [(2, 2), (6, 7)],
    [(4, 8), (9, 1)],
    [(9, 9)],
    [(9, 9)],
]
GOLDEN_TAIL: list[tuple[int, int]] = [(10, 1), (11, 2)]
