"""What is handed on of each span of a `ReadPlan`, as slices of the span and of the buffer that it is for. Pure.

All of it is worked out in columns beforehand: a worker takes part in one hand-over for each pair of a chunk and a want,
and several numbers of Python's per hand-over would take as long as moving the bytes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from elastictrain_checkpoint.boxes import Ints
from elastictrain_checkpoint.reshard import ReadPlan
from elastictrain_checkpoint.table import ChunkTable
from elastictrain_checkpoint.wants import Want

Slices = tuple[slice, ...]


class Slab(NamedTuple):
    """A box that a span and a want share.

    Attributes:
        want: the want, a position in its worker's list.
        shape: of the whole span.
        inside: where the slab lies in the span.
        into: where it lies in the want.
        sizes: of the slab.
        run: if the slab is the whole span, and one run of the want, its first element there; else -1.

    """

    want: int
    shape: tuple[int, ...]
    inside: Slices
    into: Slices
    sizes: tuple[int, ...]
    run: int


def slabs(plan: ReadPlan, table: ChunkTable, wants: Sequence[Sequence[Want]], deliveries: Ints) -> Mapping[int, Slab]:
    """The slabs of these deliveries, by their numbers."""
    spans = plan.span[deliveries]
    rows = plan.row[spans]
    workers, places = plan.worker[deliveries].tolist(), plan.want[deliveries].tolist()
    asked = [wants[worker][place] for worker, place in zip(workers, places, strict=True)]
    ndims = np.fromiter((len(want.sizes) for want in asked), dtype=np.int64, count=len(asked))
    found: dict[int, Slab] = {}
    for ndim in np.unique(ndims).tolist():
        at = np.flatnonzero(ndims == ndim)
        offsets, sizes = table.boxes.corners(rows[at], ndim)
        if ndim:
            offsets[:, 0] += plan.low[spans[at]]
            sizes[:, 0] = (plan.high - plan.low)[spans[at]]
        these = [asked[number] for number in at.tolist()]
        theirs = np.array([want.offsets for want in these], dtype=np.int64).reshape(len(at), ndim)
        widths = np.array([want.sizes for want in these], dtype=np.int64).reshape(len(at), ndim)
        low = np.maximum(offsets, theirs)
        shared = np.minimum(offsets + sizes, theirs + widths) - low
        is_run = (shared == sizes).all(axis=1) & (shared[:, 1:] == widths[:, 1:]).all(axis=1)
        first = (low - theirs)[:, 0] * widths[:, 1:].prod(axis=1) if ndim else np.zeros(len(at), dtype=np.int64)
        columns = zip(
            deliveries[at].tolist(),
            plan.want[deliveries[at]].tolist(),
            map(tuple, sizes.tolist()),
            _slices(low - offsets, shared),
            _slices(low - theirs, shared),
            map(tuple, shared.tolist()),
            np.where(is_run, first, -1).tolist(),
            strict=True,
        )
        found.update((number, Slab(*rest)) for number, *rest in columns)
    return found


def _slices(start: Ints, sizes: Ints) -> list[Slices]:
    """For each row of corners and sizes, shape [rows, ndim], the slices that cut it out."""
    if not start.shape[1]:
        return [()] * len(start)
    axes = [list(map(slice, low.tolist(), high.tolist())) for low, high in zip(start.T, (start + sizes).T, strict=True)]
    return list(zip(*axes, strict=True))
