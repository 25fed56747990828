"""A byte-level GPT on the source text of Python's standard library."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch
from model import GPT, GPTConfig
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - torch's own custom

from elastictrain.recipe import Recipe, warmup_cosine

VALIDATION = Path(__file__).parent / "data" / "validation.parquet"
END_OF_DOCUMENT = 256


class GPTRecipe(Recipe):
    """AdamW with weight decay on matrices only, linear warm-up and half a cosine; validation loss on held-out text.

    `model` takes the fields of `GPTConfig`.
    """

    def __init__(
        self,
        *,
        model: Mapping[str, Any] | None = None,
        learning_rate: float = 1e-3,
        weight_decay: float = 0.1,
        warmup_steps: int = 20,
        total_steps: int = 200,
        validation_sequences: int = 32,
    ) -> None:
        self.config = GPTConfig(**(model or {}))
        self.learning_rate, self.weight_decay = learning_rate, weight_decay
        self.warmup_steps, self.total_steps = warmup_steps, total_steps
        self.validation_sequences = validation_sequences
        self._validation: Tensor | None = None

    def model(self) -> nn.Module:
        return GPT(self.config)

    def optimizer(self, params: Sequence[tuple[str, nn.Parameter]]) -> torch.optim.Optimizer:
        groups = [
            {"params": [(n, p) for n, p in params if p.dim() >= 2], "weight_decay": self.weight_decay},
            {"params": [(n, p) for n, p in params if p.dim() < 2], "weight_decay": 0.0},
        ]
        return torch.optim.AdamW(groups, lr=self.learning_rate, betas=(0.9, 0.95), fused=True)

    def schedule(self, step: int) -> float:
        return warmup_cosine(step, warmup_steps=self.warmup_steps, total_steps=self.total_steps)

    def loss(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        return next_token_loss(model, batch["tokens"])

    def evaluate(self, model: nn.Module) -> Mapping[str, float]:
        """Mean loss in nats per byte on the first sequences of the held-out files."""
        tokens = self._validation_tokens()
        device = next(model.parameters()).device
        losses = [next_token_loss(model, part.to(device)).double() * len(part) for part in tokens.split(8)]
        return {"validation_loss": float(torch.stack(losses).sum()) / len(tokens)}

    def _validation_tokens(self) -> Tensor:
        if self._validation is None:
            width = self.config.sequence_length + 1
            flat: list[int] = []
            for text in pq.read_table(VALIDATION, columns=["text"]).column("text").to_pylist():
                flat += [*text.encode(), END_OF_DOCUMENT]
                if len(flat) >= width * self.validation_sequences:
                    break
            rows = min(len(flat) // width, self.validation_sequences)
            self._validation = torch.from_numpy(np.asarray(flat[: rows * width]).reshape(rows, width))
        return self._validation


def next_token_loss(model: nn.Module, tokens: Tensor) -> Tensor:
    """Mean cross-entropy of every token after the first; `tokens` is [batch, sequence_length + 1]."""
    logits = model(tokens[:, :-1])
    return F.cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten())
