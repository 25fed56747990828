"""Mixtures: how many samples of which source every lane gets at every step. Pure; integers only, no randomness.

**Counts.** Sources with integer weights are the leaves of a binary tree (Huffman's, so that an inner node never has
more than two thirds of its parent's weight). Of the first `m` draws of a lane that reach a node, its left child gets

    floor(m * left / (left + right) + phase)

and its right child the rest: Bresenham's line, once per node. So all counts are closed forms: any position costs as
much as the first. They grow by one draw at a time, they add up exactly, and a lane is at any time within four samples
of its share of every source.

The phases keep the lanes from drawing the same source at the same time. At the root it is `lane / lanes`, so that two
sources are exact over all lanes too (Hermite: `sum over lanes of floor(x + lane / lanes) = floor(lanes * x)`); at
depth `d` it is the radical inverse of the lane in the `d`-th prime, which together are a Hammersley set: points that
fill the cube evenly (Niederreiter, "Random Number Generation and Quasi-Monte Carlo Methods", 1992, chapter 3).

**Positions.** A source is cut into lanes like a source that stands alone, and a lane takes its own segment of it
in order, so the counts before a step are the positions. Where a new segment of the schedule begins, positions go on
where those of the last one ended: nothing is lost or repeated.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from itertools import count
from typing import Any

MIXTURE_VERSION = 1

ENDLESS = 1 << 40
"""More steps than any run has."""

_TEMPERATURE_PARTS = 1 << 16
"""Shares by temperature are no fractions; they are rounded to this many parts of the whole."""


@dataclass(frozen=True)
class _Node:
    """Draws that reach it are dealt to `left` and `right`; a leaf has a `source` and neither."""

    weight: int
    source: int = -1  # of a leaf
    left: _Node | None = None
    right: _Node | None = None


class Apportionment:
    """Exact counts for integer weights, one per source; sources of weight 0 get nothing."""

    def __init__(self, weights: Sequence[int], lanes: int) -> None:
        if not any(weights) or min(weights) < 0 or lanes < 1:
            raise ValueError(f"weights {list(weights)}, lanes {lanes}: expected weights >= 0, one above, lanes >= 1")
        self.weights, self.lanes = tuple(weights), lanes
        divisor = math.gcd(*weights)
        heap = [(weight // divisor, i, _Node(weight // divisor, i)) for i, weight in enumerate(weights) if weight]
        heapq.heapify(heap)
        while len(heap) > 1:
            _, i, one = heapq.heappop(heap)
            _, j, other = heapq.heappop(heap)
            node = _Node(one.weight + other.weight, -1, one, other)
            heapq.heappush(heap, (node.weight, min(i, j), node))
        self._root = heap[0][2]

    def counts(self, draws: int, lane: int) -> list[int]:
        """Return how many of a lane's first `draws` samples are of each source."""
        counts = [0] * len(self.weights)
        todo = [(self._root, draws, 0)]
        while todo:
            node, reached, depth = todo.pop()
            if node.left is None or node.right is None:
                counts[node.source] = reached
            else:
                left = _lefts(node, [reached], self._phase(lane, depth))[0]
                todo += [(node.left, left, depth + 1), (node.right, reached - left, depth + 1)]
        return counts

    def deal(self, start: int, stop: int, lane: int) -> list[int]:
        """Return the source of each of a lane's draws `[start, stop)`."""
        return self._deal(self._root, start, stop, lane, 0)

    def _phase(self, lane: int, depth: int) -> tuple[int, int]:
        """A fraction in [0, 1), as (numerator, denominator)."""
        return (lane, self.lanes) if depth == 0 else _radical_inverse(lane, _PRIMES[(depth - 1) % len(_PRIMES)])

    def _deal(self, node: _Node, start: int, stop: int, lane: int, depth: int) -> list[int]:
        if node.left is None or node.right is None:
            return [node.source] * (stop - start)
        lefts = _lefts(node, range(start, stop + 1), self._phase(lane, depth))
        left = iter(self._deal(node.left, lefts[0], lefts[-1], lane, depth + 1))
        right = iter(self._deal(node.right, start - lefts[0], stop - lefts[-1], lane, depth + 1))
        return [next(left) if lefts[i + 1] > lefts[i] else next(right) for i in range(stop - start)]


