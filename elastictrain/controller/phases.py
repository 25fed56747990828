"""The phases of a run, what each of them knows, and which may follow which.

The table is data: the diagram in ARCHITECTURE.md is printed from it, and `enter` is the only function that changes
phase. Each phase carries only its own facts; what outlives a phase is in `facts.Ledger`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import ClassVar

from elastictrain.errors import InternalError
from elastictrain.protocol import ParkReport


class Phase(Enum):
    """Where a run stands. FINISHED, FAILED and STOPPED are terminal."""

    GATHERING = "gathering"
    FORMING = "forming"
    RUNNING = "running"
    PARKING = "parking"
    FINISHING = "finishing"
    FINISHED = "finished"
    FAILED = "failed"
    STOPPED = "stopped"

    @property
    def is_terminal(self) -> bool:
        return not TRANSITIONS[self]


TRANSITIONS: dict[Phase, frozenset[Phase]] = {
    Phase.GATHERING: frozenset({Phase.FORMING, Phase.STOPPED, Phase.FAILED}),
    # To FINISHING directly: the last step may end before the last member's `Sealed` arrives.
    Phase.FORMING: frozenset({Phase.RUNNING, Phase.PARKING, Phase.FINISHING, Phase.FAILED}),
    Phase.RUNNING: frozenset({Phase.PARKING, Phase.FINISHING, Phase.FAILED}),
    # To FINISHING: a worker says that the closing vote was complete, after another one was seen to die.
    Phase.PARKING: frozenset({Phase.FORMING, Phase.GATHERING, Phase.FINISHING, Phase.STOPPED, Phase.FAILED}),
    Phase.FINISHING: frozenset({Phase.FINISHED, Phase.FAILED}),
    Phase.FINISHED: frozenset(),
    Phase.FAILED: frozenset(),
    Phase.STOPPED: frozenset(),
}


@dataclass(slots=True)
class Gathering:
    """Waiting for workers. `parked`: survivors that keep their state meanwhile. `reason`: what is missing, in words."""

    phase: ClassVar[Phase] = Phase.GATHERING
    parked: dict[int, ParkReport] = field(default_factory=dict)
    reason: str = "waiting for the first workers"


@dataclass(slots=True)
class Forming:
    """A plan is out. `sealed`: the members that have seen the seal. `deadline_s`: until when they may take."""

    phase: ClassVar[Phase] = Phase.FORMING
    started_s: float
    deadline_s: float
    sealed: set[int] = field(default_factory=set)


@dataclass(slots=True)
class Running:
    """All members step. `asked`: the member that was asked to raise the pause flag; ask another at `ask_again_s`.
    `in_vain`: how many were asked since the last commit. `uneven`: whether the layout is worth rebalancing; None until
    somebody asks (it cannot change while all step).
    """

    phase: ClassVar[Phase] = Phase.RUNNING
    asked: int | None = None
    ask_again_s: float = 0.0
    in_vain: int = 0
    uneven: bool | None = None


@dataclass(slots=True)
class Parking:
    """Collecting reports. `told`: `Park` has been sent (at a planned pause the members come by themselves). `nudged`:
    those who were sent it alone, because they could not come. `answered_s`: when the last report came in.
    """

    phase: ClassVar[Phase] = Phase.PARKING
    started_s: float
    deadline_s: float
    told: bool
    reports: dict[int, ParkReport] = field(default_factory=dict)
    nudged: set[int] = field(default_factory=set)
    answered_s: float | None = None


@dataclass(slots=True)
class Finishing:
    """The closing vote was complete, so the end is final. `gone`: members that will not say so any more."""

    phase: ClassVar[Phase] = Phase.FINISHING
    deadline_s: float
    step: int
    digests: dict[int, str] = field(default_factory=dict)
    gone: set[int] = field(default_factory=set)


@dataclass(slots=True)
class Ended:
    """The run is over; nothing changes any more."""

    phase: Phase
    step: int
    digest: str | None = None
    error: str | None = None


State = Gathering | Forming | Running | Parking | Finishing | Ended


def check_change(before: Phase, after: Phase) -> None:
    """Raises InternalError when the table does not allow the change."""
    if after not in TRANSITIONS[before]:
        raise InternalError(
            f"phase {before.value} -> {after.value} is not in the table; "
            f"allowed: {sorted(phase.value for phase in TRANSITIONS[before])}"
        )


def diagram() -> str:
    """The transition table as Mermaid text, for ARCHITECTURE.md."""
    lines = ["stateDiagram-v2", f"    [*] --> {Phase.GATHERING.value}"]
    for before in Phase:
        after = TRANSITIONS[before]
        lines += [f"    {before.value} --> {phase.value}" for phase in Phase if phase in after]
        if not after:
            lines.append(f"    {before.value} --> [*]")
    return "\n".join(lines) + "\n"
