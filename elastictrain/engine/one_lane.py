"""One lane: its samples, its seed, forward and backward. A pure function of the committed state, step and lane."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch

from elastictrain.data.meter import CALL
from elastictrain.data.seeds import lane_seed
from elastictrain.engine.flat import FlatModel
from elastictrain.engine.integrity import LaneSum
from elastictrain.engine.lanes import LaneTree
from elastictrain.engine.signals import Timer
from elastictrain.errors import RecipeError
from elastictrain.job import Job
from elastictrain.signs import Activity

DRAG_S = 0.005
"""How often an injected slowness looks whether anybody wants this worker to stop."""


def lost_to_data(waited: Mapping[str, float], asking_s: float) -> dict[str, float]:
    """What a lane lost to its data by cause, from what its batch was waited for and all the seconds in which it was
    asked for. Pure. A batch that lies ready costs a call, too: that is `CALL`.
    """
    rest_s = asking_s - sum(waited.values())
    return {**waited, CALL: rest_s} if rest_s > 0 else dict(waited)


class Batches(Protocol):
    """Where a lane's samples come from: a pure function of step and lane."""

    def batch(self, step: int, lane: int) -> Mapping[str, torch.Tensor]: ...


def seed_everything(seed: int) -> None:
    """Torch's, Python's and NumPy's global generators: a recipe may use any of them."""
    if torch.accelerator.is_available():
        torch.manual_seed(seed)
    else:  # there `manual_seed` formats a stack trace at every call, for when a device will come
        torch.default_generator.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed & 0xFFFFFFFF)


@dataclass(frozen=True, slots=True)
class LaneResult:
    """`total`, `weight`: the loss sum and its weight. `tokens`: that the lane has learned from. `samples_hash`: of the
    ids of its samples (`data.ids`), 0 where the batches have none. `waited`: seconds that it lost to them, by
    stage of feeding (`data.meter`). `squares`: Σ of the squared lengths of its sequences.
    """

    total: float
    weight: float
    tokens: int
    samples_hash: int
    waited: Mapping[str, float]
    squares: float = 0.0


class OneLane:
    """Runs lanes; `check` raises when the session has parked, `enter` says what this worker is doing, `spoils(step)`
    whether the next lane is to come out wrong, `drags(step, what, took_s)` how many seconds more its "compute", its
    "data" or its "link" are to take (injected faults).
    """

    def __init__(
        self,
        job: Job,
        recipe: Any,
        flat: FlatModel,
        tree: LaneTree,
        batches: Batches,
        check: Callable[[], None],
        enter: Callable[[Activity], None],
        spoils: Callable[[int], bool],
        drags: Callable[[int, str, float], float] = lambda *_: 0.0,
    ) -> None:
        self._job, self._recipe, self._flat, self._tree, self._batches = job, recipe, flat, tree, batches
        self._check, self._enter, self._spoils, self._drags = check, enter, spoils, drags

    def run(
        self, step: int, lane: int, *, first: bool, merge: bool, shown: LaneSum | None = None, keep: bool = True
    ) -> LaneResult:
        """Forward and backward of one lane; its gradient ends in the lane tree. `shown`: takes up the gradient as it
        arrives; without `keep` that is all that stays of it.
        """
        self._check()
        self._enter(Activity.DATA)
        begun = time.perf_counter()
        batch = self._batches.batch(step, lane)
        waited = lost_to_data(getattr(batch, "waited", {}), time.perf_counter() - begun)
        dragged_s = self._drag(step, "data", time.perf_counter() - begun)
        self._enter(Activity.COMPUTE)
        begun = time.perf_counter()
        self._flat.before_lane()
        seed_everything(lane_seed(self._job.seed, step, lane))
        show = None if shown is None else shown.add
        self._tree.begin(lane, merge=merge, keep=keep, show=show, spoil=self._spoils(step))
        total, weight = 0.0, 0.0
        for micro in range(self._job.micro_batches):
            self._tree.begin_micro_batch(micro)
            loss, part = self._loss(cut_batch(batch, micro, self._job.micro_batches))
            loss.backward()  # type: ignore[no-untyped-call]
            self._tree.end_micro_batch()
            total, weight = total + float(loss.detach()), weight + part
        self._tree.end(self._flat.after_lane(first))
        self._drag(step, "compute", time.perf_counter() - begun)
        tokens = batch.get("tokens")
        rows, length = (tokens.shape[0], tokens.shape[1] - 1) if tokens is not None and tokens.dim() == 2 else (0, 0)
        if dragged_s:
            waited["dragged"] = dragged_s
        samples_hash = getattr(batch, "samples_hash", 0)
        return LaneResult(total, weight, rows * length, samples_hash, waited, float(rows * length * length))

    def link(self, step: int, seconds: dict[str, float]) -> None:
        """What has come in the exchange comes later, where a fault asks for it: in `seconds` it is a part of
        "exchange_s", and "dragged_s" says how much of that is emulated.
        """
        with Timer(seconds, "exchange_s"):
            dragged_s = self._drag(step, "link", seconds.get("exchange_s", 0.0))
        if dragged_s:
            seconds["dragged_s"] = dragged_s

    def _drag(self, step: int, what: str, took_s: float) -> float:
        """Wait, where a fault asks for it: emulates a slower device, slower data or a slower link for what has taken
        `took_s`. Returns the seconds waited.
        """
        wait_s = self._drags(step, what, took_s)
        until = time.perf_counter() + wait_s
        while (left_s := until - time.perf_counter()) > 0:  # as a slow device, it can be told to stop
            time.sleep(min(left_s, DRAG_S))
            self._tree.interrupted()
        return wait_s

    def sum(self, step: int, lane: int) -> int:
        """Compute a lane only for the sum of its gradient: nothing of it stays."""
        shown = LaneSum()
        with self._flat.counters_kept():
            result = self.run(step, lane, first=True, merge=False, shown=shown, keep=False)
        return shown.total(result.total, result.weight)

    def _loss(self, batch: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, float]:
        """The loss sum of a lane, and its weight: (mean, 1) when the recipe returns a mean."""
        result = self._recipe.loss(self._flat.model, batch)
        summed = isinstance(result, tuple) and len(result) == 2
        loss, weight = result if summed else (result, 1.0 / self._job.micro_batches)
        if not isinstance(loss, torch.Tensor) or loss.numel() != 1:
            raise RecipeError(
                "recipe.loss must return a scalar tensor (a mean) or a pair (sum, weight), "
                f"got {type(loss).__name__}{tuple(loss.shape) if isinstance(loss, torch.Tensor) else ''}"
            )
        if not summed and self._job.micro_batches > 1:
            loss = loss / self._job.micro_batches
        return loss.reshape(()), float(weight)


def cut_batch(batch: Mapping[str, torch.Tensor], index: int, parts: int) -> Mapping[str, torch.Tensor]:
    """Micro-batch `index` of `parts`: the samples (first dimension) in equal runs."""
    if parts == 1:
        return batch
    return {name: tensor.chunk(parts)[index] for name, tensor in batch.items()}
