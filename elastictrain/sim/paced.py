"""A crew whose steps are simulated one by one, since they differ: devices are unequal, some become slow, lanes move.

Every member keeps the newest split that it has heard of, and names it in its ballot, as `elastictrain.offers` says; all
switch after the vote in which all have named the same. What the members say of a step goes to the straggler watch
beside the controller, and what that decides comes back through the machine.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from functools import partial

from elastictrain.controller.commands import OfferLanes
from elastictrain.offers import first_split
from elastictrain.protocol import FormPlan, StepSignals
from elastictrain.redundancy import Pace, Sharing, second_holders, taken_over
from elastictrain.sim.crew import Band, Crew, Surroundings
from elastictrain.sim.pace import records
from elastictrain.sim.process import Process
from elastictrain.sim.shared import shared_step

LATE_SHARE = 0.1
"""Of the offers, those that are on their way for up to three steps: else hardly a vote would fall in between."""


class PacedCrew(Crew):
    """Its `committed` are counted and not computed."""

    sharing: Sharing | None

    def __init__(self, around: Surroundings, plan: FormPlan) -> None:
        self.done, self.ends_s, self.turn = plan.step, math.inf, 0
        self.layout, self.changed = plan.layout, True
        self.pace, self.sharing = Pace(plan.layout.world_size), None
        split = first_split(plan.layout)
        self.mark_in_force = split.mark
        for worker, lanes in zip(plan.layout.workers, plan.layout.lanes, strict=True):
            process = around.processes.get(worker)
            if process is not None:
                process.split, process.lanes = split, lanes
        around.swings.forget()
        super().__init__(around, plan)

    def committed(self) -> int:
        return self.done

    def time_of(self, step: int) -> float:
        if step <= self.done:
            return self.around.clock.now_s
        return self.ends_s + (step - self.done - 1) * self.step_s

    def delay(self, by_s: float) -> None:
        if self.band is Band.STEPPING:
            self.ends_s = max(self.ends_s, self.around.clock.now_s) + by_s

    def offer(self, command: OfferLanes, epoch: int) -> None:
        """Each member hears of it at another time, some a few steps later; orders may overtake each other."""
        costs, rng = self.around.scenario.costs, self.around.devices.rng
        for worker in command.workers:
            late_s = rng.uniform(0.0, 3.0) * self.step_s if rng.random() < LATE_SHARE else 0.0
            self._later(costs.message_s * rng.uniform(1.0, 5.0) + late_s, partial(self._hear, worker, command, epoch))

    def _hear(self, worker: int, command: OfferLanes, epoch: int) -> None:
        process = self.around.processes.get(worker)
        if process is not None and not process.silent and process.split is not None:
            process.split = process.split.after(command.generation, command.plan, command.lanes, epoch)

    # --- stepping ---

    def _begin_stepping(self) -> None:
        super()._begin_stepping()
        if self.done < self.around.machine_steps:
            self._begin_step()

    def _begin_step(self) -> None:
        """The slowest one decides how long it takes."""
        around = self.around
        now_s, devices = around.clock.now_s, around.devices
        members = self.members()
        self.lanes = [process.lanes for process in members]
        self.computed_s = [devices.computing_s(p, len(own), now_s) for p, own in zip(members, self.lanes, strict=True)]
        if around.scenario.shared_lanes:
            self._share()
        self.step_s = max(self.computed_s) + devices.transfer_s
        self.ends_s = now_s + self.step_s
        self.turn += 1
        around.clock.at(self.ends_s, self._end_step, self.turn)

    def _share(self) -> None:
        """Lanes that a late worker has not begun are taken over, as `redundancy` says."""
        around, dealt = self.around, tuple(self.lanes)
        if self.sharing is None or self.sharing.lanes != dealt:
            self.sharing = second_holders(dealt, around.scenario.shared_lanes, firsts=False)
        lane_s = [seconds / len(own) for seconds, own in zip(self.computed_s, dealt, strict=True)]
        found, ends_s = shared_step(self.sharing, lane_s, self.pace.usual_s())
        self.pace.learn([one if own else 0.0 for one, own in zip(lane_s, found, strict=True)])
        self.lanes, self.computed_s = list(found), list(ends_s)
        around.swings.taken_over += len(taken_over(dealt, found))

    def _end_step(self, turn: int) -> None:
        """Its vote is complete, and all apply it."""
        around = self.around
        if self.band is not Band.STEPPING or turn != self.turn:
            return
        if around.clock.now_s < self.ends_s:  # something has delayed it
            around.clock.at(self.ends_s, self._end_step, turn)
            return
        self.done += 1
        self._note_samples(self.done)
        self._tell()
        self._vote_on_split()
        if self.done < around.machine_steps:
            self._begin_step()

    def _tell(self) -> None:
        """One member hands on what all have said of the step."""
        around = self.around
        counts = [len(own) for own in self.lanes]
        dealt = [len(process.lanes) for process in self.members()]
        raw = records(counts, self.computed_s, around.devices.transfer_s, first=self.changed, dealt=dealt)
        self.changed = False
        said = StepSignals(self.generation, self.done, raw)
        around.tell(around.scenario.costs.poll_s, said)

    def _note_samples(self, step: int) -> None:
        if self.around.samples is not None:
            self.around.samples.commit(step, self.lanes)

    def _vote_on_split(self) -> None:
        """All have named the same one, and it is not the one in force."""
        members = self.members()
        named = [process.split for process in members if process.split is not None]
        assert len(named) == len(members) == self.layout.world_size
        marks = {split.mark for split in named}
        if len(marks) == 1 and marks != {self.mark_in_force}:
            around, before = self.around, self.layout
            for rank, (process, split) in enumerate(zip(members, named, strict=True)):
                process.lanes = split.lanes[rank]
            self.layout, self.changed = before.with_lanes(named[0].lanes), True
            self.mark_in_force = named[0].mark
            around.swings.moved(before.workers, before.lanes, self.layout.lanes, around.devices.changed_s)

    def _stop_stepping(self, members: Sequence[Process], ahead: float) -> None:
        super()._stop_stepping(members, ahead)
        if any(process.applied > self.done for process in members):  # its vote was complete at some
            self._note_samples(self.done + 1)

    def mark(self, members: Iterable[Process], reached: int) -> None:
        self.turn += 1  # what is under way is not taken
        super().mark(members, reached)
