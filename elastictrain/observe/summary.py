"""What became of a run, in one object: `summary.json`, and the last line of `elastictrain run --json`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from pydantic import BaseModel, ConfigDict, Field

from elastictrain.observe.events import Event, recovery_seconds
from elastictrain.observe.incidents import once
from elastictrain.observe.metrics import MetricsRow, tokens_per_s
from elastictrain.observe.rundir import RunDirectory

ENDINGS = ("finished", "failed", "stopped")


class Recovery(BaseModel):
    """`seconds`: from the detection of the loss (or the request) to the seal of the next generation."""

    model_config = ConfigDict(frozen=True)

    cause: str
    generation: int
    seconds: float | None
    steps_redone: int


class Summary(BaseModel):
    """`outcome`: finished, failed, stopped, or running (no end was written). `steps`: the last step published.

    `world_sizes`: workers of every sealed generation, in order. `resizes`: planned pauses to let workers in or out.
    `tokens_per_s`: over the seconds of the steps themselves; `wall_s`: from the first event to the last, recoveries and
    starting up included. Losses are means per unit of loss weight, as the recipe defines it. `skipped_steps`: their
    gradient was not finite.
    """

    model_config = ConfigDict(frozen=True)

    run_dir: str
    outcome: str
    steps: int
    digest: str | None
    first_loss: float | None
    last_loss: float | None
    world_sizes: list[int]
    recoveries: list[Recovery]
    resizes: list[Recovery]
    tokens_per_s: float | None
    wall_s: float | None
    evaluation: dict[str, float | None] | None = None
    skipped_steps: list[int] = Field(default_factory=list)
    error: str | None = None

    def line(self) -> str:
        """One JSON object on one line."""
        return self.model_dump_json()


def summarise(run: RunDirectory) -> Summary:
    """Read from events and metrics alone, so that it is the same before and after the run's end, and after a crash."""
    events, rows = once(run.events()), run.metrics()
    end = _end(events)
    losses = [row.loss for row in rows if row.loss is not None]
    return Summary(
        run_dir=str(run.path),
        outcome=end.kind if end else "running",
        steps=_last_step(rows, end),
        digest=end.data.get("digest") if end else None,
        first_loss=losses[0] if losses else None,
        last_loss=losses[-1] if losses else None,
        world_sizes=list(worlds(events, rows).values()),
        recoveries=[_recovery(event) for event in events if event.kind == "recovery"],
        resizes=[_recovery(event) for event in events if event.kind == "resized"],
        tokens_per_s=tokens_per_s(rows),
        wall_s=(events[-1].time - events[0].time).total_seconds() if events else None,
        evaluation=next((row.evaluation for row in reversed(rows) if row.evaluation), None),
        skipped_steps=[row.step for row in rows if row.skipped is not None],
        error=_text(end.data.get("error") or end.data.get("reason")) if end else None,
    )


def worlds(events: Iterable[Event], rows: Iterable[MetricsRow]) -> dict[int, int]:
    """World size of every generation that was sealed, in order of generations; a published step proves a seal too."""
    found = {row.generation: row.world for row in rows if row.world}
    for event in events:
        key = {"running": "world", "recovery": "world_after", "resized": "world_after"}.get(event.kind)
        world = event.data.get(key) if key else None
        if event.generation is not None and isinstance(world, int):
            found[event.generation] = world
    return dict(sorted(found.items()))


def _end(events: Sequence[Event]) -> Event | None:
    """The run's end, unless it was taken up again after it."""
    for event in reversed(events):
        if event.kind in ENDINGS:
            return event
        if event.kind in ("run_started", "run_resumed"):
            return None
    return None


def _last_step(rows: Sequence[MetricsRow], end: Event | None) -> int:
    last = rows[-1].step if rows else 0
    stated = end.data.get("step") if end is not None and end.kind == "finished" else None
    return stated if isinstance(stated, int) else last


def _recovery(event: Event) -> Recovery:
    redone = event.data.get("steps_redone")
    return Recovery(
        cause=_text(event.data.get("cause")) or "unknown",
        generation=event.generation or 0,
        seconds=recovery_seconds(event.data),
        steps_redone=redone if isinstance(redone, int) else 0,
    )


def _text(value: object) -> str | None:
    return None if value is None else str(value)
