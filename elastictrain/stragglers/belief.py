"""What of the workers' own words is believed: lanes are held against the splits in force, gains against what peers saw.
Pure.

A worker whose clock or count is broken says what is finite and yet wrong. Two things it cannot bend: how many lanes
were dealt out to it, which the controller knows, and when the last of them came to the exchange, which all the others
have waited for.
"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median

import numpy as np

from elastictrain.stragglers.signals import Flags, Records, checked, counted, dealt, mirrored_s

_KEPT_STEPS = 15


def in_force(records: Records, splits: Sequence[tuple[int, ...]]) -> tuple[int, ...] | None:
    """The split that the workers are at: lanes by place; None when nobody here knows it.

    `splits`: of every one that may be in force, the newest first. All switch at the same step, so it is the split that
    most of them name. If that is not even a half of them, and what they say are all the lanes there are, it is another.
    """
    own = dealt(records)
    fitting = [split for split in splits if len(split) == len(own)]
    if not fitting:
        return None
    best = max(fitting, key=lambda split: int((own == np.asarray(split)).sum()))  # of equal ones the newest
    few = 2 * int((own == np.asarray(best)).sum()) <= len(own)
    return None if few and int(own.sum()) == sum(fitting[0]) else best


def believed(records: Records, splits: Sequence[tuple[int, ...]]) -> Flags:
    """Whether each record can be true, its lanes included (`in_force`; where nobody knows the split, lanes are
    believed). Shape [workers].
    """
    sound, split = checked(records), in_force(records, splits)
    if split is None:
        return sound
    return np.asarray(sound & ((dealt(records) == np.asarray(split)) | ~counted(records)))


class Arrival:
    """When the last worker came to the exchange, as it was said and as the others saw it; of one generation."""

    def __init__(self) -> None:
        self._more: list[float] = []

    def last_s(self, computed_s: float, records: Records, *, judging: bool) -> float:
        """Seconds until the last one had computed its lanes: what they say (`computed_s`), or more where the others
        waited longer than that. `judging`: a move is being verified; then it is not learned how much is usual.

        Everybody leaves the exchange (the mirror follows it) at about the same time, so the median of arrival and
        exchange together is no matter of one worker's words, nor of one worker's link. What usually lies between
        computing and exchange is taken out.
        """
        exchange = np.maximum(0.0, records["exchange_s"].astype(np.float64) - mirrored_s(records))
        seen = float(np.median(records["arrive_s"].astype(np.float64) + exchange)) - float(exchange.min())
        if not judging:
            self._more = [*self._more[1 - _KEPT_STEPS :], max(0.0, seen - computed_s)]
        usual = median(self._more) if self._more else max(0.0, seen - computed_s)
        return max(computed_s, seen - usual)
