"""Condition moves: what follows from the facts, whatever event brought them. Repeated in this order until nothing
changes; the first that applies goes first:

1. end: over the failure budget; stop while nobody steps; give up when nobody can start; close when all have finished
2. start the worker processes that are missing
3. let members go whose machine is about to go, when it is time
4. all members have parked: recovery rule, then form again, or wait for workers
5. enough workers wait: form; or kill who has to go anyway and stands in the way
6. all members have seen the seal: run, and let go of those that have left
7. let go of processes that are too many
8. ask for a pause when a pause would change something
"""

# ruff: noqa: ARG001  (all functions of the table have one shape, whether they need every argument or not)

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

from elastictrain.controller.alarms import blame_for_hang, let_go_of_stored, release_notices
from elastictrain.controller.commands import Announce, Command, Form, StartWorker
from elastictrain.controller.core import Core
from elastictrain.controller.facts import Role, WorkerFacts
from elastictrain.controller.incidents import Incident
from elastictrain.controller.limits import end_round, failed, over_budget
from elastictrain.controller.nodes import to_avoid
from elastictrain.controller.phases import Ended, Finishing, Forming, Gathering, Parking, Phase, Running
from elastictrain.controller.planning import Shortage, left_waiting, plan_next, propose_now
from elastictrain.controller.policies import is_uneven
from elastictrain.controller.recovery import Standing, take_stock
from elastictrain.controller.speeds import by_speed
from elastictrain.controller.vain import End, end_in_vain
from elastictrain.errors import InternalError
from elastictrain.protocol import Doubt, FormPlan, ParkReport

LAST_TRIES = 2
"""Generations that a run which is stopped forms only to store its state."""


def settle(core: Core, now_s: float, out: list[Command]) -> None:
    """Run the condition moves to a fixed point."""
    while not isinstance(core.state, Ended):
        for move, phase in MOVES:
            if (phase is None or phase is core.state.phase) and move(core, now_s, out):
                break
        else:
            return


def _stop_waiting(core: Core, now_s: float, out: list[Command]) -> bool:
    state, ledger = core.state, core.ledger
    if ledger.stop is None or not isinstance(state, Gathering):
        return False
    if ledger.plan is None or not state.parked:
        step = ledger.restore.step if ledger.truth is None else core.step()
        core.end(Ended(Phase.STOPPED, step, error=ledger.stop), out)
        return True
    if ledger.workers.doomed & ledger.workers.of(Role.MEMBER):
        return False  # until it is known to be gone
    return _go_on(core, state.parked, now_s, out)


def _give_up(core: Core, now_s: float, out: list[Command]) -> bool:
    spec, ledger, state = core.spec, core.ledger, core.state
    if not ledger.begun or not isinstance(state, Gathering) or ledger.workers.of(Role.STARTING):
        return False
    there = len(state.parked) + len(ledger.workers.of(Role.READY))
    first = ledger.plan is None
    if there >= spec.min_workers:
        return False
    if first and ledger.start_failures >= spec.start_attempts:
        core.fail(
            f"WorkerStartError: {ledger.start_failures} workers in a row could not start; {there} are ready, "
            f"workers.min={spec.min_workers} are needed; the last error was: {ledger.start_error}",
            out,
        )
        return True
    if not spec.replace and ledger.complement < spec.min_workers and (first or not ledger.workers):
        core.fail(
            f"CapacityError: {there} workers are left, workers.min={spec.min_workers} are needed, and "
            f"workers.replace=false starts no others; set workers.replace=true; {core.resume_words()}",
            out,
        )
        return True
    return False


def _close(core: Core, now_s: float, out: list[Command]) -> bool:
    state = core.state
    if not isinstance(state, Finishing):
        return False
    if len(set(state.digests.values())) > 1:
        core.fail(f"InternalError: workers ended step {state.step} with different digests: {state.digests}", out)
        return True
    if any(worker not in state.digests and worker not in state.gone for worker in core.ledger.members()):
        return False
    core.end(Ended(Phase.FINISHED, state.step, digest=next(iter(state.digests.values()))), out)
    return True


