"""The commit: what a worker knows to have happened, and the one function that makes a step happen."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from elastictrain.engine.flat import counter_conflict
from elastictrain.engine.vote import Tally, VoteFormat, gradient_scale
from elastictrain.engine.worker_model import hook
from elastictrain.errors import InternalError, RecipeError, UserError

if TYPE_CHECKING:
    from elastictrain.engine.pending import Pending
    from elastictrain.engine.session import Session


ROWS_KEPT = 1024
"""More steps than can pass between two polls of the controller."""


@dataclass(slots=True)
class Committed:
    """Facts about the state of this worker; they change only under the session's apply lock.

    `vote`: the result of the vote for `step` (R1: kept until the next seal or the vote after next). `tearing`: inside
    apply; an exception there leaves the state torn, and a torn apply is a death (R7).
    """

    step: int = 0
    sealed_generation: int = 0
    gathered_step: int = 0
    vote: bytes | None = None
    tearing: bool = False
    rows: dict[int, dict[str, Any]] = field(default_factory=dict)

    def remember(self, row: dict[str, Any]) -> None:
        """Keep the metrics of a step until it is surely published; every worker has them, any can publish."""
        self.rows[row["step"]] = row
        while len(self.rows) > ROWS_KEPT:
            self.rows.pop(next(iter(self.rows)))


def check_vote(session: Session, tally: Tally) -> bool:
    """Whether the step is applied (False: skipped by policy). Raises UserError on all workers alike."""
    if not tally.counters_agree:
        raise RecipeError(counter_conflict(", ".join(session.model.space.counters)))
    if tally.is_finite:
        return True
    if session.job.on_nan == "skip":
        return False
    what = (
        f"the loss of lane {', '.join(map(str, tally.bad_lanes))} is not finite"
        if tally.bad_lanes
        else "no sample has weight"
        if tally.weight <= 0
        else "the gradient is not finite although every lane's loss is"
    )
    raise UserError(
        f"step {tally.step}: {what} (losses {[round(x, 4) for x in tally.losses]}); set on_nan: skip to leave such "
        "steps out, or lower the learning rate"
    )


def apply_step(session: Session, pending: Pending, vote: bytes, votes: VoteFormat, generation: int) -> Tally:
    """Apply a voted step to every held block. The caller holds the apply lock and has made sure that it may."""
    tally = votes.tally(vote)
    if tally.step != pending.step or pending.step != session.committed.step + 1:
        raise InternalError(
            f"worker {session.worker} at step {session.committed.step} would apply the vote of step {tally.step} to "
            f"the gradients of step {pending.step} (generation {generation})"
        )
    applies = check_vote(session, tally)
    done = session.committed
    # The recipe's code runs before the state is touched: an exception there is the user's error and tears nothing.
    lr_factor = float(hook(session.model.recipe, "schedule")(pending.step))
    done.tearing = True
    if applies:
        session.model.held.apply(
            session_gradients(session, pending),
            scale=gradient_scale(tally, session.job.clip_grad_norm),
            lanes=tally.lanes,
            lr_factor=lr_factor,
        )
        session.probes.at(pending.step, "apply")
        session.probes.flips(session, pending.step, "apply")
        session.model.flat.commit_counters(tally.largest)
    done.step = pending.step
    done.vote = vote
    session.pending = None
    session.pristine = False
    done.tearing = False
    return tally


def session_gradients(session: Session, pending: Pending) -> dict[int, Any]:
    """The reduced gradient of every active block that the step's layout lets this worker hold."""
    space = session.model.space
    found: dict[int, Any] = {}
    for shard, reduced in pending.reduced.items():
        start, _ = space.active_span(shard.lo, shard.hi)
        for number in range(shard.lo, min(shard.hi, space.active_blocks)):
            block = space.blocks[number]
            found[number] = reduced[block.start - start : block.stop - start]
    return found
