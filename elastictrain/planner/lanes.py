"""Lanes by speed and blocks by memory, balanced apart (Cephalo, Guo et al. 2025): what the engine can do today.

A worker that is quick gets many lanes; a worker with free memory gets many blocks. The two meet only in the choice of
the micro-batch and of activation checkpointing, which trade time for memory; that choice is made by trying every
combination of them over the groups of devices, each with an exact split.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
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
        if _divisible_s(teams, ways, lanes) >= limit:
            continue
        plan = _with_ways(teams, ways, lanes, state_bytes, least)
        if plan is not None and plan.step_s < limit:
            best, limit = plan, plan.step_s
    return best


def _divisible_s(teams: Sequence[Team], ways: Sequence[Way], lanes: int) -> float:
    """Seconds of a split into fractions of lanes; a device whose fixed time alone is more takes no part."""
    speed, work, taken = 0.0, float(lanes), math.inf
    for way, team in sorted(zip(ways, teams, strict=True), key=lambda pair: pair[0].fixed_s):
        if way.fixed_s >= taken:
            break
        speed += team.count / way.lane_s
        work += team.count * way.fixed_s / way.lane_s
        taken = work / speed
    return taken


def _with_ways(
    teams: Sequence[Team], ways: Sequence[Way], lanes: int, state_bytes: float, least: int
) -> LanePlan | None:
    """The quickest split that leaves room for the state. A device without lanes holds no blocks: where speed alone
    leaves out some whose room is needed, every smallest choice of devices with room enough is made to take a lane each.
    """
    room = [team.memory_bytes - way.kept_bytes for team, way in zip(teams, ways, strict=True)]
    whole = sum(team.count * space for team, space in zip(teams, room, strict=True))
    if min(room) < 0 or whole < state_bytes:
        return None
    counts = [team.count for team in teams]
    if least or lanes == 0:
        return _split(teams, ways, lanes, state_bytes, counts if least else [0] * len(teams), least)
    free = _split(teams, ways, lanes, state_bytes, [0] * len(teams), 1)
    if free is not None:
        return free
    plans = (
        _split(teams, ways, lanes, state_bytes, must, 1)
        for must in _enough(counts, room, state_bytes)
        if sum(must) <= lanes
    )
    return min((plan for plan in plans if plan is not None), key=lambda plan: plan.step_s, default=None)


def _enough(counts: Sequence[int], room: Sequence[float], state_bytes: float) -> Iterator[tuple[int, ...]]:
    """Numbers of devices of each team whose room together holds the state: of the last team as few as are enough."""
    for taken in product(*(range(count + 1) for count in counts[:-1])):
        missing = state_bytes - sum(n * space for n, space in zip(taken, room, strict=False))
        last = 0 if missing <= 0 else math.ceil(missing / room[-1]) if room[-1] > 0 else math.inf
        # What division rounds away must not leave a device out.
        for count in {last, last + 1} if last else {0}:
            if count <= counts[-1]:
                yield (*taken, int(count))


def _split(
    teams: Sequence[Team], ways: Sequence[Way], lanes: int, state_bytes: float, must: Sequence[int], least: int
) -> LanePlan | None:
    """The split in which `must` devices of each team have `least` lanes or more; None when the state does not fit."""
    each = [(team, way) for team, way in zip(teams, ways, strict=True) for _ in range(team.count)]
    floor = [
        least if number < forced else 0
        for team, forced in zip(teams, must, strict=True)
        for number in range(team.count)
    ]
    try:
        split = split_affine(lanes, [way.fixed_s for _, way in each], [way.lane_s for _, way in each], least=floor)
        used = [
            team.memory_bytes - way.kept_bytes if n else 0.0 for n, (team, way) in zip(split.parts, each, strict=True)
        ]
        # The fullest is least full, so that there is room for what the estimate missed.
        weights = [team.memory_bytes if n else 0.0 for n, (team, _) in zip(split.parts, each, strict=True)]
        _, shares = fill(state_bytes, weights, used)
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
