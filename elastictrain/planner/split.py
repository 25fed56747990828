"""Dealing out whole things so that the slowest takes least: lanes by speed, blocks by memory. Exact.

Both are the same problem: minimise `max_i cost_i(n_i)` with `sum n_i = total` and `least_i <= n_i <= most_i`, where
every `cost_i` never falls. A threshold on the cost says how many each may take, and the smallest threshold at which
they take all is the optimum. The search begins at the optimum of the fractional problem, which no whole division can
beat, so that at most one thing per worker is left to hand out: a thousand workers take about a millisecond.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from heapq import heapify, heapreplace
from itertools import pairwise

from elastictrain.errors import CapacityError

_BELOW = 1.0 - 1e-12
"""The fractional threshold is rounded; a little below it is a lower bound for certain."""


@dataclass(frozen=True, slots=True)
class Split:
    """`parts`: how many each gets. `makespan`: the largest cost. `bound`: no division has a smaller makespan."""

    parts: tuple[int, ...]
    makespan: float
    bound: float


def split_affine(
    total: int,
    fixed: Sequence[float],
    each: Sequence[float],
    *,
    least: Sequence[int] | None = None,
    most: Sequence[int] | None = None,
    before: Sequence[int] | None = None,
) -> Split:
    """The exact split where worker i needs `fixed[i] + each[i] * n` for n things, and nothing for none.

    `least` is 0 by default, `most` is `total`. Of all splits with the smallest makespan, the one that moves fewest
    things from `before` is returned, where that is given. Raises CapacityError when the limits leave no split.
    """
    workers = len(each)
    low = [0] * workers if least is None else list(least)
    high = [total] * workers if most is None else [min(total, cap) for cap in most]
    if len(fixed) != workers or min(each, default=1.0) <= 0 or min(fixed, default=0.0) < 0:
        raise ValueError("each worker needs a time per thing above 0 and a fixed time of 0 or more")
    _must_fit(total, low, high)
    threshold = _fractional(total, fixed, each, low, high)
    must = max((a + c * lo for a, c, lo in zip(fixed, each, low, strict=True) if lo), default=0.0)
    below = threshold * _BELOW
    parts = []
    ends: list[float] = []
    for a, c, lo, hi in zip(fixed, each, low, high, strict=True):
        n = int((below - a) / c) if below > a else lo
        n = lo if n < lo else hi if n > hi else n
        parts.append(n)
        ends.append(a + c * (n + 1) if n < hi else math.inf)
    _hand_out(total - sum(parts), parts, ends, each, high)
    makespan = max([a + c * n for a, c, n in zip(fixed, each, parts, strict=True) if n], default=0.0)
    if before is not None:
        limit = makespan * (1 + 1e-12)
        upper = [int((limit - a) / c + 1e-9) if limit > a else lo for a, c, lo in zip(fixed, each, low, strict=True)]
        upper = [lo if n < lo else hi if n > hi else n for n, lo, hi in zip(upper, low, high, strict=True)]
        parts = _nearest(total, before, low, upper)
    return Split(tuple(parts), makespan, min(makespan, max(threshold, must)))


def _hand_out(left: int, parts: list[int], ends: Sequence[float], each: Sequence[float], high: Sequence[int]) -> None:
    """Give `left` more things to whoever is done earliest with one more. Exact, because costs never fall.

    `ends[i]`: what worker i needs with one more, infinite when it is full.
    """
    if left <= 0:
        return
    first = sorted(range(len(parts)), key=ends.__getitem__)[:left]
    last = ends[first[-1]]
    if len(first) == left and last < math.inf and all(ends[i] + each[i] >= last for i in first):
        for i in first:  # nobody gets two: done without a heap
            parts[i] += 1
        return
    heap = list(zip(ends, range(len(parts)), strict=True))
    heapify(heap)
    for _ in range(left):
        cost, i = heap[0]
        parts[i] += 1
        heapreplace(heap, (cost + each[i] if parts[i] < high[i] else math.inf, i))


def split_tables(
    total: int,
    tables: Sequence[Sequence[float]],
    *,
    least: Sequence[int] | None = None,
) -> Split:
    """The exact split for measured costs: `tables[i][n]` is what n things cost worker i (n from 0).

    A table's length says how many its worker may have. Raises ValueError for a table that falls: with one, more work
    would take less time, and thresholds would not be exact; CapacityError when the tables are too short together.
    """
    low = [0] * len(tables) if least is None else list(least)
    high = [min(total, len(table) - 1) for table in tables]
    for i, table in enumerate(tables):
        if any(b < a for a, b in pairwise(table)):
            raise ValueError(f"table {i} falls: the cost of more things may not be smaller")
    _must_fit(total, low, high)
    values = sorted({table[n] for table, lo, hi in zip(tables, low, high, strict=True) for n in range(lo, hi + 1)})

    def taken(limit: float) -> list[int]:
        return [
            min(hi, max(lo, bisect_right(table, limit) - 1)) for table, lo, hi in zip(tables, low, high, strict=True)
        ]

    first, last = 0, len(values) - 1
    while first < last:
        middle = (first + last) // 2
        if sum(taken(values[middle])) >= total:
            last = middle
        else:
            first = middle + 1
    parts = taken(values[first])
    parts = _nearest(total, parts, low, parts)  # more may fit than there are
    makespan = max((table[n] for table, n in zip(tables, parts, strict=True)), default=0.0)
    return Split(tuple(parts), makespan, makespan)


def fill(amount: float, weights: Sequence[float], room: Sequence[float]) -> tuple[float, tuple[float, ...]]:
    """Water-filling: the smallest level r at which `sum min(r * weight_i, room_i)` reaches `amount`, and the shares.

    Exact: the sum is linear between the levels at which one of them is full. Raises CapacityError when all the room
    together is too little.
    """
    there = math.fsum(space for weight, space in zip(weights, room, strict=True) if weight > 0)
    if amount > there:
        raise CapacityError(f"{amount:.4g} does not fit into room for {there:.4g}: {amount - there:.4g} too much")
    order = sorted((space / weight, weight, space) for weight, space in zip(weights, room, strict=True) if weight > 0)
    rest, slope = amount, math.fsum(weight for _, weight, _ in order)
    level = 0.0
    for full_at, weight, space in order:
        level = rest / slope
        if level <= full_at:
            break
        rest, slope, level = rest - space, slope - weight, full_at
    return level, tuple(min(level * weight, space) for weight, space in zip(weights, room, strict=True))


def fill_whole(things: int, size: float, used: Sequence[float], memory: Sequence[float]) -> Split:
    """Whole blocks of `size` onto workers that use `used` of `memory` already, so that the fullest is least full.

    The makespan is the fraction of its memory that the fullest worker uses. Raises CapacityError when they do not fit.
    """
    if any(u > m for u, m in zip(used, memory, strict=True)):
        raise CapacityError("some worker's memory is too small before it holds any block")
    most = [int((m - u) * (1 + 1e-12) / size) for u, m in zip(used, memory, strict=True)]
    fixed = [u / m for u, m in zip(used, memory, strict=True)]
    found = split_affine(things, fixed, [size / m for m in memory], most=most)
    fullest = max(a + size * n / m for a, n, m in zip(fixed, found.parts, memory, strict=True))
    return Split(found.parts, fullest, min(fullest, max(found.bound, *fixed)))


def _must_fit(total: int, low: Sequence[int], high: Sequence[int]) -> None:
    if total < 0 or not low:
        raise ValueError(f"{total} things for {len(low)} workers: expected 0 or more things and a worker")
    if any(lo > hi for lo, hi in zip(low, high, strict=True)) or not sum(low) <= total <= sum(high):
        raise CapacityError(f"{total} cannot be dealt out: the workers take at least {sum(low)}, at most {sum(high)}")


def _fractional(
    total: int, fixed: Sequence[float], each: Sequence[float], low: Sequence[int], high: Sequence[int]
) -> float:
    """The threshold at which fractional parts add up to `total`: a sweep over the places where the sum bends."""
    each_of = list(zip(fixed, each, low, high, strict=True))
    bends = [(a + c * lo, 1.0 / c) for a, c, lo, hi in each_of if hi > lo]
    # nobody can be full who may have all
    bends += [(a + c * hi, -1.0 / c) for a, c, lo, hi in each_of if lo < hi < total]
    bends.sort()
    left, slope, at = float(total - sum(low)), 0.0, 0.0
    if left <= 0:
        return 0.0
    for place, change in bends:
        if slope > 0 and (place - at) * slope >= left:
            break
        left -= (place - at) * slope
        at, slope = place, max(slope + change, 0.0)
    return at + left / slope if slope > 0 else at


def _nearest(total: int, before: Sequence[int], low: Sequence[int], high: Sequence[int]) -> list[int]:
    """Parts within the limits that add up and differ least from `before`: every further change moves one thing."""
    parts = [lo if old < lo else hi if old > hi else old for old, lo, hi in zip(before, low, high, strict=True)]
    missing = total - sum(parts)
    for i, part in enumerate(parts):
        if not missing:
            break
        change = min(missing, high[i] - part) if missing > 0 else max(missing, low[i] - part)
        parts[i] += change
        missing -= change
    return parts
