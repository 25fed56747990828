"""Replay of a pipeline's schedule, operation by operation: what the closed forms of cost.py only estimate."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from elastictrain.errors import InternalError


@dataclass(frozen=True, slots=True)
class Operation:
    """One forward or backward of a micro-batch on a stage, from `begin_s` to `end_s`."""

    stage: int
    kind: Literal["forward", "backward"]
    micro_batch: int
    begin_s: float
    end_s: float


def order_1f1b(stage: int, stages: int, micro_batches: int) -> list[tuple[Literal["forward", "backward"], int]]:
    """What a stage does, in order: as many forwards as stages follow, then one backward for one forward."""
    ahead = min(stages - stage - 1, micro_batches)
    order: list[tuple[Literal["forward", "backward"], int]] = [("forward", m) for m in range(ahead)]
    for m in range(micro_batches):
        if m + ahead < micro_batches:
            order.append(("forward", m + ahead))
        order.append(("backward", m))
    return order


def order_gpipe(micro_batches: int) -> list[tuple[Literal["forward", "backward"], int]]:
    """All forwards, then all backwards."""
    return [("forward", m) for m in range(micro_batches)] + [("backward", m) for m in range(micro_batches)]


def replay(
    forward_s: Sequence[float],
    backward_s: Sequence[float],
    micro_batches: int,
    *,
    send_s: Sequence[float] = (),
    gpipe: bool = False,
) -> tuple[Operation, ...]:
    """Every operation with its times. `send_s[j]`: what lies between stages j and j + 1, either way.

    An operation begins when its stage is free and its input is there.
    """
    stages = len(forward_s)
    between = list(send_s) or [0.0] * (stages - 1)
    orders = [order_gpipe(micro_batches) if gpipe else order_1f1b(j, stages, micro_batches) for j in range(stages)]
    ended: dict[tuple[int, str, int], float] = {}
    done: list[Operation] = []
    free, at = [0.0] * stages, [0] * stages
    while any(at[j] < len(orders[j]) for j in range(stages)):
        moved = False
        for j in range(stages):
            while at[j] < len(orders[j]):
                kind, m = orders[j][at[j]]
                ready = _ready(ended, between, j, kind, m, stages)
                if ready is None:
                    break
                begin = max(free[j], ready)
                end = begin + (forward_s[j] if kind == "forward" else backward_s[j])
                ended[j, kind, m] = free[j] = end
                done.append(Operation(j, kind, m, begin, end))
                at[j] += 1
                moved = True
        if not moved:
            raise InternalError(f"the schedule of {stages} stages and {micro_batches} micro-batches waits for itself")
    return tuple(done)


def _ready(
    ended: dict[tuple[int, str, int], float],
    between: Sequence[float],
    stage: int,
    kind: str,
    micro_batch: int,
    stages: int,
) -> float | None:
    """When the input of an operation is there; None: not yet known."""
    if kind == "forward":
        if stage == 0:
            return 0.0
        before = ended.get((stage - 1, "forward", micro_batch))
        return None if before is None else before + between[stage - 1]
    if stage == stages - 1:
        return ended.get((stage, "forward", micro_batch))
    after = ended.get((stage + 1, "backward", micro_batch))
    return None if after is None else after + between[stage]
