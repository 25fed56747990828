"""Lanes computed twice: which, by whom, who was wrong, and how far back that reaches. Pure.

Gradients are deterministic, so two workers that compute the same lane of the same step from the same state get the same
bits; one that does not is wrong, now and then or always (mercurial cores: Hochschild et al. 2021, "Cores that don't
count").
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, field

from elastictrain.engine.verdict import mix
from elastictrain.layout import Layout


@dataclass(frozen=True, slots=True)
class LaneCheck:
    """In this step `lane` of `worker` is computed a second time by `checker`."""

    lane: int
    worker: int
    checker: int


def lane_check(
    layout: Layout, step: int, *, seed: int, every: int | None, kinds: Mapping[int, str] | None = None
) -> LaneCheck | None:
    """Which lane is checked in `step`, by whom; None when none is. A pure function, so that nobody has to be asked.

    Checks come in rounds of L: in each every lane is checked once, in an order that is shuffled anew, and the checkers
    take turns. So every worker is looked at regularly instead of by luck. `kinds`: of numerics, by worker: only
    workers that compute the same bits can check each other.
    """
    if every is None or step % every or layout.world_size < 2:
        return None
    round_, place = divmod(step // every - 1, layout.lane_count)
    lane = _shuffled(layout.lane_count, mix(seed, round_))[place]
    rank = next(r for r, lanes in enumerate(layout.lanes) if lane in lanes)
    worker = layout.workers[rank]
    same = [w for w in layout.workers if kinds is None or kinds.get(w) == kinds.get(worker)]
    others = [w for w in same if w != worker]
    if not others:
        return None
    return LaneCheck(lane, worker, others[(place + mix(seed, round_, 1)) % len(others)])


def _shuffled(count: int, key: int) -> list[int]:
    """0 .. count-1 in an order that follows from `key` (Fisher and Yates; our own bits: they must never change)."""
    order = list(range(count))
    for i in range(count - 1, 0, -1):
        j = mix(key, i) % (i + 1)
        order[i], order[j] = order[j], order[i]
    return order


def expected_delay_steps(wrong_share: float, lane_share: float, workers: int, every: int) -> float:
    """Steps until a worker whose lanes are wrong with probability `wrong_share` is found, on average.

    `lane_share`: its share of all lanes. A check involves it as the one that is checked (`lane_share`) or as the
    checker (one of `workers - 1`), and finds it when that lane comes out wrong: every / (p (s + (1 - s) / (W - 1))).
    """
    involved = lane_share + (1 - lane_share) / (workers - 1)
    return every / (wrong_share * involved)


@dataclass(slots=True)
class LaneVerdict:
    """`named`: who has computed the lane wrongly. `undecided`: at least one of these has. `recipe`: hardly any two
    computations agree, so it is not a worker: the recipe is not deterministic.
    """

    named: set[int] = field(default_factory=set)
    undecided: set[int] = field(default_factory=set)
    recipe: bool = False


def judge_lane(first: Mapping[int, int], again: Mapping[int, int]) -> LaneVerdict:
    """`first`: the two sums that differ, by worker; `again`: everybody's sum of the same lane, computed once more.

    The majority of the second round is right, and whoever differs from it, then or before, is wrong: also one that has
    computed it right the second time. Two workers that cannot outvote each other are judged by whether they contradict
    themselves.
    """
    contradict = {worker for worker, value in first.items() if again[worker] != value}
    most, count = Counter(again.values()).most_common(1)[0]
    if 2 * count > len(again):
        wrong = {w for w, value in first.items() if value != most} | {w for w, value in again.items() if value != most}
        return LaneVerdict(named=wrong)
    if len(set(again.values())) == len(again) and len(contradict) == len(first):
        return LaneVerdict(recipe=True)
    if len(again) == 2 and contradict:
        return LaneVerdict(named=contradict)
    return LaneVerdict(undecided=set(first) | {w for w, value in again.items() if value != most})


@dataclass(slots=True)
class Health:
    """What is known of each worker: `since`: the commit at which it joined; `passed`: the last step in which a lane of
    its was checked, or it checked one, and both sums agreed.
    """

    since: dict[int, int] = field(default_factory=dict)
    passed: dict[int, int] = field(default_factory=dict)

    def joined(self, workers: Sequence[int], step: int) -> None:
        for worker in workers:
            self.since[worker] = min(step, self.since.get(worker, step))

    def took(self, check: LaneCheck, step: int) -> None:
        """A check has passed, and its vote is complete."""
        self.passed[check.worker] = self.passed[check.checker] = step

    def went_back(self, step: int) -> None:
        """The job goes on from `step`: what was checked later has not happened."""
        self.since = {worker: min(step, at) for worker, at in self.since.items()}
        self.passed = {worker: min(step, at) for worker, at in self.passed.items()}

    def merge(self, other: Health) -> None:
        """What another worker knows."""
        for worker, step in other.since.items():
            self.since[worker] = min(step, self.since.get(worker, step))
        for worker, step in other.passed.items():
            self.passed[worker] = max(step, self.passed.get(worker, step))

    def good_step(self, workers: Set[int], distrust: str) -> int:
        """The last commit that none of `workers` can have spoilt, as far as is known."""
        since = [self.since.get(worker, 0) for worker in workers]
        if distrust == "since_it_joined":
            return min(since)
        return min(self.passed.get(worker, start) for worker, start in zip(workers, since, strict=True))
