"""Seconds of a step for one way of cutting a model up over devices that are alike."""

from __future__ import annotations

from dataclasses import dataclass

from elastictrain.planner.collectives import across_nodes, all_gather_s, send_s
from elastictrain.planner.compute import DEFAULTS, Constants, head_time, layer_time
from elastictrain.planner.memory import even_layers
from elastictrain.planner.model import Cut, Transformer
from elastictrain.planner.profiles import Device, Link

_BUBBLE = {"1f1b": 1.0, "gpipe": 1.0, "zb-h1": 1 / 3}
"""Share of 1F1B's bubble that a schedule leaves (Qi et al. 2024 for ZB-H1, at 1F1B's memory)."""
OPTIMIZER_BYTES = 30.0
"""Read and written per parameter by Adam: masters and two moments, gradient, and the parameter in its compute dtype."""


@dataclass(frozen=True, slots=True)
class Place:
    """Devices that are alike, `per_node` on each node. `inside` and `across`: links within and between nodes."""

    device: Device
    per_node: int
    inside: Link
    across: Link
    slowdown: float = 1.0


@dataclass(frozen=True, slots=True)
class StepTime:
    """Seconds of a step by what they go into; they add up to `total_s`."""

    compute_s: float
    tensor_s: float
    bubble_s: float
    send_s: float
    gradients_s: float
    optimizer_s: float

    @property
    def total_s(self) -> float:
        return self.compute_s + self.tensor_s + self.bubble_s + self.send_s + self.gradients_s + self.optimizer_s

    @property
    def limit(self) -> str:
        """What takes most."""
        parts = {
            "compute": self.compute_s, "the links inside a node (tensor parallelism)": self.tensor_s,
            "the pipeline's bubble": self.bubble_s, "the links between stages": self.send_s,
            "the links between workers (gradients and parameters)": self.gradients_s, "the optimizer": self.optimizer_s,
        }  # fmt: skip
        return max(parts, key=lambda name: parts[name])


def step_time(
    model: Transformer,
    cut: Cut,
    place: Place,
    *,
    layers: tuple[int, ...] | None = None,
    constants: Constants = DEFAULTS,
) -> StepTime:
    """1F1B and its kin in closed form: all micro-batches through the slowest stage, and the others once more."""
    split = layers or even_layers(model.layers, cut.pipeline)
    layer = layer_time(model, cut, place.device, place.inside, constants)
    head = head_time(model, cut, place.device, constants)
    slow = place.slowdown
    crossing = border_s(model, cut, place)
    last = cut.pipeline - 1
    stages = [
        slow * (count * layer.total_s + (head if stage == last else 0.0)) + (crossing if stage else 0.0)
        for stage, count in enumerate(split)
    ]
    worst = max(stages)
    working = cut.micro_batches * worst
    bubble = (sum(stages) - worst) * _BUBBLE[cut.schedule] / cut.chunks
    slowest = stages.index(worst)
    tensor = cut.micro_batches * slow * split[slowest] * layer.tensor_s
    sending = cut.micro_batches * crossing * cut.chunks if slowest else 0.0
    working += sending - (cut.micro_batches * crossing if slowest else 0.0)
    held = max(stage_params(model, cut, split))
    return StepTime(
        compute_s=working - tensor - sending,
        tensor_s=tensor,
        bubble_s=bubble,
        send_s=sending,
        gradients_s=gradients_s(held, cut, place, constants),
        optimizer_s=held / (cut.workers if cut.zero_stage else 1) * OPTIMIZER_BYTES
        / (place.device.bandwidth_bytes_s * constants.memory) * slow,
    )  # fmt: skip


def border_s(model: Transformer, cut: Cut, place: Place) -> float:
    """What a stage waits for its neighbours for one micro-batch: activations forward, gradients backward."""
    if cut.pipeline == 1:
        return 0.0
    size = 2 if cut.dtype == "bf16" else 4
    hidden_bytes = size * cut.micro_batch * model.sequence * model.hidden
    within = cut.tensor * cut.workers * cut.pipeline <= place.per_node
    return 2 * send_s(hidden_bytes, place.inside if within else place.across)


def gradients_s(params: float, cut: Cut, place: Place, constants: Constants) -> float:
    """Reduce-scatter of the gradients and all-gather of the parameters among the workers of a stage.

    ZeRO-3 gathers the parameters twice more, for every forward and backward.
    """
    if cut.workers == 1:
        return 0.0
    size = 2 if cut.dtype == "bf16" else 4
    per_node = max(1, min(cut.workers, place.per_node // cut.tensor))
    nodes = -(-cut.devices // place.per_node)
    if cut.workers <= per_node and cut.devices <= place.per_node:
        link, share = place.inside, constants.inside
    else:
        link, share = across_nodes(place.across, per_node, place.per_node, nodes), constants.across
    rounds = 2 + (1 if cut.zero_stage >= 3 else 0)
    return rounds * all_gather_s(size * params, cut.workers, link, share)


def stage_params(model: Transformer, cut: Cut, layers: tuple[int, ...]) -> tuple[float, ...]:
    """Parameters of a device of each stage: its layers, and at the ends embedding and head."""
    last = cut.pipeline - 1
    return tuple(
        (count * model.layer_params + model.vocab_params * ((stage == 0) + (stage == last))) / cut.tensor
        for stage, count in enumerate(layers)
    )
