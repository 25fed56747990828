"""Any model at all, seen from outside: how its lanes and blocks are best dealt out. No structure is needed for that."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from elastictrain.planner.compute import DEFAULTS, Constants
from elastictrain.planner.cost import OPTIMIZER_BYTES
from elastictrain.planner.lanes import LanePlan, Team, Way, plan_lanes
from elastictrain.planner.memory import MEMORY, probability
from elastictrain.planner.model import Transformer
from elastictrain.planner.plan import SPREAD_BYTES, Plan
from elastictrain.planner.profiles import Cluster, Dtype
from elastictrain.planner.shapes import deals, slowest_ring_s, subsets


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """`params`: of the model. `lane_flops`: of one lane, forward and backward. `kept_bytes`: activations that one
    backward pass needs. `lanes` of a step; `operations` of one lane (each costs the host a launch). `decoder`: what is
    inside, where it was recognised as that; `decoder_said`: what was found, or why not.
    """

    params: int
    lane_flops: float
    kept_bytes: float
    lanes: int
    operations: int = 0
    dtype: Dtype = "f32"
    mirrors: bool = True
    decoder: Transformer | None = None
    decoder_said: str = ""


LAUNCH_S = 1e-5
"""Seconds that the host needs to launch one operation."""
STATE_BYTES = 12.0
"""Per parameter in the blocks: master and two moments in f32."""
WORTH = 3.0
"""Numbers of workers with which a step takes more than this many times as long are not shown."""


def plan_workload(
    work: Workload, cluster: Cluster, *, constants: Constants = DEFAULTS
) -> tuple[tuple[int, ...], LanePlan] | None:
    """The best devices of the cluster (the groups they are of) and the split over them, or None when the model fits on
    none of them together.
    """
    found = workload_plans(work, cluster, constants=constants, keep=1)
    return found[0] if found else None


def workload_plans(
    work: Workload, cluster: Cluster, *, constants: Constants = DEFAULTS, keep: int = 5
) -> list[tuple[tuple[int, ...], LanePlan]]:
    """The best devices and the split over them, best first: of all numbers of workers with the same largest number of
    lanes the best one. Of two that are as quick, the fewer workers.

    Every number of workers over every subset of the groups is tried: more of them, a slow group, or a slow link to it
    may cost more than they bring.
    """
    best: dict[int, tuple[tuple[int, ...], LanePlan]] = {}
    for counts in workers_of(cluster, 1, work.lanes):
        kind = -(-work.lanes // sum(counts.values()))
        quickest = min((split.step_s for _, split in best.values()), default=math.inf)
        limit = min(best[kind][1].step_s if kind in best else math.inf, quickest * (WORTH if keep > 1 else 1))
        found = plan_counts(work, cluster, counts, constants, better_than_s=limit * (1 - 1e-9))
        if found is not None:
            best[kind] = tuple(counts), found
    return sorted(best.values(), key=lambda plan: plan[1].step_s)[:keep]


def workers_of(cluster: Cluster, least: int, most: int) -> Iterator[dict[int, int]]:
    """Devices of each group, for every number from `least` to `most`, small ones first."""
    for count in range(least, min(most, cluster.size) + 1):
        for chosen in subsets(len(cluster.groups)):
            for taken in deals([cluster.groups[n].devices for n in chosen], count):
                yield dict(zip(chosen, taken, strict=True))


def plan_counts(
    work: Workload, cluster: Cluster, counts: Mapping[int, int], constants: Constants, *, better_than_s: float
) -> LanePlan | None:
    """The split over these devices of each group, every one with a lane; None when the model does not fit on them, or
    they are not quicker.
    """
    copies = 2 if work.mirrors and sum(counts.values()) > 1 else 1
    teams = teams_of(work, cluster, tuple(counts), constants, counts)
    return plan_lanes(teams, work.lanes, STATE_BYTES * copies * work.params, better_than_s=better_than_s, least=1)


def teams_of(
    work: Workload,
    cluster: Cluster,
    chosen: Sequence[int],
    constants: Constants,
    counts: Mapping[int, int] | None = None,
) -> tuple[Team, ...]:
    """The chosen groups as teams of workers that each hold the whole model. `counts`: how many devices of each group
    (default: all).
    """
    used = counts or {n: cluster.groups[n].devices for n in chosen}
    devices = sum(used[n] for n in chosen)
    size = 2 if work.dtype == "bf16" else 4
    # f32 gradients to their owners, parameters back
    exchange = slowest_ring_s((4.0 + size) * work.params, cluster, constants, {n: used[n] for n in chosen})
    # The leaves that the forward sees, the f32 tree of the gradient, activations with what the allocator adds.
    kept = (size + 4.0) * work.params + MEMORY.activations * work.kept_bytes + MEMORY.reserve_bytes + SPREAD_BYTES
    teams = []
    for number in chosen:
        group = cluster.groups[number]
        device = cluster.device(group)
        lane = group.slowdown * (
            work.lane_flops / (device.peak(work.dtype) * constants.gemm) + work.operations * LAUNCH_S
        )
        update = OPTIMIZER_BYTES * work.params / devices / (device.bandwidth_bytes_s * constants.memory)
        way = Way("all samples of a lane at once", exchange + group.slowdown * update, lane, kept)
        memory = group.memory_limit_bytes or device.memory_bytes
        teams.append(Team(f"{group.device} ({number})", used[number], memory, (way,)))
    return tuple(teams)


def found_of(chosen: tuple[int, ...], split: LanePlan) -> Plan:
    """The split as a plan."""
    exchange = max(way.fixed_s for way in split.ways)
    limit = "compute" if exchange < split.step_s / 2 else "the links between workers (gradients and parameters)"
    least = min(
        probability(split.fullest * team.memory_bytes - SPREAD_BYTES, team.memory_bytes) for team in split.teams
    )
    return Plan(
        "lanes", split.step_s, split.step_s, chosen, sum(n > 0 for n in split.lanes), least, limit, lane_plan=split,
        ways=tuple(way.name for way in split.ways),
    )  # fmt: skip
