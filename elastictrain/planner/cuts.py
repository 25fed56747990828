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
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import product, starmap

from elastictrain.planner.compute import Constants
from elastictrain.planner.cost import (
    stage_params,
    step_time,
)
from elastictrain.planner.kinds import Kinds
from elastictrain.planner.memory import (
    param_bytes,
    stage_memory,
)
from elastictrain.planner.model import Checkpointing, Cut, Schedule
from elastictrain.planner.places import Pipeline
from elastictrain.planner.plan import Plan, StageWork, Task
from elastictrain.planner.profiles import Cluster
from elastictrain.planner.reach import Problem, beyond, least_s
from elastictrain.planner.schedule import bubble_share, in_flight, replayed_s
from elastictrain.planner.shapes import Branch, Candidate, Shape, divisors, fewest_workers, memory_bytes
from elastictrain.planner.stages import place_stages

EXCHANGE = "the links between workers (gradients and parameters)"
_TENSORS = (1, 2, 4, 8, 16)
_PIPELINES = (1, 2, 3, 4, 5, 6, 8, 10, 12, 16, 20, 24, 32, 48, 64)
_CHUNKS = (2, 4)
_LEAST_BUBBLE = 1 / max(_CHUNKS)
_LEAST_MIXED_BUBBLE = 1 / 3
"""ZB-H1's."""
MOST_MIXED_STAGES = 24
_FAR = 1.05
"""Variants of a shape whose bounds are larger than this many times the smallest wait for being looked at."""


