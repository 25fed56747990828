"""Bytes of the fullest device, and the probability that they fit."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from elastictrain.planner.model import Cut, Transformer
from elastictrain.planner.profiles import Device
from elastictrain.planner.schedule import in_flight

LOGIT_BYTES = 16.0
"""bf16 logits and gradient, and f32 logits, softmax and gradient; four more when shards are gathered first."""


@dataclass(frozen=True, slots=True)
class MemoryConstants:
    """Fitted to which of 715 published runs fitted and which did not.

    `activations`: what the allocator takes for a counted byte of activations (fragmentation, temporaries). `norm`: more
    bytes per element of the hidden state that norms made of single operations keep. `plain`, `fused`: what unfused and
    fused attention keeps per byte of scores. `logits`: the same for the head. `reserve_bytes`: context and
    communication buffers. `spread_bytes`: how far off the estimate is, as the scale of a logistic distribution.
    """

    activations: float = 1.25
    norm: float = 10.3
    plain: float = 3.2
    fused: float = 6.3
    logits: float = 1.15
    reserve_bytes: float = 0.45e9
    spread_bytes: float = 1.5e9


MEMORY = MemoryConstants()


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes of one device by what takes them; `fits` is the probability that they are there."""

    parameters: float
    gradients: float
    optimizer: float
    mirrors: float
    activations: float
    head: float
    gathered: float
    """Whole layers that ZeRO stages 2 and 3 put together: gradients, and parameters in use and in advance."""
    reserve: float
    fits: float

    @property
    def total(self) -> float:
        parts = (
            self.parameters,
            self.gradients,
            self.optimizer,
            self.mirrors,
            self.activations,
            self.head,
            self.gathered,
            self.reserve,
        )
        return sum(parts)


def layer_kept_bytes(model: Transformer, cut: Cut, constants: MemoryConstants = MEMORY) -> float:
    """Activations that one layer keeps for the backward of one micro-batch (after Korthikanti et al. 2022, recounted
    for rotary positions and gated MLPs).
    """
    t, elements = cut.tensor, float(cut.micro_batch * model.sequence * model.hidden)
    size = 1.0 if cut.dtype == "bf16" else 2.0
    whole = (8 * size + (0 if model.fused_norm else constants.norm)) * elements
    whole /= t if cut.sequence_parallel else 1
    wide = (8 if model.gated else 6) * model.ffn / model.hidden
    shared = (12 + wide) * size * elements / t
    kept = 0.0 if cut.checkpointing == "selective" else score_bytes(model, cut, constants)
    return constants.activations * (whole + shared) + kept


def score_bytes(model: Transformer, cut: Cut, constants: MemoryConstants = MEMORY) -> float:
    """What one layer's attention keeps of its scores; nothing where they never reach memory."""
    scores = float(cut.micro_batch * model.heads) * model.sequence**2 / cut.tensor
    return {"plain": 2 * constants.plain, "fused": constants.fused}.get(model.attention, 0.0) * scores


def working_bytes(model: Transformer, cut: Cut, again: bool, constants: MemoryConstants = MEMORY) -> float:
    """What the one layer takes that is being computed again: all its activations, or its scores."""
    if again:
        return layer_kept_bytes(model, replace(cut, checkpointing="none"), constants)
    return score_bytes(model, cut, constants) if cut.checkpointing == "selective" else 0.0


def gathered_bytes(model: Transformer, cut: Cut) -> float:
    """Of ZeRO stage 2: the gradients of one layer; of stage 3 also its parameters, and those of the next."""
    if cut.workers == 1 or cut.zero_stage < 2:
        return 0.0
    size = 2 if cut.dtype == "bf16" else 4
    return (3 if cut.zero_stage == 3 else 1) * size * model.layer_params / cut.tensor


