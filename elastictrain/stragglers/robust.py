"""Robust numbers from few and noisy times. Pure."""

from __future__ import annotations

import math
from collections.abc import Sequence
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


def middle(rows: Floats, apart: float) -> Floats:
    """The median of each row without its NaN; 0 where nothing else is there. (NumPy's is slow for short rows.)

    Of an even number whose middle two differ by more than `apart`, and of two in any case, it is the one of these that
    is nearer to 0: their mean would be nobody's.
    """
    ordered = np.sort(rows, axis=1)  # NaN last
    count = (~np.isnan(rows)).sum(axis=1)
    each = np.arange(len(rows))
    low, high = ordered[each, np.maximum(count - 1, 0) // 2], ordered[each, np.maximum(count, 1) // 2 * (count > 1)]
    nearer = np.where(np.abs(low) <= np.abs(high), low, high)
    found = np.where((high - low > apart) | (count == 2), nearer, (low + high) / 2)
    return np.asarray(np.where(count > 0, found, 0.0))


def median_error(measured: Sequence[float]) -> float:
    """How well the median of these is known (its standard error, were they normal); their unit."""
    return 1.25 * stdev(measured) / math.sqrt(len(measured)) if len(measured) > 1 else math.inf
