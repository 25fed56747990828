"""A small pipeline to simulate: two stages' worth of layers more or less, and a step that is quick to replay."""

from __future__ import annotations

from typing import Any

from elastictrain.planner.model import Cut
from elastictrain.planner.pipelines import Pipelines
from elastictrain.planner.places import Kind
from elastictrain.sim.pipelines import PipelineScenario

MODEL: dict[str, Any] = {
    "layers": 16, "hidden": 2048, "heads": 16, "sequence": 2048, "vocab": 32000, "gated": True,
}  # fmt: skip


def work(*, workers: int, layers: int = 12, head: float = 1.0, memory: float = 1e12, batches: int = 8) -> Pipelines:
    """Equal devices; the last layer takes `head` more layers' time, as logits do."""
    seconds = (*(0.01,) * (layers - 1), 0.01 * (1 + head))
    kind = Kind(workers, seconds, (1e9,) * layers, (1e8,) * layers, memory)
    return Pipelines((kind,), (0,) * workers, batches, Cut(), 1 / 3, {(0, 0): 0.001}, 0.05)


def scenario(*, stages: int = 3, pipelines: int = 2, spares: int = 0, **more: Any) -> PipelineScenario:
    """Healthy and quiet unless `more` says otherwise."""
    workers = stages * pipelines
    made = more.pop("work", None) or work(workers=workers + spares)
    placements = tuple(made.best(range(first, first + stages), made.healthy()) for first in range(0, workers, stages))
    return PipelineScenario(made, placements, tuple(range(workers, workers + spares)), **{"steps": 200} | more)
