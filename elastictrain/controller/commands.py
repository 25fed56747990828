"""What must be done. Frozen and idempotent: performing a command twice is the same as once. A failure of a command
comes back as an event, never as an exception through the loop.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from elastictrain.protocol import FormPlan


@dataclass(frozen=True, slots=True)
class StartWorker:
    """Start process number `worker`; it will report WorkerReady, WorkerStartFailed or WorkerDied. `avoid`: nodes where
    it must not run (they keep failing, are lost, or are about to go). A worker that could start nowhere else waits.
    """

    worker: int
    avoid: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Park:
    """Tell `workers` to park whatever they do in `generation` or an older one; each answers with WorkerParked."""

    generation: int
    workers: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Form:
    """Send `plan` to all workers of its layout. `plan.store` is filled in by the shell."""

    plan: FormPlan


@dataclass(frozen=True, slots=True)
class AskPause:
    """Let `worker` raise the pause flag in its next vote: all workers park at that commit. `store`: they first store a
    checkpoint of it.
    """

    generation: int
    worker: int
    store: bool = False


@dataclass(frozen=True, slots=True)
class OfferLanes:
    """Tell `workers` of split number `plan` of the lanes of `generation` (by rank; 0: its layout's). All switch to it
    at the first step at which all votes name it; in another generation it changes nothing.
    """

    generation: int
    plan: int
    lanes: tuple[tuple[int, ...], ...]
    workers: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Retire:
    """The worker holds nothing any more: let its process end."""

    worker: int


@dataclass(frozen=True, slots=True)
class Kill:
    """SIGKILL the process and confirm; WorkerDied follows if it was not known to be dead."""

    worker: int
    reason: str


@dataclass(frozen=True, slots=True)
class Announce:
    """A line of events.jsonl: `kind` and plain data."""

    kind: str
    data: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class EndRun:
    """The run is over: `outcome` is "finished", "failed" or "stopped"."""

    outcome: str
    step: int
    digest: str | None = None
    error: str | None = None


Command = StartWorker | Park | Form | AskPause | OfferLanes | Retire | Kill | Announce | EndRun
