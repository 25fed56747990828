"""Pipeline schedules: their bubble and memory in closed form, and their replay, operation by operation.

1F1B (Narayanan et al. 2019), GPipe (Huang et al. 2019), interleaved 1F1B (Narayanan et al. 2021: several chunks of
layers per stage) and ZB-H1 (Qi et al. 2024: the backward in two halves, of which the one for the weights fills the
bubble). GPipe takes as long as 1F1B and keeps more, so that the search need not look at it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from elastictrain.errors import InternalError
from elastictrain.planner.model import Cut, Schedule

Step = Literal["forward", "backward", "weight"]
_BUBBLE: dict[Schedule, float] = {"1f1b": 1.0, "gpipe": 1.0, "zb-h1": 1 / 3}
"""Share of 1F1B's bubble that a schedule leaves, when a backward's two halves take as long as a forward each."""


def bubble_share(cut: Cut) -> float:
    """B in `b * sum t + (m - b) * max t`, the seconds of m micro-batches through stages of t seconds each."""
    return _BUBBLE[cut.schedule] / cut.chunks


def in_flight(cut: Cut, stage: int) -> float:
    """Micro-batches whose activations a stage keeps at most; a part of one where only some of its chunks are kept."""
    stages, count, chunks = cut.pipeline, cut.micro_batches, cut.chunks
    if cut.schedule == "gpipe":
        return count
    if cut.schedule == "zb-h1":  # later stages put the other half off for longer
        return min(stages, count)
    if chunks == 1:
        return min(stages - stage, count)
    return min((2 * (stages - stage - 1) + (chunks - 1) * stages + 1) / chunks, count)


@dataclass(frozen=True, slots=True)
class Operation:
    """A forward, a backward or (ZB-H1) a backward's half for the weights, from `begin_s` to `end_s`."""

    stage: int
    kind: Step
    micro_batch: int
    begin_s: float
    end_s: float
    chunk: int = 0


_Order = list[tuple[Step, int, int]]
"""What a stage does, in order: kind, micro-batch, chunk."""


def order_of(schedule: Schedule, stage: int, stages: int, micro_batches: int, chunks: int = 1) -> _Order:
    """What a stage does, in order. Interleaving wants micro-batches in multiples of the number of stages."""
    if schedule == "gpipe":
        return [("forward", m, 0) for m in range(micro_batches)] + [("backward", m, 0) for m in range(micro_batches)]
    if schedule == "zb-h1":
        return _order_zb_h1(stage, stages, micro_batches)
    count = micro_batches * chunks
    ahead = (
        min(stages - stage - 1, count) if chunks == 1 else min(2 * (stages - stage - 1) + (chunks - 1) * stages, count)
    )
    order: _Order = [("forward", *_turn(k, stages, chunks)) for k in range(ahead)]
    for k in range(count):
        if k + ahead < count:
            order.append(("forward", *_turn(k + ahead, stages, chunks)))
        micro_batch, chunk = _turn(k, stages, chunks)
        order.append(("backward", micro_batch, chunks - 1 - chunk))
    return order


def _turn(k: int, stages: int, chunks: int) -> tuple[int, int]:
    """Micro-batch and chunk of the k-th forward: each chunk does as many micro-batches in a row as there are stages."""
    if chunks == 1:
        return k, 0
    turn, place = divmod(k, stages * chunks)
    return turn * stages + place % stages, place // stages


def _order_zb_h1(stage: int, stages: int, micro_batches: int) -> _Order:
    """1F1B, with the half for the weights `stage` micro-batches behind the other one: as much in flight everywhere."""
    order: _Order = []
    for kind, m, _ in order_of("1f1b", stage, stages, micro_batches):
        order.append((kind, m, 0))
        if kind == "backward" and m >= stage:
            order.append(("weight", m - stage, 0))
    return order + [("weight", m, 0) for m in range(max(micro_batches - stage, 0), micro_batches)]


