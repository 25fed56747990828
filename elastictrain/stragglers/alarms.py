"""Alarms, what raises them, and the one that concerns all workers together. Pure."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np

from elastictrain.stragglers.robust import Floats, variance

Cause = Literal["compute", "data", "link", "work"]
CAUSES: tuple[Cause, ...] = ("compute", "data", "link", "work")
Kind = Literal["slow", "recovered", "faster"]
_WAS_SLOW = 1.05
COMPUTE, DATA, LINK, WORK = range(4)
MEMORY = 32
_SHIFT_IN_NOISE = 1.25
_SURE_ERRORS = 4.0
_NOISE_STEPS = 8
"""Of the network, after which its noise is known."""
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

    `factor`: how much longer than before it takes (below 1: less). `slowness`: how much longer than at its best;
    `before`: how much longer it took before this change.
    """

    step: int
    onset: int
    worker: int | None
    cause: Cause
    factor: float
    slowness: float
    before: float = 1.0

    @property
    def kind(self) -> Kind:
        """Is it "slow" (more than it was, or still), "recovered" (it was slow, and is about as at its best), or
        "faster", as it never was?
        """
        if self.factor > 1 or self.is_slow:
            return "slow"
        return "recovered" if self.before >= _WAS_SLOW else "faster"

    @property
    def is_slow(self) -> bool:
        """Whether the worker is slower now than at its best."""
        return self.slowness >= 1.1


def likely_shift(tuning: Tuning, noise: Floats | float) -> Floats:
    """The change that a CUSUM looks for, in logarithms: that of the tuning, or more where noise is larger than that.
    (Looking for a small change in large noise takes tens of steps to see one of two or three times.)
    """
    return np.asarray(np.maximum(tuning.shift, _SHIFT_IN_NOISE * noise))


class Together:
    """The transfer that all workers share: when it rises for all of them, it is the network and nobody's own link.

    Its noise is taken from the differences of steps that follow each other, to which a change that lasts adds once.
    """

    def __init__(self, tuning: Tuning) -> None:
        self._tuning = tuning
        self._level = self._now = self._best = 0.0
        """Change that the workers' own levels have not taken up yet; all of it; its least."""
        self._up = self._down = 0.0
        self._since = 0
        self._recent: list[float] = []
        self._last: float | None = None
        self._steps: list[float] = []

    def _noise(self) -> float:
        normal = float(np.quantile(self._steps, 0.75)) / (1.15 * math.sqrt(2))
        return max(4 * self._tuning.noise, normal)

    def observe(self, step: int, common: float, there: bool) -> list[Alarm]:
        """`common`: the change that all share, against their own levels (which follow it slowly)."""
        t = self._tuning
        if not there:
            return []
        if self._last is not None:
            self._steps = [*self._steps[1 - MEMORY :], abs(common - self._last)]
        self._last = common
        rest = common - self._level
        self._level *= 0.98  # the levels of the workers take up 0.02 of it
        if len(self._steps) < _NOISE_STEPS:
            return []
        noise, threshold = self._noise(), -math.log(t.rate)
        shift = float(likely_shift(t, noise))
        pace = shift / (noise * noise)
        if self._up == 0.0 and self._down == 0.0:
            self._since, self._recent = step, []
        self._recent = [*self._recent[1 - MEMORY :], rest]
        self._up = max(0.0, self._up + min(pace * (rest - shift / 2), STEP_SHARE * threshold))
        self._down = max(0.0, self._down + min(pace * (-rest - shift / 2), STEP_SHARE * threshold))
        if max(self._up, self._down) < threshold:
            return []
        change, rises = float(np.median(self._recent)), self._up >= self._down
        if abs(change) >= t.verified and rises == (change > 0):
            if abs(change) < _SURE_ERRORS * math.sqrt(float(variance(noise, len(self._recent)))):
                self._up, self._down = (min(one, 0.8 * threshold) for one in (self._up, self._down))
                return []  # not known well enough yet
            found = self._changed(step, change)
            return [] if found.kind == "faster" else [found]  # than ever: of a network that is not worth a word
        self._up = self._down = 0.0
        return []

    def _changed(self, step: int, change: float) -> Alarm:
        self._up = self._down = 0.0
        before = math.exp(self._now - self._best)
        self._level += change
        self._now += change
        self._best = min(self._best, self._now)
        slowness = math.exp(self._now - self._best)
        return Alarm(step, self._since, None, "link", math.exp(change), slowness, before)
