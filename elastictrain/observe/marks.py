"""Where on the step axis of a run something happened to it. Pure; for the plot and the live view."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

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
    """One mark per recovery, planned change of the world, way back to a checkpoint and skipped step."""
    events = list(events)
    first = {row.generation: row.step for row in reversed(rows)}
    found = [Mark(row.step, "skipped", "skipped") for row in rows if row.skipped is not None]
    for event in events:
        if event.kind in ("recovery", "resized"):
            at = _int(event.data, "step")
            if at is None and event.generation in first:
                at = first[event.generation] - 1
            if at is not None:
                found.append(Mark(at + 0.5, _family(event), _label(event)))
        elif event.kind == "went_back":
            at = _int(event.data, "to_step")
            if at is not None:
                found.append(Mark(at + 0.5, "restore", f"back to step {at}"))
    return sorted(found, key=lambda mark: mark.step)


def _int(data: Mapping[str, Any], key: str) -> int | None:
    value = data.get(key)
    return value if isinstance(value, int) else None


def _family(event: Event) -> Family:
    if event.kind == "recovery":
        return "loss"
    return "join" if event.data.get("joined") else "drain"


def _label(event: Event) -> str:
    """Who it was about: `worker 1 lost`, `workers 0, 2 left`."""
    family = _family(event)
    key, word = {"loss": ("workers", "lost"), "join": ("joined", "joined")}.get(family, ("left", "left"))
    workers = event.data.get(key)
    if not isinstance(workers, list) or not workers:
        return str(event.data.get("cause") or family).splitlines()[0][:28]
    if len(workers) > 4:
        return f"{len(workers)} workers {word}"
    return f"worker{'s' if len(workers) > 1 else ''} {', '.join(map(str, workers))} {word}"
