"""Event moves: what each kind of event changes by itself. What follows from the new facts is decided in `settle`.

Every function answers whether the event was heard. An event of another generation, or of a worker that is not a live
member of this one, is not heard and changes nothing at all.
"""

# ruff: noqa: ARG001  (all functions of the table have one shape, whether they need every argument or not)

from __future__ import annotations

from elastictrain.controller import events as ev
from elastictrain.controller import limits
from elastictrain.controller.budgets import error_line
from elastictrain.controller.commands import Announce, Command, Park
from elastictrain.controller.core import Core
from elastictrain.controller.facts import Role, WorkerFacts
from elastictrain.controller.nodes import NodeFacts, is_going
from elastictrain.controller.phases import Finishing, Forming, Gathering, Parking, Phase, Running
from elastictrain.controller.policies import refuse_drain, refuse_resize
from elastictrain.controller.recovery import less_trusting
from elastictrain.controller.restores import announce_restored, drop_checkpoint, is_refused
from elastictrain.controller.speeds import too_big_for


def heard(core: Core, generation: int, worker: int) -> bool:
    """Whether a message of `worker` about `generation` counts."""
    ledger = core.ledger
    return generation == ledger.generation and ledger.is_member(worker) and not ledger.workers[worker].doomed


def on_begun(core: Core, event: ev.Begun, out: list[Command]) -> bool:
    ledger = core.ledger
    if ledger.begun:
        return False
    ledger.begun = True
    ledger.restore = event.restore
    # A newer one than the run starts from belongs to steps that this run has yet to take.
    ledger.checkpoints = {step: path for step, path in event.checkpoints if step <= event.restore.step}
    if event.restore.checkpoint is not None:
        ledger.checkpoints[event.restore.step] = event.restore.checkpoint
    ledger.published_step = ledger.shown_step = event.restore.step
    return True


def on_placed(core: Core, event: ev.WorkerPlaced, out: list[Command]) -> bool:
    ledger, facts = core.ledger, core.ledger.workers.get(event.worker)
    if facts is None or facts.doomed or facts.role is not Role.STARTING or facts.node == event.node:
        return False
    ledger.workers.update_facts(event.worker, node=event.node)
    if is_going(ledger.nodes, event.node):
        core.retire(event.worker, out)
    return True


def on_ready(core: Core, event: ev.WorkerReady, out: list[Command]) -> bool:
    facts = core.ledger.workers.get(event.worker)
    if facts is None or facts.doomed or facts.role is not Role.STARTING:
        return False
    node = event.node or event.domain
    domain = event.labels.get(core.spec.domain_label or "") or event.domain or event.node
    if node:
        core.ledger.nodes.setdefault(node, NodeFacts())
        if is_going(core.ledger.nodes, node):  # it was placed there before the notice came: it would go with its node
            core.retire(event.worker, out)
            return True
    core.ledger.workers[event.worker] = WorkerFacts(
        Role.READY, domain, event.memory_bytes, node=node, ready_s=event.now_s
    )
    core.ledger.start_failures, core.ledger.start_retry_at_s = 0, None
    out.append(Announce("worker_ready", {"worker": event.worker, "domain": domain, "node": node}))
    return True


def on_start_failed(core: Core, event: ev.WorkerStartFailed, out: list[Command]) -> bool:
    facts = core.ledger.workers.get(event.worker)
    if facts is None or facts.role is not Role.STARTING:
        return False
    core.forget(event.worker)
    if event.user_error and core.ledger.plan is None:
        core.fail(event.error, out)
        return True
    if facts.doomed:
        return True  # counted when it was doomed
    _count_start_failure(core, event.now_s, event.worker, event.error, event.node or facts.node, out)
    return True


def _count_start_failure(core: Core, now_s: float, worker: int, error: str, node: str, out: list[Command]) -> None:
    limits.failed(core, now_s, "start", node, out)
    core.ledger.start_failures += 1
    core.ledger.start_error = error
    attempts = f"{core.ledger.start_failures} of {core.spec.start_attempts} in a row"
    out.append(Announce("start_failed", {"worker": worker, "error": error, "attempts": attempts}))


