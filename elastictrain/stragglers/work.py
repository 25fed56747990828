"""How much work a worker's lanes are: so that long sequences are not taken for a slow device, nor the other way. Pure.

Time of a lane ≈ θ · (1, tokens, Σ squares of lengths): attention grows with the squares (ByteDance's study of
stragglers, OSDI 2025, finds the two sums an accurate predictor). θ is fitted to all workers together by least squares
that forget, each worker divided by its own speed, with a small pull towards "every lane is the same", which is what
remains where lengths do not vary. Coefficients are never negative.
"""

from __future__ import annotations

import numpy as np

from elastictrain.stragglers.signals import Flags, Floats, Records

_FORGET = 0.98
_PULL = 1e-3
_VARIES = 1e-4
"""Relative variance of the lanes' lengths below which they count as equal."""


class WorkModel:
    """`work(records)`: lanes-worth of work of each worker; a mean lane is 1."""

    def __init__(self) -> None:
        self._gram = np.zeros((3, 3))
        self._moment = np.zeros(3)
        self._lanes = self._tokens = self._squares = 0.0
        self._theta: Floats = np.array([1.0, 0.0, 0.0])
        self._spread = 0.0

    @property
    def by_length(self) -> bool:
        """Whether lengths vary enough to count."""
        return self._spread > _VARIES

    def _features(self, records: Records) -> Floats:
        lanes = records["lanes"].astype(np.float64)
        tokens = records["tokens"] * (self._lanes / self._tokens) if self._tokens > 0 else lanes
        squares = records["squares"] * (self._lanes / self._squares) if self._squares > 0 else lanes
        return np.stack([lanes, tokens, squares], axis=1)

    def note(self, records: Records, sound: Flags) -> None:
        """Take in the lengths of a step (not its times): the mean lane."""
        lanes = float(records["lanes"][sound].sum())
        if lanes <= 0:
            return
        tokens, squares = float(records["tokens"][sound].sum()), float(records["squares"][sound].sum())
        self._lanes = _FORGET * self._lanes + lanes
        self._tokens = _FORGET * self._tokens + tokens
        self._squares = _FORGET * self._squares + squares
        if tokens > 0:
            there = sound & (records["lanes"] > 0)
            each = records["tokens"][there] / records["lanes"][there] / (self._tokens / self._lanes)
            longest = records["squares"][there] / records["lanes"][there] / max(self._squares / self._lanes, 1e-300)
            spread = float(np.mean((each - 1.0) ** 2) + np.mean((longest - 1.0) ** 2))
            self._spread = max(spread, _FORGET * self._spread)

    def work(self, records: Records) -> Floats:
        """Shape [workers], at least a hundredth of a lane each (a guard for records without any tokens)."""
        lanes = records["lanes"].astype(np.float64)
        if not self.by_length:
            return np.maximum(lanes, 0.01)
        return np.maximum(self._features(records) @ self._theta, 0.01)

    def learn(self, records: Records, relative: Floats, used: Flags) -> None:
        """Fit to a step. `relative`: how much slower each worker is than the median; `used`: whose time is ordinary."""
        if not self.by_length or not used.any():
            return
        features = self._features(records)[used]
        seconds = (records["compute_s"].astype(np.float64) / relative)[used]
        self._gram = _FORGET * self._gram + features.T @ features
        self._moment = _FORGET * self._moment + features.T @ seconds
        alone = self._moment[0] / self._gram[0, 0]
        pull = _PULL * float(np.trace(self._gram)) / 3
        theta = _non_negative(self._gram + pull * np.eye(3), self._moment + pull * np.array([alone, 0.0, 0.0]))
        if theta.sum() > 0:
            self._theta = theta / theta.sum()


def _non_negative(gram: Floats, moment: Floats) -> Floats:
    """Least squares with coefficients of 0 or more: what would be negative is left out, the worst one first. (For three
    coefficients this is close enough to the exact active set.)
    """
    kept = list(range(len(moment)))
    while kept:
        found = np.linalg.solve(gram[np.ix_(kept, kept)], moment[kept])
        if (found >= 0).all():
            theta = np.zeros(len(moment))
            theta[kept] = found
            return theta
        kept.pop(int(np.argmin(found)))
    return np.zeros(len(moment))
