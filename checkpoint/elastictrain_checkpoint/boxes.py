"""Flat ranges and boxes: the geometry of a row-major tensor. Pure.

Owners hold flat runs of elements (ZeRO, FSDP1, ragged blocks), files hold boxes (offsets, sizes), because
every reader in the field understands boxes. A flat run is at most ``2 * ndim - 1`` boxes: the ragged end of
a row, whole rows, the ragged start of a row, and so on inwards. Each of them is again one flat run.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from elastictrain_checkpoint.errors import InvalidPiece

Ints = NDArray[np.int64]
Box = tuple[tuple[int, ...], tuple[int, ...]]
"""(offsets, sizes), one of each per dimension; ((), ()) is the whole of a scalar."""


def flat_range_to_boxes(shape: Sequence[int], start: int, stop: int) -> list[Box]:
    """Cut the row-major element range [start, stop) of a tensor of ``shape`` into boxes, in flat order.

    The decomposition is the one that ByteCheckpoint uses for flat FSDP and ZeRO shards. The whole of an
    empty tensor is one empty box, so that it has a place in a file; an empty range of a non-empty tensor is
    no box at all.

    Raises:
        InvalidPiece: the range does not lie in the tensor.

    """
    count = math.prod(shape)
    if not 0 <= start <= stop <= count:
        raise InvalidPiece(f"elements [{start}, {stop}) do not lie in shape {list(shape)} ({count} elements)")
    if count == 0:
        return [((0,) * len(shape), tuple(shape))]
    return _cut(tuple(shape), start, stop)


def _cut(shape: tuple[int, ...], start: int, stop: int) -> list[Box]:
    if start == stop:
        return []
    if not shape:
        return [((), ())]
    inner = math.prod(shape[1:])
    row, head = divmod(start, inner)
    end, tail = divmod(stop, inner)
    if row == end:
        return _in_row(row, _cut(shape[1:], head, tail))
    boxes: list[Box] = []
    if head:
        boxes += _in_row(row, _cut(shape[1:], head, inner))
        row += 1
    if row < end:
        boxes.append(((row, *(0,) * (len(shape) - 1)), (end - row, *shape[1:])))
    return boxes + _in_row(end, _cut(shape[1:], 0, tail))


def _in_row(row: int, boxes: list[Box]) -> list[Box]:
    return [((row, *offsets), (1, *sizes)) for offsets, sizes in boxes]


def strides(shape: Sequence[int]) -> tuple[int, ...]:
    """Row-major strides in elements."""
    out, step = [], 1
    for dim in reversed(shape):
        out.append(step)
        step *= dim
    return tuple(reversed(out))


def box_runs(shape: Sequence[int], offsets: Sequence[int], sizes: Sequence[int]) -> tuple[Ints, int]:
    """Flat starts of the longest contiguous runs of a box, in the order of its bytes, and the length of
    each run.

    A box of a tensor-parallel shard ([0:512, 64:128]) is one run per row; a box made from a flat range is
    one run.
    """
    step = strides(shape)
    axis = len(shape)
    run = 1
    while axis > 0 and (axis == len(shape) or sizes[axis] == shape[axis]):
        axis -= 1
        run *= sizes[axis]
    starts = np.zeros(1, dtype=np.int64)
    for dim in range(axis):
        along = (offsets[dim] + np.arange(sizes[dim], dtype=np.int64)) * step[dim]
        starts = (starts[:, None] + along[None, :]).ravel()
    return starts + sum(offsets[dim] * step[dim] for dim in range(axis, len(shape))), run


def first_overlap(offsets: Ints, sizes: Ints) -> tuple[int, int] | None:
    """Numbers of two boxes that share an element, or None. Shapes [n, ndim]; a sweep along dimension 0."""
    if offsets.shape[1] == 0:
        return (0, 1) if len(offsets) > 1 else None
    filled = np.flatnonzero((sizes > 0).all(axis=1))
    order = filled[np.argsort(offsets[filled, 0], kind="stable")]
    starts, ends = offsets[order], (offsets + sizes)[order]
    reach = np.searchsorted(starts[:, 0], ends[:, 0], side="left")
    for i in range(len(order)):
        j = slice(i + 1, int(reach[i]))
        hit = ((starts[j] < ends[i]) & (ends[j] > starts[i])).all(axis=1)
        if hit.any():
            return int(order[i]), int(order[i + 1 + int(np.argmax(hit))])
    return None