def on_died(core: Core, event: ev.WorkerDied, out: list[Command]) -> bool:
    ledger, worker = core.ledger, event.worker
    facts = ledger.workers.get(worker)
    if facts is None:
        return ledger.fenced.pop(worker, None) is not None
    if facts.role is Role.STARTING and not facts.doomed:
        core.forget(worker)
        _count_start_failure(core, event.now_s, worker, event.cause, event.node or facts.node, out)
        return True
    out.append(Announce("worker_lost", {"worker": worker, "cause": event.cause, "generation": ledger.generation}))
    expected = facts.doomed or worker in ledger.notices or facts.role is Role.LEAVING
    if not expected:
        limits.lost(core, event.now_s, worker, "died", event.cause, out)
    lose(core, event.now_s, worker, event.cause, out)
    if ledger.incident is not None:
        if facts.role is Role.MEMBER:
            ledger.incident.blame(worker, facts.node, event.cause)
            ledger.incident.saw(event.now_s, facts.node or "cluster", f"worker {worker} is gone: {event.cause}")
        ledger.incident.gone(worker, event.now_s)
    return True


def lose(core: Core, now_s: float, worker: int, cause: str, out: list[Command]) -> None:
    """A worker is gone, or counts as gone: forget it; what follows for the others."""
    ledger, facts, state = core.ledger, core.ledger.workers[worker], core.state
    asked = worker in ledger.draining or worker in ledger.notices or facts.role in (Role.LEAVING, Role.STARTING)
    core.forget(worker)
    if not asked and not core.spec.replace:
        ledger.complement = max(0, ledger.complement - 1)
        ledger.target = max(core.spec.min_workers, min(ledger.target, ledger.complement))
    if facts.role is not Role.MEMBER:
        return
    if isinstance(state, Forming | Running | Parking):
        if isinstance(state, Parking):
            state.reports.pop(worker, None)
        core.begin_parking(now_s, cause, worker, out)
    elif isinstance(state, Gathering):
        state.parked.pop(worker, None)
        core.note_incident(now_s, cause, worker, out, planned=False)
    elif isinstance(state, Finishing):
        state.gone.add(worker)


def on_troubled(core: Core, event: ev.WorkerTroubled, out: list[Command]) -> bool:
    if not heard(core, event.generation, event.worker):
        return False
    state = core.state
    if isinstance(state, Finishing):
        if event.worker in state.gone:
            return False
        state.gone.add(event.worker)
        return True
    if isinstance(state, Parking):
        if event.worker in state.reports:
            return False
        if not state.told and event.worker not in state.nudged:
            state.nudged.add(event.worker)
            out.append(Park(event.generation, (event.worker,)))  # its peers have parked at the commit before it could
            return True
        return core.saw(event.now_s, f"worker {event.worker}", f"lost a peer: {event.error}")  # it has been told
    if not isinstance(state, Forming | Running):
        return False
    core.ledger.accused = (event.worker,)
    core.begin_parking(event.now_s, f"worker {event.worker} lost a peer: {event.error}", None, out)
    core.saw(event.now_s, f"worker {event.worker}", f"lost a peer: {event.error}")
    return True


def on_failed(core: Core, event: ev.WorkerFailed, out: list[Command]) -> bool:
    state = core.state
    if not heard(core, event.generation, event.worker):
        return False
    if event.kind == "restore" and is_refused(core, event, out):
        return True
    if isinstance(state, Gathering):  # all have parked; only that a checkpoint is corrupt is worth knowing now
        return event.kind == "restore" and drop_checkpoint(core, event, out)
    if event.kind == "user":
        core.fail(event.error, out)
    elif event.kind in ("torn", "corrupt"):  # R7: between vote and end of apply; its state is neither step
        words = "torn apply" if event.kind == "torn" else "corrupt"
        core.ledger.doubt = less_trusting(core.ledger.doubt, event.doubt)
        condemn(core, event.now_s, event.worker, event.kind, f"{words}: {event.error}", (), out, cause=event.error)
        if not isinstance(state, Finishing):
            core.begin_parking(event.now_s, f"{words}: {event.error}", event.worker, out)
            core.saw(event.now_s, f"worker {event.worker}", f"{words}: {error_line(event.error)}")
    elif event.kind == "restore" and drop_checkpoint(core, event, out):
        core.begin_parking(event.now_s, f"a checkpoint could not be restored: {event.error}", None, out)
    else:
        core.fail(f"InternalError in worker {event.worker} ({event.kind}): {event.error}", out)
    return True


