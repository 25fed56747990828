"""Layers onto pipeline stages, and stages onto kinds of devices, exactly.

A pipeline of stages with times `t_1 .. t_p` for one micro-batch (forward and backward) does m micro-batches in
`b * sum t + (m - b) * max t`, where b is the share of the bubble that the schedule leaves (1 for 1F1B; Narayanan et al.
2021 for equal stages). A stage that does not fit computes its first layers again in the backward, as few as are enough.
The search goes stage by stage over
(places used of each kind, last kind, layers used), and keeps for each of these states the pairs (sum, max) that no
other pair beats in both: whatever follows adds the same to both, so that a beaten pair can never win. Every order of
the kinds and every cut of the layers is covered. A label is dropped when even the best that could follow is no better
than the best pipeline found so far.
"""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate

from elastictrain.planner.places import Kind, Pipeline, Stage
from elastictrain.planner.reach import Reach


@dataclass(slots=True)
class _Label:
    total: float
    worst: float
    stage: Stage | None
    parent: _Label | None


LONG_S = 1e300
_ROUNDS = 4
_PARTS = 12
_LOOSER = (1.0, 1.01, 1.05)
"""The time of the guess is looked for in so many rounds, each in so many parts; and what a little more would bring."""
_State = tuple[tuple[int, ...], int, int]
"""Places used by kind, the last stage's kind, layers used."""


