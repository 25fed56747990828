"""What all systems train alike: model, batches, checkpoints, the kill that is due, and time stamps.

A peer's worker reads the order (a JSON file named in FAULTS_ORDER) and drives a `Trainee`; where it runs, how it comes
back and from what state is the peer's business.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import common  # noqa: F401 - sets the path up
import stamps

ORDER = "FAULTS_ORDER"


@dataclass(frozen=True)
class Order:
    """One run. `kills`: (rank, step), in order; each happens once, in the middle of that step's computation.
    `sequences`: per rank and step.
    """

    folder: str
    world: int
    steps: int
    sequences: int
    checkpoint_every: int
    model: dict[str, Any]
    kills: tuple[tuple[int, int], ...] = ()

    def write(self) -> Path:
        path = Path(self.folder) / "order.json"
        path.write_text(json.dumps(asdict(self)), encoding="utf-8")
        return path

    @classmethod
    def given(cls) -> Self:
        found = json.loads(Path(os.environ[ORDER]).read_text(encoding="utf-8"))
        return cls(**found | {"kills": tuple((rank, step) for rank, step in found["kills"])})

    def markers(self) -> list[Path]:
        return [Path(self.folder) / f"killed-{number}" for number in range(len(self.kills))]


class Trainee:
    """Model and optimizer of one process, at step 0."""

    def __init__(self, order: Order) -> None:
        import torch

        from recipes import GPTRecipe

        torch.set_num_threads(1)
        torch.manual_seed(0)
        self.order, self._torch = order, torch
        self.stamp = stamps.Stamps(order.folder)
        self._recipe = GPTRecipe(model=order.model, total_steps=order.steps)
        self.model = self._recipe.model()
        self.optimizer = self._recipe.optimizer(list(self.model.named_parameters()))
        self.checkpoint = Path(order.folder) / "checkpoint.pt"

    def begin(self, step: int, rank: int) -> None:
        """`attempt`: how many kills there have been, so that the same step, begun again, is told apart."""
        attempt = sum(marker.exists() for marker in self.order.markers())
        self.stamp("start", step=step, rank=rank, attempt=attempt)
        for group in self.optimizer.param_groups:
            group["lr"] = self._recipe.learning_rate * self._recipe.schedule(step)

    def loss(self, step: int, rank: int, model: Any) -> Any:
        """Forward; the kill that is due for this rank comes between it and the backward."""
        from recipes import next_token_loss

        generator = self._torch.Generator().manual_seed(step * 1000 + rank)
        width = self._recipe.config.sequence_length + 1
        batch = self._torch.randint(0, 257, (self.order.sequences, width), generator=generator)
        loss = next_token_loss(model, batch)
        for (due_rank, due_step), marker in zip(self.order.kills, self.order.markers(), strict=True):
            if (due_rank, due_step) == (rank, step) and not marker.exists():
                marker.touch()
                self.stamp("kill", step=step, rank=rank)
                os.kill(os.getpid(), signal.SIGKILL)
        return loss

    def step(self, step: int, rank: int, wrapped: Any) -> None:
        """One ordinary step of a model whose wrapper averages the gradients."""
        self.begin(step, rank)
        self.loss(step, rank, wrapped).backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.end(step, rank)

    def end(self, step: int, rank: int, *, took_part: bool = True) -> None:
        """The step is committed. `took_part`: this rank's samples are in it."""
        self.stamp("end", step=step, rank=rank, took_part=took_part)

    def state(self) -> dict[str, Any]:
        return {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}

    def load(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])

    def save(self, step: int, path: Path) -> None:
        """Whole or not at all, as a careful user writes it."""
        part = path.with_suffix(".part")
        self._torch.save(self.state() | {"step": step}, part)
        part.rename(path)

    def resume(self, path: Path) -> int:
        """The step of the checkpoint; 0 without one."""
        if not path.exists():
            return 0
        found = self._torch.load(path, weights_only=True)
        self.load(found)
        return int(found["step"])

    def finish(self, rank: int) -> None:
        """Leave the weights' digest behind."""
        whole = hashlib.sha256()
        for _, tensor in sorted(self.model.state_dict().items()):
            whole.update(tensor.detach().contiguous().numpy().tobytes())
        (Path(self.order.folder) / f"digest-{rank}").write_text(whole.hexdigest(), encoding="ascii")
