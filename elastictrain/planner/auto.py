"""How many workers a job should run on, of those that its settings allow: for `plan: auto`. Pure.

What can be run today is planned, nothing else: every worker holds the whole model, lanes are dealt out by speed. More
workers are not always quicker: each takes part in the exchange. So every number is tried, over every subset of the
groups.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from elastictrain.planner.compute import DEFAULTS, Constants
from elastictrain.planner.lanes import LanePlan
from elastictrain.planner.pace import Pace
from elastictrain.planner.profiles import Cluster
from elastictrain.planner.shapes import fewest_workers
from elastictrain.planner.workload import Workload, plan_counts, teams_of, workers_of


@dataclass(frozen=True, slots=True)
class Choice:
    """`workers` and where they are (`counts`, by group). `others`: the best seconds of some numbers,
    of `worker_counts` always.
    """

    workers: int
    counts: Mapping[int, int]
    split: LanePlan
    others: Mapping[int, float]

    @property
    def alike(self) -> bool:
        """Every worker is as good as any other, so that it does not matter which of them gets which lanes."""
        return len({(way.lane_s, way.fixed_s) for way in self.split.ways}) == 1


def worker_counts(lanes: int, least: int, most: int) -> list[int]:
    """The numbers of workers worth telling of, from `least` to `most`: the fewest for every largest number of lanes."""
    return sorted({least, most} | {count for count in fewest_workers(lanes) if least <= count <= most})


def choose_workers(
    work: Workload, cluster: Cluster, least: int, most: int, *, constants: Constants = DEFAULTS
) -> Choice | None:
    """The quickest number of workers between `least` and `most`, the smaller one of two that are as quick; None when
    the model fits on none of them, or the cluster has fewer devices than `least`.
    """
    best: Choice | None = None
    others: dict[int, float] = {}
    told_of = set(worker_counts(work.lanes, least, min(most, work.lanes, cluster.size)))
    for counts in workers_of(cluster, least, min(most, work.lanes)):
        count = sum(counts.values())
        limit = others.get(count, math.inf)
        if count not in told_of and best is not None:
            limit = min(limit, best.split.step_s)
        split = plan_counts(work, cluster, counts, constants, better_than_s=limit)
        if split is None:
            continue
        others[count] = split.step_s
        if best is None or _better(split.step_s, count, best):
            best = Choice(count, counts, split, others)
    return best


def _better(step_s: float, count: int, than: Choice) -> bool:
    if step_s < than.split.step_s * (1 - 1e-9):
        return True
    return count < than.workers and step_s <= than.split.step_s * (1 + 1e-9)


def pace_of(work: Workload, cluster: Cluster, choice: Choice, *, constants: Constants = DEFAULTS) -> Pace:
    """What the controller goes by later: up to the chosen number of workers, each number where it exchanges best."""
    rest_s = [math.inf] * choice.workers
    for counts in workers_of(cluster, 1, choice.workers):
        fixed_s = max(way.fixed_s for team in teams_of(work, cluster, tuple(counts), constants, counts)
                      for way in team.ways)  # fmt: skip
        at = sum(counts.values()) - 1
        rest_s[at] = min(rest_s[at], fixed_s)
    speed = sum(team.count / way.lane_s for team, way in zip(choice.split.teams, choice.split.ways, strict=True))
    return Pace(choice.workers / speed, tuple(rest_s))


def told(choice: Choice, cluster: Cluster, most: int) -> list[str]:
    """What was chosen and why, and what of it a run does not do."""
    where = ", ".join(
        f"{count} on {cluster.groups[n].device} (group {n})" for n, count in sorted(choice.counts.items())
    )
    number = f"{choice.workers} worker{'s' if choice.workers > 1 else ''}"
    said = [f"plan: auto: {number} ({where}), {choice.split.step_s:.3g} s a step by the cost model"]
    if choice.workers < most and most in choice.others:
        more = choice.others[most] / choice.split.step_s - 1
        said.append(f"{most}, as workers.max allows, would take {max(more, 0.0):.1%} longer")
    if len(choice.counts) < len(cluster.groups) or not choice.alike:
        said.append(
            "which worker lands on which device is not known before it starts: nodes of other groups are not kept out, "
            "and lanes begin even"
        )
    return said
