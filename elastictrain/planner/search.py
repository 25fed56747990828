"""The outer search: every way of cutting the job up, best promise first, with exact searches inside.

Three families: *lanes* (every worker holds the whole model; what the engine can do today), *grid* (tensor x pipeline x
workers on one group of nodes) and *mixed* (one pipeline over several groups: which group has which stages, in which
order, with how many layers); cuts.py has the last two. Each candidate has a bound that costs little; candidates are
worked out in the order of their bounds until no bound is below the best plan found. Then the best plan is the best
there is under the model; when the search ends early, the smallest bound that is left says how far off it can be.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from heapq import heapify, heappop, heappush
from itertools import count, product

from elastictrain.planner.compute import DEFAULTS, Constants, head_time, layer_time
from elastictrain.planner.cost import optimizer_s
from elastictrain.planner.cuts import EXCHANGE, Cuts
from elastictrain.planner.lanes import Team, Way, plan_lanes
from elastictrain.planner.memory import probability, stage_memory
from elastictrain.planner.model import Checkpointing, Cut
from elastictrain.planner.plan import SPREAD_BYTES, Family, Found, Plan, Task
from elastictrain.planner.profiles import Cluster
from elastictrain.planner.shapes import (
    Branch,
    Candidate,
    deals,
    divisors,
    memory_bytes,
    place_of,
    slowest_ring_s,
    subsets,
)

NEAR = 1.1
"""Plans that take more than this many times as long as the best one are not worth showing."""


NO_LIMIT = 2**62
FINALISTS = 12
"""So many of the best plans are replayed."""


def search(
    task: Task,
    cluster: Cluster,
    *,
    constants: Constants = DEFAULTS,
    keep: int = 5,
    limit: int = 4_000,
    families: Sequence[Family] = ("lanes", "grid", "mixed"),
    any_plan: bool = False,
    beside: int = 0,
    enough: Callable[[], bool] = lambda: False,
) -> Found:
    """The best plans: the first is the best one there is, the others are what was worked out on the way. `limit`:
    candidates worked out at most. `any_plan`: the first one that fits is good enough. `beside`: so many more candidates
    are worked out, once the best plan is known, as long as fewer than `keep` plans are near it. `enough`: asked before
    each candidate whether to end early.
    """
    made = [node for family in families for node in nodes(task, cluster, constants, family)]
    total = sum(node.size if isinstance(node, Branch) else 1 for node in made)
    numbers = count()
    waiting = [(node.bound_s, next(numbers), node) for node in made]
    heapify(waiting)
    plans: list[Plan] = []
    bound, examined, ended_early = math.inf, 0, False
    while waiting:
        promise, _, node = heappop(waiting)
        best = plans[0].step_s if plans else math.inf
        proven = promise >= best
        if proven:
            bound = min(bound, promise)
        if examined == limit or (any_plan and plans) or enough():
            bound = min(bound, promise)
            ended_early = not proven
            break
        if proven and (beside == 0 or len(plans) >= keep or promise >= best * NEAR):
            break
        if isinstance(node, Branch):
            for child in node.open(best):
                heappush(waiting, (child.bound_s, next(numbers), child))
            continue
        examined += 1
        beside -= proven
        worst = min(plans[keep - 1].step_s if len(plans) >= keep else math.inf, best * NEAR)
        plan = node.work_out(worst)
        if plan is None:
            continue
        bound = min(bound, max(plan.bound_s, promise))  # either holds, where the pipeline's search was cut off
        alike = next((other for other in plans if _alike(plan, other)), None)
        if alike is None or plan.step_s < alike.step_s:
            plans = sorted([*(p for p in plans if p is not alike), plan], key=lambda plan: plan.step_s)[:keep]
    best = plans[0].step_s if plans else math.inf
    return Found(tuple(plans), min(bound, best), examined, total, ended_early)


def search_and_replay(
    task: Task,
    cluster: Cluster,
    *,
    constants: Constants = DEFAULTS,
    keep: int = 5,
    limit: int = NO_LIMIT,
    enough: Callable[[], bool] = lambda: False,
) -> Found:
    """`search`, with its best `FINALISTS` replayed operation by operation, and ranked by that."""
    keep_all = max(keep, FINALISTS)
    found = search(task, cluster, constants=constants, keep=keep_all, limit=limit, beside=2 * FINALISTS, enough=enough)
    cuts = Cuts(task, cluster, constants)
    plans = [plan if plan.cut is None else cuts.replayed(plan) for plan in found.plans]
    # The one that is best in closed form stays, for the gap.
    plans = sorted(plans, key=lambda plan: (plan.seconds, plan.step_s))
    best = min(plans, key=lambda plan: plan.step_s, default=None)
    kept = plans[:keep] if best is None or best in plans[:keep] else [*plans[: keep - 1], best]
    return replace(found, plans=tuple(kept))


def fits(task: Task, cluster: Cluster, *, enough: Callable[[], bool] = lambda: False) -> bool | None:
    """Whether there is any plan; None when the search ended before it knew."""
    found = search(task, cluster, keep=1, limit=NO_LIMIT, any_plan=True, enough=enough)
    return True if found.plans else None if found.ended_early else False


def nodes(task: Task, cluster: Cluster, constants: Constants, family: Family) -> Iterator[Branch | Candidate]:
    """The candidates of one family, and branches of candidates."""
    if family == "lanes":
        return _Lanes(task, cluster, constants).branches()
    cuts = Cuts(task, cluster, constants)
    if family == "grid":
        return cuts.grid()
    return cuts.mixed([chosen for chosen in subsets(len(cluster.groups)) if len(chosen) > 1])


def _alike(one: Plan, other: Plan) -> bool:
    """Nothing but the number of workers differs, and as many lanes remain for the one that has most."""
    return _key(one) == _key(other)


def _key(plan: Plan) -> tuple[object, ...]:
    cut = None if plan.cut is None else replace(plan.cut, workers=1, mirrors=False)
    most = 0 if plan.lane_plan is None else max(plan.lane_plan.lanes)
    return (cut, plan.layers, plan.again, plan.stage_groups, plan.ways, plan.groups, most)


class _Lanes:
    """Every worker holds the whole model."""

    def __init__(self, task: Task, cluster: Cluster, constants: Constants) -> None:
        self.task, self.cluster, self.constants = task, cluster, constants
        self.places = [place_of(cluster, group) for group in cluster.groups]

    def branches(self) -> Iterator[Branch]:
        """Every number of workers over every subset of the groups: more of them may cost more than they bring."""
        teams = [self._team(number) for number in range(len(self.places))]
        for chosen in subsets(len(teams)):
            if all(teams[number].ways for number in chosen):
                there = sum(teams[number].count for number in chosen)
                for workers in range(len(chosen), min(there, self.task.lanes) + 1):
                    yield self._branch([teams[number] for number in chosen], chosen, workers)

    def _branch(self, teams: Sequence[Team], chosen: tuple[int, ...], workers: int) -> Branch:
        quick = sorted((min(way.lane_s for way in team.ways), team.count) for team in teams)
        speed, left = 0.0, workers
        for lane_s, there in quick:
            speed += min(left, there) / lane_s
            left -= min(left, there)
        update = min(self._update(number, workers) for number in chosen)
        sizes = [team.count for team in teams]
        least = self.task.lanes / speed + update

        def opened(_: float) -> list[Candidate]:
            return [self._candidate(teams, dict(zip(chosen, taken, strict=True)), least - update)
                    for taken in deals(sizes, workers)]  # fmt: skip

        return Branch(least, opened, 1)

    def _candidate(self, teams: Sequence[Team], counts: Mapping[int, int], lanes_s: float) -> Candidate:
        """`lanes_s`: of the lanes alone, at least."""
        task, workers = self.task, sum(counts.values())
        size = 2.0 if task.dtype == "bf16" else 4.0
        # Gradients reduced, parameters gathered.
        exchange = 2 * slowest_ring_s(size * task.model.params, self.cluster, self.constants, counts)
        fixed = [exchange + self._update(number, workers) for number in counts]
        used = tuple(
            replace(team, count=count, ways=tuple(replace(way, fixed_s=seconds) for way in team.ways))
            for team, count, seconds in zip(teams, counts.values(), fixed, strict=True)
        )
        return Candidate(lanes_s + min(fixed), self._worker(used, tuple(counts)))

    def _update(self, number: int, workers: int) -> float:
        return optimizer_s(self.task.model.params, Cut(workers=workers), self.places[number], self.constants)

    def _worker(self, teams: tuple[Team, ...], chosen: tuple[int, ...]) -> Callable[[float], Plan | None]:
        def work_out(worst: float) -> Plan | None:
            workers = sum(team.count for team in teams)
            copies = 2 if self.task.mirrors and workers > 1 else 1
            state = 12.0 * self.task.model.params * copies
            found = plan_lanes(teams, self.task.lanes, state, better_than_s=worst, least=1)
            if found is None:
                return None
            slowest = max(way.fixed_s / found.step_s for way in found.ways)
            fits = min(
                probability(found.fullest * team.memory_bytes - SPREAD_BYTES, team.memory_bytes) for team in teams
            )
            return Plan(
                "lanes", found.step_s, found.step_s, chosen, workers, fits,
                EXCHANGE if slowest > 0.5 else "compute", lane_plan=found, ways=tuple(way.name for way in found.ways),
            )  # fmt: skip

        return work_out

    def _team(self, number: int) -> Team:
        """All the devices of a group, with the ways that fit; exchange and update are not counted yet."""
        place, group, task = self.places[number], self.cluster.groups[number], self.task
        ways = []
        memory = memory_bytes(self.cluster, number)
        for micro_batch, checkpointing in product(divisors(task.lane_batch), _CHECKPOINTING):
            cut = Cut(
                micro_batch=micro_batch, micro_batches=task.lane_batch // micro_batch, checkpointing=checkpointing,
                dtype=task.dtype,
            )  # fmt: skip
            layer = layer_time(task.model, cut, place.device, place.inside, self.constants).total_s
            head = head_time(task.model, cut, place.device, self.constants)
            lane = place.slowdown * cut.micro_batches * (task.model.layers * layer + head)
            need = stage_memory(
                task.model, replace(cut, zero_stage=2), memory, layers=task.model.layers, stage=0, state_share=0
            )
            # The gradient tree is f32 and whole on every worker; masters, moments and mirrors are the blocks.
            kept = need.total + 4.0 * task.model.params + SPREAD_BYTES
            if kept <= memory:
                ways.append(Way(_way(micro_batch, checkpointing), 0.0, lane, kept))
        ways.sort(key=lambda way: (way.lane_s, way.kept_bytes))
        useful: list[Way] = []
        for way in ways:  # a way that takes longer must need less memory
            if all(way.kept_bytes < other.kept_bytes for other in useful):
                useful.append(way)
        return Team(f"{group.device} ({number})", group.devices, memory, tuple(useful))


_CHECKPOINTING: tuple[Checkpointing, ...] = ("none", "every_layer")


def _way(micro_batch: int, checkpointing: Checkpointing) -> str:
    kept = "keeps activations" if checkpointing == "none" else "computes activations again"
    return f"{micro_batch} sequence{'s' if micro_batch > 1 else ''} at a time, {kept}"