def _start_missing(core: Core, now_s: float, out: list[Command]) -> bool:
    ledger = core.ledger
    missing = ledger.complement - ledger.processes()
    if not core.spec.replace:
        missing -= sum(worker not in ledger.draining for worker in ledger.workers.doomed)  # they lower `complement`
    if not ledger.begun or ledger.stop is not None or missing <= 0 or isinstance(core.state, Finishing):
        return False
    if ledger.start_failures >= core.spec.start_attempts:
        if ledger.plan is not None and ledger.start_retry_at_s is None:
            ledger.start_retry_at_s = now_s + core.spec.start_retry_s
            data = {"failures": ledger.start_failures, "error": ledger.start_error, "after_s": core.spec.start_retry_s}
            out.append(Announce("start_paused", data))
        return False
    avoid = to_avoid(ledger.nodes)
    for worker in range(ledger.next_worker, ledger.next_worker + missing):
        ledger.workers[worker] = WorkerFacts(avoid=avoid)
        out.append(StartWorker(worker, avoid))
    ledger.next_worker += missing
    return True


def _all_parked(core: Core, now_s: float, out: list[Command]) -> bool:
    state = core.state
    if not isinstance(state, Parking) or core.is_waiting():
        return False
    incident = core.ledger.incident
    assert incident is not None  # opened together with the phase
    incident.parked_s = now_s
    if state.told and state.answered_s is not None:  # what was waited for in vain teaches nothing
        took_s = state.answered_s - state.started_s
        core.ledger.longest_parking_s = max(core.ledger.longest_parking_s, took_s)
    return _go_on(core, state.reports, now_s, out)


def _enough(core: Core, now_s: float, out: list[Command]) -> bool:
    state, ledger = core.state, core.ledger
    if not ledger.begun or not isinstance(state, Gathering):
        return False
    if ledger.workers.doomed & ledger.workers.of(Role.MEMBER):
        return False  # until it is known to be gone
    ready = len(ledger.workers.of(Role.READY))
    if ledger.plan is None and ready < core.spec.initial_workers and ledger.workers.of(Role.STARTING):
        return False
    return _go_on(core, state.parked, now_s, out)


def _go_on(core: Core, reports: Mapping[int, ParkReport], now_s: float, out: list[Command]) -> bool:
    """All that can report have reported: recovery rule, then the next generation, or wait."""
    ledger = core.ledger
    try:
        standing = take_stock(ledger.layouts, ledger.sealed, {**ledger.leaving, **reports}, ledger.published_step)
        if isinstance(core.state, Parking):
            if standing.truth is not None and ledger.plan is not None and standing.step > ledger.plan.step:
                core.note_commit()
            if blame_for_hang(core, now_s, out):
                return True  # until it is gone
            _count_redone(core, standing)
            reached = ledger.restore.step if standing.truth is None else standing.step
            further = reached > ledger.reached
            if end_round(core, reached, not standing.lost, out):
                return True
            if end_in_vain(core, _how_it_ended(core, standing, further), now_s, out):
                return True
        if standing.truth is not None:
            # All have promised not to move under an older plan: a layout that is not sealed now never will be.
            ledger.sealed = standing.truth.generation
            ledger.layouts = {ledger.sealed: standing.truth}
        doubt = ledger.doubt
        if standing.lost or doubt is not None:
            _go_back(core, standing, doubt, now_s, out)
            standing = Standing(None)
        if ledger.stop is not None:
            return _stop_here(core, standing, reports, now_s, out)
        planned = ledger.incident is not None and ledger.incident.planned
        plan = plan_next(core.spec, ledger, standing, reports, planned=planned)
    except InternalError as error:
        core.fail(f"InternalError: {error}", out)
        return True
    if isinstance(plan, Shortage):
        return _wait(core, plan, dict(reports), out)
    _form(core, plan, reports, now_s, out)
    return True


def _stop_here(
    core: Core, standing: Standing, reports: Mapping[int, ParkReport], now_s: float, out: list[Command]
) -> bool:
    """The run ends. What its holders have and no checkpoint has (a fault came before the stop) they store first, in a
    generation of their own, however few they are: only members of one can write a checkpoint together.
    """
    ledger = core.ledger
    stored = max(ledger.checkpoints, default=ledger.restore.step)
    if core.spec.checkpoint and standing.truth is not None and standing.step > stored and ledger.closing < LAST_TRIES:
        plan = plan_next(core.spec, ledger, standing, reports, planned=False)
        if isinstance(plan, FormPlan):
            ledger.closing += 1
            _form(core, plan, reports, now_s, out)
            return True
    step = ledger.restore.step if standing.truth is None else standing.step
    core.end(Ended(Phase.STOPPED, step, error=ledger.stop), out)
    return True


