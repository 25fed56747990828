"""The lines of events.jsonl: what happened to a run, typed. In words: `sentences`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from typing import Annotated, Any

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, PlainSerializer, ValidationError

from elastictrain.errors import InternalError

Data = Mapping[str, Any]


def iso(time: datetime) -> str:
    """UTC to the millisecond: 2026-11-22T10:00:00.123Z."""
    return time.astimezone(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


class Event(BaseModel):
    """`kind` says which `data` there is; see `describe`. `generation` None: not about a generation."""

    model_config = ConfigDict(frozen=True)

    time: Annotated[AwareDatetime, PlainSerializer(iso)]
    kind: str
    generation: int | None = None
    data: dict[str, Any] = Field(default_factory=dict)


def make_event(kind: str, data: Data | None = None, *, generation: int | None = None, time: datetime) -> Event:
    """An event as the run writes it; the generation is taken from `data` when it is not given."""
    facts = dict(data or {})
    if not kind:
        raise InternalError(f"an event needs a kind, got {kind!r} with {facts}")
    if generation is None and isinstance(facts.get("generation"), int):
        generation = facts["generation"]
    return Event(time=time, kind=kind, generation=generation, data=facts)


def parse_events(records: Iterable[Mapping[str, Any]]) -> list[Event]:
    """The events among `records`; what is none (torn in the middle and closed later) is passed over."""
    events = []
    for record in records:
        try:
            events.append(Event.model_validate(record))
        except ValidationError:
            continue
    return events


def recovery_seconds(data: Data) -> float | None:
    """From the detection of a loss to the seal of the next generation; None when it is not known."""
    seconds = data.get("seconds", data.get("sealed_s"))
    return float(seconds) if isinstance(seconds, int | float) else None


def step_back(event: Event) -> int | None:
    """The step that the run goes on from, where an event says that later steps have not happened; else None. Its
    `up_to_generation` says in which generations (older records do not have it).
    """
    key = {"went_back": "to_step", "checkpoint_dropped": "next_step", "run_resumed": "step"}.get(event.kind)
    step = event.data.get(key) if key else None
    return step if isinstance(step, int) else None
