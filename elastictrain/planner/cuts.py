"""Pipelines: one group of nodes cut up alike, or one pipeline over several groups.

For every shape (tensor x pipeline x workers, sequences of a micro-batch) these are tried: ZeRO stage 1, 2 and 3; 1F1B,
interleaved 1F1B with two and four chunks, and ZB-H1; activations kept, or the scores of attention computed again; and
for every stage by itself the fewest layers that must be computed again as a whole so that it fits. Left out is what is
never better under the model: ZeRO stage 0 (the same exchange as 1, more memory and more of an update) and GPipe (1F1B's
time, more memory). ZB-H1 keeps activations until its second half, so that computing them again would save nothing
there; chunks of a pipeline over several groups would cross the links between those once more each: neither is tried.

All of this is exact under the cost model. A shape is opened only when even the best of its variants could still win.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product

from elastictrain.planner.compute import Constants, layer_time
from elastictrain.planner.cost import (
    Place,
    border_s,
    ends_s,
    gradients_s,
    layer_s,
    optimizer_s,
    stage_params,
    step_time,
)
from elastictrain.planner.memory import (
    MEMORY,
    boundary_bytes,
    gathered_bytes,
    layer_kept_bytes,
    param_bytes,
    stage_memory,
    working_bytes,
)
from elastictrain.planner.model import Checkpointing, Cut, Schedule
from elastictrain.planner.plan import SPREAD_BYTES, Plan, Task
from elastictrain.planner.profiles import Cluster, Group
from elastictrain.planner.schedule import bubble_share, in_flight, replayed_s
from elastictrain.planner.stages import Kind, Pipeline, place_stages

WorkOut = Callable[[float], Plan | None]
EXCHANGE = "the links between workers (gradients and parameters)"
_TENSORS = (1, 2, 4, 8, 16)
_PIPELINES = (1, 2, 3, 4, 5, 6, 8, 10, 12, 16, 20, 24, 32, 48, 64)
_CHUNKS = (2, 4)
_LEAST_BUBBLE = 1 / max(_CHUNKS)
MOST_MIXED_STAGES = 24


@dataclass(frozen=True, slots=True)
class Candidate:
    """`work_out(worst)` gives the plan, or None when it takes `worst` seconds or more, or fits nowhere."""

    bound_s: float
    work_out: WorkOut


@dataclass(frozen=True, slots=True)
class Branch:
    """Candidates of which none takes less than `bound_s`."""

    bound_s: float
    open: Callable[[], list[Candidate]]
    size: int


def place_of(cluster: Cluster, group: Group) -> Place:
    """A group as the cost model sees it."""
    return Place(
        device=cluster.device(group), per_node=group.per_node, inside=cluster.link(group.intra),
        across=cluster.link(group.inter), slowdown=group.slowdown,
    )  # fmt: skip


def memory_bytes(cluster: Cluster, number: int) -> float:
    """What a device of a group may use."""
    group = cluster.groups[number]
    return group.memory_limit_bytes or cluster.device(group).memory_bytes


class Cuts:
    """The candidates with pipeline and tensor parallelism of one task on one cluster."""

    def __init__(self, task: Task, cluster: Cluster, constants: Constants) -> None:
        self.task, self.cluster, self.constants = task, cluster, constants
        self.places = [place_of(cluster, group) for group in cluster.groups]
        self._layers: dict[tuple[int, int, int, Checkpointing], float] = {}

    # --- what is tried ---

    def grid(self) -> Iterator[Branch]:
        """One group of nodes, cut up alike."""
        for number, group in enumerate(self.cluster.groups):
            for tensor, pipeline, micro_batch in self._shapes(group.per_node):
                workers = min(group.devices // (tensor * pipeline), self.task.lanes)
                if workers >= 1 and tensor * pipeline > 1:
                    yield self._branch((number,), (pipeline,), self._cut(tensor, pipeline, workers, micro_batch))

    def mixed(self, subsets: Sequence[tuple[int, ...]]) -> Iterator[Branch]:
        """One pipeline over several groups: which group has which stages, in which order, with how many layers."""
        groups = self.cluster.groups
        for chosen in subsets:
            for tensor, pipeline, micro_batch in self._shapes(min(groups[n].per_node for n in chosen)):
                most = sum(groups[n].devices // tensor for n in chosen) // pipeline
                for workers in _halvings(min(most, self.task.lanes)):
                    places = tuple(groups[n].devices // (tensor * workers) for n in chosen)
                    if 2 <= pipeline <= min(sum(places), MOST_MIXED_STAGES) and 0 not in places:
                        yield self._branch(chosen, places, self._cut(tensor, pipeline, workers, micro_batch))

    def _shapes(self, per_node: int) -> Iterator[tuple[int, int, int]]:
        model = self.task.model
        tensors = [t for t in _TENSORS if t <= per_node and model.heads % t == 0 and model.ffn % t == 0]
        yield from product(tensors, [p for p in _PIPELINES if p <= model.layers], divisors(self.task.lane_batch))

    def _cut(self, tensor: int, pipeline: int, workers: int, micro_batch: int) -> Cut:
        count = -(-self.task.lanes // workers) * (self.task.lane_batch // micro_batch)
        return Cut(
            tensor=tensor, pipeline=pipeline, workers=workers, micro_batch=micro_batch, micro_batches=count,
            zero_stage=1, mirrors=self.task.mirrors and workers > 1, dtype=self.task.dtype,
            sequence_parallel=tensor > 1,
        )  # fmt: skip

    def variants(self, cut: Cut, *, one_group: bool) -> list[Cut]:
        """Every schedule, ZeRO stage and choice about attention's scores for one shape."""
        schedules: list[tuple[Schedule, int]] = [("1f1b", 1)]
        if cut.pipeline > 1 and cut.micro_batches >= cut.pipeline:
            schedules.append(("zb-h1", 1))
        if cut.pipeline > 1 and one_group and cut.micro_batches % cut.pipeline == 0:
            chunks = [n for n in _CHUNKS if self.task.model.layers % n == 0]
            schedules += [("1f1b", n) for n in chunks if n * cut.pipeline <= self.task.model.layers]
        scores: list[Checkpointing] = ["none"]
        if self.task.model.attention in ("plain", "fused"):
            scores.append("selective")
        return [
            replace(cut, schedule=schedule, chunks=chunks, zero_stage=zero, checkpointing=kept)
            for (schedule, chunks), zero, kept in product(schedules, (1, 2, 3) if cut.workers > 1 else (1,), scores)
        ]

    # --- bounds ---

    def _branch(self, chosen: tuple[int, ...], places: tuple[int, ...], cut: Cut) -> Branch:
        cuts = self.variants(cut, one_group=len(chosen) == 1)
        bubble = min(bubble_share(variant) for variant in cuts)
        layers = self.task.model.layers
        whole = [layers * self._layer(n, cut) + self._ends(n, cut) for n in chosen]
        # Whatever a variant exchanges, its update takes as long.
        rest = min(optimizer_s(self._even_params(cut), cut, self.places[n], self.constants) for n in chosen)
        bound = self._working(whole, places, cut, bubble) + rest
        return Branch(bound, lambda: [self._candidate(chosen, places, variant) for variant in cuts], len(cuts))

    def _candidate(self, chosen: tuple[int, ...], places: tuple[int, ...], cut: Cut) -> Candidate:
        layers = self.task.model.layers
        whole = [
            layers * layer_s(self.task.model, cut, self.places[n], self.constants)
            + sum(ends_s(self.task.model, cut, self.places[n], self.constants))
            for n in chosen
        ]
        bound = self._working(whole, places, cut, bubble_share(cut)) + self._least_rest(chosen, cut)
        return Candidate(bound, lambda worst: self._work_out(chosen, places, cut, worst))

    def _working(self, whole: Sequence[float], places: Sequence[int], cut: Cut, bubble: float) -> float:
        """No cut of the layers is quicker than one in which all stages take the same time, on the quickest places."""
        least = min(whole)
        quick = sorted((least / t for t, n in zip(whole, places, strict=True) for _ in range(n)), reverse=True)
        return bubble * least + (cut.micro_batches - bubble) * least / sum(quick[: cut.pipeline])

    def _layer(self, number: int, cut: Cut) -> float:
        key = number, cut.tensor, cut.micro_batch, cut.checkpointing
        if key not in self._layers:
            place = self.places[number]
            time = layer_time(self.task.model, cut, place.device, place.inside, self.constants)
            self._layers[key] = place.slowdown * time.total_s
        return self._layers[key]

    def _ends(self, number: int, cut: Cut) -> float:
        return sum(ends_s(self.task.model, cut, self.places[number], self.constants))

    def _even_params(self, cut: Cut) -> float:
        """No cut of the layers leaves the fullest stage with fewer parameters."""
        model = self.task.model
        return (model.layers * model.layer_params + 2 * model.vocab_params) / cut.pipeline / cut.tensor

    def _least_rest(self, chosen: tuple[int, ...], cut: Cut) -> float:
        """No order of stages exchanges its gradients in less time."""
        return min(self.rest(number, cut, self._even_params(cut)) for number in chosen)

    def rest(self, number: int, cut: Cut, params: float) -> float:
        """Exchange and update at the end of a step, of a stage with so many parameters on this group."""
        place = self.places[number]
        exchange = gradients_s(params, self.task.model, cut, place, self.constants)
        return exchange + optimizer_s(params, cut, place, self.constants)

    # --- working a candidate out ---

    def _work_out(self, chosen: tuple[int, ...], places: tuple[int, ...], cut: Cut, worst: float) -> Plan | None:
        found = self.staged(chosen, places, cut, worst)
        if found is None:
            return None
        pipeline, rest, bound = found
        layers = tuple((stage.hi - stage.lo) * cut.chunks for stage in pipeline.stages)
        again = tuple(stage.again * cut.chunks for stage in pipeline.stages)
        groups = tuple(chosen[stage.kind] for stage in pipeline.stages)
        if len(chosen) == 1:
            parts = step_time(self.task.model, cut, self.places[chosen[0]], layers=layers, again=again,
                              constants=self.constants)  # fmt: skip
            limit = parts.limit
        else:
            limit = "the slowest stage's compute" if pipeline.time_s > 2 * rest else EXCHANGE
        return Plan(
            "grid" if len(chosen) == 1 else "mixed", pipeline.time_s + rest, bound, tuple(sorted(set(groups))),
            cut.devices, self._fits(groups, cut, layers, again), limit,
            cut=replace(cut, checkpointing="every_layer") if again == layers else cut, layers=layers, again=again,
            stage_groups=groups, stage_s=tuple(stage.time_s for stage in pipeline.stages),
            replayed_s=self._replayed(groups, cut, pipeline) + rest,
        )  # fmt: skip

    def _replayed(self, groups: Sequence[int], cut: Cut, pipeline: Pipeline) -> float:
        """Seconds of the stages' work when the schedule is replayed, operation by operation."""
        forward, backward, sends = [], [], []
        last = cut.pipeline - 1
        for j, (number, stage) in enumerate(zip(groups, pipeline.stages, strict=True)):
            place = self.places[number]
            received = self.between(groups[j - 1], number, cut) * (cut.chunks if j else cut.chunks - 1)
            time = layer_time(self.task.model, cut, place.device, place.inside, self.constants)
            ends = ends_s(self.task.model, cut, place, self.constants)
            work = stage.time_s - received
            head = ends[1] if j == last else 0.0
            first = place.slowdown * time.forward_s * (stage.hi - stage.lo) * cut.chunks + head / 3
            forward.append(min(first, work))
            backward.append(work - forward[-1])
            if j:
                sends.append(self.between(groups[j - 1], number, cut) / 2)
        wrap = self.between(groups[-1], groups[0], cut) / 2
        return replayed_s(forward, backward, cut, send_s=sends, wrap_s=wrap)

    def staged(
        self, chosen: tuple[int, ...], places: tuple[int, ...], cut: Cut, worst: float
    ) -> tuple[Pipeline, float, float] | None:
        """The pipeline with the least time of stages and exchange together, the seconds of its exchange, and a bound.

        Exact: the best pipeline first, whatever its exchange takes; then the best of those whose exchange takes less
        than that of the last one; and so on, until even an exchange at its least would not make up for the stages.
        """
        model = self.task.model
        kinds = [self.kind(number, cut, count) for number, count in zip(chosen, places, strict=True)]
        borders = {
            (a, b): self.between(chosen[a], chosen[b], cut) for a in range(len(kinds)) for b in range(len(kinds))
        }
        flights = [in_flight(cut, stage) for stage in range(cut.pipeline)]
        least = self._least_rest(chosen, cut)
        best: tuple[Pipeline, float] | None = None
        bound, limit = math.inf, worst
        while True:
            found = place_stages(
                kinds, cut.pipeline, cut.micro_batches, borders=borders, better_than_s=limit - least,
                bubble=bubble_share(cut), in_flight=flights,
            )  # fmt: skip
            if found is None:
                break
            if not found.stages:
                bound = min(bound, found.bound_s + least)
                break
            numbers = [chosen[stage.kind] for stage in found.stages]
            held = stage_params(model, cut, tuple((stage.hi - stage.lo) * cut.chunks for stage in found.stages))
            rest = max(self.rest(number, cut, params) for number, params in zip(numbers, held, strict=True))
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
        fixed, more = self.rest(number, cut, 0.0), self.rest(number, cut, 1e9)
        return (seconds * (1 - 1e-9) - fixed) / (more - fixed) * 1e9 if more > fixed else math.inf

    def kind(self, number: int, cut: Cut, count: int) -> Kind:
        """A stage's place on this group, in units of one layer for each chunk (`units` below). The first unit has the
        embedding, the last one the head.
        """
        model, place, chunks = self.task.model, self.places[number], cut.chunks
        units = model.layers // chunks
        once = layer_s(model, cut, place, self.constants)
        twice = layer_s(model, replace(cut, checkpointing="every_layer"), place, self.constants)
        per_param = param_bytes(cut)
        ends = model.vocab_params / cut.tensor
        params = [chunks * model.layer_params / cut.tensor] * units
        params[0] += ends
        params[-1] += ends
        seconds = [chunks * once] * units
        first, last = ends_s(model, cut, place, self.constants)
        seconds[0] += first
        seconds[-1] += last
        keep = [per_param * size for size in params]
        keep[-1] += self._head_bytes(cut)
        room = memory_bytes(self.cluster, number) - MEMORY.reserve_bytes - SPREAD_BYTES - gathered_bytes(model, cut)
        spent = working_bytes(model, cut, again=False)
        again = cut.schedule != "zb-h1"
        return Kind(
            count, tuple(seconds), tuple(keep), (chunks * layer_kept_bytes(model, cut),) * units, room - spent,
            fixed_s=(chunks - 1) * self.between(number, number, cut), params=tuple(params),
            again_s=(chunks * (twice - once),) * units if again else (),
            again_bytes=(chunks * boundary_bytes(model, cut),) * units if again else (),
            working_bytes=working_bytes(model, cut, again=True) - spent,
        )  # fmt: skip

    def _head_bytes(self, cut: Cut) -> float:
        return stage_memory(self.task.model, replace(cut, pipeline=1), 1.0, layers=1, stage=0).head

    def between(self, a: int, b: int, cut: Cut) -> float:
        """What a stage on group b waits for one on group a, for one micro-batch, there and back."""
        one, other = self.cluster.groups[a], self.cluster.groups[b]
        place = self.places[a]
        if a != b and one.island != other.island:
            place = replace(place, across=self.cluster.link(self.cluster.between))
        elif a != b:
            place = max(place, self.places[b], key=lambda p: border_s(self.task.model, cut, p))
        return border_s(self.task.model, cut, place)

    def _fits(self, groups: Sequence[int], cut: Cut, layers: Sequence[int], again: Sequence[int]) -> float:
        return min(
            stage_memory(
                self.task.model, cut, memory_bytes(self.cluster, number), layers=count, stage=stage, again=more
            ).fits
            for stage, (number, count, more) in enumerate(zip(groups, layers, again, strict=True))
        )


def divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]


def _halvings(number: int) -> list[int]:
    """Worker counts that are tried: powers of two, and the most there can be."""
    powers = [1 << n for n in range(number.bit_length()) if 1 << n <= number]
    return sorted({*powers, number} - {0})
