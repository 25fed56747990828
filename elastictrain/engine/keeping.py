"""The checkpoints of one generation, as one of its members sees them: begun, written, gathered, committed, settled.

Writing and committing happen beside training (`saver`, `committing`); here is what all members must do alike, and what
the one that publishes does for all. A generation that ends gives up what it has under way; the next one finds out what
has become of it before it takes a step.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from math import isfinite
from typing import TYPE_CHECKING, Any

from elastictrain.controller import events as ev
from elastictrain.engine.collective import GroupSet
from elastictrain.engine.committing import Account, Begun, Open, Statement, settled, still_lost
from elastictrain.engine.reports import Storing
from elastictrain.engine.saver import Saver
from elastictrain.engine.saving import Copier, Owned
from elastictrain.engine.vote import FLAG_COMMITTED, FLAG_STORING
from elastictrain.job import Job
from elastictrain.protocol import FormPlan
from elastictrain.signs import Activity

if TYPE_CHECKING:
    from elastictrain.engine.session import Session

FIRST_STEP_DEADLINE_S = 600.0
"""Imports, compilation and caches happen in the first step of a process: no measurement bounds it yet. Storage may take
as long.
"""


def metrics_of(row: Mapping[str, Any] | None, evaluation: Mapping[str, float] | None) -> dict[str, Any]:
    """What a manifest says of its step, for people and for `checkpoint.keep.best`: numbers that are finite."""
    found = {name: row[name] for name in ("loss", "grad_norm") if row is not None and row.get(name) is not None}
    shown = {
        name: value for name, value in (evaluation or (row or {}).get("evaluation") or {}).items() if isfinite(value)
    }
    return found | ({"evaluation": shown} if shown else {})


class Keeper:
    """For one member of one generation. A job without the setting `checkpoint` has nothing to keep.

    `owned`: gives the state that this worker stores, copied from its device by what it is given. `known_step`: the
    newest checkpoint that is known to be committed.
    """

    def __init__(self, session: Session, plan: FormPlan, groups: GroupSet, owned: Callable[[Copier], Owned]) -> None:
        self._session, self._plan, self._groups, self._owned = session, plan, groups, owned
        self._storing: Storing | None = None
        self._lost: tuple[Account, ...] = ()
        self._late: Begun | None = None
        self._open_elsewhere: tuple[Open, ...] = ()
        self._handed = 0
        self._is_committed = self._is_refused = False
        self._metrics: dict[str, Any] = {}
        self.known_step = plan.checkpointed_step

    @property
    def is_publisher(self) -> bool:
        """The first member that is no newcomer: it knows the steps before this generation."""
        return self._session.worker == self._plan.first_known

    @property
    def _saver(self) -> Saver:
        assert self._session.saver is not None, "only a job with the setting checkpoint stores"
        return self._session.saver

    # --- at the seal ---

    def settle(self) -> None:
        """Find out what has become of the checkpoints that were under way when the generation before this one ended:
        whoever was to create a manifest may have died doing it. Whoever publishes now looks, and everybody hears of it.
        A manifest that is there counts; without it that checkpoint is given up, and said to be.
        """
        s, plan = self._session, self._plan
        if s.saver is None:
            return
        looks = self.is_publisher and plan.restore is None
        if looks:
            s.pulse.enter(Activity.STORE)
        begun, left_open = s.saver.begun, s.saver.open  # asked before looking: what is open may end meanwhile
        accounts = Account.of(begun, self.known_step, lambda one: looks and self._saver.is_committed(one))
        statement = Statement(accounts, s.saver.lost, left_open)
        s.pulse.enter(Activity.VOTE)
        usual_s, self._groups.gather_deadline_s = self._groups.gather_deadline_s, FIRST_STEP_DEADLINE_S
        said = [Statement.from_bytes(raw) for raw in self._groups.all_gather_sized(statement.to_bytes())]
        self._groups.gather_deadline_s = usual_s
        found = [one.step for one in settled(said) if one.found]
        self.known_step = max(self.known_step, *found, 0)
        if looks and left_open is not None:
            mine = [one for one in begun if left_open.step in (0, one.step) and one.step not in found]
            self._late = mine[-1] if mine else None
        members = zip(plan.layout.workers, said, strict=True)
        self._open_elsewhere = tuple(one.open for worker, one in members if one.open and worker != s.worker)
        self._lost = still_lost(said, self.known_step, plan.given_up)
        if self.is_publisher:
            self._tell(found)
            s.saver.copies.serve()
        else:
            s.saver.copies.rest()
        s.saver.begun, s.saver.lost = (), self._lost

    def _tell(self, found: Sequence[int]) -> None:
        """Say what has become of earlier checkpoints, also what whoever published before may have died with. What was
        given up after one that was found is said after it: it is still to be made up for.
        """
        generation, worker = self._plan.generation, self._session.worker
        instead = self._plan.step if self.has_missed(self._plan.step) else None
        given_up = [lost for lost in self._lost if (lost.generation, lost.step) > self._plan.given_up]
        older = [step for step in found if any(step < lost.step for lost in given_up)]
        self._say_committed(older)
        for lost in given_up:
            facts = (worker, lost.step, lost.generation, lost.travelled, instead)
            self._session.emit(ev.CheckpointGivenUp(0.0, generation, *facts))
        self._say_committed(found[len(older) :])

    def _say_committed(self, steps: Iterable[int]) -> None:
        for step in steps:
            path = self._saver.path_of(step)
            self._session.emit(ev.CheckpointCommitted(0.0, self._plan.generation, step, path))

    def has_missed(self, step: int) -> bool:
        """Whether a checkpoint that was due up to `step`, the one that was sealed, does not exist."""
        checkpoint = self._session.job.checkpoint
        if checkpoint is None or step <= self.known_step:
            return False
        every = checkpoint.every_steps
        lost = any(self.known_step < one.step <= step for one in self._lost)
        return lost or (every is not None and step - step % every > self.known_step)

    # --- writing ---

    @property
    def step(self) -> int:
        """Of the checkpoint that is being written; 0: of none."""
        return 0 if self._storing is None else self._storing.step

    def begin(self, step: int, evaluation: Mapping[str, float] | None = None) -> None:
        """Begin to write this worker's share of a checkpoint of the committed state. `evaluation`: of it, if this
        worker has evaluated it.
        """
        s = self._session
        s.pulse.enter(Activity.STORE)
        self._metrics = metrics_of(s.committed.rows.get(step), evaluation)
        with s.pacing.storing(step):
            owned = self._owned(self._saver.to_host)
            writing = self._saver.begin(
                owned, step=step, generation=self._plan.generation, worker=s.worker, known_step=self.known_step
            )
        self._storing = Storing(step, writing)

    @property
    def flags(self) -> int:
        """What this worker's next vote says: about its share, and about the last commit."""
        storing = FLAG_STORING if self._storing is not None and not self._storing.writing.done else 0
        return storing | (FLAG_COMMITTED if self._is_committed else 0)

    def share(self) -> bytes:
        """This worker's share, which nobody asks for again; nothing while none is being written. Waits for it, and
        raises ClusterError when it could not be written.
        """
        storing, self._storing = self._storing, None
        return b"" if storing is None else storing.extras(self._stay)

    def gather(self, flags: int) -> tuple[int, list[bytes]]:
        """The step of the checkpoint that everybody has written, and all shares; none while somebody still writes. The
        vote (`flags`: its own) says so to everybody alike. Nobody waits here for storage.
        """
        if flags & FLAG_COMMITTED:
            self._note_committed(self._handed)
        if self._storing is None or flags & FLAG_STORING:
            return 0, []
        step = self.step
        return step, self._groups.all_gather_sized(self.share())

    def finish_writing(self) -> tuple[int, list[bytes]]:
        """The same, after waiting until everybody has written."""
        if self._storing is None:
            return 0, []
        s, begun, step = self._session, time.perf_counter(), self.step
        s.pulse.enter(Activity.STORE)
        share, usual_s = self.share(), self._groups.gather_deadline_s
        self._groups.gather_deadline_s = FIRST_STEP_DEADLINE_S  # peers may still write
        shares = self._groups.all_gather_sized(share)
        self._groups.gather_deadline_s = usual_s
        s.pacing.stalled(time.perf_counter() - begun)
        return step, shares

    # --- committing ---

    def commit(self, step: int, shares: list[bytes], world: int) -> None:
        """All shares of the checkpoint of `step` are durable and here. The publisher commits it, beside training."""
        s, generation = self._session, self._plan.generation
        self._handed, self._is_committed = step, False
        self._saver.travelled(step)
        if not self.is_publisher:
            return
        s.pulse.enter(Activity.STORE)
        started = time.perf_counter()
        late, self._late = self._late, None
        self._saver.begin_commit(
            Storing.shares(shares),
            committed=lambda *there: s.emit(ev.CheckpointCommitted(0.0, generation, *there)),
            removed=lambda steps: s.emit(ev.CheckpointsRemoved(0.0, generation, tuple(steps))),
            refused=lambda why: self._go_without(step, why),
            check=self._stay,
            known_step=self.known_step,
            late=late,
            elsewhere=self._open_elsewhere,
            final=step == s.job.steps,
            step=step,
            generation=generation,
            tree={"step": step, "seed": s.job.seed, "stages": s.stages, "data": s.data_fingerprint,
                  "numerics": s.numerics, **_provenance(s.job), **_mark(s, step)},
            aliases=s.model.space.aliases,
            info={"world": world, **self._metrics},
        )  # fmt: skip
        s.pacing.stalled(time.perf_counter() - started)

    def _go_without(self, step: int, why: str) -> None:
        """In the background: this checkpoint cannot be committed (what it refers to is gone). It is given up; the next
        one finds no base there, and is written in full.
        """
        s, generation = self._session, self._plan.generation
        self._is_refused = True
        s.emit(ev.CheckpointGivenUp(0.0, generation, s.worker, step, generation, True, None, why))

    def heed(self) -> None:
        """What a commit beside training has failed with ends the run; that one has ended well is said in the next vote.
        Asked at every step.
        """
        if self._session.saver is not None:
            self._is_committed = self._handed in self._session.saver.committed()
            if self.is_publisher:
                self._tell_of_copies()
            if self._is_refused:
                self._is_refused = False
                self._session.pacing.given_up()

    def _tell_of_copies(self) -> None:
        """Say how the further places are, if that has changed. Asks no storage."""
        s, generation = self._session, self._plan.generation
        for path, standing in self._saver.copies.news():
            facts = (standing.copied or 0, standing.waiting, standing.error)
            s.emit(ev.CopiesStand(0.0, generation, s.worker, path, *facts))
        if gone := self._saver.copies.gone():
            s.emit(ev.CheckpointsRemoved(0.0, generation, tuple(gone)))

    def copied(self, within_s: float) -> bool:
        """Wait until the further places have what they are to have, or do not get on; whether that came to be in time.
        True on a worker that does not publish.
        """
        s = self._session
        if s.saver is None or not self.is_publisher:
            return True
        s.pulse.enter(Activity.STORE)
        is_done = s.saver.copies.wait(self._stay, within_s)
        self._tell_of_copies()
        return is_done

    def finish(self) -> None:
        """Wait for the commit that is under way: the generation ends in peace."""
        s = self._session
        if s.saver is None:
            return
        s.pulse.enter(Activity.STORE)
        for step in s.saver.wait_for_commit(self._stay):
            self._note_committed(step)

    def _note_committed(self, step: int) -> None:
        self.known_step = step
        self._session.pacing.durable(step)
        self._saver.noted(step)

    def _stay(self) -> None:
        """Raise Parked when this generation is over. Asking is no beat: to wait is no sign of progress."""
        if self._session.is_parked():
            self._session.check()


def _mark(session: Session, step: int) -> dict[str, Any]:
    """How far the order of a live source was decided."""
    mark_of = getattr(session.batches, "mark_of", None)
    mark = None if mark_of is None else mark_of(step)
    return {} if mark is None else {"live": mark}


def _provenance(job: Job) -> dict[str, Any]:
    """What the run began with, if not with the recipe's initial values."""
    return {} if job.start_from is None else {"start_from": job.start_from.provenance()}
