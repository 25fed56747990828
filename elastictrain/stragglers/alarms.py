"""Alarms, what raises them, and the one that concerns all workers together. Pure."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np

Cause = Literal["compute", "data", "link", "work"]
CAUSES: tuple[Cause, ...] = ("compute", "data", "link", "work")
COMPUTE, DATA, LINK, WORK = range(4)
MEMORY = 32
STEP_SHARE = 0.4


@dataclass(frozen=True, slots=True)
class Tuning:
    """`shift`: the slow-down that the CUSUM looks for. `verified`: what an alarm must amount to. `warm_up`: steps from
    which a level is first learned. `skip`: steps after a start that count for nothing. `noise`: the least that is
    assumed. `rate`: false alarms that are put up with, per worker and step, if noise were normal. `excuses`: steps in a
    row that a flag excuses; who always has one is looked at all the same.
    """

    shift: float = math.log(1.15)
    verified: float = math.log(1.11)
    warm_up: int = 5
    skip: int = 2
    noise: float = 0.01
    rate: float = 1e-8
    excuses: int = 8


@dataclass(frozen=True, slots=True)
class Alarm:
    """`worker` (its place; None: all of them together) has become slower, or faster again, for `cause` since `onset`.

    `factor`: how much longer than before it takes (below 1: less). `slowness`: how much longer than at its best.
    """

    step: int
    onset: int
    worker: int | None
    cause: Cause
    factor: float
    slowness: float

    @property
    def is_slow(self) -> bool:
        """Whether the worker is slower now than at its best."""
        return self.slowness >= 1.1


class Together:
    """The transfer that all workers share: when it rises for all of them, it is the network and nobody's own link."""

    def __init__(self, tuning: Tuning) -> None:
        self._tuning = tuning
        self._level = self._best = 0.0
        self._up = self._down = 0.0
        self._since = 0
        self._recent: list[float] = []

    def observe(self, step: int, common: float, there: bool) -> list[Alarm]:
        """`common`: the change that all share, against their own levels (which follow it slowly)."""
        t = self._tuning
        if not there:
            return []
        rest = common - self._level
        pace, threshold = t.shift / (4 * t.noise) ** 2, -math.log(t.rate)
        if self._up == 0.0 and self._down == 0.0:
            self._since, self._recent = step, []
        self._recent = [*self._recent[1 - MEMORY :], rest]
        self._up = max(0.0, self._up + min(pace * (rest - t.shift / 2), STEP_SHARE * threshold))
        self._down = max(0.0, self._down + min(pace * (-rest - t.shift / 2), STEP_SHARE * threshold))
        self._level *= 0.98  # the levels of the workers take up 0.02 of it
        if max(self._up, self._down) < threshold:
            return []
        change = float(np.median(self._recent))
        self._up = self._down = 0.0
        if abs(change) < t.verified:
            return []
        self._level += change
        self._best = min(self._best, self._level)
        slowness = math.exp(self._level - self._best)
        return [Alarm(step, self._since, None, "link", math.exp(change), slowness)]
