"""A pipeline as it stands, with workers that are slower than their devices should be: who has which stage, how many
layers, and how long a step takes.

The layers are cut by the same dynamic programming as a plan's (`stages.place_stages`), every slowed worker as a kind of
its own, with its own memory; a step is the schedule replayed operation by operation (`schedule.replayed_s`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise

from elastictrain.planner.compute import DEFAULTS, Constants
from elastictrain.planner.kinds import Kinds
from elastictrain.planner.memory import even_layers
from elastictrain.planner.model import Cut, Transformer
from elastictrain.planner.places import Kind
from elastictrain.planner.plan import Task
from elastictrain.planner.profiles import Cluster, Group
from elastictrain.planner.schedule import bubble_share, in_flight, replayed_s
from elastictrain.planner.stages import place_stages


@dataclass(frozen=True, slots=True)
class Placement:
    """One pipeline. Of every stage: `seats`, the worker that has it; `layers`; and of these `again`, the first ones,
    that are computed again in the backward.
    """

    seats: tuple[int, ...]
    layers: tuple[int, ...]
    again: tuple[int, ...]

    @property
    def runs(self) -> dict[int, tuple[int, int]]:
        """By worker: the layers that it has, from the first to before the last."""
        ends = [sum(self.layers[: stage + 1]) for stage in range(len(self.layers))]
        return {w: (end - n, end) for w, end, n in zip(self.seats, ends, self.layers, strict=True)}


@dataclass(frozen=True)
class Pipelines:
    """What pipelines of the same model do, each with `micro_batches` a step. `kinds`: of devices, healthy (`count` says
    nothing here); `kind_of`: of every worker, by its number, those included that wait. `forward`: share of a layer's
    time. `border_s[(a, b)]`: for one micro-batch, what a stage on kind b waits for one on kind a, there and back.
    `rest_s`: of a step, beside the stages (exchange of gradients, update). `cut`: schedule; the stages are those of a
    placement.

    `factors`, wherever they are asked for: by worker, how many times as long as its kind it takes.
    """

    kinds: tuple[Kind, ...]
    kind_of: tuple[int, ...]
    micro_batches: int
    cut: Cut = field(default_factory=Cut)
    forward: float = 1 / 3
    border_s: Mapping[tuple[int, int], float] = field(default_factory=dict)
    rest_s: float = 0.0

    @property
    def layers(self) -> int:
        return len(self.kinds[0].layer_s)

    def healthy(self) -> tuple[float, ...]:
        """Factors of workers that all take what their kind takes."""
        return (1.0,) * len(self.kind_of)

    def best(self, seats: Sequence[int], factors: Sequence[float]) -> Placement | None:
        """The layers cut so that these workers, in this order, take least (`place_stages`: exact in its closed form);
        None when they do not fit.
        """
        keys = [(self.kind_of[worker], factors[worker]) for worker in seats]
        known = sorted(set(keys))
        order = [known.index(key) for key in keys]
        kinds = [_slowed(self.kinds[kind], factor, keys.count((kind, factor))) for kind, factor in known]
        borders = {
            (a, b): self.border_s.get((known[a][0], known[b][0]), 0.0)
            for a in range(len(known)) for b in range(len(known))
        }  # fmt: skip
        cut = self._cut(len(seats))
        found = place_stages(
            kinds, len(seats), self.micro_batches, borders=borders, bubble=bubble_share(cut), order=order,
            in_flight=[in_flight(cut, stage) for stage in range(len(seats))],
        )  # fmt: skip
        if found is None or not found.stages:
            return None
        layers = tuple(stage.hi - stage.lo for stage in found.stages)
        return Placement(tuple(seats), layers, tuple(stage.again for stage in found.stages))

    def kept(self, seats: Sequence[int], layers: Sequence[int]) -> Placement | None:
        """The same layers in the hands of these workers, with as few as possible computed again; None: no room."""
        cut, at, again = self._cut(len(seats)), 0, []
        for stage, (worker, count) in enumerate(zip(seats, layers, strict=True)):
            kind, flight = self.kinds[self.kind_of[worker]], in_flight(cut, stage)
            repeats = range(count + 1) if kind.again_bytes else range(1)
            fits = (n for n in repeats if _bytes(kind, at, at + count, n, flight) <= kind.memory_bytes)
            fewest = next(fits, None)
            if fewest is None:
                return None
            again.append(fewest)
            at += count
        return Placement(tuple(seats), tuple(layers), tuple(again))

    def need_bytes(self, placement: Placement) -> tuple[float, ...]:
        """Of every stage, what it needs of its worker's `memory_bytes`."""
        cut, runs = self._cut(len(placement.seats)), placement.runs
        return tuple(
            _bytes(self.kinds[self.kind_of[worker]], *runs[worker], again, in_flight(cut, stage))
            for stage, (worker, again) in enumerate(zip(placement.seats, placement.again, strict=True))
        )

    def stage_s(self, placement: Placement, factors: Sequence[float]) -> tuple[tuple[float, float], ...]:
        """(forward, backward) of every stage for one micro-batch, without waiting for others."""
        found = []
        for worker, again in zip(placement.seats, placement.again, strict=True):
            kind, (lo, hi), factor = self.kinds[self.kind_of[worker]], placement.runs[worker], factors[worker]
            once = factor * (sum(kind.layer_s[lo:hi]) + kind.fixed_s)
            found.append((self.forward * once, (1 - self.forward) * once + factor * sum(kind.again_s[lo : lo + again])))
        return tuple(found)

    def busy_s(self, placement: Placement) -> dict[int, float]:
        """By worker: seconds that it computes in a step, if all are healthy."""
        stages = self.stage_s(placement, self.healthy())
        return {w: self.micro_batches * sum(both) for w, both in zip(placement.seats, stages, strict=True)}

    def step_s(self, placement: Placement, factors: Sequence[float]) -> float:
        """Seconds of a step of one pipeline: its schedule replayed, and the rest."""
        forward, backward = zip(*self.stage_s(placement, factors), strict=True)
        kinds = [self.kind_of[worker] for worker in placement.seats]
        sends = [self.border_s.get(pair, 0.0) / 2 for pair in pairwise(kinds)]
        return replayed_s(forward, backward, self._cut(len(kinds)), send_s=sends) + self.rest_s

    def moved_bytes(self, before: Placement, after: Placement) -> float:
        """Parameters and state that the worker receives that receives most; all receive side by side."""
        had, most = before.runs, 0.0
        for worker, (lo, hi) in after.runs.items():
            first, last = had.get(worker, (0, 0))
            keep = self.kinds[self.kind_of[worker]].keep_bytes
            most = max(most, sum(keep[n] for n in range(lo, hi) if not first <= n < last))
        return most

    def _cut(self, stages: int) -> Cut:
        return replace(self.cut, pipeline=stages, micro_batches=self.micro_batches)


