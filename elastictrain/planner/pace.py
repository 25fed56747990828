"""How many of the workers that are there should take part: what the controller asks whenever a generation forms. Pure.

Seconds of a step are counted as `lane_s` of a lane on a usual worker, times the exact split of the lanes by the speeds
known so far, and what is the same for everybody (exchange and update), which depends on the number of workers alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from elastictrain.planner.split import split_affine

WORTH = 0.01
"""More workers must make a step shorter by this share at least: to take them in costs a pause."""


@dataclass(frozen=True, slots=True)
class Pace:
    """Of a job on its cluster by the cost model: seconds of one lane on a usual worker, and `rest_s[n - 1]`, seconds of
    exchange and update with n workers (of more workers than listed: as with the last number).
    """

    lane_s: float
    rest_s: tuple[float, ...]

    def step_s(self, lanes: int, speeds: Sequence[float]) -> float:
        """Seconds of a step with workers of these speeds (1: a usual worker), each of which has a lane at least."""
        each = [1.0 / speed for speed in speeds]
        split = split_affine(lanes, [0.0] * len(each), each, least=[1] * len(each))
        return self.lane_s * split.makespan + self.rest_s[min(len(each), len(self.rest_s)) - 1]


@lru_cache(maxsize=64)
def best_size(pace: Pace, lanes: int, speeds: tuple[float, ...], least: int) -> int:
    """How many of these workers, the first ones, should take part, `least` at least: the fewest with which a step takes
    less than `WORTH` longer than it could.
    """
    sizes = range(max(1, min(least, len(speeds))), min(len(speeds), lanes) + 1)
    seconds = {size: pace.step_s(lanes, speeds[:size]) for size in sizes}
    best = min(seconds.values())
    return next(size for size in sizes if seconds[size] <= best * (1 + WORTH))
