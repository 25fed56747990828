"""A worker's life: wait for a plan, enter its generation, step until told otherwise. No Ray here.

Two threads meet in a session. The *training thread* (`run`) does all the work. The *control thread* (whoever calls
`form`, `park`, `ask_pause`) only latches and reports. Between them stands one lock, taken by apply and by park:
apply is the commit, and a park report is a promise that no older generation will move the state again (R3).
"""

from __future__ import annotations

import queue
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from elastictrain.controller import events as ev
from elastictrain.engine import saving
from elastictrain.engine.collective import GroupSet, connect, meet
from elastictrain.engine.commit import Committed, apply_step
from elastictrain.engine.forming import enter_generation
from elastictrain.engine.lanes import LaneTree
from elastictrain.engine.numerics import capture
from elastictrain.engine.probes import Probes
from elastictrain.engine.reports import StepReport, step_row
from elastictrain.engine.step import Batches, Pending, StepRunner
from elastictrain.engine.vote import FLAG_PAUSE, Tally, VoteFormat
from elastictrain.engine.worker_model import WorkerModel, hook
from elastictrain.errors import CorruptCheckpoint, ElasticTrainError, InternalError, PeerLost, UserError
from elastictrain.job import Job
from elastictrain.layout import Layout, Shard
from elastictrain.protocol import FormPlan, ParkReport

FIRST_STEP_DEADLINE_S = 600.0
"""Imports, compilation and caches happen in the first step of a process: no measurement bounds it yet."""


class Parked(Exception):
    """The training thread has noticed that its generation is over."""


@dataclass(frozen=True, slots=True)
class Row:
    """One published step for metrics.jsonl."""

    values: dict[str, Any]


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
        emit: Callable[[ev.Event | Row], None],
        probes: Probes | None = None,
        data_fingerprint: Mapping[str, Any] | None = None,
        stages: Sequence[Mapping[str, Any]] = (),
    ) -> None:
        self.job, self.worker, self.model, self.batches = job, worker, model, batches
        self.device, self.host, self.emit = device, host, emit
        self.probes = probes or Probes(worker, ())
        self.data_fingerprint = dict(data_fingerprint or {})
        self.stages = [dict(stage) for stage in stages]
        self.numerics = capture(job.numerics, device)
        self.tree = LaneTree(model.space, job.lanes, device, job.micro_batches)
        self.tree.watch(model.flat.model)
        self.tree.interrupted = self.check
        self.saver = saving.Saver(job.checkpoint) if job.checkpoint else None
        self.apply_lock = threading.Lock()
        self._inbox: queue.SimpleQueue[FormPlan | None] = queue.SimpleQueue()
        self._latched = 0
        self._pause_in = -1
        self._offer: tuple[int, tuple[tuple[int, ...], ...]] | None = None
        self.groups: GroupSet | None = None
        self.generation = 0
        self.layout: Layout | None = None
        self.committed = Committed()
        self.pending: Pending | None = None
        self.vote_format: VoteFormat | None = None
        self.pristine = True
        self._store_address = ""
        self._store: Any = None
        self._longest_s = 0.0
        self.computing = 0

    def rehearse(self) -> None:
        """Run one lane and throw it away: imports, caches and the recipe's own errors come now and not in a step."""
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
        runner.run_lane(1, 0, pending, first=True, merge=False)
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
            report = self.report()
        if groups is not None:
            groups.drop()
        return report

    def ask_pause(self, generation: int) -> None:
        """Raise the pause flag in the next vote of `generation`: everybody parks at that commit."""
        self._pause_in = generation

    def offer_lanes(self, plan: int, lanes: tuple[tuple[int, ...], ...]) -> None:
        """Offer a new split of the lanes. It is switched in, without a barrier, at the first step at which every vote
        has seen it.
        """
        self._offer = (plan, lanes)

    def stop(self) -> None:
        """Let the training thread end."""
        with self.apply_lock:
            self._latched = 1 << 62
            groups, self.groups = self.groups, None
        if groups is not None:
            groups.drop()
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
        )

    def row_of(self, tally: Tally, seconds: Mapping[str, float] | None = None) -> dict[str, Any]:
        """The metrics row of a step that was applied under the layout in force."""
        world = self.layout.world_size if self.layout is not None else 0
        return step_row(self.job, self.model.recipe, tally, seconds or {}, world)

    # --- the training thread ---

    def run(self) -> None:
        """Work until `stop`. Never raises: what happens leaves as events."""
        while (plan := self._inbox.get()) is not None:
            problem: ev.Event | None = None
            try:
                self._generation(plan)
            except Parked:
                pass
            except BaseException as error:
                problem = self._explain(plan.generation, error)
            self._leave(plan.generation)
            if problem is not None:
                self.emit(problem)

    def _explain(self, generation: int, error: BaseException) -> ev.Event | None:
        if self.is_parked(generation):
            return None  # whatever broke, broke because the generation was being taken down
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
        with self.apply_lock:
            self._latched = max(self._latched, generation)
            groups, self.groups = self.groups, None
        if groups is not None:
            groups.drop()

    def is_parked(self, generation: int | None = None) -> bool:
        return (self.generation if generation is None else generation) <= self._latched

    def check(self) -> None:
        """Raise Parked when this generation is over; called between lanes and as gradients come."""
        if self.is_parked():
            raise Parked

    def _generation(self, plan: FormPlan) -> None:
        if plan.generation <= self._latched:
            raise Parked
        self.generation = plan.generation
        groups = self._open_groups(plan)
        with self.apply_lock:
            self.check()
            self.groups = groups
        enter_generation(self, plan, groups)
        self.layout = plan.layout
        self.emit(ev.Sealed(0.0, plan.generation, self.worker, plan.step))
        _Stepping(self, plan, groups).run()

    def _open_groups(self, plan: FormPlan) -> GroupSet:
        layout = plan.layout
        rank, world = layout.rank(self.worker), layout.world_size
        if world > 1:
            if self._store_address != plan.store:
                self._store, self._store_address = connect(plan.store), plan.store
            meet(self._store, plan.generation, rank, world, self.is_parked)
        self.probes.at(plan.step + 1, "form")
        return GroupSet(
            self._store, generation=plan.generation, rank=rank, world=world, device=self.device, host=self.host
        )


