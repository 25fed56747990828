"""A small regression recipe that can be made to go wrong: by its arguments, or by marked rows of the data.

A row is {a, b, y, mark}: mark 1 makes the loss of its lane NaN, mark 2 makes the recipe raise. Marks lie in the data,
so that a trouble happens at one step and in one lane whatever the layout.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import nn

from elastictrain.recipe import Recipe

NAN, RAISE = 1, 2
ROWS = 96
LANES, LANE_BATCH_SIZE = 4, 2


def write_rows(file: Path, marks: dict[int, int] | None = None, rows: int = ROWS) -> Path:
    """JSON lines; `marks`: row number → mark."""
    file.parent.mkdir(parents=True, exist_ok=True)
    lines = [
        {"a": i % 7 / 7, "b": i % 5 / 5, "y": (i % 7 + i % 5) / 12, "mark": (marks or {}).get(i, 0)}
        for i in range(rows)
    ]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return file


class Line(Recipe):
    def __init__(self, width: int = 8, optimizer: str = "sgd", bad_model: bool = False, bad_loss: bool = False) -> None:
        self.width, self.kind = width, optimizer
        self.bad_model, self.bad_loss = bad_model, bad_loss

    def model(self) -> nn.Module:
        if self.bad_model:
            raise ValueError("no weights file at /nowhere")
        return nn.Sequential(nn.Linear(2, self.width), nn.Tanh(), nn.Dropout(0.1), nn.Linear(self.width, 1))

    def optimizer(self, params):
        if self.kind == "two":
            return [torch.optim.SGD(params[:1], lr=0.1), torch.optim.SGD(params[1:], lr=0.1)]
        if self.kind == "matrices":
            return torch.optim.Adafactor(params, lr=0.01)
        if self.kind == "adam":
            return torch.optim.Adam(params, lr=0.01)
        return torch.optim.SGD(params, lr=0.1, momentum=0.9)

    def loss(self, model, batch):
        if self.bad_loss:
            raise ValueError("never works")
        if bool((batch["mark"] == RAISE).any()):
            raise ValueError("a spoilt sample")
        x = torch.stack([batch["a"], batch["b"]], -1).float()
        loss = ((model(x).squeeze(-1) - batch["y"].float()) ** 2).mean()
        return loss * float("nan") if bool((batch["mark"] == NAN).any()) else loss
