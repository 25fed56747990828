"""Where on the step axis of a run something happened to it. Pure; for the plot and the live view."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from elastictrain.observe.events import Event
from elastictrain.observe.incidents import once
from elastictrain.observe.metrics import MetricsRow

Family = Literal["loss", "join", "drain", "restore", "skipped", "notice"]
NOTICES = {"controller_back": "controller back", "preemption": "preemption notice", "node_set_aside": "node set aside",
           "storage_stalled": "storage stood still"}  # fmt: skip
"""Events that say no step: they are put between the steps whose time is known."""


@dataclass(frozen=True, slots=True)
class Mark:
    """`step` may be between two steps: a recovery lies before the first step of its generation."""

    step: float
    family: Family
    label: str


def marks(events: Iterable[Event], rows: Sequence[MetricsRow]) -> list[Mark]:
    """One mark per recovery, planned change of the world, way back to a checkpoint, skipped step, and notice."""
    events = once(events)
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
        elif event.kind in NOTICES:
            found.append(Mark(_step_at(event, events) + 0.5, "notice", NOTICES[event.kind]))
    return sorted(found, key=lambda mark: mark.step)


def _int(data: Mapping[str, Any], key: str) -> int | None:
    value = data.get(key)
    return value if isinstance(value, int) else None


def _step_at(event: Event, events: Sequence[Event]) -> float:
    """Where the run was at the time of `event`: between the commits before and after it that events speak of."""
    known = [(e.time, e.data["step"]) for e in events if e.kind in ANCHORS and isinstance(e.data.get("step"), int)]
    before = max((point for point in known if point[0] <= event.time), default=None)
    after = min((point for point in known if point[0] > event.time), default=None)
    if before is None or after is None or after[1] < before[1]:
        return float((before or after or (None, 0))[1])
    passed = (event.time - before[0]) / (after[0] - before[0])
    return int(before[1] + passed * (after[1] - before[1]))


ANCHORS = frozenset({"running", "checkpoint", "recovery", "resized", "finished", "failed", "stopped"})


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
    if family == "loss":
        word = _how(str(event.data.get("cause")))
    if len(workers) > 4:
        return f"{len(workers)} workers {word}"
    return f"worker{'s' if len(workers) > 1 else ''} {', '.join(map(str, workers))} {word}"


def _how(cause: str) -> str:
    """How a worker was lost, in a word."""
    for sign, word in (
        ("frozen", "frozen"),
        ("its node", "lost with its node"),
        ("torn", "torn"),
        ("corrupt", "corrupt"),
    ):
        if sign in cause:
            return word
    return "lost"
