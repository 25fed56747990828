"""What happened. Frozen; every event carries the time it was observed (`now_s`, seconds on the shell's monotonic clock)
and, where it is about a generation, that generation: one of another generation changes nothing.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from elastictrain.protocol import Awaited, Doubt, ParkReport, ReadBytes, Ready, Restore, Row, StepSignals


@dataclass(frozen=True, slots=True)
class Begun:
    """The run starts: `restore` names where the state comes from, `checkpoints` the (step, path) known to be whole."""

    now_s: float
    restore: Restore
    checkpoints: tuple[tuple[int, str], ...] = ()


@dataclass(frozen=True, slots=True)
class WorkerPlaced:
    """A worker's process runs on `node`, and is being prepared."""

    now_s: float
    worker: int
    node: str


@dataclass(frozen=True, slots=True)
class WorkerReady:
    """A worker process is imported, warmed and waiting.

    `node`: the machine it runs on; what is lost, preempted or set aside goes by it. `domain`: its failure domain, which
    mirrors go by. Each stands for the other where it is empty. `labels`: of the node; with
    `MachineSpec.domain_label` the value of that label is the failure domain instead (rack, zone).
    """

    now_s: float
    worker: int
    domain: str
    memory_bytes: int | None = None
    node: str = ""
    labels: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class WorkerStartFailed:
    """A worker could not start. `user_error`: the recipe, job or data is at fault, so another try would fail alike."""

    now_s: float
    worker: int
    error: str
    user_error: bool
    node: str = ""