def condemn(
    core: Core,
    now_s: float,
    worker: int,
    kind: str,
    reason: str,
    evidence: tuple[str, ...],
    out: list[Command],
    *,
    cause: str = "",
) -> None:
    """Blame a worker, count its failure (`cause`: in full, default `reason`), and kill it."""
    ledger, facts = core.ledger, core.ledger.workers[worker]
    limits.lost(core, now_s, worker, kind, cause or reason, out)
    if facts.role is Role.MEMBER and not isinstance(core.state, Finishing):
        incident = core.note_incident(now_s, reason, worker, out, planned=False)
        incident.blame(worker, facts.node, reason, evidence)
    if facts.role is Role.STARTING:
        ledger.start_failures, ledger.start_error = ledger.start_failures + 1, reason
    core.doom(worker, reason, out)


def on_parked(core: Core, event: ev.WorkerParked, out: list[Command]) -> bool:
    worker, state = event.report.worker, core.state
    if not heard(core, event.generation, worker):
        return False
    if isinstance(state, Finishing) and worker not in state.gone and worker not in state.digests:
        state.gone.add(worker)
        return True
    if isinstance(state, Running):  # at the commit that carried the pause flag: the others come by themselves
        notices = core.ledger.notices
        incident = core.note_incident(event.now_s, "planned pause", None, out, planned=True)
        incident.notice = bool(notices)
        for leaving, notice in sorted(notices.items()):
            core.saw(event.now_s, f"worker {leaving}", f"its machine is about to go: {notice.reason}")
        core.enter(Parking(event.now_s, event.now_s + core.parking_limit_s(), told=False))
    elif isinstance(state, Forming):
        core.begin_parking(event.now_s, f"worker {worker} parked while forming", None, out)
    state = core.state
    if not isinstance(state, Parking) or worker in state.reports:
        return False
    if event.report.sealed_generation == core.ledger.generation:
        core.mark_sealed(event.now_s)  # now, for the worker that knows it may be gone before the last one has parked
    core.ledger.doubt = less_trusting(core.ledger.doubt, event.report.doubt)  # said once it counts, should it die now
    state.reports[worker] = event.report
    state.answered_s = event.now_s
    if core.ledger.workers[worker].suspected_until_s is not None:  # it lives after all
        core.ledger.workers.update_facts(worker, suspected_until_s=None, why="")
        core.saw(event.now_s, f"worker {worker}", "parked, although it was taken for frozen")
    return True


def on_sealed(core: Core, event: ev.Sealed, out: list[Command]) -> bool:
    state, plan = core.state, core.ledger.plan
    if not heard(core, event.generation, event.worker) or not isinstance(state, Forming | Parking):
        return False
    if plan is None or event.step != plan.step:
        planned = None if plan is None else plan.step
        core.fail(f"InternalError: worker {event.worker} sealed at step {event.step}, planned was {planned}", out)
        return True
    if isinstance(state, Parking) and core.ledger.sealed == event.generation:
        return False
    core.mark_sealed(event.now_s)
    if isinstance(state, Forming):
        if event.read is not None and plan.restore is not None and event.worker not in state.sealed:
            announce_restored(plan.restore, event.read, out)
        state.sealed.add(event.worker)
    return True


