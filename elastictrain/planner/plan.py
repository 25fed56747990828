"""What the planner is asked, and what it answers."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from elastictrain.planner.lanes import LanePlan
from elastictrain.planner.memory import MEMORY
from elastictrain.planner.model import Cut, Transformer
from elastictrain.planner.profiles import Dtype

SURE = 0.99
"""A plan must fit with this probability."""
SPREAD_BYTES = MEMORY.spread_bytes * math.log(SURE / (1 - SURE))
"""So many bytes must stay free for that."""
Family = Literal["lanes", "grid", "mixed"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """What of a job the planner looks at. `lanes` of `lane_batch` sequences are a step, whatever the plan."""

    model: Transformer
    lanes: int
    lane_batch: int = 1
    dtype: Dtype = "bf16"
    mirrors: bool = True


@dataclass(frozen=True, slots=True)
class StageWork:
    """Seconds of each stage for one micro-batch; `send_s[j]` lies between stages j and j + 1, either way, and `wrap_s`
    between the last and the first, where there are chunks.
    """

    forward_s: tuple[float, ...]
    backward_s: tuple[float, ...]
    send_s: tuple[float, ...]
    wrap_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Plan:
    """`groups`: which of the cluster's groups it uses. `layers`, `stage_groups`: per stage; `again`: how many of its
    layers are computed again in the backward. `fits`: the probability. `replayed_s`: of a pipeline, the step when its
    schedule is replayed operation by operation, of what its stages do (`work`).
    """

    family: Family
    step_s: float
    bound_s: float
    groups: tuple[int, ...]
    devices: int
    fits: float
    limit: str
    cut: Cut | None = None
    layers: tuple[int, ...] = ()
    stage_groups: tuple[int, ...] = ()
    stage_s: tuple[float, ...] = ()
    again: tuple[int, ...] = ()
    replayed_s: float | None = None
    work: StageWork | None = None
    lane_plan: LanePlan | None = None
    ways: tuple[str, ...] = ()

    @property
    def seconds(self) -> float:
        """Of a step: replayed where the schedule was, else counted in closed form."""
        return self.step_s if self.replayed_s is None else self.replayed_s

    @property
    def usable_now(self) -> bool:
        return self.family == "lanes"


@dataclass(frozen=True, slots=True)
class Found:
    """`plans`, best first. `bound_s`: no plan of the three families takes less, counted in closed form. `examined` of
    `candidates`. `ended_early`: the search stopped at its limit.
    """

    plans: tuple[Plan, ...]
    bound_s: float
    examined: int
    candidates: int
    ended_early: bool = False

    @property
    def gap(self) -> float:
        """How far the best plan could be away from the best there is, both counted in closed form."""
        return min(plan.step_s for plan in self.plans) / self.bound_s - 1 if self.plans else math.inf