class Cuts:
    """The candidates with pipeline and tensor parallelism of one task on one cluster."""

    def __init__(self, task: Task, cluster: Cluster, constants: Constants) -> None:
        self.task, self.cluster, self.constants = task, cluster, constants
        self.kinds = Kinds(task, cluster, constants)
        self._sizes: dict[tuple[bool, int, bool, bool, bool], int] = {}

    # --- what is tried ---

    def grid(self) -> Iterator[Branch]:
        """One group of nodes, cut up alike."""
        for number, group in enumerate(self.cluster.groups):
            for shape in self._shapes(group.per_node):
                most = min(group.devices // (shape.tensor * shape.pipeline), self.task.lanes)
                if most >= 1 and shape.tensor * shape.pipeline > 1:
                    yield self._branch((number,), shape, range(1, most + 1))

    def mixed(self, subsets: Sequence[tuple[int, ...]]) -> Iterator[Branch]:
        """One pipeline over several groups: which group has which stages, in which order, with how many layers."""
        groups = self.cluster.groups
        for chosen in subsets:
            for shape in self._shapes(min(groups[n].per_node for n in chosen)):
                counts = self._counts(chosen, shape)
                if counts and 2 <= shape.pipeline <= MOST_MIXED_STAGES:
                    yield self._branch(chosen, shape, counts)

    def _counts(self, chosen: tuple[int, ...], shape: Shape) -> list[int]:
        """Numbers of workers for a pipeline over all of these groups: of all that have the same largest number of
        lanes the smallest, which leaves most places for stages; and the powers of two. More devices only add to them.
        """
        lanes = self.task.lanes
        devices = [self.cluster.groups[n].devices // shape.tensor for n in chosen]
        most = min(*devices, lanes)
        fewest = fewest_workers(lanes) | {1 << n for n in range(most.bit_length())}
        return [n for n in sorted(fewest) if n <= most and sum(d // n for d in devices) >= shape.pipeline]

    def _shapes(self, per_node: int) -> Iterator[Shape]:
        model = self.task.model
        tensors = [t for t in _TENSORS if t <= per_node and model.heads % t == 0 and model.ffn % t == 0]
        pipelines = [p for p in _PIPELINES if p <= model.layers]
        yield from starmap(Shape, product(tensors, pipelines, divisors(self.task.lane_batch)))

    def _cut(self, shape: Shape, workers: int) -> Cut:
        count = -(-self.task.lanes // workers) * (self.task.lane_batch // shape.micro_batch)
        return Cut(
            tensor=shape.tensor, pipeline=shape.pipeline, workers=workers, micro_batch=shape.micro_batch,
            micro_batches=count, zero_stage=1, mirrors=self.task.mirrors and workers > 1, dtype=self.task.dtype,
            sequence_parallel=shape.tensor > 1,
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

    def _branch(self, chosen: tuple[int, ...], shape: Shape, counts: Sequence[int]) -> Branch:
        """All the numbers of workers, halved until one is left: nothing is worked out of a half that cannot win."""
        few, many = counts[0], counts[-1]
        bound = self._range_bound(chosen, shape, few, many)
        if few == many:
            cut = self._cut(shape, few)
            cuts = self.variants(cut, one_group=len(chosen) == 1)
            places = self._places(chosen, cut)
            return Branch(bound, partial(self._opened, chosen, places, cuts), len(cuts))
        middle = len(counts) // 2
        halves = counts[:middle], counts[middle:]
        size = sum(self._variants_of(chosen, shape, count) for count in counts)
        return Branch(bound, lambda _: [self._branch(chosen, shape, half) for half in halves], size)

    def _variants_of(self, chosen: tuple[int, ...], shape: Shape, workers: int) -> int:
        """How many `variants` there are."""
        batches = -(-self.task.lanes // workers) * (self.task.lane_batch // shape.micro_batch)
        one_group = len(chosen) == 1
        key = (
            one_group, shape.pipeline, workers > 1, batches >= shape.pipeline, batches % shape.pipeline == 0
        )  # fmt: skip
        if key not in self._sizes:
            self._sizes[key] = len(self.variants(self._cut(shape, workers), one_group=one_group))
        return self._sizes[key]

    def _places(self, chosen: tuple[int, ...], cut: Cut) -> tuple[int, ...]:
        """Stages that each group has devices for."""
        if len(chosen) == 1:
            return (cut.pipeline,)
        return tuple(self.cluster.groups[n].devices // (cut.tensor * cut.workers) for n in chosen)

    def _range_bound(self, chosen: tuple[int, ...], shape: Shape, few: int, many: int) -> float:
        """No plan of this shape with `few` to `many` workers takes less, whatever its variant: micro-batches and the
        update of the most workers, exchange and places of the fewest.
        """
        most = self._cut(shape, many)
        places = self._places(chosen, self._cut(shape, few))
        if not self._holds(chosen, places, replace(most, zero_stage=3 if many > 1 else 1)):
            return math.inf
        bubble = _LEAST_BUBBLE if len(chosen) == 1 else _LEAST_MIXED_BUBBLE
        update = min(self.kinds.update_s(n, most) for n in chosen)
        bound = math.inf
        for zero in (1, 2, 3) if many > 1 else (1,):
            # With fewer workers than a node has room for, or on one node, more of them may exchange in less time.
            across = [self._across(n, shape, few) for n in chosen]
            cuts = {count: replace(most, workers=count, zero_stage=zero) for count in set(across)}
            least = [cuts[count] for count in across]
            whole = [self.kinds.all_s(n, cut) for n, cut in zip(chosen, least, strict=True)]
            exchange = min(
                self.kinds.exchange_s(n, cut, self.kinds.even_params(cut)) for n, cut in zip(chosen, least, strict=True)
            )
            bound = min(bound, self._working(whole, places, most, bubble) + exchange)
        return bound + update

    def _holds(self, chosen: tuple[int, ...], places: Sequence[int], cut: Cut) -> bool:
        """Whether the roomiest places together hold the parameters and their state: nothing fits that does not."""
        each = sorted(
            (self.kinds.room_bytes(n)
             for n, count in zip(chosen, places, strict=True) for _ in range(min(count, cut.pipeline))),
            reverse=True,
        )  # fmt: skip
        return param_bytes(cut) * self.kinds.even_params(cut) * cut.pipeline <= sum(each[: cut.pipeline]) * (1 + 1e-9)

    def _across(self, number: int, shape: Shape, workers: int) -> int:
        """So many workers as exchange in no more time than `workers` or any more of them."""
        node = self.kinds.places[number].per_node
        beyond = workers * shape.tensor * shape.pipeline > node and workers * shape.tensor >= node
        return workers if beyond else 1

    def _opened(
        self, chosen: tuple[int, ...], places: tuple[int, ...], cuts: Sequence[Cut], worst: float
    ) -> list[Branch | Candidate]:
        """The candidates that promise most, and a branch of the others: few of them will be looked at."""
        promises = [(self._promise(chosen, places, cut), cut) for cut in cuts if self._holds(chosen, places, cut)]
        least = min((promise for promise, _ in promises), default=math.inf)
        near = [cut for promise, cut in promises if promise <= least * _FAR]
        far = [cut for promise, cut in promises if promise > least * _FAR]
        found = self._candidates(chosen, places, near, worst)
        if far:
            bound = min(promise for promise, _ in promises if promise > least * _FAR)
            found.append(Branch(bound, partial(self._candidates, chosen, places, far), len(far)))
        return found

    def _promise(self, chosen: tuple[int, ...], places: tuple[int, ...], cut: Cut) -> float:
        """The seconds of a candidate at least, whatever memory allows."""
        whole = [self.kinds.all_s(n, cut) for n in chosen]
        return self._working(whole, places, cut, bubble_share(cut)) + self._least_rest(chosen, cut)

    def _candidates(
        self, chosen: tuple[int, ...], places: tuple[int, ...], cuts: Sequence[Cut], worst: float
    ) -> list[Branch | Candidate]:
        """With bounds that know what memory lets the places hold. Those that cannot take less than `worst` stay a
        branch, whose bounds are worked out when they are asked for.
        """
        problems = [self._problem(chosen, places, cut) for cut in cuts]
        rests = [self._least_rest(chosen, cut) for cut in cuts]
        late = [False] * len(cuts)
        if cuts and worst < math.inf:
            late = beyond(problems, [worst - rest for rest in rests])
        found: list[Branch | Candidate] = []
        left = [cut for cut, is_late in zip(cuts, late, strict=True) if is_late]
        if left:
            found.append(Branch(worst, lambda _: self._candidates(chosen, places, left, math.inf), len(left)))
        near = [n for n, is_late in enumerate(late) if not is_late]
        if near:
            bounds = least_s([problems[n] for n in near])
            found += [
                Candidate(least + rests[n], partial(self._work_out, chosen, places, cuts[n]))
                for n, least in zip(near, bounds, strict=True)
            ]
        return found

    def _problem(self, chosen: tuple[int, ...], places: tuple[int, ...], cut: Cut) -> Problem:
        kinds = [self.kinds.kind(number, cut, count) for number, count in zip(chosen, places, strict=True)]
        received = [min(self.kinds.between_s(a, b, cut) for a in chosen) for b in chosen]
        whole = [self.kinds.all_s(n, cut) for n in chosen]
        return Problem(
            kinds, [in_flight(cut, stage) for stage in range(cut.pipeline)], received,
            self._even_s(whole, places, cut), min(whole), bubble_share(cut), cut.micro_batches,
        )  # fmt: skip

    def _working(self, whole: Sequence[float], places: Sequence[int], cut: Cut, bubble: float) -> float:
        """No cut of the layers is quicker than one in which all stages take the same time, on the quickest places."""
        return bubble * min(whole) + (cut.micro_batches - bubble) * self._even_s(whole, places, cut)

    def _even_s(self, whole: Sequence[float], places: Sequence[int], cut: Cut) -> float:
        """One micro-batch through a stage, when all take the same time, on the quickest places."""
        speeds = [1 / t for t, n in zip(whole, places, strict=True) for _ in range(min(n, cut.pipeline))]
        return 1 / sum(sorted(speeds, reverse=True)[: cut.pipeline])

    def _least_rest(self, chosen: tuple[int, ...], cut: Cut) -> float:
        """No order of stages exchanges its gradients in less time."""
        return min(self.kinds.rest_s(number, cut, self.kinds.even_params(cut)) for number in chosen)

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
            parts = step_time(self.task.model, cut, self.kinds.places[chosen[0]], layers=layers, again=again,
                              constants=self.constants)  # fmt: skip
            limit = parts.limit
        else:
            limit = "the slowest stage's compute" if pipeline.time_s > 2 * rest else EXCHANGE
        return Plan(
            "grid" if len(chosen) == 1 else "mixed", pipeline.time_s + rest, bound, tuple(sorted(set(groups))),
            cut.devices, self._fits(groups, cut, layers, again), limit,
            cut=replace(cut, checkpointing="every_layer") if again == layers else cut, layers=layers, again=again,
            stage_groups=groups, stage_s=tuple(stage.time_s for stage in pipeline.stages),
        )  # fmt: skip

    def replayed(self, plan: Plan) -> Plan:
        """A plan, with the seconds of its step when its schedule is replayed, operation by operation."""
        cut, groups = plan.cut, plan.stage_groups
        assert cut is not None
        work = self.stage_work(plan)
        held = stage_params(self.task.model, cut, plan.layers)
        rest = max(self.kinds.rest_s(number, cut, params) for number, params in zip(groups, held, strict=True))
        seconds = replayed_s(work.forward_s, work.backward_s, cut, send_s=work.send_s, wrap_s=work.wrap_s) + rest
        return replace(plan, replayed_s=seconds, work=work)

    def stage_work(self, plan: Plan) -> StageWork:
        """What the stages of a plan do for one micro-batch."""
        cut, groups = plan.cut, plan.stage_groups
        assert cut is not None
        forward, backward, sends = [], [], []
        last = cut.pipeline - 1
        for j, (number, layers, seconds) in enumerate(zip(groups, plan.layers, plan.stage_s, strict=True)):
            received = self.kinds.between_s(groups[j - 1], number, cut) * (cut.chunks if j else cut.chunks - 1)
            ends = self.kinds.ends_s(number, cut)
            work = seconds - received
            head = ends[1] if j == last else 0.0
            first = self.kinds.places[number].slowdown * self.kinds.time(number, cut).forward_s * layers + head / 3
            forward.append(min(first, work))
            backward.append(work - forward[-1])
            if j:
                sends.append(self.kinds.between_s(groups[j - 1], number, cut) / 2)
        wrap_s = self.kinds.between_s(groups[-1], groups[0], cut) / 2
        return StageWork(tuple(forward), tuple(backward), tuple(sends), wrap_s)

    def staged(
        self, chosen: tuple[int, ...], places: tuple[int, ...], cut: Cut, worst: float
    ) -> tuple[Pipeline, float, float] | None:
        """The pipeline with the least time of stages and exchange together, the seconds of its exchange, and a bound.

        Exact: the best pipeline first, whatever its exchange takes; then the best of those whose exchange takes less
        than that of the last one; and so on, until even an exchange at its least would not make up for the stages.
        """
        model = self.task.model
        kinds = [self.kinds.kind(number, cut, count) for number, count in zip(chosen, places, strict=True)]
        borders = {
            (a, b): self.kinds.between_s(chosen[a], chosen[b], cut)
            for a in range(len(kinds))
            for b in range(len(kinds))
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
            rest = max(self.kinds.rest_s(number, cut, params) for number, params in zip(numbers, held, strict=True))
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
        fixed, more = self.kinds.rest_s(number, cut, 0.0), self.kinds.rest_s(number, cut, 1e9)
        return (seconds * (1 - 1e-9) - fixed) / (more - fixed) * 1e9 if more > fixed else math.inf

    def _fits(self, groups: Sequence[int], cut: Cut, layers: Sequence[int], again: Sequence[int]) -> float:
        return min(
            stage_memory(
                self.task.model, cut, memory_bytes(self.cluster, number), layers=count, stage=stage, again=more
            ).fits
            for stage, (number, count, more) in enumerate(zip(groups, layers, again, strict=True))
        )