@dataclass(slots=True)
class _Search:
    kinds: Sequence[Kind]
    borders: Mapping[tuple[int, int], float]
    stages: int
    micro_batches: int
    limit: int
    bubble: float
    flights: Sequence[float]
    reach: Reach
    order: Sequence[int] | None = None
    best: float = math.inf
    winner: _Label | None = None
    cut_off: bool = False
    dropped_bound: float = math.inf
    time: list[list[float]] = field(default_factory=list)
    keep: list[list[float]] = field(default_factory=list)
    live: list[list[float]] = field(default_factory=list)
    again: list[list[float]] = field(default_factory=list)
    repeated: list[list[float]] = field(default_factory=list)
    held: list[list[float]] = field(default_factory=list)
    rest: list[float] = field(default_factory=list)
    quickness: list[float] = field(default_factory=list)
    quickest: float = 0.0
    border: float = 0.0
    layer_s: list[float] = field(default_factory=list)
    by_layer: list[int] = field(default_factory=list)
    last_more: float = 0.0
    caps: list[list[float]] = field(default_factory=list)
    powers: dict[tuple[int, ...], float] = field(default_factory=dict)
    left: list[dict[tuple[int, ...], list[float]]] = field(default_factory=list)

    known: dict[tuple[int, int, int, int, int], Stage | None] = field(default_factory=dict)
    layers: int = 0

    def __post_init__(self) -> None:
        self.layers = len(self.kinds[0].layer_s)
        for kind in self.kinds:
            self.time.append([0.0, *accumulate(kind.layer_s)])
            self.keep.append([0.0, *accumulate(kind.keep_bytes)])
            self.live.append([0.0, *accumulate(kind.live_bytes)])
            self.again.append([0.0, *accumulate(kind.again_s)])
            self.repeated.append([0.0, *accumulate(kind.again_bytes)])
            self.held.append([0.0, *accumulate(kind.params or (0.0,) * self.layers)])
        least = [min(kind.layer_s[i] for kind in self.kinds) for i in range(self.layers)]
        self.rest = [*reversed(list(accumulate(reversed(least)))), 0.0]
        # The share of the least possible work that a kind does in its time, on the layer that suits it best.
        for kind in self.kinds:
            self.quickness.append(max((a / b for a, b in zip(least, kind.layer_s, strict=True) if b > 0), default=1.0))
        self.quickest = min(kind.fixed_s for kind in self.kinds)
        self.border = min(self.borders.values(), default=0.0)
        self.layer_s = [min(kind.layer_s) for kind in self.kinds]
        self.by_layer = sorted(range(len(self.kinds)), key=self.layer_s.__getitem__)
        self.last_more = min(kind.layer_s[-1] - least for kind, least in zip(self.kinds, self.layer_s, strict=True))

    def value(self, total: float, worst: float) -> float:
        return self.bubble * total + (self.micro_batches - self.bubble) * worst

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

    def ahead(self, used: tuple[int, ...], place: int, at: int) -> tuple[float, float]:
        """Of the places left, with the layers left: seconds of all together at least, and of the slowest."""
        left = self.stages - place
        if not left:
            return 0.0, 0.0
        fixed, least = self.quickest + (self.border if place else 0.0), self.rest[at]
        if self.caps:
            least = max(least, self.filled(used, place, self.layers - at))
        return least + left * fixed, self.rest[at] / self.power(used) + fixed

    def filled(self, used: tuple[int, ...], place: int, layers: float) -> float:
        """Seconds of so many layers: the quickest places take as many as they hold."""
        seconds, held = self.last_more, self.caps[place]
        for kind in self.by_layer:
            taken = min(layers, (self.kinds[kind].count - used[kind]) * held[kind])
            if taken > 0:
                seconds += taken * self.layer_s[kind]
                layers -= taken
        return seconds if layers <= 0 else math.inf

    def bound(self, total: float, worst: float, used: tuple[int, ...], place: int, at: int) -> float:
        """No pipeline that goes on from here takes less."""
        more, slowest = self.ahead(used, place, at)
        return self.value(total + more, max(worst, slowest))

    def fewest_again(self, kind: int, lo: int, hi: int, place: int) -> int | None:
        """How many of the layers must be computed again so that they fit; None when all are not enough."""
        here = self.kinds[kind]
        if self.held[kind][hi] - self.held[kind][lo] > here.most_params:
            return None
        live, flight = self.live[kind], self.flights[place]
        kept = self.keep[kind][hi] - self.keep[kind][lo]
        if kept + flight * (live[hi] - live[lo]) <= here.memory_bytes:
            return 0
        if not here.again_bytes:
            return None
        repeated = self.repeated[kind]

        def fits(count: int) -> bool:
            at = lo + count
            activations = flight * (repeated[at] - repeated[lo] + live[hi] - live[at])
            return kept + activations + here.working_bytes <= here.memory_bytes

        found = bisect_left(range(1, hi - lo + 1), True, key=fits) + 1
        return found if found <= hi - lo else None

    def seconds(self, last: int, kind: int, lo: int, hi: int) -> float:
        """Of a stage that computes nothing again."""
        border = self.borders.get((last, kind), 0.0) if last >= 0 else 0.0
        return self.time[kind][hi] - self.time[kind][lo] + self.kinds[kind].fixed_s + border

    def stage(self, last: int, kind: int, lo: int, hi: int, place: int) -> Stage | None:
        """The stage in as little time as its memory allows, or None when it does not fit. With more layers at its end
        it never takes less time.
        """
        key = last, kind, lo, hi, place
        if key not in self.known:
            self.known[key] = self._stage(last, kind, lo, hi, place)
        return self.known[key]

    def _stage(self, last: int, kind: int, lo: int, hi: int, place: int) -> Stage | None:
        again = self.fewest_again(kind, lo, hi, place)
        if again is None:
            return None
        seconds = self.seconds(last, kind, lo, hi)
        if again:
            seconds += self.again[kind][lo + again] - self.again[kind][lo]
        return Stage(kind, lo, hi, seconds, again)

    def greedy(self, order: Sequence[int], threshold: float) -> list[Stage] | None:
        """As many layers as each place may take within the threshold, in this order of kinds: exact for the order."""
        at, last, found = 0, -1, []
        for place, kind in enumerate(order):
            least_left = self.stages - place - 1
            # a little too far, so that rounding loses no layer; the exact comparison follows
            times, spare = self.time[kind], threshold - self.seconds(last, kind, at, at)
            hi = min(bisect_right(times, (times[at] + spare) * (1 + 1e-12)), self.layers - least_left + 1) - 1
            taken: Stage | None = None
            while hi > at:
                taken = self.stage(last, kind, at, hi, place)
                if taken is not None and taken.time_s <= threshold:
                    break
                hi -= 1
            if hi <= at or taken is None:
                return None
            found.append(taken)
            at, last = hi, kind
        return found if at == self.layers else None

    def in_order(self, order: Sequence[int], rounds: int = 60) -> list[Stage] | None:
        """The cut of the layers with the least maximum for this order of kinds (close to it after a few rounds); None
        when memory forbids every cut.
        """
        high = sum(self.seconds(-1, kind, 0, self.layers) + self.again[kind][-1] for kind in order)
        high += sum(self.borders.values())
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

    def most_s(self, total: float, used: tuple[int, ...], place: int, at: int) -> float:
        """No stage of a pipeline that is better than the best one takes longer, when `total` went into its first
        `place` stages, with `at` layers.
        """
        more = self.micro_batches - self.bubble
        if more <= 0:
            return math.inf
        return (self.best - self.bubble * (total + self.ahead(used, place, at)[0])) / more

    def longest(self) -> float:
        """The same of all stages. What places hold in that time makes the sum of all stages longer, and so the time
        shorter.
        """
        none = (0,) * len(self.kinds)
        within = min(self.most_s(0.0, none, 0, 0), LONG_S)
        self.caps = self.reach.each(within)
        return min(self.most_s(0.0, none, 0, 0), within)

    def hopeless(self) -> bool:
        """Whether the places hold too little, whatever their order, in the time that a better pipeline has."""
        within = self.longest()
        return within <= 0 or self.reach.most([within])[0] < self.layers

    def guess(self) -> list[Stage] | None:
        """A good pipeline to measure others by: in the order that is settled, or in that of kinds whose places hold all
        layers in the least time.
        """
        if self.order is not None:
            return self.in_order(self.order, 60 if len(self.kinds) == 1 else 12)
        if len(self.kinds) == 1:
            return self.in_order([0] * self.stages)
        low = self.rest[0] / self.power((0,) * len(self.kinds))
        longest = max(self.time[k][-1] + self.again[k][-1] + kind.fixed_s for k, kind in enumerate(self.kinds))
        high = min(self.longest(), longest + max(self.borders.values(), default=0.0))
        for _ in range(_ROUNDS):
            times = [low + (high - low) * n / _PARTS for n in range(1, _PARTS)]
            enough = bisect_left(self.reach.most(times), self.layers)
            low, high = [low, *times][enough], [*times, high][enough]
        best: list[Stage] | None = None
        for more in _LOOSER:
            found = self.in_order(self.reach.order(high * more), 12)
            if found is not None and (best is None or self.time_of(found) < self.time_of(best)):
                best = found
        return best

    def time_of(self, stages: Sequence[Stage]) -> float:
        times = [stage.time_s for stage in stages]
        return self.value(sum(times), max(times))

    def extend(self, state: _State, labels: list[_Label], after: dict[_State, list[_Label]]) -> None:
        used, last, at = state
        place = sum(used)
        final = place == self.stages - 1
        # No stage of a pipeline that is better may take longer than this.
        most = self.most_s(min(label.total for label in labels), used, place, at)
        for kind, here in enumerate(self.kinds):
            if used[kind] == here.count or (self.order is not None and self.order[place] != kind):
                continue
            taken = (*used[:kind], used[kind] + 1, *used[kind + 1 :])
            first = max(self.layers if final else at + 1, math.ceil(self.layers - self.left[place + 1][taken][kind]))
            for hi in range(first, self.layers - (self.stages - place - 1) + 1):
                stage = self.stage(last, kind, at, hi, place)
                if stage is None or stage.time_s > most:
                    break
                self.offer(labels, stage, (taken, kind, hi), place + 1, after)

    def offer(
        self, labels: list[_Label], stage: Stage, state: _State, place: int, after: dict[_State, list[_Label]]
    ) -> None:
        more, slowest = self.ahead(state[0], place, stage.hi)
        kept: list[_Label] | None = None
        for label in labels:
            total, worst = label.total + stage.time_s, max(label.worst, stage.time_s)
            if self.value(total + more, max(worst, slowest)) >= self.best:
                continue
            grown = _Label(total, worst, stage, label)
            if place == self.stages:
                self.best, self.winner = self.value(total, worst), grown
                continue
            kept = after.setdefault(state, []) if kept is None else kept
            if any(other.total <= total and other.worst <= worst for other in kept):
                continue
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
    limit: int = 6_000,
    bubble: float = 1.0,
    in_flight: Sequence[float] | None = None,
    order: Sequence[int] | None = None,
) -> Pipeline | None:
    """The pipeline of `stages` stages with the least `bubble * sum t + (micro_batches - bubble) * max t`, or None when
    none fits or none takes less than `better_than_s`.

    `bubble`: share of 1F1B's bubble that the schedule leaves. `in_flight`: micro-batches whose activations each stage
    keeps at most (default: 1F1B's).

    `order`: the kind of every stage, where that is settled and only the layers are to be cut (default: any order).
    `borders[(a, b)]`: seconds that a stage on kind b waits for what kind a sends it, for one micro-batch.
    `limit`: labels kept per stage; beyond it the search is no longer exact, and says so (also by a pipeline without
    stages, when what was kept led nowhere).
    """
    if stages > min(len(kinds[0].layer_s), sum(kind.count for kind in kinds)):
        return None
    flights = in_flight or [min(stages - place, micro_batches) for place in range(stages)]
    search = _Search(
        kinds, borders or {}, stages, micro_batches, limit, bubble, flights, Reach(kinds, borders or {}, flights),
        order=order, best=better_than_s,
    )  # fmt: skip
    if search.hopeless():
        return None
    guess = search.guess()
    # On one kind the guess has the least maximum; when it computes nothing again, no cut has a smaller sum either.
    settled = len(kinds) == 1 and (guess is None or not any(stage.again for stage in guess))
    if guess is not None and (taken_s := search.time_of(guess)) < search.best:
        search.best = taken_s
    else:
        guess = None
    if settled:
        return None if guess is None else Pipeline(tuple(guess), search.best, search.best, exact=True)
    search.left = search.reach.left(search.longest())
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
