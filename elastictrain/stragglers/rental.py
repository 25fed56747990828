"""When to pay for a change whose use depends on how long a slowness lasts, which nobody knows. Pure.

Ski rental (Karlin et al. 1988): whoever pays as soon as the loss since the onset equals the cost never pays more than
twice what he would have paid who knew the duration. A prediction lets one act earlier: the expected duration of what
has lasted `e` already grows with `e` (durations have heavy tails), so a change that is worth it by far is made at once.
Acting early can at worst add the cost of that one change: in all, never more than twice the optimum and one change.
"""

from __future__ import annotations

from dataclasses import dataclass

PRIOR_S = ((8, 600.0), (32, 1440.0), (None, 4320.0))
"""(up to so many workers, mean duration of a slowness in seconds): 10, 24 and 72 minutes for one node, four nodes and
hundreds of GPUs in the fleet that Greyhound's authors describe (ATC 2025)."""


@dataclass(frozen=True, slots=True)
class Case:
    """A change that could be made. `saved_s`: per step. `cost_s`, `undo_s`: of making it, and of taking it back.
    `lost_s`: lost so far for want of it. `lasted_s`: since the onset. `left_s`: what is left of the run, as it goes
    now.
    """

    saved_s: float
    cost_s: float
    undo_s: float
    step_s: float
    lost_s: float
    lasted_s: float
    left_s: float


def prior_s(workers: int) -> float:
    """The mean duration of a slowness before anything is known of it."""
    return next(mean for most, mean in PRIOR_S if most is None or workers <= most)


def remaining_s(prior: float, lasted_s: float) -> float:
    """Expected remaining duration: of a Lomax distribution with shape 2, whose mean at the onset is `prior`."""
    return prior + max(0.0, lasted_s)


def pays(case: Case, *, prior: float, doubt: float = 0.02, margin: float = 0.25) -> str | None:
    """Why the change should be made now, in words; None: not (yet). `doubt`: probability that the alarm is false;
    `margin`: by how much the gain must exceed the cost.
    """
    if case.saved_s <= 0 or case.step_s <= 0:
        return None
    steps = min(remaining_s(prior, case.lasted_s), case.left_s) / case.step_s
    gain, price = steps * case.saved_s, (1 + margin) * case.cost_s + doubt * case.undo_s
    if gain > price:
        return f"expected to save {gain:.3g} s for {price:.3g} s"
    if case.lost_s >= case.cost_s and case.left_s / case.step_s * case.saved_s > case.cost_s:
        return f"{case.lost_s:.3g} s are lost already, as much as it costs"
    return None
