"""The chunk table of a manifest: where each element of each tensor lies, checked for exact tiling. Pure.

Columns are NumPy arrays, so that a hundred thousand chunks are checked and searched without a loop per chunk, whether
they come from the JSON of the manifest or from the Arrow table beside it (see `elastictrain_checkpoint.sidecar`).
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import overload

import numpy as np

from elastictrain_checkpoint.boxes import Ints, first_overlap
from elastictrain_checkpoint.dtypes import item_bytes, num_elements
from elastictrain_checkpoint.part import FileRecord, TensorRecord


@dataclass(frozen=True, eq=False)
class Columns:
    """Tensors and chunks as they were written, unchecked.

    Attributes:
        names, dtypes: of each tensor, names ascending.
        shape_bounds, shape: the shape of tensor ``i`` is ``shape[shape_bounds[i]:shape_bounds[i + 1]]``.
        tensor, file, start: tensor number, file number and first byte of each chunk; chunks of a tensor together.
        offsets_bounds, offsets, sizes_bounds, sizes: boxes of the chunks, in the same way as shapes.

    """

    names: list[str]
    dtypes: list[str]
    shape_bounds: Ints
    shape: Ints
    tensor: Ints
    file: Ints
    start: Ints
    offsets_bounds: Ints
    offsets: Ints
    sizes_bounds: Ints
    sizes: Ints

    def shapes(self) -> list[tuple[int, ...]]:
        """Shape of each tensor."""
        flat = self.shape.tolist()
        return [tuple(flat[begin:end]) for begin, end in itertools.pairwise(self.shape_bounds.tolist())]

    def box_of(self, row: int) -> tuple[list[int], list[int]]:
        """Box of one chunk."""
        return (
            self.offsets[self.offsets_bounds[row] : self.offsets_bounds[row + 1]].tolist(),
            self.sizes[self.sizes_bounds[row] : self.sizes_bounds[row + 1]].tolist(),
        )


@dataclass(frozen=True, eq=False)
class Boxes(Sequence[tuple[list[int], list[int]]]):
    """(offsets, sizes) of each chunk in the order of a table; made when they are asked for."""

    columns: Columns
    order: Ints

    def __len__(self) -> int:
        return len(self.order)

    @overload
    def __getitem__(self, row: int) -> tuple[list[int], list[int]]: ...
    @overload
    def __getitem__(self, row: slice) -> list[tuple[list[int], list[int]]]: ...
    def __getitem__(self, row: int | slice) -> tuple[list[int], list[int]] | list[tuple[list[int], list[int]]]:
        if isinstance(row, slice):
            return [self.columns.box_of(int(at)) for at in self.order[row]]
        return self.columns.box_of(int(self.order[row]))

    def corners(self, rows: Ints, ndim: int) -> tuple[Ints, Ints]:
        """Offsets and sizes of these rows, all of which have ``ndim`` dimensions. Shape [rows, ndim]."""
        at, axes = self.order[rows], np.arange(ndim)
        return (
            self.columns.offsets[self.columns.offsets_bounds[at][:, None] + axes],
            self.columns.sizes[self.columns.sizes_bounds[at][:, None] + axes],
        )

    def heights(self, rows: Ints) -> Ints:
        """Size of the first dimension of each of these rows; 1 for a scalar."""
        at = self.order[rows]
        first, end = self.columns.sizes_bounds[at], self.columns.sizes_bounds[at + 1]
        out = np.ones(len(at), dtype=np.int64)
        out[first < end] = self.columns.sizes[first[first < end]]
        return out


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
    boxes: Boxes

    def __len__(self) -> int:
        return len(self.tensor)

    def tensors_in(self, file: int, start: int, stop: int) -> tuple[str, ...]:
        """Names of the tensors with bytes in [start, stop) of a file, sorted."""
        hit = (self.file == file) & (self.start < stop) & (self.start + self.size_bytes > start)
        return tuple(sorted({self.names[i] for i in self.tensor[hit]}))


def check_records(tensors: Mapping[str, TensorRecord]) -> None:
    """Refuse records that JSON would give back as something else. Those that come from JSON need it not.

    Raises:
        ValueError: names or types that are no text, numbers that are no plain whole ones, or a chunk of the wrong
            length.

    """
    records = tensors.values()
    numbers: list[Sequence[int]] = [record.shape for record in records]
    for file, start, offsets, sizes in itertools.chain.from_iterable(record.chunks for record in records):
        numbers += ((file, start), offsets, sizes)
    found = set(map(type, itertools.chain.from_iterable(numbers)))
    texts = {*map(type, tensors), *(type(record.dtype) for record in records)}
    if not found <= {int} or not texts <= {str}:
        said = sorted(kind.__name__ for kind in {*found, *texts})
        raise ValueError(f"tensors are described by {', '.join(said)}; expected nothing but int and str")


def columns_of(tensors: Mapping[str, TensorRecord]) -> Columns:
    """Tensor records as columns."""
    names = sorted(tensors)
    records = [tensors[name] for name in names]
    chunks = [chunk for record in records for chunk in record.chunks]
    counts = np.array([len(record.chunks) for record in records], dtype=np.int64)
    return Columns(
        names,
        [record.dtype for record in records],
        *_ragged([record.shape for record in records]),
        np.repeat(np.arange(len(names), dtype=np.int64), counts),
        np.array([chunk[0] for chunk in chunks], dtype=np.int64),
        np.array([chunk[1] for chunk in chunks], dtype=np.int64),
        *_ragged([chunk[2] for chunk in chunks]),
        *_ragged([chunk[3] for chunk in chunks]),
    )


def _ragged(rows: Sequence[Sequence[int]]) -> tuple[Ints, Ints]:
    """(bounds, values) of rows of different lengths."""
    bounds = np.zeros(len(rows) + 1, dtype=np.int64)
    np.cumsum([len(row) for row in rows], out=bounds[1:])
    return bounds, np.fromiter(itertools.chain.from_iterable(rows), dtype=np.int64, count=int(bounds[-1]))


def build_table(tensors: Mapping[str, TensorRecord], files: Sequence[FileRecord]) -> ChunkTable:
    """Check every chunk and every tensor, and build the table.

    Raises:
        ValueError: a chunk outside its file or tensor, a gap, an overlap; the message names the tensor.
        InvalidPiece: an unknown dtype or an impossible shape.

    """
    return table_of(columns_of(tensors), files)


def table_of(columns: Columns, files: Sequence[FileRecord]) -> ChunkTable:
    """As `build_table`, from columns."""
    names = columns.names
    shapes = columns.shapes()
    known = {shape: num_elements(shape) for shape in set(shapes)}  # most tensors have a shape of many
    counts = np.array([known[shape] for shape in shapes], dtype=np.int64)
    _check_ranks(columns)
    flat_start, flat_stop, volume = _geometry(columns)
    widths = {dtype: item_bytes(dtype) for dtype in set(columns.dtypes)}
    items = np.array([widths[dtype] for dtype in columns.dtypes], dtype=np.int64)
    size_bytes = volume * items[columns.tensor] if len(names) else volume
    order = np.lexsort((flat_start, columns.tensor))
    table = ChunkTable(
        names=names,
        bounds=np.searchsorted(columns.tensor[order], np.arange(len(names) + 1)),
        tensor=columns.tensor[order],
        file=columns.file[order],
        start=columns.start[order],
        size_bytes=size_bytes[order],
        flat_start=flat_start[order],
        flat_stop=flat_stop[order],
        dense=(flat_stop - flat_start == volume)[order],
        boxes=Boxes(columns, order),
    )
    _check_files(table, files)
    _check_tiling(table, counts)
    return table


def _check_ranks(columns: Columns) -> None:
    ndims = np.diff(columns.shape_bounds)[columns.tensor]
    wrong = (np.diff(columns.offsets_bounds) != ndims) | (np.diff(columns.sizes_bounds) != ndims)
    if wrong.any():
        row = int(np.argmax(wrong))
        name, (offsets, sizes) = columns.names[columns.tensor[row]], columns.box_of(row)
        raise ValueError(f"{name}: chunk {offsets} {sizes} has not the {ndims[row]} dimensions of its tensor")


def _geometry(columns: Columns) -> tuple[Ints, Ints, Ints]:
    """First element, one past the last, and number of elements of each chunk; a pass per number of axes."""
    tensor = columns.tensor
    flat_start, flat_stop, volume = (np.zeros(len(tensor), dtype=np.int64) for _ in range(3))
    ndims = np.diff(columns.shape_bounds)[tensor]
    for ndim in np.unique(ndims):
        rows = np.flatnonzero(ndims == ndim)
        axes = np.arange(ndim)
        # A dimension may be long, a product of several may not overflow: sizes are checked against shapes
        # first, and a shape has at most 2^56 elements.
        shape = columns.shape[columns.shape_bounds[tensor[rows]][:, None] + axes]
        offsets = columns.offsets[columns.offsets_bounds[rows][:, None] + axes]
        sizes = columns.sizes[columns.sizes_bounds[rows][:, None] + axes]
        step = np.ones_like(shape)
        step[:, :-1] = np.cumprod(shape[:, :0:-1], axis=1)[:, ::-1]
        bad = (sizes > shape - offsets).any(axis=1) | (offsets < 0).any(axis=1) | (sizes < 0).any(axis=1)
        empty = (sizes == 0).any(axis=1) & (shape > 0).all(axis=1)
        if (bad | empty).any():
            at = int(np.argmax(bad | empty))
            name = columns.names[tensor[rows[at]]]
            what = "is empty" if not bad.any() else "lies outside"
            raise ValueError(
                f"{name}: chunk at {offsets[at].tolist()} of {sizes[at].tolist()} {what} of shape {shape[at].tolist()}"
            )
        volume[rows] = sizes.prod(axis=1)
        flat_start[rows] = (offsets * step).sum(axis=1)
        last = ((offsets + sizes - 1) * step).sum(axis=1)
        flat_stop[rows] = np.where(volume[rows] > 0, last + 1, flat_start[rows])
    return flat_start, flat_stop, volume


def _check_files(table: ChunkTable, files: Sequence[FileRecord]) -> None:
    wrong = (table.file >= len(files)) | (table.file < 0)
    if not wrong.any() and len(table):
        begin = np.array([file.data_start for file in files], dtype=np.int64)[table.file]
        end = np.array([file.size_bytes for file in files], dtype=np.int64)[table.file]
        wrong = (table.start < begin) | (table.start + table.size_bytes > end)
    if wrong.any():
        row = int(np.argmax(wrong))
        number = int(table.file[row])
        where = (
            f"file {number} of {len(files)}"
            if not 0 <= number < len(files)
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
    found = [table.boxes[row] for row in rows]
    offsets = np.array([box[0] for box in found], dtype=np.int64)
    sizes = np.array([box[1] for box in found], dtype=np.int64)
    pair = first_overlap(offsets, sizes)
    if pair is not None:
        one, two = (f"{offsets[i].tolist()}+{sizes[i].tolist()}" for i in pair)
        raise ValueError(f"{table.names[number]}: chunks {one} and {two} overlap")
    held = int(sizes.prod(axis=1).sum())
    if held != count:
        raise ValueError(f"{table.names[number]}: chunks hold {held} of {count} elements, the rest is in none")
