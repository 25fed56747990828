"""Lanes by speed and blocks by memory, balanced apart (Cephalo, Guo et al. 2025): what the engine can do today.

A worker that is quick gets many lanes; a worker with free memory gets many blocks. The two meet only in the choice of
the micro-batch and of activation checkpointing, which trade time for memory; that choice is made by trying every
combination of them over the groups of devices, each with an exact split.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

from elastictrain.errors import CapacityError
from elastictrain.planner.split import fill, split_affine


@dataclass(frozen=True, slots=True)
class Way:
    """One way a device of a group can work. `fixed_s`: seconds of a step whatever its lanes (exchange, optimizer).
    `lane_s`: of each lane. `kept_bytes`: all but the blocks that it holds.
    """

    name: str
    fixed_s: float
    lane_s: float
    kept_bytes: float


@dataclass(frozen=True, slots=True)
class Team:
    """`count` devices that are alike, with the ways in which they can work."""

    name: str
    count: int
    memory_bytes: float
    ways: tuple[Way, ...]


@dataclass(frozen=True, slots=True)
class LanePlan:
    """`lanes[i]` and `blocks_share[i]` for every device, team by team (a device without lanes is left out).

    `step_s` is the least of all combinations; `bound_s` what no split, also of fractions of lanes, can beat.
    """

    teams: tuple[Team, ...]
    ways: tuple[Way, ...]
    lanes: tuple[int, ...]
    blocks_share: tuple[float, ...]
    fullest: float
    step_s: float
    bound_s: float


def plan_lanes(
    teams: Sequence[Team], lanes: int, state_bytes: float, *, better_than_s: float = float("inf"), least: int = 0
) -> LanePlan | None:
    """The best use of all the teams together, or None when the state fits in no combination or none is quicker.

    `state_bytes`: masters and optimizer state of the whole model, mirrors included. `least`: lanes that every device
    gets at least.
    """
    best: LanePlan | None = None
    limit = better_than_s
    for ways in product(*(team.ways for team in teams)):
        # What a perfectly divisible split needs: cheaper than the split, and no split beats it.
        speed = sum(team.count / way.lane_s for team, way in zip(teams, ways, strict=True))
        relaxed = lanes + sum(t.count * w.fixed_s / w.lane_s for t, w in zip(teams, ways, strict=True))
        if relaxed / speed >= limit:
            continue
        plan = _with_ways(teams, ways, lanes, state_bytes, least)
        if plan is not None and plan.step_s < limit:
            best, limit = plan, plan.step_s
    return best


def _with_ways(
    teams: Sequence[Team], ways: Sequence[Way], lanes: int, state_bytes: float, least: int
) -> LanePlan | None:
    each = [(team, way) for team, way in zip(teams, ways, strict=True) for _ in range(team.count)]
    room = [team.memory_bytes - way.kept_bytes for team, way in each]
    if min(room) < 0 or sum(room) < state_bytes:
        return None
    split = split_affine(
        lanes, [way.fixed_s for _, way in each], [way.lane_s for _, way in each], least=[least] * len(each)
    )
    used = [space if n else 0.0 for n, space in zip(split.parts, room, strict=True)]
    try:  # the fullest is least full, so that there is room for what the estimate missed
        _, shares = fill(
            state_bytes, [team.memory_bytes if n else 0.0 for n, (team, _) in zip(split.parts, each, strict=True)], used
        )
    except CapacityError:
        return None
    full = [
        (way.kept_bytes + share) / team.memory_bytes
        for share, n, (team, way) in zip(shares, split.parts, each, strict=True)
        if n
    ]
    return LanePlan(
        tuple(teams), tuple(ways), split.parts, tuple(share / state_bytes for share in shares), max(full),
        split.makespan, split.bound,
    )  # fmt: skip
