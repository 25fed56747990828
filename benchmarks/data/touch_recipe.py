"""A model that hardly computes and takes its time: its lanes wait without holding the interpreter, as those of an
accelerator do.
"""

from __future__ import annotations

import ctypes
import time
from typing import Any

import torch
from torch import nn

from elastictrain.recipe import Recipe


class Touch(Recipe):
    """A lane takes at least `lane_s` seconds from when it has its batch."""

    def __init__(self, lane_s: float = 0.01) -> None:
        self.lane_s = lane_s

    def model(self) -> nn.Module:
        return nn.Linear(4, 1)

    def optimizer(self, params: Any) -> torch.optim.Optimizer:
        return torch.optim.SGD(params, lr=0.01)

    def loss(self, model: Any, batch: Any) -> Any:
        until_s = time.perf_counter() + self.lane_s
        total = model(batch["tokens"][:, :4].float() / 1000).square().sum()
        ctypes.CDLL(None).prctl(29, 1, 0, 0, 0)  # PR_SET_TIMERSLACK, ns: sleeps may end 50 microseconds late otherwise
        time.sleep(max(0.0, until_s - time.perf_counter()))
        return total, batch["tokens"].shape[0]
