"""A recipe's model as the planner sees it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from elastictrain.engine.describe import describe
from elastictrain.errors import RecipeError
from elastictrain.job import Job, parse_job
from elastictrain.recipe import Recipe


class Wide(Recipe):
    """Two matrices without bias: everything about it can be counted by hand."""

    def model(self) -> nn.Module:
        return nn.Sequential(nn.Linear(32, 64, bias=False), nn.ReLU(), nn.Linear(64, 8, bias=False))

    def optimizer(self, params: Any) -> torch.optim.Optimizer:
        return torch.optim.SGD(params, lr=0.1)

    def loss(self, model: nn.Module, batch: Any) -> torch.Tensor:
        return model(batch["x"].to(next(model.parameters()).dtype)).sum()


class Looks(Wide):
    def loss(self, model: nn.Module, batch: Any) -> torch.Tensor:
        return super().loss(model, batch) / batch["x"].sum().item()


def job(recipe: Any, **settings: Any) -> Job:
    raw = {"recipe": recipe, "data": {"kind": "jsonl", "path": "x"}, "steps": 1, "lanes": 6, "lane_batch_size": 4}
    return parse_job(raw | settings)


BATCH = {"x": np.ones((4, 32), dtype=np.float32)}


def test_what_is_counted() -> None:
    work = describe(job(Wide()), BATCH)
    assert work.params == 32 * 64 + 64 * 8
    # Both forwards, both weight gradients, and the input gradient of the second matrix only.
    assert work.lane_flops == 2 * 4 * (2 * 32 * 64 + 3 * 64 * 8)
    # The input of the first matrix and the output of the ReLU, which the second matrix keeps too.
    assert work.kept_bytes == 4 * 4 * (32 + 64)
    assert work.lanes == 6
    assert work.operations > 5
    assert work.dtype == "f32"
    assert work.mirrors


def test_micro_batches_keep_less_and_compute_the_same() -> None:
    whole, parts = describe(job(Wide()), BATCH), describe(job(Wide(), micro_batches=2), BATCH)
    assert parts.kept_bytes == whole.kept_bytes / 2
    assert parts.lane_flops == whole.lane_flops
    assert parts.operations == 2 * whole.operations


def test_bf16_keeps_half() -> None:
    work = describe(job(Wide(), numerics={"compute_dtype": "bf16"}), BATCH)
    assert work.kept_bytes == describe(job(Wide()), BATCH).kept_bytes / 2
    assert work.dtype == "bf16"


def test_a_loss_that_needs_values_is_told_what_to_do() -> None:
    with pytest.raises(
        RecipeError, match=r"could not be looked at without data \(device meta\): .*--model model.yaml$"
    ):
        describe(job(Looks()), BATCH)
