"""A machine driven by hand: helpers that answer for the workers in the simplest possible way."""

from __future__ import annotations

from typing import Any, TypeVar

from elastictrain.controller import Machine, MachineSpec, Watch
from elastictrain.controller import commands as cm
from elastictrain.controller import events as ev
from elastictrain.protocol import FormPlan, ParkReport, Restore

C = TypeVar("C")


def spec(**changes: Any) -> MachineSpec:
    facts: dict[str, Any] = {
        "lane_count": 8,
        "steps": 100,
        "block_elements": (10,) * 8,
        "min_workers": 1,
        "max_workers": 4,
        "initial_workers": 3,
    }
    return MachineSpec(**(facts | changes))


class Scene:
    def __init__(self, begin: bool = True, restore: Restore | None = None, **changes: Any) -> None:
        self.machine = Machine(spec(**changes))
        self.watch = Watch(self.machine)
        self.now_s = 0.0
        self.log: list[ev.Event] = []
        if begin:
            self.send(ev.Begun(0.0, restore or Restore(0, None)))

    def send(self, *events: ev.Event) -> list[cm.Command]:
        out: list[cm.Command] = []
        for event in events:
            self.log.append(event)
            self.watch.before(event)
            commands = self.machine.handle(event)
            self.watch.after(commands)
            out += commands
        return out

    @property
    def ledger(self) -> Any:
        return self.machine.core.ledger

    @property
    def plan(self) -> FormPlan:
        assert self.ledger.plan is not None
        plan: FormPlan = self.ledger.plan
        return plan

    @property
    def generation(self) -> int:
        return self.machine.generation

    def ready(self, *workers: int, memory_bytes: int | None = None) -> list[cm.Command]:
        return self.send(*(ev.WorkerReady(self.now_s, w, f"node{w}", memory_bytes) for w in workers))

    def seal(self, *workers: int) -> list[cm.Command]:
        members = workers or self.plan.layout.workers
        return self.send(*(ev.Sealed(self.now_s, self.generation, w, self.plan.step) for w in members))

    def die(self, *workers: int) -> list[cm.Command]:
        return self.send(*(ev.WorkerDied(self.now_s, w, "SIGKILL") for w in workers))

    def park(self, *workers: int, applied: int, **report: Any) -> list[cm.Command]:
        """Reports of `workers`; default: sealed and gathered."""
        facts: dict[str, Any] = {"sealed_generation": self.ledger.sealed, "gathered": True, "vote": b"vote"} | report
        return self.send(
            *(
                ev.WorkerParked(self.now_s, self.generation, ParkReport(w, self.generation, applied, **facts))
                for w in workers
            )
        )

    def run(self) -> Scene:
        """Start the initial workers and seal the first generation."""
        self.ready(*self.ledger.workers)
        self.seal()
        return self


def only(kind: type[C], commands: list[cm.Command]) -> C:
    found = [command for command in commands if isinstance(command, kind)]
    assert len(found) == 1, commands
    return found[0]


def every(kind: type[C], commands: list[cm.Command]) -> list[C]:
    return [command for command in commands if isinstance(command, kind)]


def announced(commands: list[cm.Command], kind: str) -> dict[str, Any]:
    return only(dict, [c.data for c in commands if isinstance(c, cm.Announce) and c.kind == kind])  # type: ignore[arg-type, return-value]


def kinds(commands: list[cm.Command]) -> list[str]:
    return [c.kind if isinstance(c, cm.Announce) else type(c).__name__ for c in commands]
