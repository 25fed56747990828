"""What the peers of a worker share in a step, so that it is nobody's own change. Pure."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from elastictrain.stragglers.alarms import COMPUTE
from elastictrain.stragglers.robust import middle
from elastictrain.stragglers.signals import Flags, Floats

_LATELY = 5
_NOISY = 0.15
"""Noise (of a logarithm) from which one step does not say which of two workers has changed."""
_APART = math.log(1.11)
"""Changes in the middle that differ by more are of two kinds: half of the workers have changed, and half have not."""
_DROP = 0.5
"""A device may become slow; that it is faster than ever, without having been slow, is less likely: of two workers, one
whose time has dropped by more than noise must differ by twice as much from its usual time to be the one changed."""


class Lately:
    """What the workers' last few values were: of two, each one's own history says who has changed."""

    def __init__(self, causes: int, workers: int, groups: Sequence[npt.NDArray[np.int64]]) -> None:
        self._pairs = any(len(group) == 2 for group in groups)
        self._values = np.full((_LATELY if self._pairs else 0, causes, workers), np.nan)
        self._turn = 0

    def add(self, values: Floats, usable: Flags) -> None:
        """One step; shapes [causes, workers]."""
        if self._pairs:
            self._values[self._turn % _LATELY] = np.where(usable, values, np.nan)
            self._turn += 1

    def forget(self, places: Flags) -> None:
        """What they did is of other lanes."""
        self._values[:, :, places] = np.nan

    def distance(self, level: Floats, noise: Floats, group: npt.NDArray[np.int64]) -> Floats:
        """How far those of `group` are from their levels, shape [causes, 2]: the median of these steps."""
        change = np.sort(self._values[:, :, group] - level[:, group], axis=0)  # NaN last
        count = (~np.isnan(change)).sum(axis=0)
        low = np.take_along_axis(change, np.maximum(count - 1, 0)[None] // 2, axis=0)[0]
        high = np.take_along_axis(change, (count // 2 * (count > 1))[None], axis=0)[0]
        middle_of = np.asarray((low + high) / 2, dtype=np.float64)
        return np.where(middle_of < -noise[:, group], -_DROP * middle_of, np.abs(middle_of))


def back_to_best(change: Floats, level: Floats, best: Floats, least: float) -> Flags:
    """Who was slow (by `least`, a logarithm) and is nearer to its best now than to its level: that is its own change,
    and nobody else's. Shapes [causes, workers]; a best level that is not known is infinite.
    """
    away = np.where(np.isfinite(best), level - best, 0.0)
    return np.asarray((away >= least) & (np.abs(change + away) < np.abs(change)))


def in_common(
    change: Floats,
    groups: Sequence[npt.NDArray[np.int64]],
    *,
    changed: Flags | None = None,
    anew: Floats | None = None,
    lately: Lately | None = None,
    level: Floats | None = None,
    noise: Floats | None = None,
) -> Floats:
    """What all peers of a worker share in this step, shape as `change` [causes, workers]; 0 where nobody is to be
    compared with. `groups`: places of those that are peers; what is NaN is not there.

    Of three and more that are there it is their median. Of two it is the change that is nearer to none; where the
    `noise` of a group of two is large, not that of this step alone but of the last few (`lately`, against `level`).
    Who is known to have `changed` itself is there, and counts for nobody else. Who would be alone is held against those
    whose level is learned `anew`, too (same shape: against the one before; NaN of all others). Are there none, it has
    only its own history in its computation; of waiting and transfers, which one host or network may well make longer
    for all, it is not told whether it is its own.
    """
    common = np.zeros_like(change)
    for group in groups:
        part = change[:, group]
        alone = np.count_nonzero(~np.isnan(part), axis=1) == 1
        if anew is not None and len(group) > 1:
            part = np.where(alone[:, None] & np.isnan(part), anew[:, group], part)
            alone &= np.count_nonzero(~np.isnan(part), axis=1) == 1
        if changed is not None:
            part = np.where(changed[:, group], np.nan, part)
        if len(group) <= 2:
            far = np.abs(part)
            if len(group) == 2 and lately is not None and level is not None and noise is not None:
                noisy = noise[:, group].max(axis=1, keepdims=True) > _NOISY
                far = np.where(noisy & ~np.isnan(part), lately.distance(level, noise, group), far)
            nearest = np.argmin(np.where(np.isnan(far), np.inf, far), axis=1)
            shared = np.nan_to_num(part[np.arange(len(part)), nearest])
            if len(group) == 1:  # nobody to compare with: its own history alone
                shared = np.zeros(len(part))
        else:
            shared = middle(part, _APART)
        shared[COMPUTE] *= not alone[COMPUTE]
        common[:, group] = shared[:, None]
    return common