def _how_it_ended(core: Core, standing: Standing, further: bool) -> End:
    plan = core.ledger.plan
    here = plan is not None and standing.truth is not None and standing.truth.generation == plan.generation
    commits = here and plan is not None and standing.step > plan.step
    return End(commits, further, core.ledger.doubt, bool(standing.lost))


def _count_redone(core: Core, standing: Standing) -> None:
    """A step was under way if the parked generation was sealed; it is redone unless somebody had applied it."""
    incident, ledger = core.ledger.incident, core.ledger
    if incident is None or standing.truth is None or not isinstance(core.state, Parking):
        return
    under_way = any(report.computing for report in core.state.reports.values()) and not standing.behind
    if standing.truth.generation == ledger.generation and not incident.between_steps and under_way:
        incident.steps_redone += 1
    incident.between_steps = False


def _go_back(core: Core, standing: Standing, doubt: Doubt | None, now_s: float, out: list[Command]) -> None:
    """Blocks have lost all their holders, or the survivors doubt their state: the whole job goes back, and everything
    held is void; in doubt also what was stored since the last state that is known to be good.
    """
    ledger = core.ledger
    from_step = max(standing.step, ledger.restore.step)
    ledger.doubt = None
    if doubt is not None:
        ledger.distrust(doubt.good_step)
        for suspect in doubt.suspects:
            if suspect in ledger.workers:
                failed(core, now_s, "corrupt", ledger.workers[suspect].node, out)
    # What is computed again may come out differently where lanes are dropped: then what was stored has not happened.
    drops = core.spec.gradients is not None and core.spec.gradients.way == "drop_slowest"
    restore = replace(ledger.newest_restore(), discard_newer=doubt is not None or drops)
    cause = "blocks have lost all their holders" if doubt is None else doubt.reason
    incident = core.note_incident(now_s, cause, None, out, planned=False)
    redone = max(0, from_step - restore.step)
    incident.steps_redone += redone
    incident.restored_from = restore.checkpoint or "initial state"
    incident.decided("go back")
    ledger.sealed, ledger.layouts = 0, {}
    ledger.restore = restore
    ledger.published_step = ledger.shown_step = restore.step
    for worker in list(ledger.leaving):
        core.retire(worker, out)
    lost = sum(shard.hi - shard.lo for shard in standing.lost)
    holders = sorted({worker for shard in standing.lost for worker in shard.holders()})
    out.append(
        Announce(
            "went_back",
            {
                "from_step": from_step,
                "to_step": restore.step,
                "up_to_generation": ledger.generation,
                "steps_redone": redone,
                "restored_from": incident.restored_from,
                "reason": (
                    f"{lost} blocks were held only by workers {holders}, which are gone" if standing.lost else cause
                )
                + ("" if core.spec.checkpoint else "; without the setting checkpoint only the start is stored"),
            },
        )
    )


def _wait(core: Core, shortage: Shortage, parked: dict[int, ParkReport], out: list[Command]) -> bool:
    """No generation can be formed: survivors keep their state, parked."""
    if isinstance(core.state, Parking):
        core.enter(Gathering(parked, ""))
    state = core.state
    assert isinstance(state, Gathering)
    if state.reason == shortage.reason or (core.ledger.plan is None and shortage.kind == "workers"):
        return False
    state.reason = shortage.reason
    if core.ledger.incident is not None:
        core.ledger.incident.decided("wait")
    data = {"generation": core.ledger.generation, "kind": shortage.kind, "reason": shortage.reason}
    out.append(Announce("gathering", data | {"parked": sorted(state.parked)}))
    return True


def _form(core: Core, plan: FormPlan, reports: Mapping[int, ParkReport], now_s: float, out: list[Command]) -> None:
    ledger = core.ledger
    truth = ledger.truth
    for worker in plan.layout.workers:
        ledger.workers.update_facts(worker, role=Role.MEMBER)
        ledger.leaving.pop(worker, None)
    for worker in sorted(set(reports) - set(plan.layout.workers)):
        if truth is not None and worker in truth.workers:
            ledger.workers.update_facts(worker, role=Role.LEAVING)
            ledger.leaving[worker] = reports[worker]
        elif worker in ledger.draining or worker in ledger.notices:
            core.retire(worker, out)
        else:
            ledger.workers.update_facts(worker, role=Role.READY)
    if ledger.incident is not None:
        _note_plan(core, ledger.incident, plan, now_s)
    ledger.plan, ledger.accused, ledger.lane_offers, ledger.lanes_refused = plan, (), (), ()
    ledger.layouts = {plan.generation: plan.layout} | ({} if truth is None else {truth.generation: truth})
    if plan.restore is not None:
        ledger.published_step = min(ledger.published_step, plan.restore.step)
    core.enter(Forming(now_s, now_s + core.forming_limit_s(plan.restore is not None)))
    data = {"generation": plan.generation, "step": plan.step, "workers": list(plan.layout.workers)}
    moved = sum(move.hi - move.lo for move in plan.moves)
    out.append(Announce("forming", data | {"joiners": list(plan.joiners), "blocks_moved": moved}))
    out.append(Form(plan))
    waiting = left_waiting(core.spec, ledger, plan.layout.workers)
    if waiting is not None:
        out.append(Announce("workers_waiting", {"generation": plan.generation, **waiting}))


