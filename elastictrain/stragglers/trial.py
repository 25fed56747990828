"""Whether a move has brought what it promised: the same for lanes and for the stages of a pipeline. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median
from typing import Literal

from elastictrain.stragglers.robust import median_error

Outcome = Literal["confirmed", "taken back", "unjudged"]
_MOST_VERIFYING = 8
"""A move is judged after at most so many times `verify_steps`, however noisy the steps are."""
_TRIAL_TIMES = 40
"""… and given up after so many times that, when most steps cannot be judged (a checkpoint is always being written)."""


def judged(
    won_s: Sequence[float], promised_s: Sequence[float], *, since: int, verify_steps: int, returning: bool
) -> Outcome | None:
    """The verdict over a move; None: not yet. `won_s`, `promised_s`: seconds of each step that counted since it took
    effect, of the same number. `since`: steps since then, whether they counted or not. `returning`: it is a way back,
    which is looked at and never taken back.

    "taken back": less than half of what was promised, by two standard errors.
    """
    if since >= _TRIAL_TIMES * verify_steps:
        return "unjudged"  # hardly a step was without an excuse
    expected_s = median(promised_s) if promised_s else 0.0
    error_s, enough = median_error(won_s), len(won_s) >= _MOST_VERIFYING * verify_steps
    if len(won_s) < verify_steps or (error_s > abs(expected_s) / 4 and not enough):
        return None
    half_s, found_s = expected_s / 2, median(won_s)
    if not returning and found_s < half_s <= found_s + 2 * error_s:
        return "unjudged" if enough else None  # noise hides it; what is expected of it still holds
    return "confirmed" if returning or found_s >= half_s else "taken back"