def replay(
    forward_s: Sequence[float],
    backward_s: Sequence[float],
    micro_batches: int,
    *,
    send_s: Sequence[float] = (),
    wrap_s: float = 0.0,
    schedule: Schedule = "1f1b",
    chunks: int = 1,
) -> tuple[Operation, ...]:
    """Every operation with its times. `forward_s`, `backward_s`: of a stage for one micro-batch, all its chunks and
    both halves. `send_s[j]`: what lies between stages j and j + 1, either way; `wrap_s`: between the last and the
    first, where there are chunks.

    An operation begins when its stage is free and its input is there. Raises ValueError when interleaving is asked for
    a number of micro-batches that is no multiple of the stages.
    """
    stages = len(forward_s)
    if chunks > 1 and micro_batches % stages:
        raise ValueError(f"{micro_batches} micro-batches: interleaving over {stages} stages wants a multiple of those")
    way = _Way(stages, chunks, [*(list(send_s) or [0.0] * (stages - 1)), wrap_s])
    part = 2 if schedule == "zb-h1" else 1
    seconds: dict[Step, list[float]] = {
        "forward": [s / chunks for s in forward_s],
        "backward": [s / part / chunks for s in backward_s],
        "weight": [s / part / chunks for s in backward_s],
    }
    orders = [order_of(schedule, j, stages, micro_batches, chunks) for j in range(stages)]
    ended: dict[tuple[int, Step, int, int], float] = {}
    done: list[Operation] = []
    free, at = [0.0] * stages, [0] * stages
    while any(at[j] < len(orders[j]) for j in range(stages)):
        moved = False
        for j in range(stages):
            while at[j] < len(orders[j]):
                kind, m, chunk = orders[j][at[j]]
                ready = way.ready(ended, j, kind, m, chunk)
                if ready is None:
                    break
                begin = max(free[j], ready)
                end = begin + seconds[kind][j]
                ended[j, kind, m, chunk] = free[j] = end
                done.append(Operation(j, kind, m, begin, end, chunk))
                at[j] += 1
                moved = True
        if not moved:
            raise InternalError(f"the schedule of {stages} stages and {micro_batches} micro-batches waits for itself")
    return tuple(done)


@dataclass(frozen=True, slots=True)
class Send:
    """Of a micro-batch, from one stage to another: activations after a forward, their gradients after a backward."""

    kind: Step
    micro_batch: int
    sender: int
    receiver: int
    begin_s: float
    end_s: float


def sends(
    operations: Sequence[Operation], *, send_s: Sequence[float], wrap_s: float = 0.0, chunks: int = 1
) -> tuple[Send, ...]:
    """What lies between the operations of a replay; the arguments as there."""
    last, way = len(send_s), [*send_s, wrap_s]
    found = []
    for op in operations:
        if op.kind == "weight":
            continue
        forward = op.kind == "forward"
        wraps = op.stage == (last if forward else 0)
        if wraps and (op.chunk == chunks - 1 if forward else op.chunk == 0):
            continue  # the loss, and the data
        to = (op.stage + 1) % (last + 1) if forward else (op.stage - 1) % (last + 1)
        took_s = way[op.stage if forward else to]
        found.append(Send(op.kind, op.micro_batch, op.stage, to, op.end_s, op.end_s + took_s))
    return tuple(found)


@dataclass(frozen=True, slots=True)
class _Way:
    """What lies between operations. `send_s[j]`: after stage j; the last entry leads back to the first stage."""

    stages: int
    chunks: int
    send_s: Sequence[float]

    def ready(
        self, ended: dict[tuple[int, Step, int, int], float], stage: int, kind: Step, m: int, chunk: int
    ) -> float | None:
        """When the input of an operation is there; None: not yet known."""
        last = self.stages - 1
        if kind == "weight":
            return ended.get((stage, "backward", m, chunk))
        if kind == "forward":
            if stage == chunk == 0:
                return 0.0
            before = (stage - 1, chunk) if stage else (last, chunk - 1)
            then = ended.get((before[0], "forward", m, before[1]))
            return None if then is None else then + self.send_s[before[0]]
        if stage == last and chunk == self.chunks - 1:
            return ended.get((stage, "forward", m, chunk))
        after = (stage + 1, chunk) if stage < last else (0, chunk + 1)
        then = ended.get((after[0], "backward", m, after[1]))
        return None if then is None else then + self.send_s[stage]


def replayed_s(
    forward_s: Sequence[float], backward_s: Sequence[float], cut: Cut, *, send_s: Sequence[float], wrap_s: float = 0.0
) -> float:
    """Seconds of all micro-batches when the schedule is replayed.

    Of many micro-batches the first ones are replayed; then a pipeline repeats itself, and the rest is taken from how
    much more time the last of these took.
    """
    stages = cut.pipeline

    def taken(count: int) -> float:
        operations = replay(forward_s, backward_s, count, send_s=send_s, wrap_s=wrap_s, schedule=cut.schedule,
                            chunks=cut.chunks)  # fmt: skip
        return max(op.end_s for op in operations)

    few, more = 8 * stages, 16 * stages
    if cut.micro_batches <= more:
        return taken(cut.micro_batches)
    first, second = taken(few), taken(more)
    return second + (cut.micro_batches - more) * (second - first) / (more - few)
