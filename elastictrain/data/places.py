"""From a place in the files to the samples that hold it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from elastictrain.data.columns import nearest
from elastictrain.data.index import read_texts
from elastictrain.errors import DataError

if TYPE_CHECKING:
    from elastictrain.data.source import Source


def find_block(source: Source, file: str, row_group: int) -> int:
    """Return the block of a row group. Raises DataError that names what there is."""
    names = [entry.name for entry in source._files.files]
    paths = [entry.path for entry in source._files.files]
    if file not in names and file not in paths:
        raise DataError(
            f"file {file!r} is not one of the data's{nearest(file, names)}; they are called as {names[0]!r}"
        )
    number = names.index(file) if file in names else paths.index(file)
    table = source._blocks.blocks
    found = np.flatnonzero((table.file == number) & (table.number == row_group))
    if not len(found):
        there = int((table.file == number).sum())
        raise DataError(f"{file}: no row group {row_group}; it has {there}, counted from 0")
    return int(found[0])


def samples_with(source: Source, block: int, rows: tuple[int, int] | None) -> list[tuple[int, int, int]]:
    """Return (block, first sample, end) of all samples with something of rows `[first, end)` of a row group in them.

    `rows` None: of all of it. Documents are found by reading the row group; in a packed source a row may be in the
    middle of several samples, and its last tokens among the packed tails. Raises DataError for rows that are not there.
    """
    table = source._blocks.blocks
    first, end = rows or (0, int(table.rows[block]))
    if not 0 <= first < end <= int(table.rows[block]):
        raise DataError(
            f"{source._blocks.where(block)}: got rows {first} to {end - 1}; it has rows 0 to "
            f"{int(table.rows[block]) - 1}"
        )
    if source._tokenizer is None:
        return [(block, first, end)]
    texts = read_texts(source._blocks, block, str(source.spec.text_column))
    _, starts = source._tokenizer.encode_with_offsets(texts)
    span = (int(starts[first]), int(starts[end]))
    own = len(table)
    counts = source.order.block_rows
    candidates = [block, *range(own, len(counts))]
    found: list[tuple[int, int, int]] = []
    for candidate in candidates:
        for row in range(int(counts[candidate])):
            parts = source.location(candidate, row).parts
            if not any(
                p.block == block and p.tokens and p.tokens[0] < span[1] and span[0] < p.tokens[1] for p in parts
            ):
                continue
            if found and found[-1][0] == candidate and found[-1][2] == row:
                found[-1] = (candidate, found[-1][1], row + 1)
            else:
                found.append((candidate, row, row + 1))
    return found
