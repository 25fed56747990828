"""What happened. Frozen; every event carries the time it was observed (`now_s`, seconds on the shell's monotonic clock)
and, where it is about a generation, that generation: one of another generation changes nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

from elastictrain.protocol import ParkReport, Restore, Row


@dataclass(frozen=True, slots=True)
class Begun:
    """The run starts: `restore` names where the state comes from, `checkpoints` the (step, path) known to be whole."""

    now_s: float
    restore: Restore
    checkpoints: tuple[tuple[int, str], ...] = ()


@dataclass(frozen=True, slots=True)
class WorkerReady:
    """A worker process is imported, warmed and waiting. `domain` is its failure domain (node id, or a label)."""

    now_s: float
    worker: int
    domain: str
    memory_bytes: int | None = None


@dataclass(frozen=True, slots=True)
class WorkerStartFailed:
    """A worker could not start. `user_error`: the recipe, job or data is at fault, so another try would fail alike."""

    now_s: float
    worker: int
    error: str
    user_error: bool


@dataclass(frozen=True, slots=True)
class WorkerDied:
    """The process is gone, and known to be gone."""

    now_s: float
    worker: int
    cause: str


@dataclass(frozen=True, slots=True)
class WorkerTroubled:
    """A worker of `generation` lost a peer in the middle of a step (or of forming): it waits to be parked."""

    now_s: float
    generation: int
    worker: int
    error: str


@dataclass(frozen=True, slots=True)
class WorkerFailed:
    """An exception in a worker. `kind`: "user" (the recipe's: ends the run), "torn" (between vote and end of apply:
    counts as a death, R7), "restore" (the checkpoint of this generation's plan is corrupt: an older one is taken),
    "internal".
    """

    now_s: float
    generation: int
    worker: int
    kind: str
    error: str


@dataclass(frozen=True, slots=True)
class WorkerParked:
    """A worker has parked: because it was told to, or at the commit that carried the pause flag."""

    now_s: float
    generation: int
    report: ParkReport


@dataclass(frozen=True, slots=True)
class Sealed:
    """A worker has seen the seal of `generation` at commit `step` and starts stepping."""

    now_s: float
    generation: int
    worker: int
    step: int


@dataclass(frozen=True, slots=True)
class Progress:
    """Step `step` of `generation` has been published (R5): its successor's vote is complete."""

    now_s: float
    generation: int
    step: int


@dataclass(frozen=True, slots=True)
class CheckpointCommitted:
    """The manifest of `step` exists at `path`."""

    now_s: float
    generation: int
    step: int
    path: str


@dataclass(frozen=True, slots=True)
class WorkerFinished:
    """A worker has taken part in the closing vote after the last step. `digest` names the final state."""

    now_s: float
    generation: int
    worker: int
    step: int
    digest: str


@dataclass(frozen=True, slots=True)
class AddRequested:
    now_s: float


@dataclass(frozen=True, slots=True)
class DrainRequested:
    now_s: float
    worker: int


@dataclass(frozen=True, slots=True)
class ResizeRequested:
    now_s: float
    target: int


@dataclass(frozen=True, slots=True)
class StopRequested:
    now_s: float
    reason: str


@dataclass(frozen=True, slots=True)
class Tick:
    """Time has passed."""

    now_s: float


Event = (
    Begun
    | WorkerReady
    | WorkerStartFailed
    | WorkerDied
    | WorkerTroubled
    | WorkerFailed
    | WorkerParked
    | Sealed
    | Progress
    | CheckpointCommitted
    | WorkerFinished
    | AddRequested
    | DrainRequested
    | ResizeRequested
    | StopRequested
    | Tick
)

Message = Event | Row
"""What a worker's outbox carries: events for the machine, rows for the run directory."""
