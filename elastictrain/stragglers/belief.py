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

from elastictrain.stragglers.signals import Flags, Records, checked, counted, dealt

_KEPT_STEPS = 15


def believed(records: Records, splits: Sequence[tuple[int, ...]]) -> Flags:
    """Whether each record can be true, its lanes included. Shape [workers].

    `splits`: lanes of all workers, of every split that may be in force, the newest first; with none lanes are believed.
    All switch at the same step, so it is the split that most of them name. If that is not even a half of them, and what
    they say are all the lanes there are, it is a split of which nobody here knows, and no sign of nonsense.
    """
    sound, own = checked(records), dealt(records)
    fitting = [split for split in splits if len(split) == len(own)]
    if not fitting:
        return sound
    agreed = [own == np.asarray(split) for split in fitting]
    best = max(agreed, key=lambda one: int(one.sum()))  # of equal ones the newest
    if 2 * int(best.sum()) <= len(own) and int(own.sum()) == sum(fitting[0]):
        return sound
    return np.asarray(sound & (best | ~counted(records)))


class Arrival:
    """When the last worker came to the exchange, as it was said and as the others saw it; of one generation."""

    def __init__(self) -> None:
        self._more: list[float] = []

    def last_s(self, computed_s: float, records: Records, *, judging: bool) -> float:
        """Seconds until the last one had computed its lanes: what they say (`computed_s`), or more where the others
        waited longer than that. `judging`: a move is being verified; then it is not learned how much is usual.

        Everybody leaves the exchange at about the same time, so the median of arrival and exchange together is no
        matter of one worker's words. What usually lies between computing and exchange is taken out.
        """
        exchange = records["exchange_s"].astype(np.float64)
        seen = float(np.median(records["arrive_s"].astype(np.float64) + exchange)) - float(exchange.min())
        if not judging:
            self._more = [*self._more[1 - _KEPT_STEPS :], max(0.0, seen - computed_s)]
        usual = median(self._more) if self._more else max(0.0, seen - computed_s)
        return max(computed_s, seen - usual)
