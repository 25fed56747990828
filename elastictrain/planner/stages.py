"""Layers onto pipeline stages, and stages onto kinds of devices, exactly.

A pipeline of stages with times `t_1 .. t_p` for one micro-batch (forward and backward) does m micro-batches in
`sum t + (m - 1) max t` (1F1B; Narayanan et al. 2021 for equal stages). The search goes stage by stage over
(places used of each kind, last kind, layers used), and keeps for each of these states the pairs (sum, max) that no
other pair beats in both: whatever follows adds the same to both, so that a beaten pair can never win. Every order of
the kinds and every cut of the layers is covered. A label is dropped when even the best that could follow is no better
than the best pipeline found so far.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, permutations


@dataclass(frozen=True, slots=True)
class Kind:
    """Places for stages that are alike. `count`: how many. `layer_s`: seconds of each layer for one micro-batch,
    forward and backward. `fixed_s`: more for each stage. `keep_bytes`: what each layer keeps (parameters and state).
    `live_bytes`: activations of each layer for one micro-batch in flight. `memory_bytes`: what a stage may use.
    `params` of each layer: a stage may have `most_params` at most (a limit on its exchange of gradients).
    """

    count: int
    layer_s: tuple[float, ...]
    keep_bytes: tuple[float, ...]
    live_bytes: tuple[float, ...]
    memory_bytes: float
    fixed_s: float = 0.0
    params: tuple[float, ...] = ()
    most_params: float = math.inf


@dataclass(frozen=True, slots=True)
class Stage:
    """Layers `lo .. hi-1` on a place of this kind; `time_s` for one micro-batch with what it receives."""

    kind: int
    lo: int
    hi: int
    time_s: float


@dataclass(frozen=True, slots=True)
class Pipeline:
    """`time_s` of all micro-batches. `exact`: False when the search was cut off; `bound_s` says how good it is then."""

    stages: tuple[Stage, ...]
    time_s: float
    bound_s: float
    exact: bool


@dataclass(slots=True)
class _Label:
    total: float
    worst: float
    stage: Stage | None
    parent: _Label | None


_State = tuple[tuple[int, ...], int, int]
"""Places used by kind, the last stage's kind, layers used."""


