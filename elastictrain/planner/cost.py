"""Seconds of a step for one way of cutting a model up over devices that are alike."""

from __future__ import annotations

from dataclasses import dataclass, replace

from elastictrain.planner.collectives import all_gather_s, send_s, share_across
from elastictrain.planner.compute import DEFAULTS, Constants, LayerTime, head_time, layer_time
from elastictrain.planner.memory import even_layers
from elastictrain.planner.model import Cut, Transformer
from elastictrain.planner.profiles import Device, Link
from elastictrain.planner.schedule import bubble_share

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
    again: tuple[int, ...] | None = None,
    constants: Constants = DEFAULTS,
) -> StepTime:
    """Every schedule in closed form: all micro-batches through the slowest stage, and a share of the others once more.

    `again`: layers of each stage that are computed again in the backward (default: all or none, as the cut says).
    """
    split = layers or even_layers(model.layers, cut.pipeline)
    repeated = again or (split if cut.checkpointing == "every_layer" else (0,) * cut.pipeline)
    kept = cut if cut.checkpointing != "every_layer" else replace(cut, checkpointing="none")
    whole = replace(cut, checkpointing="every_layer")
    once, twice = layer_s(model, kept, place, constants), layer_s(model, whole, place, constants)
    ends = ends_s(model, cut, place, constants)
    crossing = border_s(model, cut, place)
    last = cut.pipeline - 1
    stages = [
        (count - more) * once
        + more * twice
        + (ends[0] if stage == 0 else 0.0)
        + (ends[1] if stage == last else 0.0)
        + crossing * (cut.chunks if stage else cut.chunks - 1)
        for stage, (count, more) in enumerate(zip(split, repeated, strict=True))
    ]
    worst = max(stages)
    slowest = stages.index(worst)
    count, more = split[slowest], repeated[slowest]
    one, two = (layer_time(model, c, place.device, place.inside, constants) for c in (kept, whole))
    tensor = place.slowdown * ((count - more) * one.tensor_s + more * two.tensor_s)
    beside = (count - more) * (once - place.slowdown * one.total_s) + more * (twice - place.slowdown * two.total_s)
    sending = crossing * (cut.chunks if slowest else cut.chunks - 1)
    sent = crossing * (cut.pipeline * cut.chunks - 1) - sending  # by the other stages
    held = max(stage_params(model, cut, split))
    return StepTime(
        compute_s=cut.micro_batches * (worst - tensor - sending - beside),
        tensor_s=cut.micro_batches * tensor,
        bubble_s=(sum(stages) - worst - sent) * bubble_share(cut),
        send_s=cut.micro_batches * sending + sent * bubble_share(cut),
        gradients_s=cut.micro_batches * beside + gradients_s(held, model, cut, place, constants),
        optimizer_s=optimizer_s(held, cut, place, constants),
    )


def layer_s(
    model: Transformer, cut: Cut, place: Place, constants: Constants, *, known: LayerTime | None = None
) -> float:
    """One layer for one micro-batch, forward and backward, with what ZeRO exchanges beside it.

    Stage 2 scatters a layer's gradients after every backward, stage 3 gathers its parameters before every forward and
    backward too. Either runs beside the computation of the layer before, so that the longer of the two counts (as
    Cephalo counts FSDP; Guo et al. 2025). `known`: the layer's own time, where it was worked out before.
    """
    time = known or layer_time(model, cut, place.device, place.inside, constants)
    if cut.zero_stage < 2 or cut.workers == 1:
        return place.slowdown * time.total_s
    around = round_s(model.layer_params / cut.tensor, cut, place, constants)
    gather = around if cut.zero_stage == 3 else 0.0
    forward, backward = place.slowdown * time.forward_s, place.slowdown * (time.total_s - time.forward_s)
    return max(forward, gather) + max(backward, gather + around)


def ends_s(model: Transformer, cut: Cut, place: Place, constants: Constants) -> tuple[float, float]:
    """Of one micro-batch: what the embedding adds to the first stage, and logits and loss to the last one."""
    head = place.slowdown * head_time(model, cut, place.device, constants)
    if cut.zero_stage < 2 or cut.workers == 1:
        return 0.0, head
    around = round_s(model.vocab_params / cut.tensor, cut, place, constants)
    # An embedding computes next to nothing that its exchange could hide behind.
    return (2 if cut.zero_stage == 3 else 1) * around, max(head, (3 if cut.zero_stage == 3 else 1) * around)


def optimizer_s(params: float, cut: Cut, place: Place, constants: Constants) -> float:
    """The update of a stage's `params` on one device: memory traffic, on its own share from ZeRO stage 1 on."""
    share = cut.workers if cut.zero_stage else 1
    return place.slowdown * params / share * OPTIMIZER_BYTES / (place.device.bandwidth_bytes_s * constants.memory)


def border_s(model: Transformer, cut: Cut, place: Place) -> float:
    """What a stage waits for its neighbours for one micro-batch: activations forward, gradients backward."""
    if cut.pipeline == 1:
        return 0.0
    size = 2 if cut.dtype == "bf16" else 4
    hidden_bytes = size * cut.micro_batch * model.sequence * model.hidden
    within = cut.tensor * cut.workers * cut.pipeline <= place.per_node
    return 2 * send_s(hidden_bytes, place.inside if within else place.across)


def gradients_s(params: float, model: Transformer, cut: Cut, place: Place, constants: Constants) -> float:
    """Exchange among the workers of a stage that nothing hides, once a step.

    Gradients reduced and parameters gathered; in ZeRO stage 2 only the latter, since gradients have left with every
    micro-batch; in stage 3 what the first layer waits for and the last one leaves (`layer_s` has the others).
    """
    if cut.zero_stage == 3:
        return 2 * round_s(model.layer_params / cut.tensor, cut, place, constants)
    return (1 if cut.zero_stage == 2 else 2) * round_s(params, cut, place, constants)


def round_s(params: float, cut: Cut, place: Place, constants: Constants) -> float:
    """One all-gather or reduce-scatter of `params` numbers among the workers of a stage."""
    if cut.workers == 1:
        return 0.0
    size = 2 if cut.dtype == "bf16" else 4
    per_node = max(1, min(cut.workers, place.per_node // cut.tensor))
    nodes = -(-cut.devices // place.per_node)
    if cut.workers <= per_node and cut.devices <= place.per_node:
        link, share = place.inside, constants.inside
    else:
        link = place.across
        share = constants.across * share_across(link, per_node, place.per_node, nodes)
    return all_gather_s(size * params, cut.workers, link, share)


def stage_params(model: Transformer, cut: Cut, layers: tuple[int, ...]) -> tuple[float, ...]:
    """Parameters of a device of each stage: its layers, and at the ends embedding and head."""
    last = cut.pipeline - 1
    return tuple(
        (count * model.layer_params + model.vocab_params * ((stage == 0) + (stage == last))) / cut.tensor
        for stage, count in enumerate(layers)
    )
