"""A worker's life: wait for a plan, enter its generation, step until told otherwise. No Ray here.

Two threads meet in a session. The *training thread* (`run`) does all the work. The *control thread* (whoever calls
`form`, `park`, `ask_pause`) only latches and reports. Between them stands one lock, taken by apply and by park:
apply is the commit, and a park report is a promise that no older generation will move the state again (R3).
"""

from __future__ import annotations

import queue
import threading
import traceback
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from elastictrain.controller import events as ev
from elastictrain.engine.collective import GroupSet, connect, hang_up, meet
from elastictrain.engine.commit import Committed
from elastictrain.engine.commons import Commons
from elastictrain.engine.compiling import COMPILER
from elastictrain.engine.forming import enter_generation
from elastictrain.engine.guard import Guard
from elastictrain.engine.inquest import Knowledge
from elastictrain.engine.lanes import LaneTree
from elastictrain.engine.numerics import capture
from elastictrain.engine.one_lane import Batches
from elastictrain.engine.pacing import Pacing
from elastictrain.engine.pending import Pending
from elastictrain.engine.probes import Probes
from elastictrain.engine.reports import step_row
from elastictrain.engine.saver import Saver
from elastictrain.engine.step import StepRunner
from elastictrain.engine.stepping import Stepping
from elastictrain.engine.vote import FLAG_PAUSE, FLAG_STORE, Tally, VoteFormat
from elastictrain.engine.worker_model import WorkerModel
from elastictrain.errors import (
    CorruptCheckpoint,
    CorruptWorker,
    ElasticTrainError,
    InternalError,
    PeerLost,
    RecipeError,
)
from elastictrain.job import Job
from elastictrain.layout import Layout, Shard
from elastictrain.offers import Lanes, Split, first_split
from elastictrain.protocol import Doubt, FormPlan, ParkReport, Row, StepSignals
from elastictrain.pulse import Pulse
from elastictrain.signs import Activity


class Parked(Exception):
    """The training thread has noticed that its generation is over."""


