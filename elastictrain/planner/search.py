"""The outer search: every way of cutting the job up, best promise first, with exact searches inside.

Three families: *lanes* (every worker holds the whole model; what the engine can do today), *grid* (tensor x pipeline x
workers on one group of nodes) and *mixed* (one pipeline over several groups: which group has which stages, in which
order, with how many layers); cuts.py has the last two. Each candidate has a bound that costs little; candidates are
worked out in the order of their bounds until no bound is below the best plan found. Then the best plan is the best
there is under the model; when the search ends early, the smallest bound that is left says how far off it can be.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from heapq import heapify, heappop, heappush
from itertools import combinations, count, product

from elastictrain.planner.compute import DEFAULTS, Constants, head_time, layer_time
from elastictrain.planner.cost import gradients_s, optimizer_s
from elastictrain.planner.cuts import EXCHANGE, Branch, Candidate, Cuts, divisors, memory_bytes, place_of
from elastictrain.planner.lanes import Team, Way, plan_lanes
from elastictrain.planner.memory import probability, stage_memory
from elastictrain.planner.model import Checkpointing, Cut
from elastictrain.planner.plan import SPREAD_BYTES, Family, Found, Plan, Task
from elastictrain.planner.profiles import Cluster

NEAR = 1.1
"""Plans that take more than this many times as long as the best one are not worth showing."""


def search(
    task: Task,
    cluster: Cluster,
    *,
    constants: Constants = DEFAULTS,
    keep: int = 5,
    limit: int = 4_000,
    families: Sequence[Family] = ("lanes", "grid", "mixed"),
) -> Found:
    """The best plans. `limit`: candidates worked out at most."""
    made = [node for family in families for node in nodes(task, cluster, constants, family)]
    total = sum(node.size if isinstance(node, Branch) else 1 for node in made)
    numbers = count()
    waiting = [(node.bound_s, next(numbers), node) for node in made]
    heapify(waiting)
    plans: list[Plan] = []
    bound, examined = math.inf, 0
    while waiting:
        promise, _, node = heappop(waiting)
        best = plans[0].step_s if plans else math.inf
        if promise >= best or examined == limit:
            bound = min(bound, promise)
            break
        if isinstance(node, Branch):
            for child in node.open():
                heappush(waiting, (child.bound_s, next(numbers), child))
            continue
        examined += 1
        worst = min(plans[keep - 1].step_s if len(plans) >= keep else math.inf, best * NEAR)
        plan = node.work_out(worst)
        if plan is None:
            continue
        bound = min(bound, plan.bound_s)
        if not any(_same(plan, other) for other in plans):
            plans = sorted([*plans, plan], key=lambda plan: plan.step_s)[:keep]
    best = plans[0].step_s if plans else math.inf
    return Found(tuple(plans), min(bound, best), examined, total)


def nodes(task: Task, cluster: Cluster, constants: Constants, family: Family) -> Iterator[Branch | Candidate]:
    """The candidates of one family, and branches of candidates."""
    if family == "lanes":
        return _Lanes(task, cluster, constants).candidates()
    cuts = Cuts(task, cluster, constants)
    if family == "grid":
        return cuts.grid()
    return cuts.mixed([chosen for chosen in subsets(len(cluster.groups)) if len(chosen) > 1])


def _same(one: Plan, other: Plan) -> bool:
    key = (one.cut, one.layers, one.again, one.stage_groups, one.ways, one.groups)
    return key == (other.cut, other.layers, other.again, other.stage_groups, other.ways, other.groups)


class _Lanes:
    """Every worker holds the whole model."""

    def __init__(self, task: Task, cluster: Cluster, constants: Constants) -> None:
        self.task, self.cluster, self.constants = task, cluster, constants
        self.places = [place_of(cluster, group) for group in cluster.groups]

    def candidates(self) -> Iterator[Candidate]:
        for chosen in subsets(len(self.cluster.groups)):
            teams = tuple(self._team(number, chosen) for number in chosen)
            if not all(team.ways for team in teams):
                continue
            speed = sum(team.count / min(way.lane_s for way in team.ways) for team in teams)
            least = min(way.fixed_s for team in teams for way in team.ways)
            yield Candidate(self.task.lanes / speed + least, self._worker(teams, chosen))

    def _worker(self, teams: tuple[Team, ...], chosen: tuple[int, ...]) -> Callable[[float], Plan | None]:
        def work_out(worst: float) -> Plan | None:
            copies = 2 if self.task.mirrors and sum(team.count for team in teams) > 1 else 1
            found = plan_lanes(teams, self.task.lanes, 12.0 * self.task.model.params * copies, better_than_s=worst)
            if found is None:
                return None
            slowest = max(way.fixed_s / found.step_s for way in found.ways)
            fits = min(
                probability(found.fullest * team.memory_bytes - SPREAD_BYTES, team.memory_bytes) for team in teams
            )
            return Plan(
                "lanes", found.step_s, found.step_s, chosen, sum(n > 0 for n in found.lanes), fits,
                EXCHANGE if slowest > 0.5 else "compute", lane_plan=found, ways=tuple(way.name for way in found.ways),
            )  # fmt: skip

        return work_out

    def _team(self, number: int, chosen: tuple[int, ...]) -> Team:
        place, group, task = self.places[number], self.cluster.groups[number], self.task
        workers = sum(self.cluster.groups[n].devices for n in chosen)
        ways = []
        memory = memory_bytes(self.cluster, number)
        for micro_batch, checkpointing in product(divisors(task.lane_batch), _CHECKPOINTING):
            cut = Cut(
                workers=workers, micro_batch=micro_batch, micro_batches=task.lane_batch // micro_batch,
                checkpointing=checkpointing, mirrors=task.mirrors and workers > 1, dtype=task.dtype,
            )  # fmt: skip
            layer = layer_time(task.model, cut, place.device, place.inside, self.constants).total_s
            head = head_time(task.model, cut, place.device, self.constants)
            lane = place.slowdown * cut.micro_batches * (task.model.layers * layer + head)
            need = stage_memory(
                task.model, replace(cut, zero_stage=2), memory, layers=task.model.layers, stage=0, state_share=0
            )
            # The gradient tree is f32 and whole on every worker; masters, moments and mirrors are the blocks.
            kept = need.total + 4.0 * task.model.params + SPREAD_BYTES
            if kept > memory:
                continue
            fixed = self.exchange(cut, chosen) + optimizer_s(task.model.params, cut, place, self.constants)
            ways.append(Way(_way(micro_batch, checkpointing), fixed, lane, kept))
        ways.sort(key=lambda way: (way.lane_s, way.kept_bytes))
        useful: list[Way] = []
        for way in ways:  # a way that takes longer must need less memory
            if all(way.kept_bytes < other.kept_bytes for other in useful):
                useful.append(way)
        return Team(f"{group.device} ({number})", group.devices, memory, tuple(useful))

    def exchange(self, cut: Cut, chosen: tuple[int, ...]) -> float:
        """Of gradients and parameters over all groups: as slow as over the slowest of their links."""
        model = self.task.model
        slow = max(gradients_s(model.params, model, cut, self.places[number], self.constants) for number in chosen)
        if len({self.cluster.groups[number].island for number in chosen}) > 1:
            between = self.cluster.link(self.cluster.between)
            for number in chosen:
                over = replace(self.places[number], across=between)
                slow = max(slow, gradients_s(model.params, model, cut, over, self.constants))
        return slow


_CHECKPOINTING: tuple[Checkpointing, ...] = ("none", "every_layer")


def _way(micro_batch: int, checkpointing: Checkpointing) -> str:
    kept = "keeps activations" if checkpointing == "none" else "computes activations again"
    return f"{micro_batch} sequence{'s' if micro_batch > 1 else ''} at a time, {kept}"


def subsets(count: int) -> Iterator[tuple[int, ...]]:
    """Every choice of groups, the small ones first."""
    for size in range(1, count + 1):
        yield from combinations(range(count), size)
