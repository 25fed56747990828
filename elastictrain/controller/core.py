"""The state of the machine, and the few ways in which anything may change it. Outputs are appended to `out`."""

from __future__ import annotations

from dataclasses import dataclass

from elastictrain.controller.commands import Announce, AskPause, Command, EndRun, Kill, Park, Retire
from elastictrain.controller.facts import Ledger, MachineSpec, Role
from elastictrain.controller.incidents import KEPT, Incident
from elastictrain.controller.phases import (
    Ended,
    Finishing,
    Forming,
    Gathering,
    Parking,
    Phase,
    Running,
    State,
    check_change,
)

RESTORE_PATIENCE = 10
"""Forming from a checkpoint and the closing checkpoint read and write storage: this many times the usual deadline."""
MOST_PATIENCE = 10
"""What is learnt from slow workers stretches a deadline at most so many times."""


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
        base_s = self._learnt_limit_s(self.ledger.longest_forming_s)
        return base_s * self.ledger.patience * (RESTORE_PATIENCE if from_storage else 1)

    def parking_limit_s(self) -> float:
        return self._learnt_limit_s(self.ledger.longest_parking_s)

    def _learnt_limit_s(self, longest_s: float) -> float:
        """Bounded: who was frozen for minutes and came back teaches otherwise to wait for the next one for hours."""
        return min(max(self.spec.deadline_s, 20 * longest_s), MOST_PATIENCE * self.spec.deadline_s)

    def ask_pause(self, worker: int, out: list[Command]) -> None:
        out.append(AskPause(self.ledger.generation, worker, self.stores_at_pause()))

    def stores_at_pause(self) -> bool:
        """A run that is stopped, or that cannot go on without a machine that is about to go, stores where it is."""
        due = any(notice.due for notice in self.ledger.notices.values())
        return self.spec.checkpoint and (self.ledger.stop is not None or due)

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

    def note_incident(
        self, now_s: float, cause: str, worker: int | None, out: list[Command], *, planned: bool
    ) -> Incident:
        """Open the record of a recovery or a planned pause, or add to the one that is open."""
        incident = self.ledger.incident
        if incident is None:
            self.complete_incident("overtaken", None, out)
            plan = self.ledger.plan
            world = 0 if plan is None else plan.layout.world_size
            incident = self.ledger.incident = Incident(cause, now_s, world, planned, between_steps=planned)
        elif incident.planned and not planned:
            incident.planned, incident.cause, incident.detected_s, incident.parked_s = False, cause, now_s, None
        if worker is not None and worker not in incident.workers:
            incident.workers.append(worker)
        return incident

    def begin_parking(self, now_s: float, cause: str, worker: int | None, out: list[Command]) -> None:
        """Something is wrong in the live generation: all its live members must park. Also while already parking."""
        self.note_incident(now_s, cause, worker, out, planned=False)
        if isinstance(self.state, Forming | Running):
            self.enter(Parking(now_s, now_s + self.parking_limit_s(), told=False))
            data = {"generation": self.ledger.generation, "cause": cause, "worker": worker}
            out.append(Announce("parking", data))
        if isinstance(self.state, Parking) and not self.state.told:
            self.state.told = True
            self.state.deadline_s = now_s + self.parking_limit_s()
            self.tell_to_park(out)

    def tell_to_park(self, out: list[Command]) -> None:
        """All who can still hear, and have not parked."""
        hearing = tuple(worker for worker in self.waiting() if worker not in self.ledger.workers.doomed)
        if hearing:
            out.append(Park(self.ledger.generation, hearing))

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
            took_s = now_s - self.state.started_s
            if ledger.plan.restore is not None:
                took_s /= RESTORE_PATIENCE  # storage is allowed this much more: it must not teach what forming takes
            ledger.longest_forming_s = max(ledger.longest_forming_s, took_s)

    def begin_finishing(self, now_s: float, step: int, out: list[Command]) -> Finishing:
        """The closing vote was complete: nothing can be lost any more."""
        if isinstance(self.state, Forming):
            self.close_incident(now_s, out)
        gone = set(self.state.reports) if isinstance(self.state, Parking) else set()
        finishing = Finishing(now_s + self.spec.deadline_s * RESTORE_PATIENCE, step, gone=gone)
        self.enter(finishing)
        return finishing

    def close_incident(self, now_s: float, out: list[Command]) -> None:
        """The generation that ended a recovery or a planned pause is sealed: say so. What it cost is known at the first
        commit (`complete_incident`).
        """
        ledger, incident = self.ledger, self.ledger.incident
        ledger.incident = None
        if incident is None or ledger.plan is None:
            return
        incident.sealed_s, incident.step = now_s, ledger.plan.step
        incident.world_after = ledger.plan.layout.world_size
        incident.joined, incident.left = list(ledger.plan.joiners), sorted(ledger.leaving)
        facts = incident.summary(ledger.generation, now_s)
        if incident.planned:
            out.append(Announce("resized", facts))
        else:
            ledger.recoveries = [*ledger.recoveries[1 - KEPT :], facts]
            out.append(Announce("recovery", dict(facts)))
        ledger.settling = incident

    def complete_incident(self, outcome: str, first_commit_s: float | None, out: list[Command]) -> None:
        """Write down the record of the last fault: with its first commit, or with what came in between."""
        ledger = self.ledger
        incident = ledger.settling or ledger.incident
        ledger.settling = None
        if incident is None or (incident.planned and not incident.notice):
            return
        ledger.incident_count += 1
        spec, number = self.spec, ledger.incident_count
        record = incident.record(number, outcome, first_commit_s, spec.lane_count, spec.bytes_per_held_element)
        ledger.incidents = [*ledger.incidents[1 - KEPT :], record]
        out.append(Announce("incident", dict(record)))

    def saw(self, now_s: float, source: str, what: str) -> bool:
        """Add to the open incident what somebody has seen. False: nothing new, or no incident is open."""
        return self.ledger.incident is not None and self.ledger.incident.saw(now_s, source, what)

    def note_commit(self) -> None:
        """The present generation has committed a step: whoever was let off before it has used it well."""
        ledger = self.ledger
        ledger.hangs = 0 if ledger.hung is None else 1
        ledger.reprieved = {w: formed for w, formed in ledger.reprieved.items() if formed == ledger.generation}

    def held_alone(self, worker: int) -> int:
        """How many blocks of the sealed layout have no other live holder that may still speak."""
        ledger = self.ledger
        if ledger.truth is None:
            return 0

        def speaks(other: int) -> bool:
            return other != worker and other in ledger.workers and other not in ledger.workers.doomed

        return sum(
            shard.hi - shard.lo
            for shard in ledger.truth.shards
            if worker in shard.holders() and not any(map(speaks, shard.holders()))
        )

    def forget(self, worker: int) -> None:
        """The worker is gone: it can neither be asked nor counted."""
        ledger = self.ledger
        ledger.workers.pop(worker, None)
        ledger.leaving.pop(worker, None)
        ledger.notices.pop(worker, None)
        ledger.reprieved.pop(worker, None)
        if worker in ledger.draining:
            ledger.draining.remove(worker)

    def doom(self, worker: int, reason: str, out: list[Command]) -> None:
        """Kill a worker; nothing that it says counts from now on. It is gone when `WorkerDied` says so. If it is the
        last holder of some blocks, that is said (R7): it counts as the loss of both holders.
        """
        ledger, facts = self.ledger, self.ledger.workers[worker]
        alone = 0 if facts.doomed else self.held_alone(worker)
        words = f"; the last holder of {alone} blocks: both their holders are lost" if alone else ""
        data = {"worker": worker, "node": facts.node, "reason": reason + words, "blocks_held_alone": alone}
        if facts.role is Role.LEAVING:  # it was kept only as a holder
            ledger.leaving.pop(worker)
            if worker in ledger.draining:
                ledger.draining.remove(worker)
            ledger.notices.pop(worker, None)
            ledger.workers.update_facts(worker, role=Role.READY)
        ledger.workers.update_facts(worker, doomed=True, why=reason, suspected_until_s=None)
        if isinstance(self.state, Parking):
            self.state.reports.pop(worker, None)
        elif isinstance(self.state, Gathering):
            self.state.parked.pop(worker, None)
        out += [Announce("doomed", data), Kill(worker, reason)]

    def fence(self, worker: int, reason: str, out: list[Command]) -> None:
        """Its node is lost: it counts as gone for good. Should it speak again, it is killed and not heard."""
        self.forget(worker)
        self.ledger.fenced[worker] = reason
        out.append(Kill(worker, reason))

    def retire(self, worker: int, out: list[Command]) -> None:
        """The worker holds nothing (any more): let it go."""
        starting = self.ledger.workers[worker].role is Role.STARTING
        self.forget(worker)
        out.append(Kill(worker, "not needed any more") if starting else Retire(worker))

    def resume_words(self) -> str:
        """Where the job can be started again, for the end of an error message."""
        newest = self.ledger.newest_restore()
        if newest.checkpoint is None:
            return "the job can be started again from the beginning"
        return f"the job can be resumed from step {newest.step} ({newest.checkpoint})"

    def fail(self, error: str, out: list[Command]) -> None:
        """The run ends here. Workers are killed: after an error nobody waits for them to hand over anything."""
        ended = Ended(Phase.FAILED, self.step(), error=error)
        self.enter(ended)
        self.complete_incident("failed", None, out)
        out.extend(Kill(worker, "the run has failed") for worker in sorted({*self.ledger.workers, *self.ledger.fenced}))
        out.append(EndRun("failed", ended.step, error=error))

    def end(self, ended: Ended, out: list[Command]) -> None:
        """The run ends in order: finished or stopped."""
        self.enter(ended)
        self.complete_incident(ended.phase.value, None, out)
        for worker in sorted(self.ledger.workers):
            facts = self.ledger.workers[worker]
            started = facts.role is not Role.STARTING and not facts.doomed
            out.append(Retire(worker) if started else Kill(worker, f"the run has {ended.phase.value}"))
        out.extend(Kill(worker, why) for worker, why in sorted(self.ledger.fenced.items()))
        out.append(EndRun(ended.phase.value, ended.step, ended.digest, ended.error))