def on_progress(core: Core, event: ev.Progress, out: list[Command]) -> bool:
    ledger = core.ledger
    if event.generation != ledger.generation or event.step <= ledger.shown_step:
        return False
    if core.state.phase not in (Phase.FORMING, Phase.RUNNING, Phase.PARKING, Phase.FINISHING):
        return False
    core.mark_sealed(event.now_s)  # a vote of this generation was complete
    ledger.published_step, ledger.shown_step = max(ledger.published_step, event.step), event.step
    if isinstance(core.state, Running):
        core.state.in_vain = 0
    if ledger.plan is not None and event.step > ledger.plan.step:
        core.note_commit()
        if ledger.settling is not None:
            core.complete_incident("recovered", event.now_s, out)
    return True


def on_finished(core: Core, event: ev.WorkerFinished, out: list[Command]) -> bool:
    state = core.state
    if not heard(core, event.generation, event.worker):
        return False
    if isinstance(state, Forming | Running | Parking):
        core.mark_sealed(event.now_s)
        core.ledger.published_step = max(core.ledger.published_step, event.step)
        state = core.begin_finishing(event.now_s, event.step, out)
    if not isinstance(state, Finishing) or event.worker in state.digests:
        return False
    state.gone.discard(event.worker)
    state.digests[event.worker] = event.digest
    return True


def on_add(core: Core, event: ev.AddRequested, out: list[Command]) -> bool:
    ledger = core.ledger
    if core.state.phase is Phase.FINISHING or ledger.stop is not None:
        return _refuse("add", "the run is ending", out)
    ledger.start_failures, ledger.start_retry_at_s = 0, None
    if ledger.processes() < ledger.target:  # fewer than wanted: fill up first
        ledger.complement = max(ledger.complement, ledger.processes() + 1)
    elif ledger.target >= core.spec.max_workers:
        return _refuse("add", f"{ledger.target} workers are workers.max; raise workers.max", out)
    else:
        ledger.target += 1
        ledger.complement += 1
    return True


def on_drain(core: Core, event: ev.DrainRequested, out: list[Command]) -> bool:
    ledger, worker = core.ledger, event.worker
    facts = ledger.workers.get(worker)
    if facts is None or facts.doomed or facts.role is Role.LEAVING:
        return _refuse("drain", f"worker {worker} is not one of {sorted(ledger.workers)}", out)
    if core.state.phase is Phase.FINISHING or ledger.stop is not None:
        return _refuse("drain", "the run is ending", out)
    if facts.role is not Role.MEMBER:  # it holds nothing: it can go at once
        ledger.complement -= not core.spec.replace
        core.retire(worker, out)
        return True
    reason = refuse_drain(core.spec, worker, ledger.members(), ledger.draining, ledger.target)
    reason = reason or too_big_for(core, [w for w in ledger.members() if w not in (worker, *ledger.draining)])
    if reason is not None:
        return _refuse("drain", reason, out)
    ledger.draining.append(worker)
    ledger.target -= 1
    ledger.complement -= 1
    return True


def on_resize(core: Core, event: ev.ResizeRequested, out: list[Command]) -> bool:
    ledger = core.ledger
    staying = [worker for worker in ledger.members() if worker not in ledger.draining]
    reason = refuse_resize(core.spec, event.target) or too_big_for(core, staying[: event.target])
    if core.state.phase is Phase.FINISHING or ledger.stop is not None:
        reason = "the run is ending"
    if reason is not None:
        return _refuse("resize", reason, out)
    ledger.start_failures, ledger.start_retry_at_s = 0, None
    ledger.complement = max(event.target, ledger.complement + event.target - ledger.target)
    ledger.target = event.target
    staying.sort(key=lambda worker: worker in ledger.notices)  # those that go anyway go first
    ledger.draining += reversed(staying[event.target :])
    return True


def on_stop(core: Core, event: ev.StopRequested, out: list[Command]) -> bool:
    if core.ledger.stop is not None or core.state.phase is Phase.FINISHING:
        return False
    core.ledger.stop = event.reason
    if isinstance(core.state, Running):
        core.state.asked = None  # a pause that was asked for before would store nothing
    return True


def _refuse(request: str, reason: str, out: list[Command]) -> bool:
    out.append(Announce("refused", {"request": request, "reason": reason}))
    return False
