"""What a worker has of a step that it has not applied yet."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from elastictrain.layout import Shard


@dataclass(slots=True)
class Pending:
    """A step that this worker has computed and exchanged but not applied: the redo-log entry (R1). `reduced`: for every
    held shard its reduced gradient, fp32, one flat run over the shard's active span. `lane_sum`: of the gradient of the
    lane that is computed twice in this step, if this worker is one of the two. `samples_hash`: of its lanes' samples.
    `lanes`, `tokens`, `samples_hash` are of the lanes whose result counts, `numbers`; the rest of all that it has
    computed to the end. `squares`: Σ of squared lengths.
    """

    step: int
    generation: int
    reduced: dict[Shard, torch.Tensor] = field(default_factory=dict)
    lanes: list[tuple[float, float]] = field(default_factory=list)
    numbers: list[int] = field(default_factory=list)
    tokens: int = 0
    computed: int = 0
    computed_tokens: int = 0
    squares: float = 0.0
    lane_sum: int = 0
    samples_hash: int = 0
