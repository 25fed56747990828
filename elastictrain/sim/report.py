"""What came out of a simulation, and the tally that is kept on the way."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from elastictrain.protocol import FormPlan

PAUSE = "planned pause"


@dataclass(frozen=True, slots=True)
class Outages:
    """Times without a step, from the fault (not from its detection) to the seal of the next generation, in seconds."""

    count: int
    p50_s: float
    p95_s: float
    longest_s: float
    total_s: float

    @classmethod
    def of(cls, seconds: Sequence[float]) -> Outages:
        """Nearest rank: p95 of 20 is the 19th."""
        ordered = sorted(seconds)
        at = [ordered[max(0, math.ceil(share * len(ordered)) - 1)] for share in (0.5, 0.95, 1.0)]
        p50_s, p95_s, longest_s = (round(value, 3) for value in at)
        return cls(len(ordered), p50_s, p95_s, longest_s, round(sum(ordered), 3))


@dataclass(frozen=True, slots=True)
class Report:
    """`events`: handled by the machine. `goodput`: committed steps x the time of a step of the undisturbed world / all
    time; what it lacks is start-up, outages, steps redone and worlds that were too small. `stepping`: the share of time
    in which the members stepped. `outages`: by cause. `steps_redone`: computed again, those of going back included.
    `steps_lost`, `steps_twice`: by the simulator's own books; anything but 0 is a bug. `checks`: after how many events
    the machine's invariants were checked. `replayed`: events that returning controllers have replayed. `lanes_moved`:
    times that other workers got other lanes between two steps, of these `lanes_moved_back` since it had not helped;
    `lanes_swung`: times that a worker's lanes went to and fro although no speed had changed; `lanes_taken_over`: lanes
    that others have computed within a step, where that is asked for. `stragglers`: what was said of slow workers.
    `samples`: digest of what the steps have given, the same for any number of workers, faults and slow-downs.
    """

    workers: int
    seed: int
    hours: float
    events: int
    steps: int
    goodput: float
    stepping: float
    faults: dict[str, int]
    recoveries: Outages | None
    outages: dict[str, Outages]
    pauses: Outages | None
    generations: int
    steps_redone: int
    went_back: int
    steps_lost: int
    steps_twice: int
    checks: int
    controller_deaths: int
    replayed: int
    world_least: int
    lanes_moved: int
    lanes_moved_back: int
    lanes_swung: int
    lanes_taken_over: int
    stragglers: dict[str, int]
    samples: str | None
    phase: str
    error: str | None

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return asdict(self)


@dataclass(slots=True)
class Tally:
    """Counts and times on the way. An outage begins with the first fault and ends with the next seal."""

    faults: Counter[str] = field(default_factory=Counter)
    outages: dict[str, list[float]] = field(default_factory=dict)
    open_since_s: float | None = None
    open_cause: str = ""
    stepping_s: float = 0.0
    stepping_since_s: float | None = None
    steps_redone: int = 0
    went_back: int = 0
    world_least: int = 0
    stragglers: Counter[str] = field(default_factory=Counter)
    lanes_moved_back: int = 0

    def interrupt(self, now_s: float, cause: str) -> None:
        if self.stepping_since_s is not None:
            self.stepping_s += now_s - self.stepping_since_s
            self.stepping_since_s = None
            self.open_since_s, self.open_cause = now_s, cause
        elif self.open_cause == PAUSE:
            self.open_since_s, self.open_cause = now_s, cause

    def resume(self, now_s: float, plan: FormPlan) -> None:
        """A generation has been sealed."""
        world = plan.layout.world_size
        self.world_least = min(self.world_least or world, world)
        if self.open_since_s is not None:
            self.outages.setdefault(self.open_cause, []).append(now_s - self.open_since_s)
        self.open_since_s, self.open_cause, self.stepping_since_s = None, "", now_s

    def note_slowness(self, kind: str, data: Mapping[str, Any]) -> None:
        """An announcement of the straggler watch, or of what is done about it."""
        if kind == "lanes_moved":
            self.lanes_moved_back += data["action"] == "move_back"
        else:
            self.stragglers[data["what"] if kind == "straggler" else data["action"]] += 1

    def recoveries(self) -> list[float]:
        return [value for cause, values in self.outages.items() if cause != PAUSE for value in values]
