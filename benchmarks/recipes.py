"""The GPT of examples/gpt with time stamps: the model that the benchmarks train."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

import stamps

sys.path.append(str(Path(__file__).resolve().parent.parent / "examples" / "gpt"))
from recipe import GPTRecipe, next_token_loss

TINY = {"vocabulary_size": 320, "sequence_length": 16, "layers": 1, "heads": 1, "width": 64}


class MeasuredGPT(GPTRecipe):
    """`stamp`: folder for time stamps. `memory`: watch memory too, counted from here (imports done, no model yet).
    `moves`: what moves when a generation forms, too.
    """

    def __init__(self, *, stamp: str | None = None, memory: bool = False, moves: bool = False, **settings: Any) -> None:
        super().__init__(**settings)
        if stamp is not None:
            stamps.install(stamp, memory_base=memory_base() if memory else None)
        if stamp is not None and moves:
            stamps.install_moves(stamp)


def memory_base() -> int:
    """RSS after imports and one small step: pages of libraries that any training touches are no state of ours."""
    rehearse({})
    stamps.forget_peak()
    return stamps.memory_bytes("VmRSS")


def rehearse(settings: Mapping[str, Any]) -> None:
    """One small forward, backward and optimizer step."""
    recipe = GPTRecipe(model={**TINY, **settings})
    model = recipe.model()
    optimizer = recipe.optimizer(list(model.named_parameters()))
    next_token_loss(model, torch.zeros(2, 17, dtype=torch.int64)).backward()
    optimizer.step()
