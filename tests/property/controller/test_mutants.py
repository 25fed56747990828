"""Judge the properties by mutants: every bug planted here must turn the storms red."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from elastictrain.controller import moves, planning, policies, recovery, settle
from elastictrain.controller.core import Core
from elastictrain.controller.facts import Ledger
from elastictrain.errors import InternalError
from elastictrain.protocol import Restore
from tests.property.controller.storm import storm

SEEDS = 250
Plant = Callable[[pytest.MonkeyPatch], None]


def no_generation_fence(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(moves, "heard", lambda core, generation, worker: core.ledger.is_member(worker))


def goes_on_from_the_slowest(patch: pytest.MonkeyPatch) -> None:
    """The target is the smallest applied step: those that applied the next one would have to roll back."""
    real = recovery.take_stock

    def slow(*args: Any) -> Any:
        standing = real(*args)
        return replace(standing, step=standing.step - 1, behind=(), roll_forward=None) if standing.behind else standing

    patch.setattr(settle, "take_stock", slow)


def forgets_the_vote(patch: pytest.MonkeyPatch) -> None:
    real = planning._plan
    patch.setattr(planning, "_plan", lambda *args: replace(real(*args), roll_forward=None))


def gathers_only_to_joiners(patch: pytest.MonkeyPatch) -> None:
    real = planning._plan

    def lazy(*args: Any) -> Any:
        plan = real(*args)
        return replace(plan, gather_to=plan.joiners)

    patch.setattr(planning, "_plan", lazy)


def does_not_wait_for_all_reports(patch: pytest.MonkeyPatch) -> None:
    real = Core.waiting
    patch.setattr(Core, "waiting", lambda core: real(core)[1:])


def ignores_the_first_seal(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Core, "mark_sealed", lambda core, now_s: None)


def distrusts_the_survivors_seal(patch: pytest.MonkeyPatch) -> None:
    """Only what the controller has heard itself counts as sealed, not what the survivors saw."""
    real = recovery.take_stock
    patch.setattr(
        settle,
        "take_stock",
        lambda layouts, sealed, reports, step: real(
            layouts, sealed, {w: replace(r, sealed_generation=0) for w, r in reports.items()}, step
        ),
    )


def leaving_workers_do_not_count(patch: pytest.MonkeyPatch) -> None:
    """R4 broken: who leaves stops being a holder before the seal."""
    real = planning.plan_next
    stock = recovery.take_stock

    def deaf(core_spec: Any, ledger: Ledger, standing: Any, reports: Any, **rest: Any) -> Any:
        ledger.leaving = {}
        return real(core_spec, ledger, standing, reports, **rest)

    patch.setattr(settle, "plan_next", deaf)
    patch.setattr(settle, "take_stock", stock)


def leaves_without_another_holder(patch: pytest.MonkeyPatch) -> None:
    """A drained worker is dropped even when it is the only holder of a block."""
    real = policies.propose

    def rash(spec: Any, truth: Any, generation: int, **facts: Any) -> Any:
        proposal = real(spec, truth, generation, **facts)
        gone = set(facts["draining"])
        stay = [w for w in truth.workers if w not in gone]
        if proposal is None or not gone & set(truth.workers) or len(stay) < spec.min_workers:
            return proposal
        return policies.Proposal(policies.even_layout(spec, generation, stay, facts["domains"]), (), tuple(gone))

    patch.setattr(planning, "propose", rash)


def copies_from_the_dead(patch: pytest.MonkeyPatch) -> None:
    real = planning.moves_between
    patch.setattr(planning, "moves_between", lambda truth, layout, alive: real(truth, layout, truth.workers))


def restores_the_oldest_checkpoint(patch: pytest.MonkeyPatch) -> None:
    def oldest(ledger: Ledger) -> Restore:
        step = min(ledger.checkpoints, default=0)
        return Restore(step, ledger.checkpoints.get(step))

    patch.setattr(Ledger, "newest_restore", oldest)


def hears_the_doomed(patch: pytest.MonkeyPatch) -> None:
    """R7 broken: a worker with a torn apply is not killed, and its report counts."""
    patch.setattr(Core, "doom", lambda core, worker, reason, out: None)


MUTANTS: list[Plant] = [
    no_generation_fence,
    goes_on_from_the_slowest,
    forgets_the_vote,
    gathers_only_to_joiners,
    does_not_wait_for_all_reports,
    ignores_the_first_seal,
    distrusts_the_survivors_seal,
    leaving_workers_do_not_count,
    leaves_without_another_holder,
    copies_from_the_dead,
    restores_the_oldest_checkpoint,
    hears_the_doomed,
]


def _all_storms() -> None:
    for seed in range(SEEDS):
        storm(seed)


@pytest.mark.parametrize("plant", MUTANTS, ids=lambda plant: plant.__name__)
def test_a_planted_bug_is_found(plant: Plant, monkeypatch: pytest.MonkeyPatch) -> None:
    plant(monkeypatch)
    with pytest.raises((AssertionError, InternalError)):
        _all_storms()
