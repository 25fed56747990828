"""Which elements of a tensor each process of a mesh holds, and where they lie in its local tensor. Pure.

A mesh of processes has axes; each of them cuts one dimension of a tensor into chunks, or repeats the tensor. The axes
apply one after the other, each to what those before it have left, and chunks are ``ceil(size / chunks)`` long, so that
the last ones may be shorter or empty: the rules of ``torch.distributed.tensor``. What a process holds is then, in every
dimension, a few intervals of indices, and its local tensor is their product.

Indices ascend everywhere, so elements lie in a local tensor in the order of their flat places in the whole one: what a
process has of any flat range is one slice of its memory.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from elastictrain_checkpoint.boxes import Box, Ints, strides
from elastictrain_checkpoint.dtypes import num_elements
from elastictrain_checkpoint.errors import InvalidPiece

Interval = tuple[int, int]
Held = tuple[tuple[Interval, ...], ...]
"""For every dimension the indices that a process holds: intervals [low, high), ascending, none empty, none touching."""


@dataclass(frozen=True, slots=True)
class Cut:
    """An axis of a mesh that cuts a dimension.

    Attributes:
        dim: of the tensor, from 0 on.
        pieces: 1, or: the dimension is first cut into so many pieces, each of these into chunks, and a process has its
            chunk of every piece. So torch describes (`_StridedShard`) that a later axis has cut first.

    """

    dim: int
    pieces: int = 1


def held_by(shape: Sequence[int], mesh: Sequence[int], cuts: Sequence[Cut | None], coordinate: Sequence[int]) -> Held:
    """What the process at a coordinate of a mesh holds.

    Args:
        shape: of the whole tensor.
        mesh: length of each axis.
        cuts: what each axis does; None: it repeats the tensor.
        coordinate: of the process, one number for each axis.

    """
    found: list[tuple[Interval, ...]] = [((0, size),) if size else () for size in shape]
    for length, cut, number in zip(mesh, cuts, coordinate, strict=True):
        if cut is not None:
            found[cut.dim] = _chunk(found[cut.dim], length, number, cut.pieces)
    return tuple(found)


def _chunk(intervals: Sequence[Interval], chunks: int, number: int, pieces: int) -> tuple[Interval, ...]:
    """The chunk ``number`` of the indices in these intervals, or of each of their pieces."""
    total = sum(high - low for low, high in intervals)
    piece = max(1, -(-total // pieces))
    kept: list[Interval] = []
    for begin in range(0, total, piece):
        size = min(piece, total - begin)
        chunk = -(-size // chunks)
        first, last = begin + min(number * chunk, size), begin + min((number + 1) * chunk, size)
        at = 0
        for low, high in intervals:
            left, right = max(low, low + first - at), min(high, low + last - at)
            if left < right:
                if kept and kept[-1][1] == left:
                    kept[-1] = kept[-1][0], right
                else:
                    kept.append((left, right))
            at += high - low
    return tuple(kept)


def local_shape(held: Held) -> tuple[int, ...]:
    """Shape of the local tensor."""
    return tuple(sum(high - low for low, high in intervals) for intervals in held)


def boxes_of(held: Held) -> list[tuple[Box, tuple[slice, ...]]]:
    """What is held as boxes of the whole tensor, and where each of them lies in the local tensor."""
    sides = []
    for intervals in held:
        ends = itertools.accumulate(high - low for low, high in intervals)
        places = zip(intervals, ends, strict=True)
        sides.append([(low, high - low, slice(end - high + low, end)) for (low, high), end in places])
    return [
        ((tuple(low for low, _, _ in one), tuple(size for _, size, _ in one)), tuple(place for _, _, place in one))
        for one in itertools.product(*sides)
    ]


@dataclass(frozen=True, eq=False)
class Runs:
    """What a process holds as runs of elements that follow one another in the whole tensor; ascending.

    Attributes:
        starts: flat place of each run's first element. Shape [runs].
        bounds: run ``i`` is elements ``bounds[i]:bounds[i + 1]`` of the local tensor. Shape [runs + 1].

    """

    starts: Ints
    bounds: Ints

    def between(self, low: int, high: int) -> tuple[int, int]:
        """The slice of the local tensor that holds what there is of the flat range [low, high)."""
        first = self._before(low)
        return first, max(first, self._before(high))

    def _before(self, place: int) -> int:
        """How many local elements lie before a flat place."""
        run = int(np.searchsorted(self.starts, place, side="right")) - 1
        if run < 0:
            return 0
        return int(min(self.bounds[run] + place - self.starts[run], self.bounds[run + 1]))

    def from_place(self, low: int, high: int) -> int:
        """How many elements from the flat place ``low`` on, and below ``high``, follow one another here."""
        run = int(np.searchsorted(self.starts, low, side="right")) - 1
        if run < 0:
            return 0
        end = int(self.starts[run] + self.bounds[run + 1] - self.bounds[run])
        return max(0, min(end, high) - low)

    def put(self, first: int, last: int, data: memoryview, out: memoryview, base: int, item: int) -> None:
        """Copy the local elements [first, last) to their flat places.

        Args:
            first: of them; there is at least one.
            last: one past the last of them.
            data: their bytes.
            out: bytes of the flat range that begins with the element ``base`` and has all of them in it.
            base: see ``out``.
            item: bytes of an element.

        """
        low = int(np.searchsorted(self.bounds, first, side="right")) - 1
        high = int(np.searchsorted(self.bounds, last, side="left"))
        edges = np.clip(self.bounds[low : high + 1], first, last)
        lengths = np.diff(edges)
        starts = self.starts[low:high] + edges[:-1] - self.bounds[low:high] - base
        if len(starts) == 1:
            begin = int(starts[0]) * item
            out[begin : begin + len(data)] = data
            return
        # In the largest grains that all runs are made of, so that the work does not go element by element.
        grain = math.gcd(int(np.gcd.reduce(starts)), int(np.gcd.reduce(lengths)))
        counts = lengths // grain
        places = np.repeat(starts // grain - (np.cumsum(counts) - counts), counts) + np.arange(counts.sum())
        kind = np.dtype((np.void, grain * item))
        whole = len(out) - len(out) % kind.itemsize
        np.frombuffer(out[:whole], dtype=kind)[places] = np.frombuffer(data, dtype=kind)


def runs_of(shape: Sequence[int], held: Held) -> Runs:
    """The runs of what is held of a tensor; not of one without elements."""
    step = strides(shape)
    axis = len(shape) - 1
    while axis >= 0 and held[axis] == ((0, shape[axis]),):
        axis -= 1
    inner = math.prod(shape[axis + 1 :])
    starts = np.zeros(1, dtype=np.int64)
    lengths = np.full(1, inner, dtype=np.int64)
    if axis >= 0:
        sides = np.array(held[axis], dtype=np.int64).reshape(-1, 2)
        starts, lengths = sides[:, 0] * inner, (sides[:, 1] - sides[:, 0]) * inner
    for dim in reversed(range(axis)):
        index = np.concatenate([np.arange(low, high, dtype=np.int64) for low, high in held[dim]] or [starts[:0]])
        starts = (index[:, None] * step[dim] + starts[None, :]).ravel()
        lengths = np.tile(lengths, len(index))
    return Runs(starts, np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(lengths)]))


@dataclass(frozen=True, eq=False)
class Group:
    """The processes that hold the same elements of a tensor.

    Attributes:
        holders: their ranks, ascending.
        runs: what each of them holds.

    """

    holders: tuple[int, ...]
    runs: Runs


@dataclass(frozen=True, eq=False)
class Layout:
    """How a tensor lies in a world.

    Attributes:
        shape: of the whole tensor.
        groups: hold every element exactly once; in the order of their first elements. None of a tensor without any.
        of: for each rank the number of its group, or None: it holds nothing.

    """

    shape: tuple[int, ...]
    groups: tuple[Group, ...]
    of: tuple[int | None, ...]


def lay_out(name: str, shape: Sequence[int], helds: Sequence[Held | None]) -> Layout:
    """Group the ranks by what they hold; None: nothing.

    Raises:
        InvalidPiece: the ranks together do not hold every element, or hold some in two different ways.

    """
    holders: dict[Held, list[int]] = {}
    for rank, held in enumerate(helds):
        if held is not None and all(held):
            holders.setdefault(held, []).append(rank)
    found = [Group(tuple(ranks), runs_of(shape, held)) for held, ranks in holders.items()]
    groups = tuple(sorted(found, key=lambda group: int(group.runs.starts[0])))
    have, count = sum(int(group.runs.bounds[-1]) for group in groups), num_elements(shape)
    if have != count:
        raise InvalidPiece(
            f"{name}: the {len(helds)} ranks that save hold {have} of {count} elements between them; the group that "
            "saves must have all ranks of the mesh that the tensor is placed on"
        )
    of: list[int | None] = [None] * len(helds)
    for number, group in enumerate(groups):
        for rank in group.holders:
            of[rank] = number
    return Layout(tuple(shape), groups, tuple(of))
