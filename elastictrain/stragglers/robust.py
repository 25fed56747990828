"""Robust numbers from few and noisy times. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from math import inf, sqrt
from statistics import stdev

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]


def variance(noise: Floats | float, count: npt.NDArray[np.int64] | int) -> Floats:
    """Of the median of `count` samples with standard deviation `noise`, were they normal; shape as `noise`."""
    return np.asarray((1.2533 * noise) ** 2 / np.maximum(count, 1))


def spread(samples: Floats) -> float:
    """Standard deviation by the median distance from the median: a few wild samples do not count."""
    return 1.4826 * float(np.median(np.abs(samples - np.median(samples))))


def middle(rows: Floats) -> Floats:
    """The median of each row without its NaN; 0 where nothing else is there. (NumPy's is slow for short rows.)"""
    ordered = np.sort(rows, axis=1)  # NaN last
    count = (~np.isnan(rows)).sum(axis=1)
    each = np.arange(len(rows))
    found = (ordered[each, np.maximum(count - 1, 0) // 2] + ordered[each, np.maximum(count, 1) // 2 * (count > 1)]) / 2
    return np.asarray(np.where(count > 0, found, 0.0))


def median_error(measured: Sequence[float]) -> float:
    """How well the median of these is known (its standard error, were they normal); their unit."""
    return 1.25 * stdev(measured) / sqrt(len(measured)) if len(measured) > 1 else inf
