"""Who of several processes stores what, and what they hand each other for it. Pure: all ranks find the same plan.

Storage and digest know flat runs that begin on the digest grid; what processes hold begins anywhere. So every tensor is
cut into flat runs on the grid: where what a process holds is one run, near its ends (only the few elements up to the
next border of the grid move), else evenly. What several processes hold is stored once, and shared out between them.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from elastictrain_checkpoint.dtypes import num_elements
from elastictrain_checkpoint.hashing import DIGEST_BLOCK_ELEMENTS
from elastictrain_checkpoint.layouts import Layout, Runs

SPLIT_BYTES = 1 << 20
"""No run that several ranks could share is cut into smaller ones than this."""
Range = tuple[int, int]


@dataclass(frozen=True, eq=False, slots=True)
class Spread:
    """A tensor, bytes of an element as stored, and how it lies in the world."""

    name: str
    item: int
    layout: Layout


@dataclass(frozen=True, slots=True)
class _Stretch:
    """A flat run [start, stop) that any of these ranks may store, or share."""

    start: int
    stop: int
    ranks: Sequence[int]


def plan_shares(spreads: Sequence[Spread], world: int) -> dict[str, list[Range]]:
    """For each tensor the flat run [start, stop) that each rank stores; together all elements, each once, cut on the
    digest grid only. What is too small to be shared goes, the largest first, to the rank with the least to write of
    those that may (longest processing time first: Graham 1969).
    """
    shares: dict[str, list[Range]] = {}
    load = [0] * world
    loose: list[tuple[int, str, int, _Stretch]] = []
    for spread in spreads:
        mine = shares[spread.name] = [(0, 0)] * world
        for stretch in _stretches(spread.layout, world):
            size = (stretch.stop - stretch.start) * spread.item
            parts = min(len(stretch.ranks), max(1, size // SPLIT_BYTES))
            for part, (start, stop) in enumerate(_evenly(stretch, parts)):
                if parts == len(stretch.ranks):
                    rank = stretch.ranks[part]
                    mine[rank] = start, stop
                    load[rank] += (stop - start) * spread.item
                else:
                    one = _Stretch(start, stop, stretch.ranks)
                    loose.append(((stop - start) * spread.item, spread.name, start, one))
    for size, name, start, stretch in sorted(loose, key=lambda one: (-one[0], one[1], one[2])):
        if size:
            rank = min((r for r in stretch.ranks if shares[name][r] == (0, 0)), key=load.__getitem__)
            load[rank] += size
            shares[name][rank] = start, stretch.stop
    return shares


def _stretches(layout: Layout, world: int) -> list[_Stretch]:
    """Runs of a tensor, on the grid, with the ranks that are to store them; no rank is in two of them."""
    count = num_elements(layout.shape)
    if not count:
        return []
    if any(len(group.runs.starts) > 1 for group in layout.groups):  # elements move anyhow
        return [_Stretch(0, count, range(world))]
    if count <= DIGEST_BLOCK_ELEMENTS:
        return [_Stretch(0, count, layout.groups[0].holders if len(layout.groups) == 1 else range(world))]
    edges = [_up(int(group.runs.starts[0]), count) for group in layout.groups] + [count]
    edges[0] = 0
    return [
        _Stretch(start, stop, group.holders)
        for start, stop, group in zip(edges[:-1], edges[1:], layout.groups, strict=True)
    ]


def _evenly(stretch: _Stretch, parts: int) -> list[Range]:
    """Cut a run into parts on the grid."""
    size = stretch.stop - stretch.start
    edges = [_up(stretch.start + size * part // parts, stretch.stop) for part in range(parts)] + [stretch.stop]
    return list(itertools.pairwise(edges))


def _up(at: int, most: int) -> int:
    return min(most, -(-at // DIGEST_BLOCK_ELEMENTS) * DIGEST_BLOCK_ELEMENTS)


def source(layout: Layout, group: int, receiver: int) -> int:
    """Which holder of a group hands its elements to a rank of another: replicas serve their own kind, so the work is
    spread over all of them.
    """
    holders, own = layout.groups[group].holders, layout.of[receiver]
    place = receiver if own is None else layout.groups[own].holders.index(receiver)
    return holders[place % len(holders)]


def outgoing(layout: Layout, shares: Sequence[Range], rank: int) -> list[tuple[int, int, int]]:
    """What a rank hands to others: (receiver, first, last), a slice of its local tensor, in elements."""
    own = layout.of[rank]
    if own is None:
        return []
    runs = layout.groups[own].runs
    out = []
    for other, (low, high) in enumerate(shares):
        if low < high and layout.of[other] != own and source(layout, own, other) == rank:
            first, last = runs.between(low, high)
            if first < last:
                out.append((other, first, last))
    return out


def incoming(layout: Layout, shares: Sequence[Range], rank: int) -> list[tuple[int, int, int, int]]:
    """What a rank gets from others: (sender, number of the sender's group, first, last), as the sender's slices."""
    low, high = shares[rank]
    out = []
    if low < high:
        for number, group in enumerate(layout.groups):
            if number != layout.of[rank]:
                first, last = group.runs.between(low, high)
                if first < last:
                    out.append((source(layout, number, rank), number, first, last))
    return out


@dataclass(frozen=True, slots=True)
class Share:
    """What this rank stores of one tensor: the run from `start` on, in live memory, then in memory of its own."""

    start: int
    live: memoryview
    own: memoryview


@dataclass(frozen=True, slots=True)
class Coming:
    """A slice [first, last) of another rank's local tensor, and where it belongs: in ``out``, whose first element has
    the flat place ``base``.
    """

    runs: Runs
    first: int
    last: int
    out: memoryview
    base: int
    item: int

    @property
    def size_bytes(self) -> int:
        """Bytes that come."""
        return (self.last - self.first) * self.item

    def put(self, data: memoryview) -> None:
        """They have come."""
        self.runs.put(self.first, self.last, data, self.out, self.base, self.item)


@dataclass(frozen=True, slots=True)
class Moves:
    """What a rank hands over.

    Attributes:
        out: for each rank what it gets from here, one view after the other.
        coming: for each rank what comes from there, in the same order.
        shares: what this rank stores of each tensor, whole when all has come.

    """

    out: list[list[memoryview]]
    coming: list[list[Coming]]
    shares: dict[str, Share]


def hand_over(
    spreads: Sequence[Spread],
    local: Mapping[str, memoryview],
    shares: Mapping[str, Sequence[Range]],
    rank: int,
    world: int,
) -> Moves:
    """What a rank hands over so that everybody has its share.

    Args:
        spreads: of all tensors, in the same order on every rank.
        local: the bytes of this rank's local tensor of each, row-major.
        shares: the plan.
        rank: this one.
        world: how many ranks there are.

    """
    moves = Moves([[] for _ in range(world)], [[] for _ in range(world)], {})
    known: dict[Any, Any] = {}  # tensors of one kind move alike
    for spread in spreads:
        layout, item, mine = spread.layout, spread.item, shares[spread.name]
        key = id(layout), tuple(mine)
        if key not in known:
            known[key] = outgoing(layout, mine, rank), incoming(layout, mine, rank)
        data = local[spread.name]
        share = moves.shares[spread.name] = _own_share(spread, data, mine[rank], rank)
        base = share.start + len(share.live) // item
        for other, first, last in known[key][0]:
            moves.out[other].append(data[first * item : last * item])
        for sender, number, first, last in known[key][1]:
            runs = layout.groups[number].runs
            moves.coming[sender].append(Coming(runs, first, last, share.own, base, item))
    return moves


def _own_share(spread: Spread, data: memoryview, wanted: Range, rank: int) -> Share:
    """The share with what this rank has; what follows on its start stays where it is."""
    low, high = wanted
    item, layout = spread.item, spread.layout
    own = layout.of[rank]
    if own is None or low == high:
        return Share(low, memoryview(b""), memoryview(bytearray((high - low) * item)))
    runs = layout.groups[own].runs
    first, last = runs.between(low, high)
    count = runs.from_place(low, high)
    if low + count < high:  # the rest, from the last grid border on, comes together in memory of its own
        count -= count % DIGEST_BLOCK_ELEMENTS
    rest = memoryview(bytearray((high - low - count) * item))
    if first + count < last:
        runs.put(first + count, last, data[(first + count) * item : last * item], rest, low + count, item)
    return Share(low, data[first * item : (first + count) * item], rest)