_PRIMES = (2, 3, 5, 7, 11, 13, 17, 19)


def _lefts(node: _Node, reached: Sequence[int], phase: tuple[int, int]) -> list[int]:
    """Return how many of the draws that have reached a node went left, for each number of them."""
    assert node.left is not None
    (numerator, denominator), below = phase, node.weight * phase[1]
    factor, constant = node.left.weight * denominator, numerator * node.weight
    return [(count * factor + constant) // below for count in reached]


@lru_cache(maxsize=1 << 14)
def _radical_inverse(number: int, base: int) -> tuple[int, int]:
    """Return the digits of `number` in `base` mirrored at the point, as (numerator, denominator)."""
    mirrored, power = 0, 1
    while number:
        number, digit = divmod(number, base)
        mirrored, power = mirrored * base + digit, power * base
    return mirrored, power


@dataclass(frozen=True)
class Segment:
    """From step `from_step` on: integer weights by source, and the length that packed rows are cut to."""

    from_step: int
    weights: Mapping[str, int]
    sequence_length: int | None = None

    def as_json(self) -> dict[str, Any]:
        """Return what `from_json` takes."""
        shown = {"from_step": self.from_step, "weights": dict(sorted(self.weights.items()))}
        return shown if self.sequence_length is None else {**shown, "sequence_length": self.sequence_length}

    @classmethod
    def from_json(cls, stored: Mapping[str, Any]) -> Segment:
        """Make a segment of what `as_json` gave."""
        return cls(int(stored["from_step"]), dict(stored["weights"]), stored.get("sequence_length"))


def join_plans(plans: Sequence[tuple[int, Sequence[Segment]]]) -> list[Segment]:
    """Return the schedule that was in force: plan `i` from its step until the step of the next one.

    `plans`: (from_step, segments) in ascending order. The first segment of the result begins at the first plan's step;
    of segments that do not differ from the one before only the first is kept.
    """
    joined: list[Segment] = []
    for number, (begin, plan) in enumerate(plans):
        end = plans[number + 1][0] if number + 1 < len(plans) else None
        started = [segment for segment in plan if segment.from_step <= begin][-1:]
        later = [s for s in plan if s.from_step > begin and (end is None or s.from_step < end)]
        for segment in [*(Segment(begin, s.weights, s.sequence_length) for s in started), *later]:
            if joined and joined[-1].from_step == segment.from_step:
                joined.pop()  # a plan that was replaced before its first step
            same = joined and (joined[-1].weights, joined[-1].sequence_length) == (
                segment.weights,
                segment.sequence_length,
            )
            if not same:
                joined.append(segment)
    return joined


def with_new_names(renamed: Mapping[str, str], changed: Iterable[str], taken: Collection[str]) -> dict[str, str]:
    """Return how sources are called that have become new ones: `renamed`, by their names in the settings, with another
    name for those `changed` (as they are called so far), which none of `taken` is: `web`, then `web@1`, `web@2`, ….
    """
    found, as_set = dict(renamed), {name: mine for mine, name in renamed.items()}
    for name in changed:
        mine = as_set.get(name, name)
        found[mine] = next(new for i in count(1) if (new := f"{mine}@{i}") not in {*taken, *found.values()})
    return found


@dataclass(frozen=True)
class Run:
    """Positions `[start, stop)` of a lane in the endless sequence of source `source` (its number in the schedule)."""

    source: int
    start: int
    stop: int


class Schedule:
    """Which samples make up batch `step` of `lane`, for the segments of a run.

    `names` are all sources that occur; steps count from the first segment's.
    """

    def __init__(self, segments: Sequence[Segment], *, lanes: int, lane_batch_size: int) -> None:
        if not segments:
            raise ValueError("a schedule needs a segment")
        self.names = sorted({name for segment in segments for name in segment.weights})
        self.segments = tuple(segments)
        self.lanes, self.lane_batch_size = lanes, lane_batch_size
        self._origin = segments[0].from_step
        self._dealt = [Apportionment([s.weights.get(name, 0) for name in self.names], lanes) for s in segments]
        self._bases: dict[int, list[list[int]]] = {}  # by lane: positions where each segment begins

    def segment_at(self, step: int) -> int:
        """Return the number of the segment that `step` belongs to."""
        if step < 0:
            raise IndexError(f"step {step}: expected at least 0")
        begun = [i for i, segment in enumerate(self.segments) if segment.from_step - self._origin <= step]
        return begun[-1]

    def positions(self, step: int, lane: int) -> list[int]:
        """Return how many samples of every source a lane has used before `step`."""
        number = self.segment_at(step)
        draws = (step - self.segments[number].from_step + self._origin) * self.lane_batch_size
        return _sum(self._base(lane)[number], self._dealt[number].counts(draws, lane))

    def runs(self, step: int, lane: int) -> list[Run]:
        """Return the batch, in order: runs of neighbouring positions of one source."""
        if not 0 <= lane < self.lanes:
            raise IndexError(f"lane {lane}: expected 0 <= lane < {self.lanes}")
        number = self.segment_at(step)
        at = self.positions(step, lane)
        first = (step - self.segments[number].from_step + self._origin) * self.lane_batch_size
        runs: list[Run] = []
        for source in self._dealt[number].deal(first, first + self.lane_batch_size, lane):
            if runs and runs[-1].source == source:
                runs[-1] = Run(source, runs[-1].start, at[source] + 1)
            else:
                runs.append(Run(source, at[source], at[source] + 1))
            at[source] += 1
        return runs

    def reach(self, step: int) -> list[int]:
        """Return how many samples of every source the lane that has used most of it has used before `step`."""
        of_lanes = [self.positions(step, lane) for lane in range(self.lanes)]
        return [max(of_source) for of_source in zip(*of_lanes, strict=True)]

    def steps_within(self, limits: Mapping[str, int], known: int = 0) -> int:
        """Return how many steps no lane needs more samples for than `limits` says, by source; at most `ENDLESS`.

        `known`: a number of steps for which that is known to be so. The time grows with the logarithm of the answer.
        """
        numbers = [(self.names.index(name), limit) for name, limit in limits.items() if name in self.names]

        def fits(steps: int) -> bool:
            reach = self.reach(steps)
            return all(reach[number] <= limit for number, limit in numbers)

        low, more = known, 1
        while low + more <= ENDLESS and fits(low + more):
            low, more = low + more, more * 2
        high = min(low + more, ENDLESS + 1)
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if fits(middle) else (low, middle)
        return low

    def _base(self, lane: int) -> list[list[int]]:
        if lane not in self._bases:
            base = [[0] * len(self.names)]
            for number, segment in enumerate(self.segments[:-1]):
                draws = (self.segments[number + 1].from_step - segment.from_step) * self.lane_batch_size
                base.append(_sum(base[-1], self._dealt[number].counts(draws, lane)))
            self._bases[lane] = base
        return self._bases[lane]


def _sum(one: Sequence[int], other: Sequence[int]) -> list[int]:
    return [a + b for a, b in zip(one, other, strict=True)]


def weights_from_amounts(amounts: Mapping[str, float], sizes: Mapping[str, int] | None = None) -> dict[str, int]:
    """Return integer weights exactly proportional to the decimal amounts, each times its size if sizes are given.

    An amount counts as the decimal that it is written as: 0.1 is a tenth.
    """
    exact = {name: Fraction(str(amount)) * (sizes[name] if sizes else 1) for name, amount in amounts.items()}
    common = math.lcm(*(value.denominator for value in exact.values()))
    whole = {name: int(value * common) for name, value in exact.items()}
    divisor = math.gcd(*whole.values())
    return {name: value // divisor for name, value in sorted(whole.items()) if value}


def weights_from_temperature(sizes: Mapping[str, int], temperature: float) -> dict[str, int]:
    """Return weights that go with `size ** (1 / temperature)`, in 65,536 parts, at least one each.

    Sampling by temperature as in multilingual pre-training (Arivazhagan et al., arXiv 1907.05019).
    """
    largest = max(sizes.values())
    powers = {name: (size / largest) ** (1.0 / temperature) for name, size in sorted(sizes.items())}
    total = math.fsum(powers.values())
    parts = {name: max(1, round(power / total * _TEMPERATURE_PARTS)) for name, power in powers.items()}
    divisor = math.gcd(*parts.values())
    return {name: part // divisor for name, part in parts.items()}
