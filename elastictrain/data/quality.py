"""How well an order mixes. Pure.

The measure: of how many different blocks the samples of a step come, as a fraction of what it would be if all samples
were shuffled with each other. Data are often alike within a block (one document source, one class, one hour), so this
says how much of a full shuffle's variety a step has. 1 is a full shuffle; `lanes * window_blocks` blocks at most are
open at a time, which is what bounds it: raise `data.window_row_groups`, or have smaller row groups, for more.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from elastictrain.data.order import LaneOrder, StrictOrder

GOOD = 0.5
"""From here on a step sees half as many blocks as in a full shuffle, or more: said to be good (a choice)."""


@dataclass(frozen=True)
class Mixing:
    """`blocks_per_step`: the mean over the steps that were looked at; `full_shuffle`: what to expect of one."""

    blocks_per_step: float
    full_shuffle: float

    @property
    def quality(self) -> float:
        """Blocks per step as a fraction of a full shuffle's."""
        return self.blocks_per_step / self.full_shuffle

    @property
    def words(self) -> str:
        """A sentence with what is good, and what helps where it is not."""
        judged = (
            "good" if self.quality >= GOOD else
            "little: raise data.window_row_groups, have more lanes or smaller row groups, or shuffle the rows before"
        )  # fmt: skip
        return (
            f"{self.quality:.2f} of a full shuffle: a step's samples come from {self.blocks_per_step:.0f} blocks, of a "
            f"full shuffle from {self.full_shuffle:.0f} (1 is best, {GOOD} or more is good). It is {judged}"
        )


def mixing(order: LaneOrder | StrictOrder, *, steps: int = 8) -> Mixing:
    """Measure an order at `steps` steps, evenly spread over its first epoch."""
    chosen = np.unique(np.linspace(0, order.steps_per_epoch - 1, steps).astype(np.int64))
    seen = [
        len(np.unique(np.concatenate([order.samples_of(int(step), lane)[0] for lane in range(order.lanes)])))
        for step in chosen
    ]
    return Mixing(float(np.mean(seen)), expected_blocks(order.block_rows, order.lanes * order.lane_batch_size))


def expected_blocks(block_rows: np.typing.NDArray[np.int64], batch: int) -> float:
    """Return of how many blocks `batch` samples come that are drawn from all of them with equal chances."""
    shares = block_rows / max(1, int(block_rows.sum()))
    return float(np.sum(-np.expm1(batch * np.log1p(-np.minimum(shares, 1 - 1e-15)))))
