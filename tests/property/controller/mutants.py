"""Judge the properties by mutants: every bug planted here must turn one of the properties red.

`python tests/property/controller/mutants.py` plants them one by one and prints what found each of them, and how soon.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from time import perf_counter
from typing import Any

import pytest

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[3]))

from elastictrain.controller import alarms, budgets, limits, machine, moves, planning, policies, recovery, settle, vain
from elastictrain.controller import commands as cm
from elastictrain.controller import events as ev
from elastictrain.controller.core import Core
from elastictrain.controller.facts import Ledger
from elastictrain.controller.phases import Parking
from elastictrain.protocol import Restore
from tests.property.controller import faults
from tests.property.controller.judges import judges

HEARD: list[Any] = []
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
    a_dead_workers_knowledge_of_the_seal_dies_with_it(patch)
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


def fenced_workers_live_on(patch: pytest.MonkeyPatch) -> None:
    """What a worker of a lost node says is dropped, but the worker is left alone."""
    patch.setattr(machine, "speaker", lambda event: None)


def a_lost_node_keeps_its_say(patch: pytest.MonkeyPatch) -> None:
    """Its workers are not forgotten: they wait for their generation as before."""
    patch.setattr(alarms, "lose", lambda *args: None)
    patch.setattr(Core, "fence", lambda core, worker, reason, out: core.ledger.fenced.update({worker: reason}))


def rounds_are_never_counted(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(settle, "end_round", lambda *args: False)


def rounds_are_never_forgotten(patch: pytest.MonkeyPatch) -> None:
    """A commit in between does not count."""
    real = limits.end_round

    def grudge(core: Core, reached: int, exact: bool, out: Any) -> bool:
        core.ledger.reached = 10**9
        return real(core, reached, exact, out)

    patch.setattr(settle, "end_round", grudge)


def torn_applies_are_never_compared(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(budgets, "_torn", lambda rounds: None)


def generations_in_vain_are_never_counted(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(settle, "end_in_vain", lambda *args: False)


def nobody_is_replaced_for_trouble(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(vain, "whom_to_replace", lambda core, ended: None)


def workers_are_replaced_for_trouble_without_end(patch: pytest.MonkeyPatch) -> None:
    real = vain.whom_to_replace

    def forgetful(core: Core, ended: Any) -> int | None:
        core.ledger.vain_replaced = []
        return real(core, ended)

    patch.setattr(vain, "whom_to_replace", forgetful)


def another_is_blamed_for_trouble(patch: pytest.MonkeyPatch) -> None:
    """The last of the members, whoever it was."""
    real = settle.end_in_vain

    def blame_the_last(core: Core, *rest: Any) -> bool:
        core.ledger.accused = tuple(core.ledger.members()[-1:])
        return real(core, *rest)

    patch.setattr(settle, "end_in_vain", blame_the_last)


def a_doubt_dies_with_whoever_has_said_it(patch: pytest.MonkeyPatch) -> None:
    real = machine.HANDLERS[ev.WorkerParked]

    def heard_only_in_the_end(core: Core, event: Any, out: Any) -> bool:
        known = core.ledger.doubt
        answer = real(core, event, out)
        if isinstance(core.state, Parking) and core.ledger.doubt is not known:
            core.ledger.doubt = known
        return answer

    patch.setitem(machine.HANDLERS, ev.WorkerParked, heard_only_in_the_end)
    stock = settle.take_stock

    def with_what_reports_say(layouts: Any, sealed: Any, reports: Any, step: Any) -> Any:
        HEARD[:] = [report.doubt for report in reports.values()]
        return stock(layouts, sealed, reports, step)

    patch.setattr(settle, "take_stock", with_what_reports_say)
    back = settle.end_round

    def and_then(core: Core, *rest: Any) -> bool:
        core.ledger.doubt = recovery.less_trusting(core.ledger.doubt, *HEARD)
        return back(core, *rest)

    patch.setattr(settle, "end_round", and_then)


def doubts_are_not_heard(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(moves, "less_trusting", lambda known, said: known)


def the_latest_doubt_counts(patch: pytest.MonkeyPatch) -> None:
    """Not the one that goes back furthest."""
    patch.setattr(moves, "less_trusting", lambda known, said: said or known)


def checkpoints_in_doubt_are_gone_back_to(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Ledger, "distrust", lambda ledger, good_step: None)


def checkpoints_in_doubt_are_kept(patch: pytest.MonkeyPatch) -> None:
    """Nobody goes back to them now, but they stay in the store for whoever resumes the job."""
    real = settle._form

    def keep(core: Core, plan: Any, *rest: Any) -> None:
        restore = None if plan.restore is None else replace(plan.restore, discard_newer=False)
        real(core, replace(plan, restore=restore), *rest)

    patch.setattr(settle, "_form", keep)


def an_hour_is_never_full(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(settle, "MOVES", settle.MOVES[1:])


def forgets(kind: type[Any]) -> Plant:
    """A successor that does not give this command again."""

    def plant(patch: pytest.MonkeyPatch) -> None:
        real = faults.outstanding
        patch.setattr(faults, "outstanding", lambda found: [c for c in real(found) if not isinstance(c, kind)])

    plant.__name__ = f"a_successor_forgets_{kind.__name__}"
    return plant


def the_last_holder_is_killed_like_any_other(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Core, "held_alone", lambda core, worker: 0)


def the_gap_counts(patch: pytest.MonkeyPatch) -> None:
    """Deadlines go on while nobody listens."""
    patch.setitem(machine.HANDLERS, ev.ControllerBack, lambda core, event, out: True)


def all_nodes_may_be_set_aside(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(limits, "should_set_aside", lambda budget, nodes, node: len(nodes[node].failures) >= 3)


def a_preempted_worker_stays_to_the_end(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(settle, "MOVES", tuple(row for row in settle.MOVES if row[0] is not alarms.release_notices))


def the_first_hang_is_blamed(patch: pytest.MonkeyPatch) -> None:
    """A step was committed since the last one, and counts for nothing."""
    patch.setattr(Core, "note_commit", lambda core: None)


def a_dead_workers_knowledge_of_the_seal_dies_with_it(patch: pytest.MonkeyPatch) -> None:
    real, mark = machine.HANDLERS[ev.WorkerParked], Core.mark_sealed

    def deaf(core: Core, event: Any, out: Any) -> bool:
        with pytest.MonkeyPatch.context() as inner:
            inner.setattr(Core, "mark_sealed", lambda core, now_s: None)
            return real(core, event, out)

    assert mark is Core.mark_sealed
    patch.setitem(machine.HANDLERS, ev.WorkerParked, deaf)


def forms_before_the_doomed_are_gone(patch: pytest.MonkeyPatch) -> None:
    real = Core.waiting
    patch.setattr(Core, "waiting", lambda core: [w for w in real(core) if w not in core.ledger.workers.doomed])
    patch.setattr(Core, "is_waiting", lambda core: bool(core.waiting()))


def a_stop_loses_what_is_not_stored(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(settle, "LAST_TRIES", 0)


def a_stop_is_tried_for_ever(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(settle, "LAST_TRIES", 1000)


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
    fenced_workers_live_on,
    a_lost_node_keeps_its_say,
    rounds_are_never_counted,
    rounds_are_never_forgotten,
    torn_applies_are_never_compared,
    generations_in_vain_are_never_counted,
    nobody_is_replaced_for_trouble,
    workers_are_replaced_for_trouble_without_end,
    another_is_blamed_for_trouble,
    a_doubt_dies_with_whoever_has_said_it,
    doubts_are_not_heard,
    the_latest_doubt_counts,
    checkpoints_in_doubt_are_gone_back_to,
    checkpoints_in_doubt_are_kept,
    an_hour_is_never_full,
    *map(forgets, (cm.StartWorker, cm.Form, cm.Park, cm.AskPause, cm.Kill, cm.EndRun)),
    the_last_holder_is_killed_like_any_other,
    the_gap_counts,
    all_nodes_may_be_set_aside,
    a_preempted_worker_stays_to_the_end,
    the_first_hang_is_blamed,
    a_dead_workers_knowledge_of_the_seal_dies_with_it,
    forms_before_the_doomed_are_gone,
    a_stop_loses_what_is_not_stored,
    a_stop_is_tried_for_ever,
]


def found_by(plant: Plant | None, patch: pytest.MonkeyPatch) -> str | None:
    """Plant one bug (None: none) and ask all judges; the first that notices, and what it said."""
    if plant is not None:
        plant(patch)
    for name, judge in judges():
        try:
            judge()
        except Exception as error:  # whatever it is: the property does not hold
            said = str(error).splitlines() or [""]
            return f"{name}: {type(error).__name__} {said[0][:90]}"
    return None


def main() -> int:
    """Print a table; 1 when a mutant survives, or when the properties do not hold without one."""
    survived = 0
    for plant in [None, *MUTANTS]:
        started_s = perf_counter()
        with pytest.MonkeyPatch.context() as patch:
            found = found_by(plant, patch)
        survived += (found is None) is (plant is not None)
        name = "(no bug)" if plant is None else plant.__name__
        print(f"{name:55} {perf_counter() - started_s:6.1f} s  {found or 'NOT FOUND'}", flush=True)
    return min(survived, 1)


if __name__ == "__main__":
    raise SystemExit(main())
