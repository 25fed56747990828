"""The outer search: every way of cutting the job up, best promise first, with exact searches inside.

Three families: *lanes* (every worker holds the whole model; what the engine can do today), *grid* (tensor x pipeline x
workers on one group of nodes) and *mixed* (one pipeline over several groups: which group has which stages, in which
order, with how many layers). Each candidate has a bound that costs little; candidates are worked out in the order of
their bounds until no bound is below the best plan found. Then the best plan is the best there is under the model;
when the search ends early, the smallest bound that is left says how far off it can be.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import combinations, product

from elastictrain.planner.compute import DEFAULTS, Constants, head_time, layer_time
from elastictrain.planner.cost import OPTIMIZER_BYTES, Place, border_s, gradients_s, stage_params, step_time
from elastictrain.planner.lanes import Team, Way, plan_lanes
from elastictrain.planner.memory import (
    MEMORY,
    boundary_bytes,
    layer_kept_bytes,
    probability,
    stage_memory,
)
from elastictrain.planner.model import Checkpointing, Cut, Schedule, Transformer
from elastictrain.planner.plan import SPREAD_BYTES, Family, Found, Plan, Task
from elastictrain.planner.profiles import Cluster, Group
from elastictrain.planner.stages import Kind, Pipeline, place_stages

NEAR = 1.1
"""Plans that take more than this many times as long as the best one are not worth showing."""


@dataclass(frozen=True, slots=True)
class _Candidate:
    bound_s: float
    order: int
    work_out: Callable[[float], Plan | None]


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
    here = _Search(task, cluster, constants)
    made: list[tuple[float, Callable[[float], Plan | None]]] = []
    for family in families:
        made += {"lanes": here.lanes, "grid": here.grid, "mixed": here.mixed}[family]()
    waiting = sorted(
        (_Candidate(bound, n, work) for n, (bound, work) in enumerate(made)), key=lambda c: (c.bound_s, c.order)
    )
    plans: list[Plan] = []
    bound, examined = math.inf, 0
    for candidate in waiting:
        best = plans[0].step_s if plans else math.inf
        if candidate.bound_s >= best or examined == limit:
            bound = min(bound, candidate.bound_s)
            break
        examined += 1
        worst = min(plans[keep - 1].step_s if len(plans) >= keep else math.inf, best * NEAR)
        plan = candidate.work_out(worst)
        if plan is None:
            continue
        bound = min(bound, plan.bound_s)
        if not any(_same(plan, other) for other in plans):
            plans = sorted([*plans, plan], key=lambda plan: plan.step_s)[:keep]
    best = plans[0].step_s if plans else math.inf
    return Found(tuple(plans), min(bound, best), examined, len(waiting))


def _same(one: Plan, other: Plan) -> bool:
    key = (one.cut, one.layers, one.stage_groups, one.ways, one.groups)
    return key == (other.cut, other.layers, other.stage_groups, other.ways, other.groups)


class _Search:
    """The candidates of one task on one cluster."""

    def __init__(self, task: Task, cluster: Cluster, constants: Constants) -> None:
        self.task, self.cluster, self.constants = task, cluster, constants
        self.places = [_place(cluster, group) for group in cluster.groups]

    # --- lanes: every worker holds the whole model ---

    def lanes(self) -> Iterator[tuple[float, Callable[[float], Plan | None]]]:
        for chosen in subsets(len(self.cluster.groups)):
            teams = tuple(self._team(number, chosen) for number in chosen)
            if not all(team.ways for team in teams):
                continue
            speed = sum(team.count / min(way.lane_s for way in team.ways) for team in teams)
            least = min(way.fixed_s for team in teams for way in team.ways)
            yield self.task.lanes / speed + least, self._lanes_worker(teams, chosen)

    def _lanes_worker(self, teams: tuple[Team, ...], chosen: tuple[int, ...]) -> Callable[[float], Plan | None]:
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
                _EXCHANGE if slowest > 0.5 else "compute", lane_plan=found, ways=tuple(way.name for way in found.ways),
            )  # fmt: skip

        return work_out

    def _team(self, number: int, chosen: tuple[int, ...]) -> Team:
        place, group, task = self.places[number], self.cluster.groups[number], self.task
        workers = sum(self.cluster.groups[n].devices for n in chosen)
        ways = []
        memory = self.memory(number)
        for micro_batch, checkpointing in product(_divisors(task.lane_batch), _CHECKPOINTING):
            cut = self.cut(1, 1, workers, micro_batch, task.lane_batch // micro_batch, checkpointing)
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
            fixed = self.exchange(cut, chosen) + self.optimizer(place, task.model.params / workers)
            ways.append(Way(_way(micro_batch, checkpointing), fixed, lane, kept))
        ways.sort(key=lambda way: (way.lane_s, way.kept_bytes))
        useful: list[Way] = []
        for way in ways:  # a way that takes longer must need less memory
            if all(way.kept_bytes < other.kept_bytes for other in useful):
                useful.append(way)
        return Team(f"{group.device} ({number})", group.devices, memory, tuple(useful))

    # --- grid: one group of nodes ---

    def grid(self) -> Iterator[tuple[float, Callable[[float], Plan | None]]]:
        for number, group in enumerate(self.cluster.groups):
            for tensor, pipeline, micro_batch, checkpointing in self.shapes(group.per_node):
                workers = min(group.devices // (tensor * pipeline), self.task.lanes)
                if workers < 1 or tensor * pipeline == 1:
                    continue
                per_pipeline = -(-self.task.lanes // workers) * (self.task.lane_batch // micro_batch)
                cut = self.cut(tensor, pipeline, workers, micro_batch, per_pipeline, checkpointing)
                yield self._even(number, cut), self._grid_worker(number, cut)

    def shapes(self, per_node: int) -> Iterator[tuple[int, int, int, Checkpointing]]:
        model = self.task.model
        tensors = [t for t in (1, 2, 4, 8, 16) if t <= per_node and model.heads % t == 0 and model.ffn % t == 0]
        pipelines = [p for p in (1, 2, 3, 4, 5, 6, 8, 10, 12, 16, 20, 24, 32, 48, 64) if p <= model.layers]
        yield from product(tensors, pipelines, _divisors(self.task.lane_batch), _CHECKPOINTING)

    def _even(self, number: int, cut: Cut) -> float:
        """No cut of the layers is quicker than one in which all stages take the same time."""
        place, model = self.places[number], self.task.model
        layer = layer_time(model, cut, place.device, place.inside, self.constants).total_s
        whole = place.slowdown * (model.layers * layer + head_time(model, cut, place.device, self.constants))
        rest = self._rest(number, cut, self._even_params(cut))
        return whole + (cut.micro_batches - 1) * whole / cut.pipeline + rest

    def _even_params(self, cut: Cut) -> float:
        """No cut of the layers leaves the fullest stage with fewer parameters."""
        model = self.task.model
        return (model.layers * model.layer_params + 2 * model.vocab_params) / cut.pipeline / cut.tensor

    def _rest(self, number: int, cut: Cut, params: float) -> float:
        place = self.places[number]
        return gradients_s(params, cut, place, self.constants) + self.optimizer(place, params / cut.workers)

    def _grid_worker(self, number: int, cut: Cut) -> Callable[[float], Plan | None]:
        def work_out(worst: float) -> Plan | None:
            place = self.places[number]
            found = self._staged((number,), (cut.pipeline,), cut, worst)
            if found is None:
                return None
            pipeline, rest, bound = found
            layers = tuple(stage.hi - stage.lo for stage in pipeline.stages)
            time = step_time(self.task.model, cut, place, layers=layers, constants=self.constants)
            return Plan(
                "grid", pipeline.time_s + rest, bound, (number,), cut.devices,
                self._fits([number] * cut.pipeline, cut, layers), time.limit, cut=cut, layers=layers,
                stage_groups=(number,) * cut.pipeline, stage_s=tuple(stage.time_s for stage in pipeline.stages),
            )  # fmt: skip

        return work_out

    def _staged(
        self, chosen: tuple[int, ...], places: tuple[int, ...], cut: Cut, worst: float
    ) -> tuple[Pipeline, float, float] | None:
        """The pipeline with the least time of stages and exchange together, the seconds of its exchange, and a bound.

        Exact: the best pipeline first, whatever its exchange takes; then the best of those whose exchange takes less
        than that of the last one; and so on, until even an exchange at its least would not make up for the stages.
        """
        model = self.task.model
        kinds = [self._kind(number, cut, count) for number, count in zip(chosen, places, strict=True)]
        borders = {
            (a, b): self._between(chosen[a], chosen[b], cut) for a in range(len(kinds)) for b in range(len(kinds))
        }
        least = self._least_rest(chosen, cut)
        best: tuple[Pipeline, float] | None = None
        bound, limit = math.inf, worst
        while True:
            found = place_stages(kinds, cut.pipeline, cut.micro_batches, borders=borders, better_than_s=limit - least)
            if found is None:
                break
            if not found.stages:
                bound = min(bound, found.bound_s + least)
                break
            numbers = [chosen[stage.kind] for stage in found.stages]
            held = stage_params(model, cut, tuple(stage.hi - stage.lo for stage in found.stages))
            rest = max(self._rest(number, cut, params) for number, params in zip(numbers, held, strict=True))
            bound = min(bound, found.bound_s + (rest if found.exact else least))
            if found.time_s + rest < limit:
                best, limit = (found, rest), found.time_s + rest
            kinds = [
                replace(kind, most_params=self._params_below(number, cut, rest))
                for number, kind in zip(chosen, kinds, strict=True)
            ]
        return None if best is None else (*best, min(bound, limit))

    def _params_below(self, number: int, cut: Cut, seconds: float) -> float:
        """How many parameters a device may have so that its exchange takes less than `seconds`."""
        fixed, more = self._rest(number, cut, 0.0), self._rest(number, cut, 1e9)
        return (seconds * (1 - 1e-9) - fixed) / (more - fixed) * 1e9 if more > fixed else math.inf

    # --- mixed: one pipeline over several groups ---

    def mixed(self) -> Iterator[tuple[float, Callable[[float], Plan | None]]]:
        for chosen in subsets(len(self.cluster.groups)):
            if len(chosen) < 2:
                continue
            per_node = min(self.cluster.groups[n].per_node for n in chosen)
            for tensor, pipeline, micro_batch, checkpointing in self.shapes(per_node):
                most = sum(self.cluster.groups[n].devices // tensor for n in chosen) // pipeline
                for workers in _halvings(min(most, self.task.lanes)):
                    places = [self.cluster.groups[n].devices // (tensor * workers) for n in chosen]
                    if pipeline < 2 or sum(places) < pipeline or pipeline > 24 or 0 in places:
                        continue
                    per_pipeline = -(-self.task.lanes // workers) * (self.task.lane_batch // micro_batch)
                    cut = self.cut(tensor, pipeline, workers, micro_batch, per_pipeline, checkpointing)
                    yield self._mixed_bound(chosen, places, cut), self._mixed_worker(chosen, tuple(places), cut)

    def _mixed_bound(self, chosen: tuple[int, ...], places: Sequence[int], cut: Cut) -> float:
        model = self.task.model
        times = []
        for number in chosen:
            place = self.places[number]
            layer = layer_time(model, cut, place.device, place.inside, self.constants).total_s
            head = head_time(model, cut, place.device, self.constants)
            times.append(place.slowdown * (model.layers * layer + head))
        least = min(times)
        quick = sorted((least / t for t, n in zip(times, places, strict=True) for _ in range(n)), reverse=True)
        working = least + (cut.micro_batches - 1) * least / sum(quick[: cut.pipeline])
        return working + self._least_rest(chosen, cut)

    def _mixed_worker(
        self, chosen: tuple[int, ...], places: tuple[int, ...], cut: Cut
    ) -> Callable[[float], Plan | None]:
        def work_out(worst: float) -> Plan | None:
            found = self._staged(chosen, places, cut, worst)
            if found is None:
                return None
            pipeline, rest, bound = found
            layers = tuple(stage.hi - stage.lo for stage in pipeline.stages)
            groups = tuple(chosen[stage.kind] for stage in pipeline.stages)
            limit = "the slowest stage's compute" if pipeline.time_s > 2 * rest else _EXCHANGE
            return Plan(
                "mixed", pipeline.time_s + rest, bound, tuple(sorted(set(groups))), cut.devices,
                self._fits(groups, cut, layers), limit, cut=cut, layers=layers, stage_groups=groups,
                stage_s=tuple(stage.time_s for stage in pipeline.stages),
            )  # fmt: skip

        return work_out

    def _least_rest(self, chosen: tuple[int, ...], cut: Cut) -> float:
        """No order of stages exchanges its gradients in less time."""
        return min(self._rest(number, cut, self._even_params(cut)) for number in chosen)

    # --- shared ---

    def cut(self, tensor: int, pipeline: int, workers: int, micro_batch: int, count: int, kept: Checkpointing) -> Cut:
        schedule: Schedule = "1f1b"
        return Cut(
            tensor=tensor, pipeline=pipeline, workers=workers, micro_batch=micro_batch, micro_batches=count,
            checkpointing=kept, schedule=schedule, zero_stage=1, mirrors=self.task.mirrors and workers > 1,
            dtype=self.task.dtype, sequence_parallel=tensor > 1,
        )  # fmt: skip

    def memory(self, number: int) -> float:
        group = self.cluster.groups[number]
        return group.memory_limit_bytes or self.places[number].device.memory_bytes

    def optimizer(self, place: Place, params: float) -> float:
        return place.slowdown * params * OPTIMIZER_BYTES / (place.device.bandwidth_bytes_s * self.constants.memory)

    def exchange(self, cut: Cut, chosen: tuple[int, ...]) -> float:
        """Of gradients and parameters over all groups: as slow as over the slowest of their links."""
        slow = max(gradients_s(self.task.model.params, cut, self.places[number], self.constants) for number in chosen)
        if len({self.cluster.groups[number].island for number in chosen}) > 1:
            between = self.cluster.link(self.cluster.between)
            for number in chosen:
                over = replace(self.places[number], across=between)
                slow = max(slow, gradients_s(self.task.model.params, cut, over, self.constants))
        return slow

    def _kind(self, number: int, cut: Cut, count: int) -> Kind:
        """A stage's place on this group. The first layer has the embedding's memory, the last one the head."""
        model, place = self.task.model, self.places[number]
        layer = place.slowdown * layer_time(model, cut, place.device, place.inside, self.constants).total_s
        head = place.slowdown * head_time(model, cut, place.device, self.constants)
        full, bound = layer_kept_bytes(model, cut), boundary_bytes(model, cut)
        live = full if cut.checkpointing == "none" else bound
        state = (4 + 12 * (2 if cut.mirrors else 1) / cut.workers) / cut.tensor
        ends = state * model.vocab_params
        params = [model.layer_params / cut.tensor] * model.layers
        params[0] += model.vocab_params / cut.tensor
        params[-1] += model.vocab_params / cut.tensor
        seconds = [layer] * model.layers
        seconds[-1] += head
        keep = [state * model.layer_params] * model.layers
        keep[0] += ends
        keep[-1] += ends + _head_bytes(model, cut)
        working = 0.0 if cut.checkpointing == "none" else full
        room = self.memory(number) - MEMORY.reserve_bytes - SPREAD_BYTES - working
        return Kind(count, tuple(seconds), tuple(keep), (live,) * model.layers, room, params=tuple(params))

    def _between(self, a: int, b: int, cut: Cut) -> float:
        one, other = self.cluster.groups[a], self.cluster.groups[b]
        place = self.places[a]
        if a != b and one.island != other.island:
            place = replace(place, across=self.cluster.link(self.cluster.between))
        elif a != b:
            place = max(place, self.places[b], key=lambda p: border_s(self.task.model, cut, p))
        return border_s(self.task.model, cut, place)

    def _fits(self, groups: Sequence[int], cut: Cut, layers: Sequence[int]) -> float:
        return min(
            stage_memory(self.task.model, cut, self.memory(number), layers=count, stage=stage).fits
            for stage, (number, count) in enumerate(zip(groups, layers, strict=True))
        )


_CHECKPOINTING: tuple[Checkpointing, ...] = ("none", "every_layer")
_EXCHANGE = "the links between workers (gradients and parameters)"


def _head_bytes(model: Transformer, cut: Cut) -> float:
    probe = stage_memory(model, replace(cut, pipeline=1), 1.0, layers=1, stage=0)
    return probe.head


def _way(micro_batch: int, checkpointing: Checkpointing) -> str:
    kept = "keeps activations" if checkpointing == "none" else "computes activations again"
    return f"{micro_batch} sequence{'s' if micro_batch > 1 else ''} at a time, {kept}"


def _place(cluster: Cluster, group: Group) -> Place:
    return Place(
        device=cluster.device(group), per_node=group.per_node, inside=cluster.link(group.intra),
        across=cluster.link(group.inter), slowdown=group.slowdown,
    )  # fmt: skip


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]


def _halvings(number: int) -> list[int]:
    """Worker counts that are tried: powers of two, and the most there can be."""
    powers = [1 << n for n in range(number.bit_length()) if 1 << n <= number]
    return sorted({*powers, number} - {0})


def subsets(count: int) -> Iterator[tuple[int, ...]]:
    """Every choice of groups, the small ones first."""
    for size in range(1, count + 1):
        yield from combinations(range(count), size)
