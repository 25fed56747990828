"""A small convolutional network, with batch norm and dropout, on scikit-learn's handwritten digits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - torch's own custom

from elastictrain.recipe import BufferRule, Recipe, warmup_cosine

HELD_OUT = Path(__file__).parent / "data" / "test.parquet"


def cnn(width: int, dropout: float) -> nn.Sequential:
    """Images [batch, 1, 8, 8] to logits [batch, 10]."""
    return nn.Sequential(
        nn.Conv2d(1, width, 3, padding=1, bias=False),
        nn.BatchNorm2d(width),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(width, 2 * width, 3, padding=1, bias=False),
        nn.BatchNorm2d(2 * width),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Dropout(dropout),
        nn.Linear(8 * width, 10),
    )


def as_images(pixels: Tensor) -> Tensor:
    """Pixels [batch, 64] of 0 … 16 to images [batch, 1, 8, 8] of 0 … 1."""
    return pixels.view(-1, 1, 8, 8) / 16.0


class DigitsRecipe(Recipe):
    """SGD with momentum; `evaluate` gives the accuracy on the digits that were held out."""

    def __init__(
        self,
        *,
        width: int = 32,
        dropout: float = 0.2,
        learning_rate: float = 0.1,
        warmup_steps: int = 10,
        total_steps: int = 200,
    ) -> None:
        self.width, self.dropout, self.learning_rate = width, dropout, learning_rate
        self.warmup_steps, self.total_steps = warmup_steps, total_steps
        self._held_out: tuple[Tensor, Tensor] | None = None

    def model(self) -> nn.Module:
        return cnn(self.width, self.dropout)

    def optimizer(self, params: Sequence[tuple[str, nn.Parameter]]) -> torch.optim.Optimizer:
        return torch.optim.SGD(params, lr=self.learning_rate, momentum=0.9, weight_decay=1e-4)

    def schedule(self, step: int) -> float:
        return warmup_cosine(step, warmup_steps=self.warmup_steps, total_steps=self.total_steps)

    def loss(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        return F.cross_entropy(model(as_images(batch["image"])).float(), batch["label"])

    def evaluate(self, model: nn.Module) -> Mapping[str, float]:
        if self._held_out is None:
            table = pq.read_table(HELD_OUT)
            pixels = np.stack(table.column("image").to_numpy())
            self._held_out = torch.from_numpy(pixels), torch.from_numpy(table.column("label").to_numpy().copy())
        device = next(model.parameters()).device
        pixels_there, labels = (part.to(device) for part in self._held_out)
        predicted = model(as_images(pixels_there)).argmax(dim=1)
        return {"accuracy": float((predicted == labels).double().mean())}

    def buffer_rule(self, name: str) -> BufferRule:
        """Running means are averaged over lanes; the counter of batches goes up by one in every lane."""
        return "same" if name.endswith("num_batches_tracked") else "mean"