def param_bytes(cut: Cut) -> float:
    """What a device keeps for every parameter of its stage: in its compute dtype, gradient, masters and moments."""
    size, state, share = (2, 12, 1 / cut.workers) if cut.dtype == "bf16" else (4, 8, 1 / cut.workers)
    return (
        size * (share if cut.zero_stage >= 3 else 1)
        + size * (share if cut.zero_stage >= 2 else 1)
        + state * (share if cut.zero_stage >= 1 else 1) * (2 if cut.mirrors else 1)
    )


def boundary_bytes(model: Transformer, cut: Cut, constants: MemoryConstants = MEMORY) -> float:
    """What checkpointing keeps of a layer: its input."""
    size = 2 if cut.dtype == "bf16" else 4
    return constants.activations * size * cut.micro_batch * model.sequence * model.hidden


def stage_memory(
    model: Transformer,
    cut: Cut,
    device_bytes: float,
    *,
    layers: int,
    stage: int,
    again: int | None = None,
    state_share: float | None = None,
    constants: MemoryConstants = MEMORY,
) -> Memory:
    """One device of stage `stage` with `layers` layers. `again`: how many of them are computed again in the backward
    (default: all or none, as the cut says). `state_share`: the part of the stage's masters and optimizer state that
    this device owns (default: an even share, or all of it below ZeRO stage 1).
    """
    first, last = stage == 0, stage == cut.pipeline - 1
    vocab = model.vocab_params * (first + (last and not (first and model.tied)))
    params = (layers * model.layer_params + vocab) / cut.tensor
    share = state_share if state_share is not None else (1 / cut.workers if cut.zero_stage >= 1 else 1.0)
    size = 2 if cut.dtype == "bf16" else 4
    repeated = again if again is not None else (layers if cut.checkpointing == "every_layer" else 0)
    per_batch = (layers - repeated) * layer_kept_bytes(model, cut, constants)
    per_batch += repeated * boundary_bytes(model, cut, constants)
    activations = in_flight(cut, stage) * per_batch + working_bytes(model, cut, repeated > 0, constants)
    head = 0.0
    if last:
        gathered = cut.tensor > 1 and not model.loss_over_shards
        width = LOGIT_BYTES if cut.tensor == 1 else LOGIT_BYTES / cut.tensor
        width = 20.0 + 4.0 / cut.tensor if gathered else width
        head = constants.logits * width * cut.micro_batch * model.sequence * model.vocab
    state = 12 if size == 2 else 8
    owned = state * params * share
    parts = (
        size * params * (share if cut.zero_stage >= 3 else 1),
        size * params * (share if cut.zero_stage >= 2 else 1),
        owned,
        owned if cut.mirrors else 0.0,
        activations,
        head,
        gathered_bytes(model, cut),
        constants.reserve_bytes,
    )
    return Memory(*parts, fits=probability(sum(parts), device_bytes))


def probability(need_bytes: float, there_bytes: float, constants: MemoryConstants = MEMORY) -> float:
    """That a device with `there_bytes` holds what is estimated at `need_bytes`."""
    z = (there_bytes - need_bytes) / constants.spread_bytes
    return 1 / (1 + math.exp(-z)) if z > -700 else 0.0


def memory_of(
    model: Transformer,
    cut: Cut,
    device: Device,
    *,
    layers: tuple[int, ...] | None = None,
    limit_bytes: float | None = None,
    constants: MemoryConstants = MEMORY,
) -> Memory:
    """The device that is least likely to fit, over all stages of a cut (layers even unless given)."""
    split = layers or even_layers(model.layers, cut.pipeline)
    there = limit_bytes or device.memory_bytes
    stages = (
        stage_memory(model, cut, there, layers=count, stage=stage, constants=constants)
        for stage, count in enumerate(split)
    )
    return min(stages, key=lambda memory: (memory.fits, -memory.total))


def even_layers(layers: int, stages: int) -> tuple[int, ...]:
    """Layers per stage, as even as they go; the first stages have one more."""
    return tuple(layers // stages + (stage < layers % stages) for stage in range(stages))