def _note_plan(core: Core, incident: Incident, plan: FormPlan, now_s: float) -> None:
    """What was decided, and what it moves."""
    incident.forming_s = now_s
    incident.generations.append(plan.generation)
    incident.blocks_moved = sum(move.hi - move.lo for move in plan.moves)
    incident.elements_moved = sum(sum(core.spec.block_elements[move.lo : move.hi]) for move in plan.moves)
    for worker in plan.joiners:
        ready_s = core.ledger.workers[worker].ready_s
        incident.decided("spare" if ready_s is not None and ready_s <= incident.detected_s else "replace")
    if plan.layout.world_size < incident.world_before:
        incident.decided("drop")
    if not incident.workers and not plan.joiners:
        incident.decided("form again")


def _all_sealed(core: Core, now_s: float, out: list[Command]) -> bool:
    state, ledger = core.state, core.ledger
    if not isinstance(state, Forming) or len(state.sealed) < len(ledger.workers.of(Role.MEMBER)):
        return False  # asked at every single seal: not all can be there yet
    if not set(ledger.members()) <= state.sealed or ledger.plan is None:
        return False
    core.close_incident(now_s, out)
    core.enter(Running())
    ledger.patience = 1
    layout = ledger.plan.layout
    data = {"generation": layout.generation, "step": ledger.plan.step, "world": layout.world_size}
    out.append(Announce("running", data | {"held_once": layout.held_once}))
    for worker in sorted(ledger.leaving):
        core.retire(worker, out)
    return True


def _retire_excess(core: Core, now_s: float, out: list[Command]) -> bool:
    ready = core.ledger.workers.of(Role.READY)
    if not isinstance(core.state, Running) or not ready or core.ledger.processes() <= core.ledger.complement:
        return False
    core.retire(max(ready), out)
    return True


def _ask_pause(core: Core, now_s: float, out: list[Command]) -> bool:
    state, ledger = core.state, core.ledger
    if not isinstance(state, Running) or state.asked is not None or not _pause_is_worth_it(core, state):
        return False
    state.asked = ledger.members()[0]
    state.ask_again_s = now_s + core.parking_limit_s()
    core.ask_pause(state.asked, out)
    return True


def _pause_is_worth_it(core: Core, state: Running) -> bool:
    spec, ledger = core.spec, core.ledger
    if ledger.stop is not None:
        return True
    if ledger.plan is None or ledger.truth is None:
        return False
    if any(notice.due for notice in ledger.notices.values()):
        return True  # below the minimum too
    due = ledger.published_step - ledger.plan.step >= spec.rebalance_after_steps
    if due and state.uneven is None:
        state.uneven = is_uneven(by_speed(spec, ledger), ledger.truth, ledger.domains(), ledger.memory())
    rebalance = due and state.uneven is True
    return propose_now(spec, ledger, ledger.truth, ledger.generation, rebalance=rebalance) is not None


MOVES: tuple[tuple[Callable[[Core, float, list[Command]], bool], Phase | None], ...] = (
    (over_budget, None),
    (_stop_waiting, Phase.GATHERING),
    (_give_up, Phase.GATHERING),
    (_close, Phase.FINISHING),
    (_start_missing, None),
    (release_notices, None),
    (_all_parked, Phase.PARKING),
    (_enough, Phase.GATHERING),
    (let_go_of_stored, Phase.GATHERING),
    (_all_sealed, Phase.FORMING),
    (_retire_excess, Phase.RUNNING),
    (_ask_pause, Phase.RUNNING),
)
"""In order of priority, each with the only phase in which it applies (None: in any): in others it is not even asked."""