class _Stepping:
    """The steps of one generation, from its seal to its end."""

    def __init__(self, session: Session, plan: FormPlan, groups: GroupSet) -> None:
        self.session, self.plan, self.groups = session, plan, groups
        self.job = session.job
        self.layout = plan.layout
        self.first_step = True
        self.lane_plan = 0
        self.runner = self._runner()

    def _runner(self) -> StepRunner:
        s = self.session
        runner = StepRunner(
            self.job, s.model.recipe, s.worker, self.layout, self.groups, s.model.flat, s.model.held, s.tree, s.batches,
            probe=lambda phase: s.probes.at(self.step, phase), check=s.check,
        )  # fmt: skip
        s.vote_format = runner.vote_format
        s.layout = self.layout
        return runner

    @property
    def is_publisher(self) -> bool:
        """The first member that is no newcomer: it knows the steps before this generation."""
        return self.session.worker == self.plan.first_known

    def run(self) -> None:
        s = self.session
        self.step = self.plan.step
        report = self._after_commit(self.step, sealed=True)
        while self.step < self.job.steps:
            self.step += 1
            tally = self._one_step(report)
            if tally.flags & FLAG_PAUSE:
                with s.apply_lock:
                    s.check()
                park = s.park(self.plan.generation)
                s.emit(ev.WorkerParked(0.0, self.plan.generation, park))
                return
            report = self._after_commit(self.step, sealed=False)
        self._close(report)

    def _one_step(self, report: StepReport) -> Tally:
        s = self.session
        started = time.perf_counter()
        s.computing = self.step
        unmeasured = self.first_step or report.evaluates or report.stores  # peers may evaluate or store meanwhile
        self.groups.deadline_s = FIRST_STEP_DEADLINE_S if unmeasured else max(60.0, 30.0 * s._longest_s)
        self._expect(self.step)
        pending = self.runner.run(self.step)
        with s.apply_lock:
            s.check()
            s.pending = pending
        flags = FLAG_PAUSE if s._pause_in == self.plan.generation else 0
        offered = s._offer[0] if s._offer else 0
        vote = self.runner.vote(pending, flags=flags, plan=offered)
        extras = self.groups.all_gather_sized(report.extras()) if report.stores else []
        s.probes.at(self.step, "voted")
        # The vote of this step is complete: its predecessor can no more be redone, and may be seen (R5).
        self._publish(report)
        with self.runner._timed("apply"), s.apply_lock:
            s.check()
            if self.first_step:  # one vote after the seal: what moved away is let go (R4)
                s.model.held.keep_only(self.layout.held(s.worker))
            tally = apply_step(s, pending, vote, self.runner.vote_format, self.plan.generation)
            s.committed.remember(s.row_of(tally, self.runner.seconds))
        self.runner.gather()
        s.committed.gathered_step = self.step
        self.runner.seconds["step_s"] = time.perf_counter() - started
        if not self.first_step:
            s._longest_s = max(s._longest_s, self.runner.seconds["step_s"])
        self.first_step = False
        s.committed.remember(s.row_of(tally, self.runner.seconds))
        self._commit_checkpoint(report, extras)
        self._switch_lanes(tally.plan)
        return tally

    def _expect(self, step: int) -> None:
        expect = getattr(self.session.batches, "expect", None)
        if expect is not None:
            mine = self.layout.lanes_of(self.session.worker)
            expect([(t, lane) for t in (step, step + 1) if t <= self.job.steps for lane in mine])

    def _switch_lanes(self, plan: int) -> None:
        offer = self.session._offer
        if offer is not None and plan > self.lane_plan and plan == offer[0]:
            self.lane_plan = plan
            self.layout = self.layout.with_lanes(offer[1])
            self.runner = self._runner()

    # --- at a commit ---

    def _after_commit(self, step: int, *, sealed: bool) -> StepReport:
        """Evaluate and write packs where step `step` asks for it. What comes of it is published one vote later; a step
        that was sealed with nothing more to come is published at once.
        """
        s, last = self.session, step == self.job.steps
        known = self.plan.published_step >= step if sealed else False
        evaluate = bool(self.job.evaluate_every) and step > 0 and not known
        evaluate = evaluate and (step % (self.job.evaluate_every or 1) == 0 or last)
        report = StepReport(step, row=s.committed.rows.get(step) if not known else None)
        checkpoint = self.job.checkpoint
        store = checkpoint is not None and step > 0 and not (sealed and self.plan.checkpointed_step >= step)
        store = (
            store and checkpoint is not None and (step % checkpoint.every_steps == 0 or (last and checkpoint.at_end))
        )
        report.evaluates, report.stores = evaluate, store
        if evaluate and self.is_publisher:
            report.evaluation = self._evaluate()
        if store and s.saver is not None:
            report.share = s.saver.write(self._owned(), step=step, generation=self.plan.generation, worker=s.worker)
        if sealed:
            self._publish_missed(step)
        if sealed and not evaluate and not store:
            self._publish(report)
            report.row = None
        return report

    def _owned(self) -> saving.Owned:
        s = self.session
        return saving.owned_state(
            s.model.flat, s.model.held, self.layout.owned(s.worker), with_counters=self.runner.rank == 0
        )

    def _evaluate(self) -> dict[str, float]:
        """On the committed parameters, in eval mode; whatever the recipe does to buffers or mode is undone."""
        s = self.session
        model = s.model.flat.model
        modes = {module: module.training for module in model.modules()}
        s.model.flat.before_lane()
        model.eval()
        try:
            with torch.no_grad():
                result = hook(s.model.recipe, "evaluate")(model)
        finally:
            for module, training in modes.items():
                module.training = training
        return {str(name): float(value) for name, value in result.items()}

    def _publish_missed(self, sealed_step: int) -> None:
        """Steps before the sealed one whose rows died with the worker that was to publish them."""
        for step in range(self.plan.published_step + 1, sealed_step):
            row = self.session.committed.rows.get(step)
            if row is not None:
                self._publish(StepReport(step, row=row))

    def _publish(self, report: StepReport) -> None:
        if self.is_publisher and report.row is not None and report.step > 0:
            if report.evaluation:
                report.row["evaluation"] = report.evaluation
            self.session.emit(Row(dict(report.row, generation=self.plan.generation)))
            self.session.emit(ev.Progress(0.0, self.plan.generation, report.step))

    def _commit_checkpoint(self, report: StepReport, extras: list[bytes]) -> None:
        s = self.session
        if not (report.stores and self.is_publisher and s.saver is not None):
            return
        path = s.saver.commit(
            StepReport.shares(extras),
            step=report.step,
            generation=self.plan.generation,
            tree={"step": report.step, "seed": self.job.seed, "stages": s.stages, "data": s.data_fingerprint,
                  "numerics": s.numerics},
            aliases=s.model.space.aliases,
            info={"world": self.layout.world_size},
        )  # fmt: skip
        s.emit(ev.CheckpointCommitted(0.0, self.plan.generation, report.step, path))

    def _close(self, report: StepReport) -> None:
        """The closing vote: after it the last step can no more be redone. Its digest names the final state."""
        s = self.session
        share = saving.digest_share(self._owned())
        extras = self.groups.all_gather_sized(report.extras()) if report.stores else []
        shares = self.groups.all_gather_sized(share)
        self._publish(report)
        self._commit_checkpoint(report, extras)
        digest = saving.combine_shares(shares, s.model.space.aliases)
        # Nobody leaves before everybody has the digest: a group dropped early would fail a slower peer.
        self.groups.all_gather_equal(b"done")
        s.emit(ev.WorkerFinished(0.0, self.plan.generation, s.worker, self.step, digest))


__all__ = ["Parked", "Row", "Session", "UserError"]
