"""The state of the machine, and the few ways in which anything may change it. Outputs are appended to `out`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from elastictrain.controller.commands import Announce, AskPause, Command, EndRun, Kill, Park, Retire
from elastictrain.controller.facts import Incident, Ledger, MachineSpec, Role
from elastictrain.controller.phases import Ended, Finishing, Forming, Parking, Phase, Running, State, check_change

RESTORE_PATIENCE = 10
"""Forming from a checkpoint and the closing checkpoint read and write storage: this many times the usual deadline."""


@dataclass(slots=True)
class Core:
    """Spec, facts that outlive a phase, and the facts of the present phase. Two machines are equal if these are."""

    spec: MachineSpec
    ledger: Ledger
    state: State

    def enter(self, state: State) -> None:
        """Change phase: the only place where `state` is set. Raises InternalError against the transition table."""
        check_change(self.state.phase, state.phase)
        self.state = state

    def forming_limit_s(self, from_storage: bool) -> float:
        base_s = max(self.spec.deadline_s, 20 * self.ledger.longest_forming_s)
        return base_s * self.ledger.patience * (RESTORE_PATIENCE if from_storage else 1)

    def parking_limit_s(self) -> float:
        return max(self.spec.deadline_s, 20 * self.ledger.longest_parking_s)

    def ask_pause(self, worker: int, out: list[Command]) -> None:
        """A run that is stopped stores where it has come to."""
        store = self.ledger.stop is not None and self.spec.checkpoint
        out.append(AskPause(self.ledger.generation, worker, store))

    def step(self) -> int:
        """The last commit known to the controller."""
        return max(self.ledger.published_step, 0 if self.ledger.plan is None else self.ledger.plan.step)

    def waiting(self) -> list[int]:
        """While parking: live members without a report that counts."""
        reports = self.state.reports if isinstance(self.state, Parking) else {}
        return [worker for worker in self.ledger.members() if worker not in reports]

    def is_waiting(self) -> bool:
        """Whether `waiting` is not empty, mostly without listing it."""
        reports = self.state.reports if isinstance(self.state, Parking) else {}
        return len(self.ledger.workers.of(Role.MEMBER)) > len(reports) or bool(self.waiting())

    def note_incident(self, now_s: float, cause: str, worker: int | None, *, planned: bool) -> None:
        """Open the record of a recovery or a planned pause, or add to the one that is open."""
        incident = self.ledger.incident
        if incident is None:
            plan = self.ledger.plan
            world = 0 if plan is None else plan.layout.world_size
            incident = self.ledger.incident = Incident(cause, now_s, world, planned, between_steps=planned)
        elif incident.planned and not planned:
            incident.planned, incident.cause, incident.detected_s, incident.parked_s = False, cause, now_s, None
        if worker is not None and worker not in incident.workers:
            incident.workers.append(worker)

    def begin_parking(self, now_s: float, cause: str, worker: int | None, out: list[Command]) -> None:
        """Something is wrong in the live generation: all its live members must park. Also while already parking."""
        self.note_incident(now_s, cause, worker, planned=False)
        if isinstance(self.state, Forming | Running):
            self.enter(Parking(now_s, now_s + self.parking_limit_s(), told=False))
            data = {"generation": self.ledger.generation, "cause": cause, "worker": worker}
            out.append(Announce("parking", data))
        if isinstance(self.state, Parking) and not self.state.told:
            self.state.told = True
            self.state.deadline_s = now_s + self.parking_limit_s()
            if waiting := self.waiting():
                out.append(Park(self.ledger.generation, tuple(waiting)))

    def mark_sealed(self, now_s: float) -> None:
        """The newest generation's seal is complete somewhere: from now on its layout is the truth (R4)."""
        ledger = self.ledger
        assert ledger.plan is not None
        if ledger.sealed == ledger.generation:
            return
        ledger.sealed = ledger.generation
        ledger.layouts = {ledger.generation: ledger.plan.layout}
        ledger.published_step = max(ledger.published_step, ledger.plan.step)  # R5
        if isinstance(self.state, Forming):
            ledger.longest_forming_s = max(ledger.longest_forming_s, now_s - self.state.started_s)

    def begin_finishing(self, now_s: float, step: int, out: list[Command]) -> Finishing:
        """The closing vote was complete: nothing can be lost any more."""
        if isinstance(self.state, Forming):
            self.close_incident(now_s, out)
        gone = set(self.state.reports) if isinstance(self.state, Parking) else set()
        finishing = Finishing(now_s + self.spec.deadline_s * RESTORE_PATIENCE, step, gone=gone)
        self.enter(finishing)
        return finishing

    def close_incident(self, now_s: float, out: list[Command]) -> None:
        """The generation that ended a recovery or a planned pause is sealed: write down what it cost."""
        ledger, incident = self.ledger, self.ledger.incident
        ledger.incident = None
        if incident is None or ledger.plan is None:
            return
        seconds = now_s - incident.detected_s
        facts: dict[str, Any] = {
            "cause": incident.cause,
            "generation": ledger.generation,
            "workers": list(incident.workers),
            "detected_s": incident.detected_s,
            "parked_s": None if incident.parked_s is None else incident.parked_s - incident.detected_s,
            "sealed_s": seconds,
            "seconds": seconds,
            "step": ledger.plan.step,
            "steps_redone": incident.steps_redone,
            "world_before": incident.world_before,
            "world_after": ledger.plan.layout.world_size,
            "joined": list(ledger.plan.joiners),
            "left": sorted(ledger.leaving),
            "restored_from": incident.restored_from,
        }
        if incident.planned:
            out.append(Announce("resized", facts))
        else:
            ledger.recoveries.append(facts)
            out.append(Announce("recovery", dict(facts)))

    def forget(self, worker: int) -> None:
        """The worker is gone: it can neither be asked nor counted."""
        ledger = self.ledger
        ledger.workers.pop(worker, None)
        ledger.leaving.pop(worker, None)
        if worker in ledger.draining:
            ledger.draining.remove(worker)

    def doom(self, worker: int, reason: str, out: list[Command]) -> None:
        """Kill a worker; nothing that it says counts from now on. It is gone when `WorkerDied` says so."""
        self.ledger.workers.update_facts(worker, doomed=True)
        out.append(Kill(worker, reason))

    def retire(self, worker: int, out: list[Command]) -> None:
        """The worker holds nothing (any more): let it go."""
        starting = self.ledger.workers[worker].role is Role.STARTING
        self.forget(worker)
        out.append(Kill(worker, "not needed any more") if starting else Retire(worker))

    def fail(self, error: str, out: list[Command]) -> None:
        """The run ends here. Workers are killed: after an error nobody waits for them to hand over anything."""
        ended = Ended(Phase.FAILED, self.step(), error=error)
        self.enter(ended)
        out.extend(Kill(worker, "the run has failed") for worker in sorted(self.ledger.workers))
        out.append(EndRun("failed", ended.step, error=error))

    def end(self, ended: Ended, out: list[Command]) -> None:
        """The run ends in order: finished or stopped."""
        self.enter(ended)
        for worker in sorted(self.ledger.workers):
            facts = self.ledger.workers[worker]
            started = facts.role is not Role.STARTING and not facts.doomed
            out.append(Retire(worker) if started else Kill(worker, f"the run has {ended.phase.value}"))
        out.append(EndRun(ended.phase.value, ended.step, ended.digest, ended.error))
