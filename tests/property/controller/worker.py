"""One worker of the model cluster: what it has, and where it stands."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field

from elastictrain.controller import events as ev
from elastictrain.protocol import Doubt, FormPlan


def vote_bytes(step: int) -> bytes:
    return f"vote {step}".encode()


@dataclass
class Worker:
    number: int
    state: str = "starting"  # waiting forming voted stepping troubled parked finished
    plan: FormPlan | None = None
    parked_at: int = 0  # refuses plans up to this generation
    applied: int = 0
    sealed: int = 0
    gathered: bool = False
    vote: bytes | None = None
    copies: dict[int, int] = field(default_factory=dict)  # block -> step of the copy
    pause: bool = False
    store: bool = False  # at the pause
    frozen: bool = False
    cut: bool = False  # nothing reaches it, and nothing from it arrives
    doubt: Doubt | None = None  # what it says against its own state until it enters a new generation
    outbox: deque[ev.Event] = field(default_factory=deque)

    @property
    def node(self) -> str:
        return f"node{self.number % 3}"

    @property
    def generation(self) -> int:
        return 0 if self.plan is None else self.plan.generation


def waits_for_shares(worker: Worker, there: Mapping[int, Worker]) -> bool:
    """The first member commits when it has the shares of all, who have applied that step by then."""
    assert worker.plan is not None
    first, *others = (there.get(number) for number in worker.plan.layout.workers)
    return worker is first and any(one is None or one.applied <= worker.applied for one in others)
