"""What a step leaves behind to be published: its metrics row, its evaluation, its share of a checkpoint."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from elastictrain.data.ids import show_hash
from elastictrain.engine.saver import Writing
from elastictrain.engine.vote import Tally
from elastictrain.engine.worker_model import hook
from elastictrain.job import Job


@dataclass(slots=True)
class StepReport:
    """Of commit `step`, waiting for the vote after it (R5)."""

    step: int
    row: dict[str, Any] | None
    evaluates: bool = False
    stores: bool = False
    evaluation: dict[str, float] | None = None


@dataclass(slots=True)
class Storing:
    """A checkpoint of commit `step` that is being written while training goes on.

    All workers of a generation have it at the same votes: in each they say whether their share is still being written,
    and beside the first vote in which nobody says so the shares travel.
    """

    step: int
    writing: Writing

    def extras(self, check: Callable[[], None]) -> bytes:
        """This worker's share. Waits for it, asking `check`, which may raise; ClusterError: it could not be written."""
        return json.dumps(self.writing.share(check)).encode()

    @staticmethod
    def shares(extras: list[bytes]) -> list[dict[str, Any]]:
        return [json.loads(raw) for raw in extras]


def step_row(
    job: Job,
    recipe: Any,
    tally: Tally,
    seconds: Mapping[str, float],
    world: int,
    data_wait: Mapping[str, float],
) -> dict[str, Any]:
    """One line of metrics.jsonl, without the generation. Floats that are not finite become None: JSON has none."""
    loss = tally.loss
    skipped = not tally.is_finite
    return {
        "step": tally.step,
        "loss": loss if math.isfinite(loss) else None,
        "grad_norm": None if skipped else tally.norm / tally.weight,
        "lr_factor": float(hook(recipe, "schedule")(tally.step)),
        "tokens": tally.tokens,
        "samples": tally.lanes * job.lane_batch_size,
        "samples_hash": show_hash(tally.samples_hash),
        "step_s": seconds.get("step_s", 0.0),
        "world": world,
        "phases": {name: round(value, 6) for name, value in seconds.items() if name != "step_s"},
        "data_wait": {stage: round(value, 6) for stage, value in data_wait.items()},
        **({"skipped": list(tally.bad_lanes)} if skipped else {}),
        **({"lanes_dropped": []} if job.redundancy.drops else {}),  # a worker that is alone shares nothing
        **({} if tally.shares is None else tally.shares.row()),
    }
