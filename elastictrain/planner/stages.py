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

from elastictrain.planner.reach import Reach


@dataclass(frozen=True, slots=True)
class Kind:
    """Places for stages that are alike. `count`: how many. `layer_s`: seconds of each layer for one micro-batch,
    forward and backward. `fixed_s`: more for each stage. `keep_bytes`: what each layer keeps (parameters and state).
    `live_bytes`: activations of each layer for one micro-batch in flight. `memory_bytes`: what a stage may use.
    `params` of each layer: a stage may have `most_params` at most (a limit on its exchange of gradients).

    `again_s`, `again_bytes`: more seconds of each layer when its activations are computed again, and what it then keeps
    instead of `live_bytes` (not more than that). `working_bytes`: more for the one layer that is being computed again.
    Empty: nothing is computed again.
    """

    count: int
    layer_s: tuple[float, ...]
    keep_bytes: tuple[float, ...]
    live_bytes: tuple[float, ...]
    memory_bytes: float
    fixed_s: float = 0.0
    params: tuple[float, ...] = ()
    most_params: float = math.inf
    again_s: tuple[float, ...] = ()
    again_bytes: tuple[float, ...] = ()
    working_bytes: float = 0.0


@dataclass(frozen=True, slots=True)
class Stage:
    """Layers `lo .. hi-1` on a place of this kind; `time_s` for one micro-batch with what it receives. `again`: so many
    of the layers, from the first on, are computed again.
    """

    kind: int
    lo: int
    hi: int
    time_s: float
    again: int = 0


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

    def bound(self, total: float, worst: float, used: tuple[int, ...], place: int, layers: int) -> float:
        """No pipeline that goes on from here takes less: at best the places left share the layers left evenly."""
        left = self.stages - place
        if left:
            fixed = self.quickest
            worst = max(worst, self.rest[layers] / self.power(used) + fixed)
            total += self.rest[layers] + left * fixed
        return self.value(total, worst)

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

    def most_s(self, total: float, at: int, place: int) -> float:
        """No stage of a pipeline that is better than the best one takes longer, when `total` went into its first
        `place` stages, with `at` layers.
        """
        least = total + self.rest[at] + (self.stages - place) * self.quickest
        more = self.micro_batches - self.bubble
        return (self.best - self.bubble * least) / more if more > 0 else math.inf

    def hopeless(self) -> bool:
        """Whether the places hold too little, whatever their order, in the time that a better pipeline has."""
        return self.reach.most([min(self.most_s(0.0, 0, 0), LONG_S)])[0] < self.layers

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
        high = min(self.most_s(0.0, 0, 0), longest + max(self.borders.values(), default=0.0))
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
        most = self.most_s(min(label.total for label in labels), at, place)
        for kind, here in enumerate(self.kinds):
            if used[kind] == here.count or (self.order is not None and self.order[place] != kind):
                continue
            taken = (*used[:kind], used[kind] + 1, *used[kind + 1 :])
            first = max(self.layers if final else at + 1, math.ceil(self.layers - self.left[place + 1][taken][kind]))
            for hi in range(first, self.layers - (self.stages - place - 1) + 1):
                stage = self.stage(last, kind, at, hi, place)
                if stage is None or stage.time_s > most:
                    break
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
    search.left = search.reach.left(min(search.most_s(0.0, 0, 0), LONG_S))
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
