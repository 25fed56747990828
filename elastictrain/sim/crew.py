"""The members of one generation, as one: they form, seal, step, stall, park and finish together.

Steps are not simulated one by one (`paced` does that): how many have been committed follows from the time since the
seal. What differs between members is drawn when something interrupts them: a vote may have been complete at some and
not yet at others.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from enum import Enum
from functools import partial
from random import Random
from typing import Protocol, TypeVar

from elastictrain.controller import events as ev
from elastictrain.protocol import FormPlan, StepSignals
from elastictrain.sim.books import Books
from elastictrain.sim.clock import Clock
from elastictrain.sim.pace import Devices, Samples, Swings
from elastictrain.sim.pilot import Letter
from elastictrain.sim.process import Process, Stage, vote_bytes
from elastictrain.sim.report import PAUSE, Tally
from elastictrain.sim.scenario import Scenario

BATCHES = 64
"""Answers of a large world reach the controller in so many letters: it polls, it is not called by each."""

Item = TypeVar("Item")


class Band(Enum):
    """What the members do together. STALLED: they wait for a peer that does not answer, or have been told to park."""

    FORMING = "forming"
    STEPPING = "stepping"
    PAUSED = "paused"
    STALLED = "stalled"
    FINISHED = "finished"


class Surroundings(Protocol):
    """What a crew needs of the cluster around it."""

    scenario: Scenario
    clock: Clock
    rng: Random
    books: Books
    tally: Tally
    processes: dict[int, Process]
    next_checkpoint_s: float
    devices: Devices
    samples: Samples | None
    swings: Swings

    @property
    def machine_steps(self) -> int: ...
    def post(self, delay_s: float, letter: Letter) -> None: ...
    def tell(self, delay_s: float, said: StepSignals) -> None: ...


class Crew:
    """Enters `plan` at once. A member that is missing or silent lets all the others wait."""

    def __init__(self, around: Surroundings, plan: FormPlan) -> None:
        self.around, self.plan = around, plan
        self.generation = plan.generation
        self.band = Band.FORMING
        self.step_s = around.scenario.step_time_s(plan.layout.world_size)
        self.since_s, self.at_step = 0.0, plan.step  # it steps without a break since then, from there
        self.pausing = False
        whole = True
        for worker in plan.layout.workers:
            process = around.processes.get(worker)
            if process is None or process.silent or process.parked_at >= plan.generation:
                whole = False
            else:
                process.stage, process.generation = Stage.FORMING, plan.generation
        if not whole:
            self.band = Band.STALLED
            around.clock.after(around.scenario.costs.collective_timeout_s, self.complain)
            return
        restores = plan.restore is not None and plan.restore.checkpoint is not None
        forming_s = around.scenario.costs.forming_time_s(plan.layout.world_size, restores=restores)
        if restores and around.rng.random() < around.scenario.rates.corrupt_checkpoint:
            around.clock.after(forming_s / 2, self._find_corrupt)
        around.clock.after(forming_s, self._seal)

    def members(self) -> list[Process]:
        """Those that live and are in it, in rank order."""
        found = map(self.around.processes.get, self.plan.layout.workers)
        return [p for p in found if p is not None and p.generation == self.generation]

    def committed(self) -> int:
        """The last step committed by now, while it steps."""
        done = int((self.around.clock.now_s - self.since_s) / self.step_s + 1e-9)
        return self.at_step + max(0, done)

    def time_of(self, step: int) -> float:
        """When `step` will be committed, if nothing comes in between."""
        return self.since_s + (step - self.at_step) * self.step_s

    # --- forming ---

    def _seal(self) -> None:
        if self.band is not Band.FORMING:
            return
        around = self.around
        members = self.members()
        around.books.enter(self.plan, around.processes)
        self._see_seal(members)
        self.band = Band.STEPPING
        self._begin_stepping()
        around.tally.resume(around.clock.now_s, self.plan)
        self._later(around.scenario.costs.report_every_s, self._report)
        around.clock.at(around.next_checkpoint_s, self._begin_checkpoint)
        around.clock.at(self.time_of(around.machine_steps), self._finish)

    def _begin_stepping(self) -> None:
        self.since_s = self.around.clock.now_s

    def _see_seal(self, members: Sequence[Process]) -> None:
        for process in members:
            process.stage, process.sealed, process.vote = Stage.STEPPING, self.generation, None
        generation, step = self.generation, self.plan.step

        def sealed(now_s: float, part: Sequence[Process]) -> Iterable[ev.Event]:
            return [ev.Sealed(now_s, generation, process.number, step) for process in part]

        self._post_all(members, sealed, self.around.scenario.costs.poll_s)

    def _find_corrupt(self) -> None:
        """One member finds that the checkpoint's bytes are not what its hash says."""
        if self.band is Band.FORMING:
            self.band = Band.STALLED
            worker = self.around.rng.choice(self.members()).number
            self._say(lambda now_s: ev.WorkerFailed(now_s, self.generation, worker, "restore", "hash differs"))

    # --- stepping ---

    def _later(self, delay_s: float, act: Callable[[], None]) -> None:
        self.around.clock.after(delay_s, act)

    def _report(self) -> None:
        """What has been published since the last report: the newest step is enough."""
        if self.band is Band.STEPPING:
            self._publish(self.committed() - 1)
            self._later(self.around.scenario.costs.report_every_s, self._report)

    def _publish(self, step: int) -> None:
        if step >= max(1, self.plan.step):
            self._say(lambda now_s: ev.Progress(now_s, self.generation, step))

    def _begin_checkpoint(self) -> None:
        if self.band is Band.STEPPING:
            costs = self.around.scenario.costs
            self.around.next_checkpoint_s = self.around.clock.now_s + costs.checkpoint_every_s
            self._later(costs.checkpoint_write_s, partial(self._end_checkpoint, self.committed()))
            self.around.clock.at(self.around.next_checkpoint_s, self._begin_checkpoint)

    def _end_checkpoint(self, step: int) -> None:
        """Its manifest is created once the next step's vote is complete, if the generation still lives."""
        if self.band is Band.STEPPING and self.plan.step < step < self.committed():
            self._store(step)

    def _store(self, step: int) -> None:
        path = f"checkpoint {step} of generation {self.generation}"
        self._say(lambda now_s: ev.CheckpointCommitted(now_s, self.generation, step, path))

    def _finish(self) -> None:
        """The closing vote after the last step."""
        if self.band is not Band.STEPPING:
            return
        steps = self.around.machine_steps
        if self.committed() < steps:  # something has delayed it
            self.around.clock.at(self.time_of(steps), self._finish)
            return
        self.band = Band.FINISHED
        members = self.members()
        for process in members:
            process.stage, process.applied = Stage.FINISHED, steps
        generation, digest = self.generation, f"digest of {steps}"

        def finished(now_s: float, part: Sequence[Process]) -> Iterable[ev.Event]:
            return [ev.WorkerFinished(now_s, generation, process.number, steps, digest) for process in part]

        self._post_all(members, finished, self.around.scenario.costs.poll_s)

    def delay(self, by_s: float) -> None:
        """A short partition: everybody waits for a message, and the step under way takes longer."""
        if self.band is Band.STEPPING:
            now_s, done = self.around.clock.now_s, self.committed()
            self.since_s, self.at_step = max(self.since_s, now_s) + by_s, done

    # --- interruptions ---

    def stall(self, cause: str, *, in_apply: bool = False) -> None:
        """A member is lost or silent, or some have been told to park: nobody commits any more.

        `in_apply`: the fault hit between the vote and the end of apply, so that the vote was complete.
        """
        around, rng = self.around, self.around.rng
        if self.band not in (Band.FORMING, Band.STEPPING, Band.PAUSED):
            return
        around.tally.interrupt(around.clock.now_s, cause)
        was, self.band = self.band, Band.STALLED
        members = self.members()
        if was is Band.FORMING:
            self._stop_forming(members)
        elif was is Band.STEPPING:
            ahead = in_apply or rng.random() < around.scenario.rates.split_vote
            self._stop_stepping(members, rng.choice((0.1, 0.5, 1.0)) if ahead else 0.0)

    def _stop_forming(self, members: Sequence[Process]) -> None:
        """Some may have rolled forward already; or the seal was complete, and some have seen it."""
        around, rng, plan = self.around, self.around.rng, self.plan
        whole = len(members) == plan.layout.world_size
        if whole and rng.random() < around.scenario.rates.late_seal:
            around.books.enter(plan, around.processes)
            self._see_seal([process for process in members if rng.random() < 0.5])
            return
        holders = set() if plan.previous is None else set(plan.previous.workers)
        for process in members:
            if plan.restore is not None and rng.random() < 0.5:
                process.applied, process.vote, process.sealed = plan.step, None, 0
            elif process.number in holders and process.applied == plan.step - 1 and rng.random() < 0.5:
                process.applied, process.vote, process.gathered = plan.step, plan.roll_forward, False

    def _stop_stepping(self, members: Sequence[Process], ahead: float) -> None:
        """All have applied the step that is committed; a share `ahead` of them also the one after that."""
        rng, reached = self.around.rng, min(self.committed(), self.around.machine_steps)
        self.mark(members, reached)
        if reached >= self.around.machine_steps:
            return
        for process in members:
            if ahead and rng.random() < ahead:
                process.applied, process.vote, process.gathered = reached + 1, vote_bytes(reached + 1), False
        if rng.random() < 0.5:  # the last row may still have left
            self._publish(reached if ahead == 1.0 else reached - 1)
        self.around.tally.steps_redone += ahead == 0.0

    def mark(self, members: Iterable[Process], reached: int) -> None:
        self.around.books.marks[self.generation] = reached
        vote = vote_bytes(reached) if reached > self.plan.step else None
        for process in members:
            process.applied, process.vote, process.gathered = reached, vote, True

    def complain(self) -> None:
        """A member or two has waited in vain for a peer, and says so."""
        if self.band is not Band.STALLED:
            return
        waiting = [p for p in self.members() if not p.silent and p.stage in (Stage.FORMING, Stage.STEPPING)]
        for process in self.around.rng.sample(waiting, min(2, len(waiting))):
            self.around.post(self.around.scenario.costs.message_s, partial(self._troubled, process.number))

    def _troubled(self, worker: int, now_s: float) -> list[ev.Event]:
        return [ev.WorkerTroubled(now_s, self.generation, worker, "peer lost")]

    # --- pauses ---

    def ask_pause(self, worker: int, store: bool) -> None:
        """`worker` raises the flag in its next vote: all park at that commit."""
        process = self.around.processes.get(worker)
        if self.band is not Band.STEPPING or process is None or process.silent or self.pausing:
            return
        self.pausing = True
        step = self.committed() + 1
        self.around.clock.at(self.time_of(step), self._pause, step, store)

    def _pause(self, step: int, store: bool) -> None:
        if self.band is not Band.STEPPING:
            return
        if self.committed() < step:
            self.around.clock.at(self.time_of(step), self._pause, step, store)
            return
        self.band = Band.PAUSED
        self.around.tally.interrupt(self.around.clock.now_s, PAUSE)
        self.mark(self.members(), step)
        self._later(self.around.scenario.costs.checkpoint_write_s if store else 0.0, partial(self._parked, step, store))

    def _parked(self, step: int, store: bool) -> None:
        if self.band is not Band.PAUSED:
            return
        if store:
            self._store(step)
        self.band = Band.STALLED
        for process in self.members():
            process.stage = Stage.PARKED
        self.park(self.generation, self.plan.layout.workers)

    def park(self, generation: int, workers: Iterable[int]) -> None:
        """These have been told to park, or have come to it by themselves; whoever can, answers."""
        if self.generation == generation:
            self.stall("told to park")
        around = self.around
        found = [p for p in map(around.processes.get, workers) if p is not None]
        reports = [p.park(generation) for p in found if not p.silent and p.generation <= generation]
        self._post_all(
            reports,
            lambda now_s, part: [ev.WorkerParked(now_s, generation, report) for report in part],
            around.scenario.costs.park_s + around.scenario.costs.message_s,
        )

    # --- messages ---

    def _say(self, what: Callable[[float], ev.Event]) -> None:
        self.around.post(self.around.scenario.costs.message_s, lambda now_s: [what(now_s)])

    def _post_all(
        self, items: Sequence[Item], events: Callable[[float, Sequence[Item]], Iterable[ev.Event]], within_s: float
    ) -> None:
        """One message of each, in batches that arrive at random within a time."""
        size = -(-len(items) // BATCHES) or 1
        for at in range(0, len(items), size):
            letter = partial(_letter, events, items[at : at + size])
            self.around.post(within_s * self.around.rng.random(), letter)


def _letter(
    events: Callable[[float, Sequence[Item]], Iterable[ev.Event]], part: Sequence[Item], now_s: float
) -> Iterable[ev.Event]:
    return events(now_s, part)
