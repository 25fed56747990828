"""The recovery rule, as one pure function of what the survivors reported.

Survivors park and report the last step they have applied. If any of them has applied step `s + 1`, all apply `s + 1`
with that vote's result; otherwise all discard it and redo it. Nobody rolls back. This holds while every block has a
live holder in the layout that was sealed last; blocks that have lost all holders come back from a checkpoint, and then
the whole job goes back to that checkpoint's step.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from elastictrain.errors import InternalError
from elastictrain.layout import Layout, Shard, lost_blocks
from elastictrain.protocol import Doubt, ParkReport


@dataclass(frozen=True, slots=True)
class Standing:
    """Where the survivors stand.

    `truth`: the layout sealed last, None if no sealed layout is known. `step`: the commit to go on from. `behind`:
    holders that have applied only `step - 1`; they roll forward with `roll_forward`. `lost`: shards without a live
    holder; if there are any, `step` is only how far the job had come.
    """

    truth: Layout | None
    step: int = 0
    behind: tuple[int, ...] = ()
    roll_forward: bytes | None = None
    lost: tuple[Shard, ...] = ()


def less_trusting(*doubts: Doubt | None) -> Doubt | None:
    """Of several doubts the one that trusts least: it goes back furthest."""
    return min((doubt for doubt in doubts if doubt is not None), key=lambda doubt: doubt.good_step, default=None)


def take_stock(
    layouts: Mapping[int, Layout], sealed: int, reports: Mapping[int, ParkReport], published_step: int
) -> Standing:
    """Apply the recovery rule.

    `layouts`: by generation, of the layouts that can be the truth. `sealed`: the newest generation that the controller
    itself knows to be sealed. `reports`: of all survivors, each by worker number. Only holders, the members of the true
    layout, have a say in the step: a worker that is joining may not have anything yet.

    Raises InternalError when the reports contradict the protocol: applied steps more than one apart, a published step
    that nobody has applied, or no vote to roll forward with.
    """
    generation = max([sealed, *(r.sealed_generation for r in reports.values() if r.sealed_generation in layouts)])
    truth = layouts.get(generation)
    if truth is None:
        return Standing(None)
    holders = {worker: reports[worker] for worker in truth.workers if worker in reports}
    lost = lost_blocks(truth, set(truth.workers) - set(holders))
    step = max((report.applied_step for report in holders.values()), default=0)
    if lost:
        return Standing(truth, max(step, published_step), lost=lost)
    applied = {worker: report.applied_step for worker, report in holders.items()}
    if min(applied.values()) < step - 1:
        raise InternalError(f"survivors have applied steps {applied}; expected at most one step between them")
    if step < published_step:
        raise InternalError(f"step {published_step} was published, but the survivors have applied only {applied}")
    behind = tuple(worker for worker, done in applied.items() if done < step)
    if not behind:
        return Standing(truth, step)
    votes = [report.vote for report in holders.values() if report.applied_step == step and report.vote is not None]
    if not votes:
        raise InternalError(f"workers {behind} are one step behind {step}, but no survivor kept that step's vote")
    if any(vote != votes[0] for vote in votes):
        raise InternalError(f"survivors hold different results of the vote for step {step}")
    return Standing(truth, step, behind, votes[0])