@dataclass(slots=True)
class _Search:
    kinds: Sequence[Kind]
    borders: Mapping[tuple[int, int], float]
    stages: int
    micro_batches: int
    limit: int
    best: float = math.inf
    winner: _Label | None = None
    cut_off: bool = False
    dropped_bound: float = math.inf
    time: list[list[float]] = field(default_factory=list)
    keep: list[list[float]] = field(default_factory=list)
    live: list[list[float]] = field(default_factory=list)
    held: list[list[float]] = field(default_factory=list)
    rest: list[float] = field(default_factory=list)
    quickness: list[float] = field(default_factory=list)
    quickest: float = 0.0
    powers: dict[tuple[int, ...], float] = field(default_factory=dict)

    layers: int = 0

    def __post_init__(self) -> None:
        self.layers = len(self.kinds[0].layer_s)
        for kind in self.kinds:
            self.time.append([0.0, *accumulate(kind.layer_s)])
            self.keep.append([0.0, *accumulate(kind.keep_bytes)])
            self.live.append([0.0, *accumulate(kind.live_bytes)])
            self.held.append([0.0, *accumulate(kind.params or (0.0,) * self.layers)])
        least = [min(kind.layer_s[i] for kind in self.kinds) for i in range(self.layers)]
        self.rest = [*reversed(list(accumulate(reversed(least)))), 0.0]
        # The share of the least possible work that a kind does in its time, on the layer that suits it best.
        for kind in self.kinds:
            self.quickness.append(max((a / b for a, b in zip(least, kind.layer_s, strict=True) if b > 0), default=1.0))
        self.quickest = min(kind.fixed_s for kind in self.kinds)

    def value(self, total: float, worst: float) -> float:
        return total + (self.micro_batches - 1) * worst

    def power(self, used: tuple[int, ...]) -> float:
        """What the quickest of the places that are left do together, in units of the quickest kind."""
        if used not in self.powers:
            left = self.stages - sum(used)
            free = sorted(
                (q for q, kind, n in zip(self.quickness, self.kinds, used, strict=True) for _ in range(kind.count - n)),
                reverse=True,
            )
            self.powers[used] = sum(free[:left])
        return self.powers[used]

    def bound(self, total: float, worst: float, used: tuple[int, ...], place: int, layers: int) -> float:
        """No pipeline that goes on from here takes less: at best the places left share the layers left evenly."""
        left = self.stages - place
        if left:
            fixed = self.quickest
            worst = max(worst, self.rest[layers] / self.power(used) + fixed)
            total += self.rest[layers] + left * fixed
        return total + (self.micro_batches - 1) * worst

    def fits(self, kind: int, lo: int, hi: int, place: int) -> bool:
        if self.held[kind][hi] - self.held[kind][lo] > self.kinds[kind].most_params:
            return False
        in_flight = min(self.stages - place, self.micro_batches)
        kept = self.keep[kind][hi] - self.keep[kind][lo]
        return kept + in_flight * (self.live[kind][hi] - self.live[kind][lo]) <= self.kinds[kind].memory_bytes

    def seconds(self, last: int, kind: int, lo: int, hi: int) -> float:
        border = self.borders.get((last, kind), 0.0) if last >= 0 else 0.0
        return self.time[kind][hi] - self.time[kind][lo] + self.kinds[kind].fixed_s + border

    def greedy(self, order: Sequence[int], threshold: float) -> list[Stage] | None:
        """As many layers as each place may take within the threshold, in this order of kinds: exact for the order."""
        at, last, found = 0, -1, []
        for place, kind in enumerate(order):
            least_left = self.stages - place - 1
            # a little too far, so that rounding loses no layer; the exact comparison follows
            times, spare = self.time[kind], threshold - self.seconds(last, kind, at, at)
            hi = min(bisect_right(times, (times[at] + spare) * (1 + 1e-12)), self.layers - least_left + 1) - 1
            while hi > at and (self.seconds(last, kind, at, hi) > threshold or not self.fits(kind, at, hi, place)):
                hi -= 1
            if hi <= at:
                return None
            found.append(Stage(kind, at, hi, self.seconds(last, kind, at, hi)))
            at, last = hi, kind
        return found if at == self.layers else None

    def in_order(self, order: Sequence[int], rounds: int = 60) -> list[Stage] | None:
        """The cut of the layers with the least maximum for this order of kinds (close to it after a few rounds); None
        when memory forbids every cut.
        """
        high = sum(self.seconds(-1, kind, 0, self.layers) for kind in order) + sum(self.borders.values())
        best = self.greedy(order, high)
        if best is None:
            return None
        low = 0.0
        for _ in range(rounds):
            high = max(stage.time_s for stage in best)
            if high - low <= 1e-13 * high:
                break
            found = self.greedy(order, (low + high) / 2)
            if found is None:
                low = (low + high) / 2
            else:
                best = found
        return best

    def guess(self) -> list[Stage] | None:
        """A good pipeline to measure others by: the kinds one after the other, quickest places taken first."""
        ranked = sorted(range(len(self.kinds)), key=lambda kind: self.time[kind][-1])
        places = [kind for kind in ranked for _ in range(self.kinds[kind].count)][: self.stages]
        rounds = 60 if len(self.kinds) == 1 else 12
        guesses = [self.in_order([kind for kind in order for _ in range(places.count(kind))], rounds)
                   for order in permutations(sorted(set(places)))]  # fmt: skip
        found = [guess for guess in guesses if guess is not None]
        return min(found, key=self.time_of, default=None)

    def time_of(self, stages: Sequence[Stage]) -> float:
        times = [stage.time_s for stage in stages]
        return self.value(sum(times), max(times))

    def extend(self, state: _State, labels: list[_Label], after: dict[_State, list[_Label]]) -> None:
        used, last, at = state
        place = sum(used)
        final = place == self.stages - 1
        # No stage of a pipeline that is better may take longer than this.
        least = min(label.total for label in labels) + self.rest[at] + (self.stages - place) * self.quickest
        most = (self.best - least) / (self.micro_batches - 1) if self.micro_batches > 1 else math.inf
        for kind, here in enumerate(self.kinds):
            if used[kind] == here.count:
                continue
            taken = (*used[:kind], used[kind] + 1, *used[kind + 1 :])
            first = self.layers if final else at + 1
            left_power = 0.0 if final else self.power(taken)
            while not final and first < self.layers and self.rest[first] / left_power + self.quickest > most:
                first += 1
            for hi in range(first, self.layers - (self.stages - place - 1) + 1):
                seconds = self.seconds(last, kind, at, hi)
                if seconds > most or not self.fits(kind, at, hi, place):
                    break
                stage = Stage(kind, at, hi, seconds)
                for label in labels:
                    self.offer(label, stage, (taken, kind, hi), place + 1, after)

    def offer(self, label: _Label, stage: Stage, state: _State, place: int, after: dict[_State, list[_Label]]) -> None:
        total, worst = label.total + stage.time_s, max(label.worst, stage.time_s)
        if self.bound(total, worst, state[0], place, stage.hi) >= self.best:
            return
        grown = _Label(total, worst, stage, label)
        if place == self.stages:
            self.best, self.winner = self.value(total, worst), grown
            return
        kept = after.setdefault(state, [])
        if any(other.total <= total and other.worst <= worst for other in kept):
            return
        kept[:] = [other for other in kept if not (total <= other.total and worst <= other.worst)]
        kept.append(grown)

    def thin(self, states: dict[_State, list[_Label]], place: int) -> dict[_State, list[_Label]]:
        """Over the limit: only the labels that promise most go on; the bound of the others is remembered."""
        if sum(map(len, states.values())) <= self.limit:
            return states
        ranked = sorted(
            ((self.bound(label.total, label.worst, state[0], place, state[2]), state, n, label)
             for state, labels in states.items() for n, label in enumerate(labels)),
            key=lambda entry: entry[:3],
        )  # fmt: skip
        self.cut_off = True
        self.dropped_bound = min(self.dropped_bound, ranked[self.limit][0])
        thinned: dict[_State, list[_Label]] = {}
        for _, state, _, label in ranked[: self.limit]:
            thinned.setdefault(state, []).append(label)
        return thinned

    def winning(self) -> list[Stage]:
        found: list[Stage] = []
        label = self.winner
        while label is not None and label.stage is not None:
            found.append(label.stage)
            label = label.parent
        return found[::-1]


