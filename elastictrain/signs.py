"""Signs of life, as plain data: what a worker is doing, what its pulse says, what a node agent reports of it.

Pure vocabulary between the worker that writes (`pulse`), the agent that reads and sends, and the controller that judges
(`controller.suspicion`). Times are seconds on the monotonic clock of the node they come from; nobody compares clocks of
two nodes.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum


class Activity(IntEnum):
    """What the training thread is doing. Within a step the order of the numbers is the order of the step."""

    STARTING = 0
    """Imports, model, data and the trial lane, before the worker is ready."""
    IDLE = 1
    """Waiting for a plan: a spare, a parked worker."""
    MEET = 2
    """Waiting for the peers of a new generation, or for their copies."""
    FORM = 3
    """Own work on entering a generation: loading, copying, rolling forward."""
    DATA = 4
    COMPUTE = 5
    COMPILE = 6
    """A compiler works inside compute (`torch.compile`): minutes are no sign of trouble."""
    EXCHANGE = 7
    MIRROR = 8
    VOTE = 9
    APPLY = 10
    GATHER = 11
    EVALUATE = 12
    STORE = 13


WAITING = frozenset({Activity.IDLE, Activity.MEET, Activity.EXCHANGE, Activity.MIRROR, Activity.VOTE, Activity.GATHER})
"""A worker that stands still here may be the victim of another; in all other activities progress is its own duty."""


@dataclass(frozen=True, slots=True)
class Beat:
    """The content of one pulse. `thread`: kernel id of the training thread. `count` grows with every sign of progress.

    `steps_done`: steps that this process has completed; `step_s`: seconds of the last of them. `beat_s`, `entered_s`:
    when the last progress was, and when the activity began, on the node's monotonic clock.
    """

    worker: int
    pid: int
    start_ticks: int
    thread: int
    count: int
    generation: int
    step: int
    activity: Activity
    steps_done: int
    step_s: float
    beat_s: float
    entered_s: float


@dataclass(frozen=True, slots=True)
class WorkerSign:
    """What a node agent says of one worker at one beat of its own.

    `state`: the kernel's letter, "T" or "t" when the process is stopped, else that of the training thread; "X" when the
    process is gone. `cpu_s`: CPU seconds of the whole process. `held_up_s`: seconds, since the agent first saw the
    process, in which it was ready to run and got no processor (None: the kernel does not say). `count` is -1 when there
    is no pulse to read. `age_s`: since the last progress. `in_activity_s`: since the activity began.
    """

    worker: int
    pid: int
    start_ticks: int
    state: str
    cpu_s: float
    held_up_s: float | None
    count: int = -1
    generation: int = 0
    step: int = 0
    activity: Activity = Activity.STARTING
    steps_done: int = 0
    step_s: float = 0.0
    age_s: float = 0.0
    in_activity_s: float = 0.0

    @property
    def identity(self) -> tuple[int, int]:
        """Names the process for good."""
        return self.pid, self.start_ticks

    @property
    def is_gone(self) -> bool:
        return self.state == "X"

    @property
    def is_stopped(self) -> bool:
        """By SIGSTOP or a terminal ("T"), or held by a debugger ("t")."""
        return self.state in ("T", "t")


@dataclass(frozen=True, slots=True)
class NodeReport:
    """One beat of a node agent. `agent`: the number that the controller gave it; a later agent of the node has a higher
    one. `number`: of the beat, from 1. `echo`: the newest beat whose answer has reached the agent, 0 before. `at_s`:
    the agent's clock. `late_s`: by how much its beats have been late, summed since it started: what kept the watcher
    from running may have kept the watched from running. `going_s`: seconds until the machine goes, once that has been
    announced to it; `going_why`: by whom.
    """

    node: str
    agent: int
    number: int
    echo: int
    at_s: float
    late_s: float
    workers: tuple[WorkerSign, ...] = ()
    going_s: float | None = None
    going_why: str = ""
