"""Any model at all, seen from outside: how its lanes and blocks are best dealt out. No structure is needed for that."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from elastictrain.planner.collectives import across_nodes, all_gather_s
from elastictrain.planner.compute import DEFAULTS, Constants
from elastictrain.planner.cost import OPTIMIZER_BYTES
from elastictrain.planner.lanes import LanePlan, Team, Way, plan_lanes
from elastictrain.planner.memory import MEMORY, probability
from elastictrain.planner.plan import SPREAD_BYTES, Plan
from elastictrain.planner.profiles import Cluster, Dtype
from elastictrain.planner.search import subsets


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """`params`: of the model. `lane_flops`: of one lane, forward and backward. `kept_bytes`: activations that one
    backward pass needs. `lanes` of a step; `operations` of one lane (each costs the host a launch).
    """

    params: int
    lane_flops: float
    kept_bytes: float
    lanes: int
    operations: int = 0
    dtype: Dtype = "f32"
    mirrors: bool = True


LAUNCH_S = 1e-5
"""Seconds that the host needs to launch one operation."""
STATE_BYTES = 12.0
"""Per parameter in the blocks: master and two moments in f32."""


def plan_workload(
    work: Workload, cluster: Cluster, *, constants: Constants = DEFAULTS
) -> tuple[tuple[int, ...], LanePlan] | None:
    """The best groups of the cluster and the split over them, or None when the model fits on none of them together.

    Every subset of the groups is tried: a slow group, or a slow link to it, may cost more than it brings.
    """
    best: tuple[tuple[int, ...], LanePlan] | None = None
    for chosen in subsets(len(cluster.groups)):
        devices = sum(cluster.groups[n].devices for n in chosen)
        copies = 2 if work.mirrors and devices > 1 else 1
        limit = best[1].step_s if best is not None else float("inf")
        teams = teams_of(work, cluster, chosen, constants)
        found = plan_lanes(teams, work.lanes, STATE_BYTES * copies * work.params, better_than_s=limit)
        if found is not None:
            best = chosen, found
    return best


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
    exchange = exchange_s(work, cluster, chosen, constants, used)
    size = 2 if work.dtype == "bf16" else 4
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


def exchange_s(
    work: Workload, cluster: Cluster, chosen: Sequence[int], constants: Constants, used: Mapping[int, int]
) -> float:
    """f32 gradients to their owners, parameters back; as slow as the slowest link that is used. `used`: devices of each
    group, on as few nodes as hold them.
    """
    devices = sum(used[n] for n in chosen)
    nodes = sum(-(-used[n] // cluster.groups[n].per_node) for n in chosen)
    size = 4.0 + (2 if work.dtype == "bf16" else 4)
    islands = {cluster.groups[n].island for n in chosen}
    slowest = 0.0
    for number in chosen:
        group = cluster.groups[number]
        names = [group.inter] + ([cluster.between] if len(islands) > 1 else [])
        for name in names:
            if nodes == 1:
                link, share = cluster.link(group.intra), constants.inside
            else:
                sending = min(used[number], group.per_node)
                link = across_nodes(cluster.link(name), sending, group.per_node, nodes)
                share = constants.across
            slowest = max(slowest, all_gather_s(size * work.params, devices, link, share))
    return slowest


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
