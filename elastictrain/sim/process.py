"""A virtual worker process: where it stands, and what it would say of itself."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from elastictrain.offers import Split
from elastictrain.protocol import ParkReport


class Stage(Enum):
    """What a process does."""

    STARTING = "starting"
    IDLE = "idle"
    FORMING = "forming"
    STEPPING = "stepping"
    PARKED = "parked"
    FINISHED = "finished"


def vote_bytes(step: int) -> bytes:
    """The result of the vote for `step`: only that it is the same for all matters here."""
    return step.to_bytes(8, "big")


@dataclass(slots=True, eq=False)
class Process:
    """`silent`: frozen, torn or cut off: it answers nobody. `cut`: no kill reaches it either. `generation`: the newest
    plan that it has entered; it refuses plans up to `parked_at`. `applied`: the step that its state is at. `split`: the
    newest one that it was offered; `lanes`: those that it computes. `speed`: of its device, once known; its lanes take
    `slow_factor` times as long until `slow_until_s`.
    """

    number: int
    node: int
    stage: Stage = Stage.STARTING
    silent: bool = False
    cut: bool = False
    generation: int = 0
    parked_at: int = 0
    applied: int = 0
    sealed: int = 0
    gathered: bool = False
    vote: bytes | None = None
    split: Split | None = None
    lanes: tuple[int, ...] = ()
    speed: float | None = None
    slow_factor: float = 1.0
    slow_until_s: float = 0.0

    def park(self, generation: int) -> ParkReport:
        """Latch apply off and promise it (invariant R3)."""
        computing = self.stage is Stage.STEPPING
        self.stage, self.parked_at = Stage.PARKED, generation
        return ParkReport(
            self.number, self.generation, self.applied, self.sealed, self.gathered, self.vote, False, computing
        )
