"""Where on the step axis of a run something happened to it. Pure; for the plot and the live view."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from elastictrain.observe.events import Event
from elastictrain.observe.metrics import MetricsRow

Family = Literal["loss", "join", "drain", "restore", "skipped"]


@dataclass(frozen=True, slots=True)
class Mark:
    """`step` may be between two steps: a recovery lies before the first step of its generation."""

    step: float
    family: Family
    label: str


def marks(events: Iterable[Event], rows: Sequence[MetricsRow]) -> list[Mark]:
    """One mark per generation that came out of a change (see `recovery` events), per step back and per skipped step."""
    events = list(events)
    sealed = _seal_steps(events, rows)
    found = [Mark(row.step, "skipped", "skipped") for row in rows if row.skipped]
    for event in events:
        step = event.data.get("step")
        if event.kind == "recovery" and event.generation is not None:
            at = step if isinstance(step, int) else sealed.get(event.generation)
            if at is not None:
                found.append(Mark(at + 0.5, _family(event), _label(event)))
        elif event.kind == "restore" and isinstance(step, int) and step > 0:
            found.append(Mark(step, "restore", f"back to {step}"))
    return sorted(found, key=lambda mark: mark.step)


def _seal_steps(events: Iterable[Event], rows: Sequence[MetricsRow]) -> dict[int, int]:
    """Generation → the commit at which it was sealed: from its event, else the step before its first row."""
    steps: dict[int, int] = {}
    for row in reversed(rows):
        steps[row.generation] = row.step - 1
    for event in events:
        step = event.data.get("step")
        if event.kind == "generation_sealed" and event.generation is not None and isinstance(step, int):
            steps[event.generation] = step
    return steps


def _family(event: Event) -> Family:
    cause = str(event.data.get("cause", "")).lower()
    before, after = event.data.get("world_before"), event.data.get("world_after")
    if any(word in cause for word in ("drain", "shrink")):
        return "drain"
    if any(word in cause for word in ("join", "add", "grow")) and not _lost(cause):
        return "join"
    if isinstance(before, int) and isinstance(after, int) and after > before and not _lost(cause):
        return "join"
    return "loss"


def _lost(cause: str) -> bool:
    return any(word in cause for word in ("died", "dead", "kill", "lost", "fail", "gone"))


def _label(event: Event) -> str:
    cause = str(event.data.get("cause") or _family(event)).splitlines()[0]
    return cause if len(cause) <= 28 else cause[:27] + "…"
