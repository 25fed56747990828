"""What a stage on a group of nodes takes and holds, for one way of cutting a task up; worked out once for each."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

from elastictrain.planner.compute import Constants, LayerTime, layer_time
from elastictrain.planner.cost import border_s, ends_s, gradients_s, layer_s, optimizer_s
from elastictrain.planner.memory import (
    MEMORY,
    boundary_bytes,
    gathered_bytes,
    layer_kept_bytes,
    param_bytes,
    stage_memory,
    working_bytes,
)
from elastictrain.planner.model import Checkpointing, Cut
from elastictrain.planner.places import Kind
from elastictrain.planner.plan import SPREAD_BYTES, Task
from elastictrain.planner.profiles import Cluster
from elastictrain.planner.shapes import memory_bytes, place_of


class _Kept(NamedTuple):
    """Bytes of one micro-batch on one device: a layer's activations, its input alone, what is worked with, the head."""

    live: float
    boundary: float
    working: float
    working_again: float
    head: float


class Kinds:
    """The groups of a cluster as places for the stages of one task."""

    def __init__(self, task: Task, cluster: Cluster, constants: Constants) -> None:
        self.task, self.cluster, self.constants = task, cluster, constants
        self.places = [place_of(cluster, group) for group in cluster.groups]
        self._between_islands = cluster.link(cluster.between)
        self._rooms = [memory_bytes(cluster, n) - MEMORY.reserve_bytes - SPREAD_BYTES for n in range(len(self.places))]
        self._times: dict[tuple[int, int, int, Checkpointing], LayerTime] = {}
        self._layers: dict[tuple[object, ...], float] = {}
        self._ends: dict[tuple[object, ...], tuple[float, float]] = {}
        self._borders: dict[tuple[object, ...], float] = {}
        self._kept: dict[tuple[object, ...], _Kept] = {}

    def time(self, number: int, cut: Cut, checkpointing: Checkpointing | None = None) -> LayerTime:
        """One layer for one micro-batch on this group, without what ZeRO exchanges. `checkpointing`: other than the
        cut's.
        """
        key = number, cut.tensor, cut.micro_batch, checkpointing or cut.checkpointing
        if key not in self._times:
            place = self.places[number]
            here = cut if checkpointing is None else replace(cut, checkpointing=checkpointing)
            self._times[key] = layer_time(self.task.model, here, place.device, place.inside, self.constants)
        return self._times[key]

    def layer_s(self, number: int, cut: Cut, checkpointing: Checkpointing | None = None) -> float:
        """The same with what ZeRO exchanges beside it."""
        key = (number, *_exchanged(cut), checkpointing or cut.checkpointing)
        if key not in self._layers:
            known = self.time(number, cut, checkpointing)
            self._layers[key] = layer_s(self.task.model, cut, self.places[number], self.constants, known=known)
        return self._layers[key]

    def ends_s(self, number: int, cut: Cut) -> tuple[float, float]:
        """What the embedding adds to the first stage, and the head to the last one."""
        key = (number, *_exchanged(cut))
        if key not in self._ends:
            self._ends[key] = ends_s(self.task.model, cut, self.places[number], self.constants)
        return self._ends[key]

    def all_s(self, number: int, cut: Cut) -> float:
        """One micro-batch through the whole model."""
        return self.task.model.layers * self.layer_s(number, cut) + sum(self.ends_s(number, cut))

    def even_params(self, cut: Cut) -> float:
        """No cut of the layers leaves the fullest stage with fewer parameters."""
        model = self.task.model
        return (model.layers * model.layer_params + 2 * model.vocab_params) / cut.pipeline / cut.tensor

    def update_s(self, number: int, cut: Cut) -> float:
        """The least update of any stage here."""
        return optimizer_s(self.even_params(cut), cut, self.places[number], self.constants)

    def exchange_s(self, number: int, cut: Cut, params: float) -> float:
        """What workers exchange at the end of a step, of a stage with so many parameters on this group."""
        return gradients_s(params, self.task.model, cut, self.places[number], self.constants)

    def rest_s(self, number: int, cut: Cut, params: float) -> float:
        """Exchange and update at the end of a step, of a stage with so many parameters on this group."""
        update = optimizer_s(params, cut, self.places[number], self.constants)
        return self.exchange_s(number, cut, params) + update

    def room_bytes(self, number: int) -> float:
        """What a device of the group may use, less what any plan needs there."""
        return self._rooms[number]

    def between_s(self, a: int, b: int, cut: Cut) -> float:
        """What a stage on group b waits for one on group a, for one micro-batch, there and back."""
        key = (a, b, cut.micro_batch, cut.tensor * cut.workers * cut.pipeline, cut.pipeline == 1)
        if key not in self._borders:
            self._borders[key] = self._between_s(a, b, cut)
        return self._borders[key]

    def _between_s(self, a: int, b: int, cut: Cut) -> float:
        one, other = self.cluster.groups[a], self.cluster.groups[b]
        place = self.places[a]
        if a != b and one.island != other.island:
            place = replace(place, across=self._between_islands)
        elif a != b:
            place = max(place, self.places[b], key=lambda p: border_s(self.task.model, cut, p))
        return border_s(self.task.model, cut, place)

    def kind(self, number: int, cut: Cut, count: int) -> Kind:
        """A stage's place on this group, in units of one layer for each chunk. The first unit has the embedding, the
        last one the head.
        """
        model, chunks = self.task.model, cut.chunks
        units = model.layers // chunks
        once, twice = self.layer_s(number, cut), self.layer_s(number, cut, "every_layer")
        kept, per_param = self._kept_bytes(cut), param_bytes(cut)
        ends = model.vocab_params / cut.tensor
        params = [chunks * model.layer_params / cut.tensor] * units
        params[0] += ends
        params[-1] += ends
        seconds = [chunks * once] * units
        first, last = self.ends_s(number, cut)
        seconds[0] += first
        seconds[-1] += last
        keep = [per_param * params[units // 2]] * units
        keep[0], keep[-1] = per_param * params[0], per_param * params[-1] + kept.head
        room = self._rooms[number] - gathered_bytes(model, cut)
        again = cut.schedule != "zb-h1"
        return Kind(
            count, tuple(seconds), tuple(keep), (chunks * kept.live,) * units, room - kept.working,
            fixed_s=(chunks - 1) * self.between_s(number, number, cut), params=tuple(params),
            again_s=(chunks * (twice - once),) * units if again else (),
            again_bytes=(chunks * kept.boundary,) * units if again else (),
            working_bytes=kept.working_again - kept.working,
        )  # fmt: skip

    def _kept_bytes(self, cut: Cut) -> _Kept:
        key = cut.tensor, cut.micro_batch, cut.checkpointing
        if key not in self._kept:
            model = self.task.model
            head = stage_memory(model, replace(cut, pipeline=1), 1.0, layers=1, stage=0).head
            self._kept[key] = _Kept(
                layer_kept_bytes(model, cut), boundary_bytes(model, cut), working_bytes(model, cut, again=False),
                working_bytes(model, cut, again=True), head,
            )  # fmt: skip
        return self._kept[key]


def _exchanged(cut: Cut) -> tuple[object, ...]:
    """What the time of layers and ends depends on, but for checkpointing."""
    if cut.zero_stage < 2 or cut.workers == 1:
        return (cut.tensor, cut.micro_batch, 0)
    return (cut.tensor, cut.micro_batch, cut.zero_stage, cut.workers, cut.pipeline)
