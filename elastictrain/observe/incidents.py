"""The incidents of a run, as its events tell them: one record per fault, from its first sign to the first commit after
it (`controller.incidents` fills it in), and where its seconds lie beside each other.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from elastictrain.observe.events import Event

PARTS = ("detect", "fence", "park", "wait", "form", "first_commit")


class Seen(BaseModel):
    """`source` said `what` at `at_s`, on the controller's clock."""

    at_s: float
    source: str
    what: str


class Blamed(BaseModel):
    worker: int
    node: str = ""
    why: str = ""
    evidence: list[str] = Field(default_factory=list)
    gone_s: float | None = None


class Incident(BaseModel):
    """The data of an `incident` event. `number`: counted over the life of the run directory, also where the run was
    taken up again and its controller counts anew. `time`: when the record was written, after the first commit.
    Seconds by part: see `controller.incidents.Incident.record`.
    """

    model_config = ConfigDict(extra="allow")

    number: int
    time: datetime
    outcome: str
    cause: str
    planned: bool = False
    detected_s: float
    seen: list[Seen] = Field(default_factory=list)
    seen_more: int = 0
    blamed: list[Blamed] = Field(default_factory=list)
    workers: list[int] = Field(default_factory=list)
    decided: list[str] = Field(default_factory=list)
    seconds: dict[str, float | None] = Field(default_factory=dict)
    generations: list[int] = Field(default_factory=list)
    step: int = 0
    world_before: int = 0
    world_after: int = 0
    joined: list[int] = Field(default_factory=list)
    left: list[int] = Field(default_factory=list)
    blocks_moved: int = 0
    bytes_moved: int | None = None
    steps_redone: int = 0
    lane_batches_redone: int = 0
    restored_from: str | None = None

    @classmethod
    def of(cls, event: Event, number: int) -> Self:
        """Raises ValidationError for an event that holds no such record."""
        return cls.model_validate({**event.data, "number": number, "time": event.time})

    @property
    def total_s(self) -> float | None:
        """From the detection to the first commit, or to the seal where there was none."""
        return self.seconds.get("total")

    @property
    def detected(self) -> datetime:
        """The wall clock at the detection: the record is written at its last point, `total_s` later."""
        return self.time - timedelta(seconds=self.total_s or 0.0)

    @property
    def who(self) -> list[int]:
        """The workers it was about: lost, or else blamed."""
        return self.workers or [blame.worker for blame in self.blamed]


def incidents(events: Iterable[Event]) -> list[Incident]:
    """The incidents among `events`, oldest first. One that a controller has written again when it came back from its
    death counts once; one of another version of the record is passed over.
    """
    found: list[Incident] = []
    for event in once(events):
        if event.kind == "incident":
            try:
                found.append(Incident.of(event, len(found) + 1))
            except ValidationError:
                continue
    return found


def once(events: Iterable[Event]) -> list[Event]:
    """A controller that comes back writes again what its predecessor may not have written: records that carry the time
    of their detection are the same when their data are.
    """
    kept: list[Event] = []
    seen: set[str] = set()
    for event in events:
        if event.kind in ("incident", "recovery", "resized") and "detected_s" in event.data:
            key = f"{event.kind} {event.data!r}"
            if key in seen:
                continue
            seen.add(key)
        elif event.kind in ("run_started", "run_resumed"):
            seen.clear()  # another life, another clock
        kept.append(event)
    return kept


@dataclass(frozen=True, slots=True)
class Span:
    """A part of an incident: from `start_s` to `end_s`, seconds from the detection."""

    name: str
    start_s: float
    end_s: float

    @property
    def seconds(self) -> float:
        return self.end_s - self.start_s


def spans(seconds: Mapping[str, Any]) -> list[Span]:
    """The parts that are known, where they lie. Fence and park both begin with the detection; the others follow one
    another after park. A part whose predecessor is not known cannot be placed and begins where the known ones end.
    """
    known = {name: float(seconds[name]) for name in PARTS if isinstance(seconds.get(name), int | float)}
    found, at_s = [], 0.0
    for name, length_s in known.items():
        if name == "detect":
            found.append(Span(name, -length_s, 0.0))
        elif name == "fence":
            found.append(Span(name, 0.0, length_s))
        else:
            found.append(Span(name, at_s, at_s + length_s))
            at_s += length_s
    return found


def bar(span: Span, every: Iterable[Span], columns: int) -> str:
    """`span` as cells on the scale of `every` span together: blanks up to its start, at least one full cell."""
    every = list(every)
    start_s = min(other.start_s for other in every)
    length_s = max(other.end_s for other in every) - start_s
    if length_s <= 0:
        return "█"
    first = min(columns - 1, int((span.start_s - start_s) / length_s * columns))
    last = max(first + 1, min(columns, round((span.end_s - start_s) / length_s * columns)))
    return " " * first + "█" * (last - first)
