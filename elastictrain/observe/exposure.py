"""What a run would lose if everything died now: the training since the state that is stored. Pure."""

from __future__ import annotations

from collections.abc import Sequence

from elastictrain.observe.events import Event, step_back
from elastictrain.observe.metrics import MetricsRow


def stored_step(events: Sequence[Event]) -> int | None:
    """The step of the newest checkpoint that this run has stored or began from, and can still go back to."""
    stored: list[int] = []
    for event in events:
        back = step_back(event)
        if back is not None:
            # What was stored after the step that it goes on from has not happened.
            stored = [step for step in stored if step <= back]
        step = event.data.get("step")
        if event.kind in ("checkpoint", "run_resumed") and isinstance(step, int):
            stored.append(step)
    return max(stored, default=None)


def exposure_s(step: int | None, rows: Sequence[MetricsRow]) -> float:
    """Seconds of training that would have to be done again: those of the published steps after the stored one, `step`
    (None: nothing is stored).
    """
    return sum(row.step_s or 0.0 for row in rows if step is None or row.step > step)