class Session:
    """One worker. `emit` takes controller events and `Row`s, from either thread, and must not block."""

    def __init__(
        self,
        job: Job,
        worker: int,
        model: WorkerModel,
        batches: Batches,
        *,
        device: torch.device,
        host: str,
        emit: Callable[[ev.Event | Row | StepSignals], None],
        probes: Probes | None = None,
        data_fingerprint: Mapping[str, Any] | None = None,
        stages: Sequence[Mapping[str, Any]] = (),
        pulse: Pulse | None = None,
    ) -> None:
        self.job, self.worker, self.model, self.batches = job, worker, model, batches
        self.device, self.host, self.emit = device, host, emit
        self.pulse = pulse or Pulse.create_or_mute(None, worker)[0]
        self.probes = probes or Probes(worker, ())
        self.data_fingerprint = dict(data_fingerprint or {})
        self.stages = [dict(stage) for stage in stages]
        self.numerics = capture(job.numerics, device)
        self.tree = LaneTree(model.space, job.lanes, device, job.micro_batches)
        self.tree.watch(model.flat.model)
        self.tree.interrupted = self.check
        self.saver = Saver(job.checkpoint, self.probes.storing) if job.checkpoint else None
        self.pacing = Pacing(job.checkpoint)
        self.guard = Guard(model.flat, model.held)
        self.knowledge = Knowledge()
        self.doubt: Doubt | None = None
        self.corrupt = ""
        self.apply_lock = threading.Lock()
        self._inbox: queue.SimpleQueue[FormPlan | None] = queue.SimpleQueue()
        self._latched = 0
        self._pause_in, self._pause_flags = -1, 0
        self._split: Split | None = None
        self._offering = threading.Lock()
        self.groups: GroupSet | None = None
        self.generation = 0
        self.layout: Layout | None = None
        self.committed = Committed()
        self.pending: Pending | None = None
        self.vote_format: VoteFormat | None = None
        self.pristine = True
        self._store_address, self._opening = "", ""
        self._asked = ""  # the address of the store that questions of a step go to
        self._store: Any = None
        self._longest_s = 0.0
        self.computing = 0

    def rehearse(self, step: int = 1) -> None:
        """Run one lane of `step` and throw it away: imports, caches and the recipe's own errors come now and not in a
        step.
        """
        pending = Pending(0, 0)
        layout = Layout(
            1, (self.worker,), (tuple(range(self.job.lanes)),), (Shard(0, 1, self.worker, None),), self.job.lanes
        )
        groups = GroupSet(None, generation=0, rank=0, world=1, device=self.device, host=self.host)
        runner = StepRunner(
            self.job, self.model.recipe, self.worker, layout, groups, self.model.flat, self.model.held, self.tree,
            self.batches, probe=lambda _: None, check=lambda: None,
        )  # fmt: skip
        self.tree.interrupted = lambda: None
        self.guard.gathered()
        runner.run_lane(step, 0, pending, first=True, merge=False)
        if self.job.integrity.state and (changed := self.guard.verify()):
            raise RecipeError(
                f"a forward and backward of the recipe change {changed}: only the optimizer may. Leave such changes to "
                "the optimizer, or set integrity.state: false to train without the check for flipped bits"
            )
        self.guard.forget()
        self.tree.abandon()
        self.tree.interrupted = self.check

    # --- the control thread ---

    def form(self, plan: FormPlan) -> None:
        """Enter `plan`'s generation as soon as the training thread is free."""
        self._inbox.put(plan)

    def park(self, generation: int) -> ParkReport:
        """Latch apply off for `generation` and all before it, drop the groups, and report (R3, R6)."""
        with self.apply_lock:
            self._latched = max(self._latched, generation)
            groups, self.groups = self.groups, None
            if self.committed.tearing:
                raise InternalError(
                    f"worker {self.worker} has torn its state within apply and can promise nothing (R7)"
                )
            if self.corrupt:
                raise InternalError(f"worker {self.worker} is corrupt and can promise nothing: {self.corrupt}")
            report = self.report()
            opening = self._opening or self._stop_asking()
        if opening:
            hang_up(opening)  # before the report: after it the next generation may have a connection of its own there
        if groups is not None:
            # Destroying a group waits for its operations in flight; the report must not.
            threading.Thread(target=groups.drop, name="elastictrain-drop", daemon=True).start()
        return report

    def open_commons(self, plan: FormPlan) -> Commons | None:
        """For a job whose lanes are shared, what the members of its generation have in common."""
        world, settings = plan.layout.world_size, self.job.redundancy
        if settings.replay is not None:
            return Commons(settings, None, plan.generation, world, self._hang_up)
        if settings.lanes == "none" or world == 1:
            return None
        self._asked = plan.store
        return Commons(settings, self._store, plan.generation, world, self._hang_up)

    def _stop_asking(self) -> str:
        """Forget the connection to the store that questions of a step go to, so that it may be cut. Returns where."""
        asked, self._asked = self._asked, ""
        if asked:
            self._store_address = ""
        return asked

    def _hang_up(self) -> None:
        with self.apply_lock:  # or `park` does it, before the next generation connects
            asked = self._stop_asking()
            if asked:
                hang_up(asked)

    def ask_pause(self, generation: int, store: bool = False) -> None:
        """Raise the pause flag in the next vote of `generation`: everybody parks at that commit, after a checkpoint of
        it if `store`.
        """
        self._pause_in, self._pause_flags = generation, FLAG_PAUSE | (FLAG_STORE if store else 0)

    def pause_flags(self) -> int:
        """What this worker's next vote says about a pause."""
        return self._pause_flags if self._pause_in == self.generation else 0

    def offer_lanes(self, generation: int, plan: int, lanes: Lanes, epoch: int = 0) -> None:
        """Offer split number `plan` of the lanes of `generation`, by controller `epoch`. It is switched in, without a
        barrier, at the first step at which all votes name it (see `offers`).
        """
        with self._offering:
            if self._split is not None:
                self._split = self._split.after(generation, plan, lanes, epoch)

    @property
    def newest_split(self) -> Split:
        """The newest split of this generation's lanes that this worker has been offered."""
        assert self._split is not None  # since its first generation
        return self._split

    def stop(self) -> None:
        """Let the training thread end."""
        with self.apply_lock:
            self._latched = 1 << 62
            groups, self.groups = self.groups, None
        if groups is not None:
            groups.drop()
        if self.saver is not None:
            self.saver.copies.rest()
        self._inbox.put(None)

    def report(self) -> ParkReport:
        done = self.committed
        return ParkReport(
            worker=self.worker,
            generation=self.generation,
            applied_step=done.step,
            sealed_generation=done.sealed_generation,
            gathered=done.gathered_step == done.step,
            vote=done.vote,
            computing=self.computing == done.step + 1,
            holds_next=self.pending is not None and self.pending.step == done.step + 1,
            doubt=self.doubt,
        )

    def row_of(
        self,
        tally: Tally,
        seconds: Mapping[str, float] | None = None,
        data_wait: Mapping[str, float] | None = None,
    ) -> dict[str, Any]:
        """The metrics row of a step that was applied under the layout in force."""
        world = self.layout.world_size if self.layout is not None else 0
        return step_row(self.job, self.model.recipe, tally, seconds or {}, world, data_wait or {})

    # --- the training thread ---

    def run(self) -> None:
        """Work until `stop`. Never raises: what happens leaves as events."""
        self.pulse.adopt()
        with COMPILER.shown_in(self.pulse):
            while (plan := self._next_plan()) is not None:
                try:
                    self._generation(plan)
                except Parked:
                    pass
                except BaseException as error:
                    problem = self._explain(plan.generation, error)
                    if problem is not None:  # before peers are let go, who then say what they have to say
                        self.emit(problem)
                self._leave(plan.generation)

    def _next_plan(self) -> FormPlan | None:
        self.pulse.at(self.generation, self.committed.step, Activity.IDLE)
        return self._inbox.get()

    def _explain(self, generation: int, error: BaseException) -> ev.Event | None:
        if self.is_parked(generation) and not self.committed.tearing:
            return None  # whatever broke, broke because the generation was being taken down
        if isinstance(error, CorruptWorker):
            return None  # said before the groups were dropped (`inquest.convict`)
        if isinstance(error, PeerLost):
            return ev.WorkerTroubled(0.0, generation, self.worker, str(error))
        kind = "user"
        if self.committed.tearing:
            kind = "torn"
        elif isinstance(error, CorruptCheckpoint):
            kind = "restore"
        elif isinstance(error, InternalError):
            kind = "internal"
        if isinstance(error, ElasticTrainError):
            text = f"{type(error).__name__}: {error}"
        else:
            text = "".join(traceback.format_exception(error))
        return ev.WorkerFailed(0.0, generation, self.worker, kind, text)

    def _leave(self, generation: int) -> None:
        if self.saver is not None:
            self.saver.give_up()  # before the next generation writes into the state
            # One that was fenced hears of no later seal: it must not go on copying beside its successor. Where this one
            # publishes again, it serves again at the seal, and takes up what is missing.
            self.saver.copies.rest()
        with self.apply_lock:
            self._latched = max(self._latched, generation)
            groups, self.groups = self.groups, None
        if groups is not None:
            groups.drop()

    def is_parked(self, generation: int | None = None) -> bool:
        return (self.generation if generation is None else generation) <= self._latched

    def check(self) -> None:
        """Raise Parked when this generation is over; called between lanes and as gradients come, so it is also the
        sign that the lane gets on.
        """
        self.pulse.beat()
        if self.is_parked():
            raise Parked

    def _generation(self, plan: FormPlan) -> None:
        if plan.generation <= self._latched:
            raise Parked
        self.generation = plan.generation
        with self._offering:
            self._split = first_split(plan.layout)
        self.pulse.at(plan.generation, plan.step, Activity.MEET)
        groups = self._open_groups(plan)
        with self.apply_lock:
            self.check()
            self.groups = groups
        read = enter_generation(self, plan, groups)
        self.layout = plan.layout
        read = read if self.worker == plan.first_known else None  # one says so for all
        if read is not None and read.healed and self.saver is not None:
            self.saver.copies.mend(plan.step)
        self.emit(ev.Sealed(0.0, plan.generation, self.worker, plan.step, read))
        stepping = Stepping(self, plan, groups)
        try:
            stepping.run()
        finally:
            stepping.close()

    def _open_groups(self, plan: FormPlan) -> GroupSet:
        layout = plan.layout
        rank, world = layout.rank(self.worker), layout.world_size
        with self.apply_lock:
            self.check()
            self._opening = plan.store
        try:
            if world > 1:
                if not plan.store or self._store_address != plan.store:
                    self._store, self._store_address = connect(plan.store), plan.store
                meet(self._store, plan.generation, rank, world, self.is_parked)
            self.probes.at(plan.step + 1, "form")
            self.check()
            return GroupSet(
                self._store, generation=plan.generation, rank=rank, world=world, device=self.device, host=self.host
            )
        except (PeerLost, Parked):
            self._store_address = ""  # the connection may have been cut, so that nobody waits for one who has died
            raise
        finally:
            self._opening = ""
