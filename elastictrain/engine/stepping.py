"""The steps of one generation, from its seal to its end: the training thread's inner loop."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

from elastictrain.controller import events as ev
from elastictrain.engine import saving
from elastictrain.engine.collective import GroupSet
from elastictrain.engine.commit import apply_step
from elastictrain.engine.inquest import check_claims, check_lane, gather_claims, settle
from elastictrain.engine.keeping import FIRST_STEP_DEADLINE_S, Keeper
from elastictrain.engine.reports import StepReport
from elastictrain.engine.signals import StepClock, Timer
from elastictrain.engine.step import StepRunner
from elastictrain.engine.vote import FLAG_PAUSE, FLAG_STORE, FLAG_STORING, Tally
from elastictrain.engine.worker_model import hook
from elastictrain.offers import first_split
from elastictrain.protocol import FormPlan, Row, StepSignals
from elastictrain.signs import Activity

if TYPE_CHECKING:
    from elastictrain.engine.session import Session

AHEAD_STEPS = 128
"""Steps whose batches are named to the feeder; how many of them it has ready follows from its bytes."""


COPYING_S = 20.0
"""At the end of a run peers hear this often that checkpoints are still being copied."""


class Stepping:
    """The steps of one generation, from its seal to its end."""

    def __init__(self, session: Session, plan: FormPlan, groups: GroupSet) -> None:
        self.session, self.plan, self.groups = session, plan, groups
        self.job = session.job
        self.layout = plan.layout
        self.first_step = True
        self.split = first_split(plan.layout)
        self.named = self.split  # in our last ballot
        self.clock = StepClock()
        self.expected: tuple[tuple[int, ...], int] = ((), 0)  # lanes, and the step up to which they are expected
        self.commons = session.open_commons(plan)
        self.runner = self._runner()
        self.keeper = Keeper(session, plan, groups, self._owned)

    def _runner(self) -> StepRunner:
        s = self.session
        shares = None if self.commons is None else self.commons.shares(s, self.layout, self.groups, self._probe)
        runner = StepRunner(
            self.job, s.model.recipe, s.worker, self.layout, self.groups, s.model.flat, s.model.held, s.tree, s.batches,
            probe=lambda phase: self._probe(phase), check=s.check, enter=s.pulse.enter,
            guard=s.guard if self.job.integrity.state else None, kinds=s.knowledge.kinds, spoils=s.probes.spoils_lane,
            drags=s.probes.drags, clock=self.clock, shares=shares,
        )  # fmt: skip
        s.vote_format = runner.vote_format
        s.layout = self.layout
        return runner

    def _probe(self, phase: str) -> None:
        self.session.probes.at(self.step, phase)
        if phase == "compute":
            self.session.probes.flips(self.session, self.step, phase)

    @property
    def is_publisher(self) -> bool:
        return self.keeper.is_publisher

    def run(self) -> None:
        s = self.session
        self.step = self.plan.step
        s.pacing.given_up()
        self.keeper.settle()
        report = self._after_commit(self.step, sealed=True)
        while self.step < self.job.steps:
            self.step += 1
            tally = self._one_step(report)
            if tally.flags & FLAG_PAUSE:
                self._finish_storing()
                if tally.flags & FLAG_STORE:
                    self._store_now()
                self.keeper.finish()
                with s.apply_lock:
                    s.check()
                park = s.park(self.plan.generation)
                s.emit(ev.WorkerParked(0.0, self.plan.generation, park))
                return
            report = self._after_commit(self.step, sealed=False, flags=tally.flags)
        self._close(report)

    def close(self) -> None:
        """The generation is over."""
        if self.commons is not None:
            self.commons.close()

    def _one_step(self, report: StepReport) -> Tally:
        s = self.session
        started = time.perf_counter()
        s.computing = self.step
        s.pulse.begin_step(self.plan.generation, self.step)
        unmeasured = self.first_step or report.evaluates or report.stores  # peers may evaluate or store meanwhile
        self.groups.deadline_s = FIRST_STEP_DEADLINE_S if unmeasured else max(60.0, 30.0 * s._longest_s)
        self._expect(self.step)
        self.keeper.heed()
        pending = self.runner.run(self.step)
        with s.apply_lock:
            s.check()
            s.pending = pending
        s.probes.flips(s, self.step, "reduced")
        flags = s.pause_flags() | self.keeper.flags | s.pacing.flags(is_publisher=self.is_publisher)
        storing = report.stores or bool(self.keeper.flags & FLAG_STORING)
        self.named = s.newest_split
        vote = self.runner.vote(pending, flags=flags, plan=self.named.mark, stores=storing, evaluates=report.evaluates)
        self._tell_signals(vote)
        self._check_sums(vote)
        stored = self._gather_shares(vote)
        s.probes.at(self.step, "voted")
        # The vote of this step is complete: its predecessor can no more be redone, and may be seen (R5).
        self._publish(report)
        if s.saver is not None:
            begun = time.perf_counter()
            with self.runner._timed("apply"):
                s.saver.before_apply()
            s.pacing.stalled(time.perf_counter() - begun)
        with self.runner._timed("apply"), s.apply_lock:
            s.check()
            if self.first_step:  # one vote after the seal: what moved away is let go (R4)
                s.model.held.keep_only(self.layout.held(s.worker))
            s.guard.forget()
            tally = apply_step(s, pending, vote, self.runner.vote_format, self.plan.generation)
            s.committed.remember(s.row_of(tally, self.runner.seconds, self.runner.data_wait))
        self._sum_up(s.guard.applied)
        self.runner.gather()
        s.probes.flips(s, self.step, "gathered")
        self._sum_up(s.guard.gathered)
        with s.apply_lock:
            s.check()
            s.committed.gathered_step = self.step
        settle(s, self.layout, self.groups, self.step)
        s.pulse.end_step()
        self.runner.seconds["step_s"] = time.perf_counter() - started
        self.clock.end(self.runner.seconds)
        if not self.first_step:
            s._longest_s = max(s._longest_s, self.runner.seconds["step_s"])
            s.pacing.stepped(self.runner.seconds["step_s"])
        self.first_step = False
        s.committed.remember(s.row_of(tally, self.runner.seconds, self.runner.data_wait))
        if self.commons is not None and tally.shares is not None:
            self.commons.end_step(s, self.runner, tally.shares)
        self._commit_checkpoint(*stored)
        self._switch_lanes(tally.plan)
        return tally

    def _sum_up(self, take: Callable[[], None]) -> None:
        """Of a worker without a partner nobody else has a copy: it is its own witness."""
        if self.job.integrity.state and (self.job.integrity.witness or self.layout.world_size == 1):
            with Timer(self.runner.seconds, "sums_s"):
                take()

    def _check_sums(self, vote: bytes) -> None:
        """Before anything that the vote makes final is published, and before apply (see `inquest`)."""
        s, claims = self.session, self.runner.vote_format.claims(vote)
        if self.job.integrity.state:
            check_claims(s, self.layout, self.groups, claims, commit=self.step - 1)
        check = self.runner.lane_check(self.step)
        if check is not None:
            check_lane(s, self.runner, self.groups, claims, check, self.step)

    def _audit(self) -> None:
        """The sums of a commit that no vote follows: the last one, and one that is stored at a pause."""
        s = self.session
        if not self.job.integrity.state:
            return
        claims = gather_claims(s, self.layout, self.groups)
        check_claims(s, self.layout, self.groups, claims, commit=self.step)

    def _expect(self, step: int) -> None:
        expect = getattr(self.session.batches, "expect", None)
        if expect is not None:
            lanes = self.runner.lanes
            if self.expected[0] == lanes and step + AHEAD_STEPS // 2 <= self.expected[1]:
                return
            places = []
            for t in range(step, min(step + AHEAD_STEPS, self.job.steps + 1)):
                check = self.runner.lane_check(t)
                if check is not None and check.checker == self.session.worker:
                    places.append((t, check.lane))
                places += [(t, lane) for lane in lanes]
            expect(places)
            self.expected = (lanes, step + AHEAD_STEPS)

    def _switch_lanes(self, agreed: int | None) -> None:
        """`agreed`: the mark of the split that all ballots have named, so ours too; None: they named several."""
        if agreed is not None and agreed != self.split.mark:
            self.split = self.named
            self.layout = self.layout.with_lanes(self.split.lanes)
            self.runner = self._runner()
            self.clock.changed()

    def _tell_signals(self, vote: bytes) -> None:
        """One member hands all workers' signals to the watch: what a step was like is known before it is applied."""
        if self.is_publisher and self.layout.world_size > 1:
            records = self.runner.vote_format.signals(vote)
            if records:
                self.session.emit(StepSignals(self.plan.generation, self.step, records))

    # --- at a commit ---

    def _after_commit(self, step: int, *, sealed: bool, flags: int = 0) -> StepReport:
        """Evaluate, and begin to write packs, where step `step` asks for it (`flags`: of the vote that made it). What
        comes of it is published one vote later (a checkpoint: once it is written); a step that was sealed with nothing
        more to come is published at once.
        """
        s, last = self.session, step == self.job.steps
        known = self.plan.published_step >= step if sealed else False
        evaluate = bool(self.job.evaluate_every) and step > 0 and not known
        evaluate = evaluate and (step % (self.job.evaluate_every or 1) == 0 or last)
        report = StepReport(step, row=s.committed.rows.get(step) if not known else None)
        store = self._stores(step, flags, sealed=sealed)
        report.evaluates, report.stores = evaluate, store
        if evaluate and self.is_publisher:
            s.pulse.enter(Activity.EVALUATE)
            report.evaluation = self._evaluate()
        if store:
            self._finish_storing()
            self.keeper.begin(step, report.evaluation)
        if sealed:
            self._publish_missed(step)
        if sealed and not evaluate and not store:
            self._publish(report)
            report.row = None
        return report

    def _stores(self, step: int, flags: int, *, sealed: bool) -> bool:
        """Whether commit `step` is stored. A generation that begins also makes up for a checkpoint that was being
        written when the one before it ended: its step is gone by, so that which is sealed is stored.
        """
        if self.job.checkpoint is None or step == 0 or (sealed and self.keeper.known_step >= step):
            return False
        missed = sealed and self.keeper.has_missed(step)
        return missed or self.session.pacing.stores(step, flags, last=step == self.job.steps)

    def _store_now(self) -> None:
        """Store the commit at which the run pauses. That everybody has gathered the shares shows that everybody has
        applied it: it can be redone no more, as after the vote that would follow (R5).
        """
        s = self.session
        report = StepReport(self.step, row=s.committed.rows.get(self.step), stores=True)
        self.keeper.begin(self.step)
        share = self.keeper.share()
        self.groups.deadline_s = self.groups.gather_deadline_s = FIRST_STEP_DEADLINE_S
        s.pulse.enter(Activity.VOTE)
        self._audit()
        extras = self.groups.all_gather_sized(share)
        self._publish(report)
        self._commit_checkpoint(self.step, extras)

    def _gather_shares(self, vote: bytes) -> tuple[int, list[bytes]]:
        """The step of the checkpoint that everybody has written, and all shares (none while somebody still writes)."""
        return self.keeper.gather(self.runner.vote_format.tally(vote).flags)

    def _commit_checkpoint(self, step: int, extras: list[bytes]) -> None:
        """Of a step whose shares are all here (none: of no step). They travel beside a vote, so R5 holds."""
        if extras:
            self.keeper.commit(step, extras, self.layout.world_size)

    def _finish_storing(self) -> None:
        """Wait until everybody has written the checkpoint that is under way, and hand it to the commit: where the next
        one begins, or the generation ends in peace. The vote after its step is complete (R5).
        """
        self._commit_checkpoint(*self.keeper.finish_writing())

    def _owned(self, to_host: saving.Copier | None = None) -> saving.Owned:
        s = self.session
        owned, counts = self.layout.owned(s.worker), self.runner.rank == 0
        return saving.owned_state(s.model.flat, s.model.held, owned, with_counters=counts, to_host=to_host)

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

    def _close(self, report: StepReport) -> None:
        """The closing vote: after it the last step can no more be redone. Its digest names the final state."""
        s = self.session
        self.groups.deadline_s = self.groups.gather_deadline_s = FIRST_STEP_DEADLINE_S  # peers may evaluate and store
        s.pulse.enter(Activity.STORE)
        share = saving.digest_share(self._owned())
        stored, written = self.keeper.step, self.keeper.share()
        s.pulse.enter(Activity.VOTE)
        self._audit()
        extras = self.groups.all_gather_sized(written) if stored else []
        shares = self.groups.all_gather_sized(share)
        self._publish(report)
        self._commit_checkpoint(stored, extras)
        self.keeper.finish()
        digest = saving.combine_shares(shares, s.model.space.aliases)
        s.pulse.enter(Activity.VOTE)
        # Nobody leaves before everybody has the digest: a group dropped early would fail a slower peer. Whoever
        # publishes may still copy, and says so from time to time: then nobody's wait grows with what is copied.
        while b"more" in self.groups.all_gather_equal(b"done" if self.keeper.copied(COPYING_S) else b"more"):
            s.pulse.enter(Activity.VOTE)
        s.emit(ev.WorkerFinished(0.0, self.plan.generation, s.worker, self.step, digest))
