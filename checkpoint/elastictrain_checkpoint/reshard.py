"""Read once per job: who reads which bytes of a checkpoint, and whom they are sent to. Pure, no communication.

When several workers restore one checkpoint under another layout, each of them wants a part of nearly every stored
chunk. Reading it everywhere multiplies the load on storage by the number of workers (DCP reads and decodes a whole
chunk for every reader that wants any of it). Here each chunk is cut into spans of rows, every span is read by one
worker and handed on. Orbax's restore-and-broadcast does that for replicas; this does it for any boxes.

The plan is a function of the chunk table and of what everybody wants, so all workers find the same plan by themselves.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from elastictrain_checkpoint.boxes import Ints
from elastictrain_checkpoint.collector import no_collections
from elastictrain_checkpoint.dtypes import item_bytes
from elastictrain_checkpoint.errors import InvalidPiece
from elastictrain_checkpoint.manifest import Manifest
from elastictrain_checkpoint.wants import Numbering, Want

SPAN_BYTES = 2 << 20
"""Chunks are cut into spans of rows of about this size: small enough to share out evenly and to stay in cache."""
_WHOLE = 4
"""A chunk of less than a span over this is not cut: nothing is gained for it, and there may be very many."""


@dataclass(frozen=True, eq=False)
class ReadPlan:
    """Who reads what, and where it goes. Columns are arrays; the same on every worker.

    Attributes:
        workers: how many there are.
        file, start, size_bytes: file number, first byte and length of each span. Shape [spans], sorted by file and
            start; spans do not overlap.
        owner: the worker that reads the span. Shape [spans]; ascending, so everybody reads few long runs.
        row, low, high: the chunk (row of the manifest's table) and the rows of its box that are the span. Shape
            [spans].
        span, worker, want: delivery ``i`` hands a part of span ``span[i]`` to ``worker[i]``, for its want
            ``want[i]`` (a position in its list). Shape [deliveries], sorted by span.
        bounds: deliveries of span ``s`` are ``bounds[s]:bounds[s + 1]``. Shape [spans + 1].

    """

    workers: int
    file: Ints
    start: Ints
    size_bytes: Ints
    owner: Ints
    row: Ints
    low: Ints
    high: Ints
    span: Ints
    worker: Ints
    want: Ints
    bounds: Ints

    @property
    def read_bytes(self) -> int:
        """Bytes of all spans: what the job reads, but for the rest of the hash blocks at the ends of long runs."""
        return int(self.size_bytes.sum())

    def owned_bytes(self) -> Ints:
        """Bytes that each worker reads. Shape [workers]."""
        return np.bincount(self.owner, weights=self.size_bytes, minlength=self.workers).astype(np.int64)


@no_collections()
def plan_reads(manifest: Manifest, wants: Sequence[Sequence[Want]], *, span_bytes: int = SPAN_BYTES) -> ReadPlan:
    """Share out the reading of what all workers want.

    Every span that anybody wants is read by exactly one worker, and every wanted element is delivered exactly once. No
    worker reads more than its even share and one span.

    Args:
        manifest: the checkpoint.
        wants: what each worker wants, the same lists on every worker.
        span_bytes: chunks are cut into spans of about this size, with the last row before each multiple of it in the
            file; a single longer row makes a longer span.

    Raises:
        KeyError: no such tensor.
        InvalidPiece: a box that does not lie in its tensor.

    """
    found = [_meet(manifest, one, span_bytes) for one in _columns(manifest, wants)]
    begin = np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum([len(one.row) for one in found], dtype=np.int64)])
    row, low, high = (_joined([getattr(one, column) for one in found]) for column in ("row", "low", "high"))
    span = _joined([one.span + at for one, at in zip(found, begin.tolist(), strict=False)])
    worker, want = (_joined([getattr(one, column) for one in found]) for column in ("worker", "want"))

    file, start, size = _places(manifest, row, low, high)
    wanted = np.flatnonzero(np.bincount(span, minlength=len(row)))
    kept = wanted[np.lexsort((start[wanted], file[wanted]))]
    number = np.empty(len(row), dtype=np.int64)
    number[kept] = np.arange(len(kept))
    span = number[span]
    order = np.argsort(span, kind="stable")
    return ReadPlan(
        workers=len(wants),
        file=file[kept],
        start=start[kept],
        size_bytes=size[kept],
        owner=_share(size[kept], len(wants)),
        row=row[kept],
        low=low[kept],
        high=high[kept],
        span=span[order],
        worker=worker[order],
        want=want[order],
        bounds=np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(np.bincount(span, minlength=len(kept)))]),
    )


def _joined(columns: Sequence[Ints]) -> Ints:
    return np.concatenate([np.zeros(0, dtype=np.int64), *columns])


def _share(size: Ints, workers: int) -> Ints:
    """Owners of spans in a row: whoever's even share of the bytes the middle of a span lies in."""
    ends = np.cumsum(size)
    total = int(ends[-1]) if len(ends) else 0
    middle = ends - size / 2
    return np.minimum((middle * workers / max(total, 1)).astype(np.int64), workers - 1)


@dataclass(frozen=True, eq=False)
class _Wants:
    """All wants for tensors of one number of dimensions."""

    tensor: Ints
    worker: Ints
    want: Ints
    offsets: Ints
    sizes: Ints


def _columns(manifest: Manifest, wants: Sequence[Sequence[Want]]) -> list[_Wants]:
    numbering = Numbering(manifest)
    each = [numbering.columns(mine) for mine in wants]
    tensor, corners = (_joined(columns) for columns in zip(*each, strict=True)) if each else (_joined([]), _joined([]))
    counts = [len(mine) for mine in wants]
    worker = np.repeat(np.arange(len(wants)), counts)
    at = _joined([np.arange(count) for count in counts])
    ndims = numbering.ndims
    begin = np.cumsum(2 * ndims[tensor]) - 2 * ndims[tensor]
    wanted = np.bincount(tensor, minlength=len(ndims)) > 0
    out = []
    for ndim in np.unique(ndims[wanted]).tolist():
        used = np.flatnonzero(wanted & (ndims == ndim))
        rows, both, of = np.arange(len(tensor)), corners, tensor
        if len(used) < np.count_nonzero(wanted):
            rows = np.flatnonzero((ndims == ndim)[tensor])
            both, of = corners[_ranges(begin[rows], begin[rows] + 2 * ndim)[1]], tensor[rows]
        offsets, sizes = both.reshape(len(rows), 2, ndim).swapaxes(0, 1)
        # Shapes once per tensor, and axis by axis: there are as many wants as tensors times workers.
        shape = np.zeros((ndim, len(ndims)), dtype=np.int64)
        shape[:, used] = (
            np.array([numbering.shapes[i] for i in used.tolist()], dtype=np.int64).reshape(len(used), ndim).T
        )
        filled, wrong = np.ones(len(rows), dtype=np.bool_), np.zeros(len(rows), dtype=np.bool_)
        for axis in range(ndim):
            wrong |= (
                (offsets[:, axis] < 0) | (sizes[:, axis] < 0) | (sizes[:, axis] > shape[axis][of] - offsets[:, axis])
            )
            filled &= sizes[:, axis] > 0
        if wrong.any():
            row = int(rows[int(np.argmax(wrong))])
            want = wants[int(worker[row])][int(at[row])]
            raise InvalidPiece(
                f"{want.name}: box {want.offsets} {want.sizes} does not lie in shape "
                f"{numbering.shapes[int(tensor[row])]}"
            )
        if filled.all():
            out.append(_Wants(of, worker[rows], at[rows], offsets, sizes))
            continue
        kept = rows[filled]
        out.append(_Wants(tensor[kept], worker[kept], at[kept], offsets[filled], sizes[filled]))
    return out


@dataclass(frozen=True, eq=False)
class _Met:
    """All spans of the chunks of some tensors (``row``, ``low``, ``high``), wanted or not, and who wants which."""

    row: Ints
    low: Ints
    high: Ints
    span: Ints
    worker: Ints
    want: Ints


def _meet(manifest: Manifest, wants: _Wants, span_bytes: int) -> _Met:
    table = manifest.table
    ndim = wants.sizes.shape[1]
    used = np.flatnonzero(np.bincount(wants.tensor))
    rows = _ranges(table.bounds[used], table.bounds[used + 1])[1]
    offsets, sizes = table.boxes.corners(rows, ndim)
    # Where each tensor's chunks begin in these columns.
    count = table.bounds[used + 1] - table.bounds[used]
    begin = np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(count)])
    place = np.zeros(len(table.bounds), dtype=np.int64)
    place[used] = np.arange(len(used))
    at = place[wants.tensor]
    low, high = begin[at], begin[at + 1]
    if ndim:
        low, high = _near(offsets[:, 0], sizes[:, 0], begin, wants, at)
    want, chunk = _ranges(low, high)
    want, chunk, left, right = _overlaps(want, chunk, offsets, sizes, wants)
    if not ndim:
        zero = np.zeros(len(rows), dtype=np.int64)
        return _Met(rows, zero, zero + 1, chunk, wants.worker[want], wants.want[want])
    items = np.array([item_bytes(manifest.tensors[table.names[i]][0]) for i in used.tolist()], dtype=np.int64)
    row_bytes = sizes[:, 1:].prod(axis=1) * items[np.repeat(np.arange(len(used)), count)]
    # Spans end with the last row before a multiple of their size in the file: whoever reads some of them reads hash
    # blocks that hardly reach into the next.
    row_bytes = np.maximum(1, row_bytes)
    step = -(-row_bytes // span_bytes) * span_bytes
    before = table.start[rows] % step
    before[sizes[:, 0] * row_bytes * _WHOLE < span_bytes] = 0
    spans = np.maximum(1, -(-(before + sizes[:, 0] * row_bytes) // step))
    if (spans == 1).all():  # by far the most frequent, and very many numbers to divide
        return _Met(rows, np.zeros_like(spans), sizes[:, 0], chunk, wants.worker[want], wants.want[want])
    of, number = _ranges(np.zeros_like(spans), spans)
    ends = ((number + 1) * step[of] - before[of]) // row_bytes[of]
    low_row = np.where(number > 0, np.roll(ends, 1), 0)
    high_row = np.minimum(ends, sizes[of, 0])
    # The span of a row is the one in which it ends.
    row_bytes, step, before = row_bytes[chunk], step[chunk], before[chunk]
    first = -(-((left - offsets[chunk, 0] + 1) * row_bytes + before) // step) - 1
    last = -(-((right - offsets[chunk, 0]) * row_bytes + before) // step)
    pair, inside = _ranges(first, last)
    span = (np.cumsum(spans) - spans)[chunk[pair]] + inside
    return _Met(rows[of], low_row, high_row, span, wants.worker[want[pair]], wants.want[want[pair]])


def _overlaps(want: Ints, chunk: Ints, offsets: Ints, sizes: Ints, wants: _Wants) -> tuple[Ints, Ints, Ints, Ints]:
    """Those of these pairs that share an element, and where they do along the first axis.

    Axis by axis, in columns: there may be millions of pairs.
    """
    first = last = np.zeros(0, dtype=np.int64)
    meet = np.ones(len(want), dtype=np.bool_)
    for axis in range(offsets.shape[1]):
        begin, theirs = offsets[:, axis].copy(), wants.offsets[:, axis].copy()
        left = np.maximum(begin[chunk], theirs[want])
        right = np.minimum((begin + sizes[:, axis])[chunk], (theirs + wants.sizes[:, axis])[want])
        meet &= left < right
        if not axis:
            first, last = left, right
    if meet.all():  # also where there is no axis: scalars
        return want, chunk, first, last
    return want[meet], chunk[meet], first[meet], last[meet]


def _near(start: Ints, size: Ints, begin: Ints, wants: _Wants, at: Ints) -> tuple[Ints, Ints]:
    """Range of chunks that can meet each want, by the first dimension, in which a tensor's chunks are sorted.

    Sound for any boxes: ends are made to ascend first, so that no chunk is left out.
    """
    tensor = np.repeat(np.arange(len(begin) - 1), np.diff(begin))
    # Tensors follow one another on one long axis, far enough apart.
    far = int(max((start + size).max(initial=0), (wants.offsets[:, 0] + wants.sizes[:, 0]).max(initial=0))) + 1
    if far > (1 << 62) // max(1, len(begin)):
        return begin[at], begin[at + 1]
    base = tensor * far
    starts, ends = base + start, np.maximum.accumulate(base + start + size)
    low = np.searchsorted(ends, at * far + wants.offsets[:, 0], side="right")
    high = np.searchsorted(starts, at * far + wants.offsets[:, 0] + wants.sizes[:, 0], side="left")
    return np.maximum(low, begin[at]), np.maximum(np.minimum(high, begin[at + 1]), begin[at])


def _ranges(low: Ints, high: Ints) -> tuple[Ints, Ints]:
    """All (i, j) with low[i] <= j < high[i], as two columns."""
    count = np.maximum(high - low, 0)
    which = np.repeat(np.arange(len(low)), count)
    inside = np.arange(len(which)) - np.repeat(np.cumsum(count) - count, count)
    return which, low[which] + inside


def _places(manifest: Manifest, row: Ints, low: Ints, high: Ints) -> tuple[Ints, Ints, Ints]:
    """File, first byte and length of the rows [low, high) of each chunk."""
    table = manifest.table
    width = table.size_bytes[row] // np.maximum(table.boxes.heights(row), 1)
    return table.file[row], table.start[row] + low * width, (high - low) * width
