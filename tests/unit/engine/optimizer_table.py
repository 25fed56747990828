"""torch's optimizers, and some of users, that must work on blocks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.optim import ASGD, SGD, Adadelta, Adagrad, Adam, Adamax, AdamW, NAdam, Optimizer, RAdam, RMSprop, Rprop

MakeOptimizer = Callable[[Sequence[Any]], Optimizer]


class Lion(Optimizer):
    """Sign of an interpolated momentum; keeps a step number outside tensors, and a setting on itself."""

    def __init__(self, params: Any, lr: float) -> None:
        super().__init__(params, {"lr": lr})
        self.betas = [0.9, 0.99]

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state.update(moment=torch.zeros_like(p), count=0, rate=0.1, past=[0.25])
                state["count"] += 1
                state["rate"] = state["rate"] / 3
                state["past"] = [*state["past"][-1:], state["rate"]]
                update = state["moment"] * self.betas[0] + p.grad * (1 - self.betas[0])
                p.sub_(update.sign() * group["lr"] / (1 + 0.1 * state["count"]))
                state["moment"].mul_(self.betas[1]).add_(p.grad, alpha=1 - self.betas[1])


def with_groups(cls: Any, **settings: Any) -> MakeOptimizer:
    """Three groups chosen by shape and name, one of them with another learning rate and setting."""

    def make(params: Sequence[tuple[str, torch.nn.Parameter]]) -> Optimizer:
        flat = [(n, p) for n, p in params if p.dim() < 2]
        tied = [(n, p) for n, p in params if p.dim() >= 2 and n.startswith("mid")]
        rest = [(n, p) for n, p in params if p.dim() >= 2 and not n.startswith("mid")]
        groups: list[dict[str, Any]] = [{"params": flat, "lr": 3e-3}, {"params": tied}, {"params": rest}]
        if "weight_decay" in settings:
            groups[0]["weight_decay"] = 0.0
        made: Optimizer = cls([g for g in groups if g["params"]], **settings)
        return made

    return make


ELEMENT_WISE: dict[str, MakeOptimizer] = {
    "sgd": with_groups(SGD, lr=0.1),
    "sgd-momentum": with_groups(SGD, lr=0.1, momentum=0.9, weight_decay=0.01, dampening=0.1),
    "sgd-nesterov": with_groups(SGD, lr=0.1, momentum=0.9, nesterov=True),
    "sgd-foreach": with_groups(SGD, lr=0.1, momentum=0.9, foreach=True),
    "sgd-fused": with_groups(SGD, lr=0.1, momentum=0.9, fused=True),
    "adam": with_groups(Adam, lr=0.01, foreach=False),
    "adam-amsgrad": with_groups(Adam, lr=0.01, amsgrad=True),
    "adam-foreach": with_groups(Adam, lr=0.01, foreach=True),
    "adamw": with_groups(AdamW, lr=0.01, weight_decay=0.1),
    "adamw-foreach": with_groups(AdamW, lr=0.01, weight_decay=0.1, foreach=True),
    "adamw-fused": with_groups(AdamW, lr=0.01, weight_decay=0.1, fused=True),
    "nadam": with_groups(NAdam, lr=0.01),
    "radam": with_groups(RAdam, lr=0.01),
    "adagrad": with_groups(Adagrad, lr=0.01, initial_accumulator_value=0.1),
    "adagrad-fused": with_groups(Adagrad, lr=0.01, fused=True),
    "rmsprop": with_groups(RMSprop, lr=0.01, centered=True, momentum=0.5),
    "adamax": with_groups(Adamax, lr=0.01),
    "adadelta": with_groups(Adadelta, lr=0.5),
    "rprop": with_groups(Rprop, lr=0.01),
    "asgd": with_groups(ASGD, lr=0.01, t0=1.0),
    "lion": with_groups(Lion, lr=0.01),
}