@dataclass(frozen=True, slots=True)
class WorkerDied:
    """The process is gone, and known to be gone. `node`: where it was, if it never said so itself."""

    now_s: float
    worker: int
    cause: str
    node: str = ""


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
    counts as a death, R7), "corrupt" (checks say that its state or its sums are wrong: counts as a death, and against
    its node), "restore" (the checkpoint of this generation's plan is corrupt: an older one is taken), "internal".
    `error` is shown to the user as it is, traceback included. `doubt`: with "corrupt", what this worker may have spoilt
    before it was found. Any member may say that another one is corrupt: who is wrong is not relied on for saying so.
    """

    now_s: float
    generation: int
    worker: int
    kind: str
    error: str
    doubt: Doubt | None = None


@dataclass(frozen=True, slots=True)
class WorkerParked:
    """A worker has parked: because it was told to, or at the commit that carried the pause flag."""

    now_s: float
    generation: int
    report: ParkReport


@dataclass(frozen=True, slots=True)
class Sealed:
    """A worker has seen the seal of `generation` at commit `step` and starts stepping. `read`: of a generation that has
    restored a checkpoint, what it has read; one member says so for all.
    """

    now_s: float
    generation: int
    worker: int
    step: int
    read: ReadBytes | None = None


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
class CheckpointsRemoved:
    """Retention has removed the checkpoints of `steps`: nobody can go back to them."""

    now_s: float
    generation: int
    steps: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class CheckpointGivenUp:
    """`worker`, which publishes in `generation`, says at its seal: the checkpoint of `step`, begun in generation
    `begun_in`, does not exist, because that generation has ended. `travelled`: all shares of it were durable, only the
    manifest was missing. `instead`: the step that is stored in its place (the one that was sealed); None: the job went
    back to an earlier step and stores `step` again when it gets there. `why`: another reason than that a generation has
    ended (then `begun_in` is `generation`): packs that this checkpoint refers to are gone.
    """

    now_s: float
    generation: int
    worker: int
    step: int
    begun_in: int
    travelled: bool
    instead: int | None
    why: str = ""


@dataclass(frozen=True, slots=True)
class CopiesStand:
    """`worker`, which publishes, says how the further place `path` of checkpoints is: its newest step (0: none that is
    known), the steps that are still to be copied there, and why it does not get on (empty while it does). Said anew in
    every generation.
    """

    now_s: float
    generation: int
    worker: int
    path: str
    step: int
    waiting: tuple[int, ...]
    error: str


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
class WorkerFrozen:
    """Detection has named `worker`: it lives, but does nothing any more. It is killed, and its peers park at once.

    `reason` in words; `evidence`: what was measured, a line each. `last_seen_s`: its last sign of life, if known.
    """

    now_s: float
    worker: int
    reason: str
    evidence: tuple[str, ...] = ()
    last_seen_s: float | None = None


@dataclass(frozen=True, slots=True)
class NodeLost:
    """`node` answers no more. All its workers count as gone for good: one that speaks again is killed, not heard.

    `workers`: further ones that are known to be there (those that have not been ready yet). A lost rack is one such
    event for each of its nodes.
    """

    now_s: float
    node: str
    reason: str
    workers: tuple[int, ...] = ()
    last_seen_s: float | None = None


@dataclass(frozen=True, slots=True)
class GenerationHung:
    """All members of `generation` wait for each other. `suspect`: who is the likeliest cause, if anybody is."""

    now_s: float
    generation: int
    reason: str
    suspect: int | None = None
    evidence: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class PreemptionNotice:
    """At `deadline_s`, on the shell's clock, the machine goes: of `worker`, or all workers of `node`."""

    now_s: float
    deadline_s: float
    worker: int | None = None
    node: str = ""
    reason: str = "preemption"


@dataclass(frozen=True, slots=True)
class ClusterChanged:
    """What the cluster has now: its live `nodes`, and what is there and what is free in words, for a run that waits."""

    now_s: float
    nodes: tuple[str, ...]
    capacity: str = ""


@dataclass(frozen=True, slots=True)
class LanesProposed:
    """The straggler watch would deal the lanes of `generation` out otherwise. `lanes`: how many each rank gets;
    `speeds`: (worker, relative speed), as learned. `action`: "move_lanes", or "move_back" for a move that did not bring
    what was expected. `step`: that has shown it; `before_s`, `after_s`: computation of a step now, and expected.
    """

    now_s: float
    generation: int
    step: int
    lanes: tuple[int, ...]
    speeds: tuple[tuple[int, float], ...]
    action: str
    reason: str
    before_s: float = 0.0
    after_s: float = 0.0


@dataclass(frozen=True, slots=True)
class SpeedsLearned:
    """What the straggler watch has learned of the speeds of `generation`, where lanes do not move by themselves: the
    next generation is dealt out by it. `speeds`: (worker, relative speed).
    """

    now_s: float
    generation: int
    step: int
    speeds: tuple[tuple[int, float], ...]


@dataclass(frozen=True, slots=True)
class StragglerLeaves:
    """The straggler watch would do without `worker`: "replace" it by a spare that waits, or "leave_out"."""

    now_s: float
    generation: int
    step: int
    worker: int
    action: str
    reason: str
    before_s: float = 0.0
    after_s: float = 0.0


@dataclass(frozen=True, slots=True)
class ControllerBack:
    """The controller was away for `gone_s`: it was dead, or its process or its machine stood still. The first event of
    a new controller after replay. Deadlines move by the gap; those of preemptions do not.
    """

    now_s: float
    gone_s: float


@dataclass(frozen=True, slots=True)
class Tick:
    """Time has passed."""

    now_s: float


Event = (
    Begun
    | WorkerPlaced
    | WorkerReady
    | WorkerStartFailed
    | WorkerDied
    | WorkerTroubled
    | WorkerFailed
    | WorkerParked
    | Sealed
    | Progress
    | CheckpointCommitted
    | CheckpointsRemoved
    | CheckpointGivenUp
    | CopiesStand
    | WorkerFinished
    | AddRequested
    | DrainRequested
    | ResizeRequested
    | StopRequested
    | WorkerFrozen
    | NodeLost
    | GenerationHung
    | PreemptionNotice
    | ClusterChanged
    | LanesProposed
    | StragglerLeaves
    | SpeedsLearned
    | ControllerBack
    | Tick
)

Message = Event | Row | Ready | StepSignals | Awaited
"""What a worker's outbox carries: events for the machine, rows for the run directory, signals for the straggler watch,
what its data wait for, and once what it is.
"""