def _slowed(kind: Kind, factor: float, count: int) -> Kind:
    """The same memory, and every layer so many times as long."""
    return replace(
        kind, count=count, layer_s=tuple(factor * s for s in kind.layer_s), fixed_s=factor * kind.fixed_s,
        again_s=tuple(factor * s for s in kind.again_s),
    )  # fmt: skip


def _bytes(kind: Kind, lo: int, hi: int, again: int, flight: float) -> float:
    """Of a stage with layers `lo .. hi-1`, the first `again` of them computed again, `flight` micro-batches kept."""
    at = lo + again
    activations = sum(kind.again_bytes[lo:at]) + sum(kind.live_bytes[at:hi])
    return sum(kind.keep_bytes[lo:hi]) + flight * activations + (kind.working_bytes if again else 0.0)


def pipelines_of(
    model: Transformer,
    devices: Sequence[str],
    *,
    stages: int,
    pipelines: int,
    micro_batches: int,
    micro_batch: int = 1,
    link: str = "ib-hdr",
    constants: Constants = DEFAULTS,
) -> Pipelines:
    """What the planner's cost model says of `pipelines` pipelines of one device a stage. `devices`: by worker, names
    of profiles. The exchange of gradients is that of an even cut. Raises ConfigError when a name has no profile.
    """
    names = sorted(set(devices))
    cluster = Cluster(groups=tuple(Group(device=name, nodes=devices.count(name), inter=link) for name in names))
    lanes = pipelines * micro_batches
    kinds = Kinds(Task(model=model, lanes=lanes, lane_batch=micro_batch, mirrors=pipelines > 1), cluster, constants)
    cut = Cut(pipeline=stages, workers=pipelines, micro_batch=micro_batch, micro_batches=micro_batches,
              mirrors=pipelines > 1)  # fmt: skip
    each = range(len(names))
    even = max(even_layers(model.layers, stages)) * model.layer_params + model.vocab_params
    time = kinds.time(0, cut)
    return Pipelines(
        tuple(kinds.kind(number, cut, devices.count(name)) for number, name in enumerate(names)),
        tuple(names.index(name) for name in devices), micro_batches, cut, time.forward_s / time.total_s,
        {(a, b): kinds.between_s(a, b, cut) for a in each for b in each},
        max(kinds.rest_s(number, cut, even) for number in each),
    )  # fmt: skip
