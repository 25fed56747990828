"""What a worker does in one step whose lanes it may not compute alone, or not all."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Protocol

from elastictrain.engine.one_lane import LaneResult


class Work(Protocol):
    """What computes: `StepRunner` for one step. `count`: the lane counts, and is ours. `forget`: the one that was
    computed last does not, whoever has it.
    """

    def compute(self, lane: int, *, first: bool, merge: bool) -> LaneResult: ...
    def count(self, lane: int, result: LaneResult) -> None: ...
    def forget(self) -> None: ...


@dataclass(slots=True)
class Doing:
    """One step of this worker. `closed`: lanes that are not shared in it; `stays`: it must not break off; `measures`:
    nor in its first lane. `tried`: lanes of others that are not to be claimed any more. `begun`: the lanes that it has
    begun to compute; `mine`: those whose result counts and is ours. `computed`: how many have been computed to the end,
    in `lanes_s` seconds; `in_vain`: how many of those that were begun do not count. `dropped`: its own lanes that count
    for nobody.
    """

    step: int
    work: Work
    closed: frozenset[int]
    stays: bool
    measures: bool = False
    begun_at: float = field(default_factory=time.perf_counter)
    begun: set[int] = field(default_factory=set)
    tried: set[int] = field(init=False)
    mine: list[int] = field(default_factory=list)
    computed: int = 0
    in_vain: int = 0
    dropped: list[int] = field(default_factory=list)
    lanes_s: float = 0.0

    def __post_init__(self) -> None:
        self.tried = set(self.closed)

    @property
    def now_s(self) -> float:
        return time.perf_counter() - self.begun_at

    @property
    def lane_s(self) -> float:
        """Mean seconds of a lane; 0 when none was computed."""
        return self.lanes_s / self.computed if self.computed else 0.0
