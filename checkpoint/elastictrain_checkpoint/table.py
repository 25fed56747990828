"""The chunk table of a manifest: where each element of each tensor lies, checked for exact tiling. Pure.

Columns are NumPy arrays, so that tens of thousands of chunks are checked and searched without a loop per
chunk, and so that the same table can later be kept as Arrow columns.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from elastictrain_checkpoint.boxes import Ints, first_overlap, strides
from elastictrain_checkpoint.dtypes import item_bytes, num_elements
from elastictrain_checkpoint.part import FileRecord, TensorRecord


@dataclass(frozen=True, eq=False)
class ChunkTable:
    """One row per chunk, sorted by tensor and first element.

    Attributes:
        names: tensor names; `tensor` holds positions in it.
        bounds: rows of tensor ``i`` are ``bounds[i]:bounds[i + 1]``, shape [tensors + 1].
        tensor, file, start, size_bytes: tensor number, file number, first byte in the file, bytes. Shape
            [chunks].
        flat_start, flat_stop: first element and one past the last, row-major in the whole tensor. Shape
            [chunks].
        dense: whether the chunk is that whole flat run (else rows of a box, with gaps between). Shape
            [chunks].
        boxes: (offsets, sizes) of each chunk.

    """

    names: list[str]
    bounds: Ints
    tensor: Ints
    file: Ints
    start: Ints
    size_bytes: Ints
    flat_start: Ints
    flat_stop: Ints
    dense: np.ndarray[tuple[int], np.dtype[np.bool_]]
    boxes: list[tuple[list[int], list[int]]]

    def __len__(self) -> int:
        return len(self.tensor)

    def tensors_in(self, file: int, start: int, stop: int) -> tuple[str, ...]:
        """Names of the tensors with bytes in [start, stop) of a file, sorted."""
        hit = (self.file == file) & (self.start < stop) & (self.start + self.size_bytes > start)
        return tuple(sorted({self.names[i] for i in self.tensor[hit]}))


def build_table(tensors: Mapping[str, TensorRecord], files: Sequence[FileRecord]) -> ChunkTable:
    """Check every chunk and every tensor, and build the table.

    Raises:
        ValueError: a chunk outside its file or tensor, a gap, an overlap; the message names the tensor.
        InvalidPiece: an unknown dtype or an impossible shape.

    """
    names = sorted(tensors)
    counts = np.array([num_elements(tensors[name].shape) for name in names], dtype=np.int64)
    tensor, file, start, boxes = [], [], [], []
    for number, name in enumerate(names):
        ndim = len(tensors[name].shape)
        for chunk_file, chunk_start, offsets, sizes in tensors[name].chunks:
            if len(offsets) != ndim or len(sizes) != ndim:
                raise ValueError(f"{name}: chunk {offsets} {sizes} has not the {ndim} dimensions of its tensor")
            tensor.append(number)
            file.append(chunk_file)
            start.append(chunk_start)
            boxes.append((offsets, sizes))
    columns = [np.array(column, dtype=np.int64) for column in (tensor, file, start)]
    flat_start, flat_stop, volume = _geometry(names, tensors, columns[0], boxes)
    items = np.array([item_bytes(tensors[name].dtype) for name in names], dtype=np.int64)
    size_bytes = volume * items[columns[0]] if len(names) else volume
    order = np.lexsort((flat_start, columns[0]))
    table = ChunkTable(
        names=names,
        bounds=np.searchsorted(columns[0][order], np.arange(len(names) + 1)),
        tensor=columns[0][order],
        file=columns[1][order],
        start=columns[2][order],
        size_bytes=size_bytes[order],
        flat_start=flat_start[order],
        flat_stop=flat_stop[order],
        dense=(flat_stop - flat_start == volume)[order],
        boxes=[boxes[i] for i in order],
    )
    _check_files(table, files)
    _check_tiling(table, counts)
    return table


def _geometry(
    names: Sequence[str],
    tensors: Mapping[str, TensorRecord],
    tensor: Ints,
    boxes: Sequence[tuple[list[int], list[int]]],
) -> tuple[Ints, Ints, Ints]:
    """First element, one past the last, and number of elements of each chunk; a pass per number of axes."""
    flat_start, flat_stop, volume = (np.zeros(len(boxes), dtype=np.int64) for _ in range(3))
    ndims = np.array([len(offsets) for offsets, _ in boxes], dtype=np.int64)
    for ndim in np.unique(ndims):
        rows = np.flatnonzero(ndims == ndim)
        # A dimension may be long, a product of several may not overflow: sizes are checked against shapes
        # first, and a shape has at most 2^56 elements.
        shape, step = (
            np.array(kind, dtype=np.int64).reshape(len(rows), ndim)
            for kind in (
                [tensors[names[tensor[row]]].shape for row in rows],
                [strides(tensors[names[tensor[row]]].shape) for row in rows],
            )
        )
        offsets = np.array([boxes[int(row)][0] for row in rows], dtype=np.int64).reshape(len(rows), ndim)
        sizes = np.array([boxes[int(row)][1] for row in rows], dtype=np.int64).reshape(len(rows), ndim)
        bad = (sizes > shape - offsets).any(axis=1)
        empty = (sizes == 0).any(axis=1) & (shape > 0).all(axis=1)
        if (bad | empty).any():
            row = rows[int(np.argmax(bad | empty))]
            name = names[tensor[row]]
            what = "is empty" if not bad.any() else "lies outside"
            raise ValueError(
                f"{name}: chunk at {boxes[row][0]} of {boxes[row][1]} {what} of shape {tensors[name].shape}"
            )
        volume[rows] = sizes.prod(axis=1)
        flat_start[rows] = (offsets * step).sum(axis=1)
        last = ((offsets + sizes - 1) * step).sum(axis=1)
        flat_stop[rows] = np.where(volume[rows] > 0, last + 1, flat_start[rows])
    return flat_start, flat_stop, volume


def _check_files(table: ChunkTable, files: Sequence[FileRecord]) -> None:
    wrong = table.file >= len(files)
    if not wrong.any() and len(table):
        begin = np.array([file.data_start for file in files], dtype=np.int64)[table.file]
        end = np.array([file.size_bytes for file in files], dtype=np.int64)[table.file]
        wrong = (table.start < begin) | (table.start + table.size_bytes > end)
    if wrong.any():
        row = int(np.argmax(wrong))
        number = int(table.file[row])
        where = (
            f"file {number} of {len(files)}"
            if number >= len(files)
            else f"bytes [{table.start[row]}, {table.start[row] + table.size_bytes[row]}) of {files[number].path}, "
            f"whose data is [{files[number].data_start}, {files[number].size_bytes})"
        )
        raise ValueError(f"{table.names[table.tensor[row]]}: a chunk points outside its file: {where}")


def _check_tiling(table: ChunkTable, counts: Ints) -> None:
    """Every element in exactly one chunk.

    Dense chunks of a tensor must follow one another; a tensor with other boxes has as many elements in its
    chunks as in its shape and no two chunks that meet.
    """
    has_box = np.zeros(len(counts), dtype=np.bool_)
    has_box[table.tensor[~table.dense]] = True
    flat = np.flatnonzero(~has_box[table.tensor]) if len(table) else np.zeros(0, dtype=np.int64)
    tensor, begin, end = table.tensor[flat], table.flat_start[flat], table.flat_stop[flat]
    first = np.ones(len(flat), dtype=np.bool_)
    first[1:] = tensor[1:] != tensor[:-1]
    expected = np.zeros(len(flat), dtype=np.int64)
    expected[1:] = np.where(first[1:], 0, end[:-1])
    wrong = begin != expected
    if wrong.any():
        row = int(np.argmax(wrong))
        _refuse(table.names[tensor[row]], int(expected[row]), int(begin[row]))
    reached = np.zeros(len(counts), dtype=np.int64)
    np.maximum.at(reached, tensor, end)
    short = (reached != counts) & ~has_box
    if short.any():
        number = int(np.argmax(short))
        _refuse(table.names[number], int(reached[number]), int(counts[number]))
    for boxed in np.flatnonzero(has_box):
        _check_boxes(table, int(boxed), int(counts[boxed]))


def _refuse(name: str, expected: int, got: int) -> None:
    if got > expected:
        raise ValueError(f"{name}: elements [{expected}, {got}) are in no chunk")
    raise ValueError(f"{name}: elements from {got} on are in two chunks (the one before ends at {expected})")


def _check_boxes(table: ChunkTable, number: int, count: int) -> None:
    rows = range(int(table.bounds[number]), int(table.bounds[number + 1]))
    offsets = np.array([table.boxes[row][0] for row in rows], dtype=np.int64)
    sizes = np.array([table.boxes[row][1] for row in rows], dtype=np.int64)
    pair = first_overlap(offsets, sizes)
    if pair is not None:
        one, two = (f"{offsets[i].tolist()}+{sizes[i].tolist()}" for i in pair)
        raise ValueError(f"{table.names[number]}: chunks {one} and {two} overlap")
    held = int(sizes.prod(axis=1).sum())
    if held != count:
        raise ValueError(f"{table.names[number]}: chunks hold {held} of {count} elements, the rest is in none")
