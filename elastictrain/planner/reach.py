"""How many layers places can hold at most within a time: bounds for the search over stages, in arrays.

Of each kind it is enough to know its cheapest layer and what the first and the last one need beyond that (layers are
alike but for the ends wherever a transformer is planned). Then a stage on a place holds so many
layers at most within a time, computing as few again as its memory demands, and no pipeline holds more than its places
together. Two bounds come from that:

- `least_s`, of many pipelines at once: places are taken as if each kind could have those with the fewest
  micro-batches in flight.
- `Reach`, of one: every order of the kinds, with what passes between them. Dynamic programming over the places used of
  each kind, without the layers: what the places left hold together, whatever comes before them.

Both are bounds also where layers differ. Rounding is given away in favour of the layers, so that nothing is ruled out
that fits.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise, product
from typing import TYPE_CHECKING, Any

import numpy as np

from elastictrain.planner.places import Kind

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Floats = NDArray[np.float64]

_NONE = -1e9
"""Layers of a place that cannot hold even one."""
_STEPS = np.array([1.0, *(1.0 + 0.04 * 1.7**n for n in range(12))])
"""Times that are looked at first, in units of the least: denser near it."""
_FINER = np.linspace(0.0, 1.0, 9)
_MORE = 1 + 1e-9


@dataclass(frozen=True, slots=True)
class Problem:
    """A pipeline over these kinds that takes `bubble * sum t + (micro_batches - bubble) * max t`. `flights`:
    micro-batches in flight, by place. `received_s`: what a stage on each kind waits for at least, unless it is the
    first. `even_s`: the slowest stage takes no less; `least_s`: all together take no less.
    """

    kinds: Sequence[Kind]
    flights: Sequence[float]
    received_s: Sequence[float]
    even_s: float
    least_s: float
    bubble: float
    micro_batches: int


def ends(kind: Kind) -> tuple[float, ...]:
    """Of one kind, what bounds need to know: seconds of the cheapest layer, more of the first, of the last; the same of
    bytes; activations, seconds and bytes of a layer computed again; memory; working memory; parameters likewise; fixed
    seconds.
    """
    layer, keep = min(kind.layer_s), min(kind.keep_bytes)
    live = min(kind.live_bytes)
    params = kind.params or (0.0,)
    held = min(params)
    again = bool(kind.again_bytes)
    return (
        layer, kind.layer_s[0] - layer, kind.layer_s[-1] - layer,
        keep, kind.keep_bytes[0] - keep, kind.keep_bytes[-1] - keep,
        live, min(kind.again_s) if again else 0.0, min(kind.again_bytes) if again else live,
        kind.memory_bytes, kind.working_bytes if again else math.inf,
        held, params[0] - held, params[-1] - held, kind.most_params, kind.fixed_s,
    )  # fmt: skip


def most_layers(each: Floats, flights: Floats, within_s: Floats) -> Floats:
    """Layers of a stage at most, by place and kind (the last two axes). `each`: of every kind its `ends`, (..., kinds,
    16). `flights`: (..., places). `within_s`: seconds without what is received, broadcast to (..., places, kinds).
    """
    (layer, first_s, last_s, keep, first_keep, last_keep, live, again_s, again, memory, working, held, first_held,
     last_held, most_held, fixed) = np.moveaxis(each[..., None, :, :], -1, 0)  # fmt: skip
    flight = flights[..., None]
    places = flights.shape[-1]
    at_first = (np.arange(places) == 0)[:, None]
    at_last = (np.arange(places) == places - 1)[:, None]
    spare = within_s * _MORE - fixed - first_s * at_first - last_s * at_last
    room = memory * _MORE - first_keep * at_first - last_keep * at_last
    with np.errstate(divide="ignore", invalid="ignore"):
        whole = keep + flight * live
        count = np.where(whole > 0, room / whole, np.where(room >= 0, np.inf, -np.inf))
        saved = flight * (live - again)
        each_again = keep + flight * again
        all_again = np.where(each_again > 0, (room - working) / each_again, np.inf)
        # n layers need (n * whole - room + working) / saved of them computed again
        price = again_s / saved
        some_again = (spare + price * (room - working)) / (layer + price * whole)
        some_again = np.where(saved > 0, np.minimum(some_again, all_again), -np.inf)
        count = np.fmax(count, some_again)
        count = np.fmin(count, np.where(layer > 0, spare / layer, np.where(spare >= 0, np.inf, -np.inf)))
        count = np.minimum(np.floor(count + 1e-6), 1e6)
        # Whole layers are computed again: where their last one takes too long, one layer less is always enough.
        short = np.ceil((count * whole - room + working) / saved - 1e-6)
        count -= (count * whole > room) & (count * layer + short * again_s > spare * _MORE)
        # Nearly nothing is given away here: the search asks for a little less than the last exchange.
        params = most_held - first_held * at_first - last_held * at_last
        most = np.where(held > 0, np.floor(params / held + 1e-10), np.where(params >= 0, np.inf, -np.inf))
        count = np.fmin(count, most)
    return np.where((count >= 1) & (spare >= 0), count, _NONE)


def _ranked(held: Floats, counts: Sequence[int]) -> list[Floats]:
    """Of each kind the places that hold most, as many as there are of it: (..., places of the kind)."""
    stages = held.shape[-2]
    ranked = -np.sort(-held, axis=-2)
    return [ranked[..., : min(count, stages), k] for k, count in enumerate(counts)]


def _least_sum(ranked: Sequence[Floats], each: Floats, layers: Floats) -> Floats:
    """Seconds of all layers together at least, of one micro-batch: the quickest kinds take what their places hold."""
    there = np.stack([np.maximum(held, 0.0).sum(axis=-1) for held in ranked], axis=-1)
    layer_s = np.broadcast_to(each[..., 0], there.shape)
    order = np.argsort(layer_s, axis=-1)
    there, layer_s = np.take_along_axis(there, order, -1), np.take_along_axis(layer_s, order, -1)
    before = np.cumsum(there, axis=-1) - there
    taken = np.clip(layers[..., None] - before, 0.0, there)
    seconds: Floats = (taken * layer_s).sum(axis=-1)
    return seconds


class _Many:
    """Problems in arrays, one to a row. All have the same number of kinds and of stages, and the same places."""

    def __init__(self, problems: Sequence[Problem]) -> None:
        self.layers = np.array([len(problem.kinds[0].layer_s) for problem in problems], dtype=float)[:, None]
        self.each = np.array([[ends(kind) for kind in problem.kinds] for problem in problems])
        self.flights = np.array([problem.flights for problem in problems], dtype=float)
        self.received = np.array([problem.received_s for problem in problems])
        self.counts = [kind.count for kind in problems[0].kinds]
        self.low = np.array([problem.even_s for problem in problems])[:, None]
        self.share = np.array([problem.bubble for problem in problems])[:, None]
        self.more = np.array([problem.micro_batches for problem in problems])[:, None] - self.share
        self.least = np.array([problem.least_s for problem in problems])[:, None]

    def sums(self, times: Floats) -> Floats:
        """Seconds of all stages together at least, when none takes longer than these times (pipelines, times);
        infinite where the places hold too little.
        """
        stages = self.flights.shape[1]
        later = np.arange(stages)[:, None] > 0
        within = times[:, :, None, None] - self.received[:, None, None, :] * later
        ranked = _ranked(most_layers(self.each[:, None], self.flights[:, None], within), self.counts)
        there = np.concatenate(ranked, axis=-1)
        best = -np.sort(-there, axis=-1)[..., :stages].sum(axis=-1)
        short = (best < self.layers) | (there.shape[-1] < stages)
        return np.where(short, np.inf, np.maximum(_least_sum(ranked, self.each[:, None], self.layers), self.least))

    def between(self, times: Floats) -> Floats:
        """Seconds at least when the slowest stage takes from one of these times to the next (pipelines, times - 1)."""
        seconds: Floats = self.share * self.sums(times)[:, 1:] + self.more * times[:, :-1]
        return seconds


def least_s(problems: Sequence[Problem]) -> list[float]:
    """Seconds that the micro-batches of each pipeline take at least; infinite where its layers fit nowhere. All
    problems have the same number of kinds and of stages, and the same places.

    Of the times that the slowest stage may take: none is possible in which the places hold too little; and the shorter
    it is, the fewer layers are on the quickest kinds, so that the sum over all stages is larger.
    """
    many = _Many(problems)
    low = many.low
    times = np.concatenate([low * _STEPS, np.full((len(low), 1), 1e300)], axis=1)
    found = many.between(times)
    rows = np.arange(len(low))
    at = np.argmin(found, axis=1)
    finer = many.between(times[rows, at][:, None] + (times[rows, at + 1] - times[rows, at])[:, None] * _FINER)
    found[rows, at] = np.where(times[rows, at + 1] >= 1e300, found[rows, at], finer.min(axis=1))
    bounds: list[float] = found.min(axis=1).tolist()
    return bounds


def beyond(problems: Sequence[Problem], limits_s: Sequence[float]) -> list[bool]:
    """Which of these pipelines take at least so many seconds, by one look at the time that is left for the slowest
    stage: the places hold too little in it, or all stages together take too long.
    """
    many, limits = _Many(problems), np.array(limits_s)[:, None]
    with np.errstate(divide="ignore", invalid="ignore"):
        longest = (limits - many.share * many.least) / many.more
    longest = np.where(many.more > 0, np.maximum(longest, 0.0), 1e300)
    sums = many.sums(longest)
    late: list[bool] = (many.share * sums + many.more * many.low >= limits)[:, 0].tolist()
    return late


@lru_cache(maxsize=256)
def _levels(counts: tuple[int, ...], stages: int) -> tuple[list[dict[tuple[int, ...], int]], list[Any]]:
    """The ways in which 0, 1, .. `stages` places can be used, by how many of each kind, and for every such way where
    one more of each kind leads (one beyond the last: nowhere).
    """
    levels: list[dict[tuple[int, ...], int]] = [{} for _ in range(stages + 1)]
    for used in product(*(range(min(count, stages) + 1) for count in counts)):
        if sum(used) <= stages:
            level = levels[sum(used)]
            level[used] = len(level)
    leads = []
    for level, following in pairwise(levels):
        nowhere = len(following)
        leads.append(np.array([
            [following.get((*used[:k], used[k] + 1, *used[k + 1 :]), nowhere) for used in level]
            for k in range(len(counts))
        ]))  # fmt: skip
    return levels, leads


class Reach:
    """What the places that are left hold at most, of one pipeline."""

    def __init__(
        self, kinds: Sequence[Kind], borders: Mapping[tuple[int, int], float], flights: Sequence[float]
    ) -> None:
        self._each = np.array([ends(kind) for kind in kinds])
        self._flights = np.array(flights, dtype=float)
        # by the kind before, the last row for none
        self._received = np.array([[borders.get((a, b), 0.0) for b in range(len(kinds))] for a in range(len(kinds))])
        self._received = np.concatenate([self._received, np.zeros((1, len(kinds)))])
        self._levels, self._leads = _levels(tuple(kind.count for kind in kinds), len(flights))

    def _held(self, within_s: Floats) -> Floats:
        """Layers of a stage at most, (times, kind before, places, kinds)."""
        within = within_s[:, None, None, None] - self._received[:, None, :]
        return most_layers(self._each[None, None], self._flights[None, None], within)

    def _tables(self, held: Floats) -> list[Floats]:
        """For every number of places used: layers at most on the places left (times, ways to use them, kind before)."""
        stages, kinds, times = len(self._flights), len(self._each), len(held)
        below = np.zeros((times, len(self._levels[stages]), kinds + 1))
        tables = [below]
        for place in range(stages - 1, -1, -1):
            leads = self._leads[place]
            beyond = np.concatenate([below, np.full((times, 1, kinds + 1), _NONE)], axis=1)
            below = beyond[:, leads[0], 0, None] + held[:, None, :, place, 0]
            for k in range(1, kinds):
                np.maximum(below, beyond[:, leads[k], k, None] + held[:, None, :, place, k], out=below)
            tables.append(below)
        return tables[::-1]

    def each(self, within_s: float) -> list[list[float]]:
        """For every place, by kind: layers at most of a stage there or later, whatever is before it."""
        held = self._held(np.array([within_s]))[0].max(axis=0)
        later: list[list[float]] = np.maximum.accumulate(held[::-1], axis=0)[::-1].tolist()
        return later

    def most(self, within_s: Sequence[float]) -> list[float]:
        """Layers at most on all places, for each of these times that no stage exceeds."""
        found: list[float] = self._tables(self._held(np.array(within_s)))[0][:, 0, -1].tolist()
        return found

    def left(self, within_s: float) -> list[dict[tuple[int, ...], list[float]]]:
        """For every number of places used, and every way to use them: layers at most on the places left, by the kind of
        the last place used (the last entry for none), when no stage takes more than `within_s`.
        """
        tables = self._tables(self._held(np.array([within_s])))
        return [dict(zip(way, table[0].tolist(), strict=True)) for way, table in zip(self._levels, tables, strict=True)]

    def order(self, within_s: float) -> list[int]:
        """The order of kinds whose places hold most layers."""
        held = self._held(np.array([within_s]))
        tables = self._tables(held)
        at, last, found = 0, len(self._each), []
        for place, leads in enumerate(self._leads):
            ways = [
                (float(held[0, last, place, k] + tables[place + 1][0, leads[k, at], k]), k)
                for k in range(len(self._each))
                if leads[k, at] < len(self._levels[place + 1])
            ]
            last = max(ways, key=lambda way: way[0])[1]
            at = int(leads[last, at])
            found.append(last)
        return found
