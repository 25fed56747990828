"""Small recipes for the tests that start processes. Loaded by file name, as a user's recipe would be."""

from __future__ import annotations

import time
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional

from elastictrain.recipe import Recipe

LANE_S = 0.03


class Bytes(Recipe):
    """A byte-level model with everything that must stay bit-identical: dropout, BatchNorm, tied weights, a frozen
    parameter, two parameter groups, a schedule, EMA, lanes of different weight.
    """

    ema_decay = 0.9

    def __init__(self, width: int = 48, fail_at: int | None = None) -> None:
        self.width, self.fail_at = width, fail_at

    def model(self) -> nn.Module:
        return ByteModel(self.width)

    def optimizer(self, params):
        matrices = [p for p in params if p[1].dim() >= 2]
        others = [p for p in params if p[1].dim() < 2]
        groups = [{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0, "lr": 2e-3}]
        return torch.optim.AdamW(groups, lr=1e-2, fused=True)

    def loss(self, model, batch):
        tokens = batch["tokens"]
        logits = model(tokens[:, :-1]).float()
        targets = tokens[:, 1:]
        valid = targets % 7 != 0  # lanes so have different weights
        losses = functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
        return (losses * valid.flatten()).sum(), valid.sum()

    def schedule(self, step: int) -> float:
        if step == self.fail_at:
            raise ValueError(f"no learning rate for step {step}")
        return min(1.0, step / 3)

    def evaluate(self, model):
        tokens = torch.arange(64).view(1, 64) % 257
        return {"logit": float(model(tokens).float().sum())}


class Plain(Bytes):
    """`Bytes` without an integer buffer."""

    def model(self) -> nn.Module:
        model = super().model()
        model.norm = nn.Identity()
        return model


class Frozen(Bytes):
    """`Bytes` with a frozen layer that is most of the model."""

    def model(self) -> nn.Module:
        model = super().model()
        model.base = nn.Linear(1000, 1000).requires_grad_(requires_grad=False)
        return model

    def loss(self, model, batch):
        total, weight = super().loss(model, batch)
        return total + 0.0 * model.base.bias.sum(), weight


class Unhurried(Bytes):
    """`Bytes` that takes its time until a file is there: so that a run lasts as long as what happens to it, without a
    bit that depends on it.
    """

    def __init__(self, until: str) -> None:
        super().__init__()
        self.until = Path(until)

    def loss(self, model, batch):
        if not self.until.exists():
            time.sleep(LANE_S)
        return super().loss(model, batch)


class ByteModel(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(257, width)
        self.inner = nn.Linear(width, 2 * width)
        self.norm = nn.BatchNorm1d(2 * width)
        self.outer = nn.Linear(2 * width, width)
        self.drop = nn.Dropout(0.1)
        self.scale = nn.Parameter(torch.tensor(1.0))
        self.fixed = nn.Parameter(torch.randn(width), requires_grad=False)
        self.head = nn.Linear(width, 257, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens):
        x = self.embed(tokens)
        h = self.norm(self.inner(x).transpose(1, 2)).transpose(1, 2)
        return self.head(x + self.scale * self.drop(self.outer(functional.gelu(h))) + self.fixed)