def place_stages(
    kinds: Sequence[Kind],
    stages: int,
    micro_batches: int,
    *,
    borders: Mapping[tuple[int, int], float] | None = None,
    better_than_s: float = math.inf,
    limit: int = 2_000,
) -> Pipeline | None:
    """The pipeline of `stages` stages with the least `sum t + (micro_batches - 1) max t`, or None when none fits or
    none takes less than `better_than_s`.

    `borders[(a, b)]`: seconds that a stage on kind b waits for what kind a sends it, for one micro-batch.
    `limit`: labels kept per stage; beyond it the search is no longer exact, and says so (also by a pipeline without
    stages, when what was kept led nowhere).
    """
    if stages > min(len(kinds[0].layer_s), sum(kind.count for kind in kinds)):
        return None
    search = _Search(kinds, borders or {}, stages, micro_batches, limit, best=better_than_s)
    guess = search.guess()
    if guess is not None and (taken_s := search.time_of(guess)) < search.best:
        search.best = taken_s
    else:
        guess = None
    if len(kinds) == 1:  # the sum is the same for every cut, so that the least maximum wins
        return None if guess is None else Pipeline(tuple(guess), search.best, search.best, exact=True)
    states: dict[_State, list[_Label]] = {((0,) * len(kinds), -1, 0): [_Label(0.0, 0.0, None, None)]}
    for place in range(1, stages + 1):
        after: dict[_State, list[_Label]] = {}
        for state, labels in states.items():
            search.extend(state, labels, after)
        states = search.thin(after, place)
    found = search.winning() or guess
    if not found:
        return Pipeline((), math.inf, search.dropped_bound, exact=False) if search.cut_off else None
    return Pipeline(tuple(found), search.best, min(search.best, search.dropped_bound), not search.cut_off)
