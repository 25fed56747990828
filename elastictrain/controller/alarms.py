"""Event moves for what detection and the cluster say: frozen workers, lost nodes, hung generations, machines that are
about to go, and a controller that was away. As in `moves`, an event that is not heard changes nothing.
"""

# ruff: noqa: ARG001  (all functions of the table have one shape, whether they need every argument or not)

from __future__ import annotations

from dataclasses import replace

from elastictrain.controller import events as ev
from elastictrain.controller import limits
from elastictrain.controller.commands import Announce, Command
from elastictrain.controller.core import Core
from elastictrain.controller.facts import Hang, Notice, Role
from elastictrain.controller.moves import condemn, lose
from elastictrain.controller.nodes import is_going, keep_only
from elastictrain.controller.phases import Finishing, Forming, Gathering, Parking, Running


def on_frozen(core: Core, event: ev.WorkerFrozen, out: list[Command]) -> bool:
    facts = core.ledger.workers.get(event.worker)
    if facts is None or facts.doomed or facts.suspected_until_s is not None:
        return False
    accuse(core, event, out)
    return True


def accuse(core: Core, event: ev.WorkerFrozen, out: list[Command]) -> None:
    """Kill a frozen worker; its peers park at once. One that alone holds some blocks is first told to park like the
    others, and killed when it does not (R7): once, until the next commit.
    """
    now_s, worker, reason = event.now_s, event.worker, event.reason
    ledger, state = core.ledger, core.state
    facts = ledger.workers[worker]
    alone = core.held_alone(worker)
    spare_it = alone > 0 and worker not in ledger.reprieved and not isinstance(state, Finishing)
    spare_it = spare_it and facts.role in (Role.MEMBER, Role.LEAVING)
    data = {"worker": worker, "node": facts.node, "reason": reason, "evidence": list(event.evidence)}
    grace = {"blocks_held_alone": alone, "grace_s": core.spec.last_holder_grace_s} if spare_it else {}
    out.append(Announce("frozen", data | grace))
    cause = f"worker {worker} is frozen: {reason}"
    if not spare_it:
        condemn(core, now_s, worker, "frozen", f"frozen: {reason}", event.evidence, out)
    if facts.role is Role.MEMBER and isinstance(state, Forming | Running | Parking):
        core.begin_parking(now_s, cause, None, out)
    if spare_it:
        ledger.reprieved[worker] = ledger.generation
        if worker in core.waiting() and isinstance(core.state, Parking):
            until_s = now_s + core.spec.last_holder_grace_s
            ledger.workers.update_facts(worker, why=reason, suspected_until_s=until_s)
    if core.saw(now_s, "watch", cause) and ledger.incident is not None and event.last_seen_s is not None:
        ledger.incident.last_seen_s = event.last_seen_s


def on_node_lost(core: Core, event: ev.NodeLost, out: list[Command]) -> bool:
    ledger = core.ledger
    there = {worker for worker, facts in ledger.workers.items() if facts.node == event.node}
    there |= {worker for worker in event.workers if worker in ledger.workers}
    known = event.node in ledger.nodes and ledger.nodes[event.node].avoided != "lost"
    if not there and not known:
        return False
    limits.failed(core, event.now_s, "node", event.node, out)
    limits.avoid(core, event.now_s, event.node, event.now_s, "lost")
    out.append(Announce("node_lost", {"node": event.node, "workers": sorted(there), "reason": event.reason}))
    why = f"its node {event.node} is lost: {event.reason}"
    for worker in there:
        ledger.workers.update_facts(worker, doomed=True)  # none of them is asked to park
    for worker in sorted(there):
        facts = ledger.workers[worker]
        lose(core, event.now_s, worker, why, out)
        core.fence(worker, why, out)
        if ledger.incident is not None and facts.role is Role.MEMBER:
            ledger.incident.blame(worker, facts.node, why)
            ledger.incident.gone(worker, event.now_s)  # as gone as it can be: nothing that it does counts
            ledger.incident.last_seen_s = event.last_seen_s
            core.saw(event.now_s, "watch", f"node {event.node} is lost: {event.reason}")
    return True


def on_hung(core: Core, event: ev.GenerationHung, out: list[Command]) -> bool:
    """All park and form again. The suspect is to blame only if no step was committed since the last hang, which is
    known when all have parked (`blame_for_hang`); until then it has the grace of a last holder to park.
    """
    ledger, suspect = core.ledger, event.suspect
    if event.generation != ledger.generation or not isinstance(core.state, Forming | Running):
        return False
    ledger.hangs += 1
    ledger.hung = Hang(event.reason, suspect, event.evidence)
    limits.failed(core, event.now_s, "hung", "", out)
    data = {"generation": event.generation, "reason": event.reason, "suspect": suspect, "times": ledger.hangs}
    out.append(Announce("hung", data | {"evidence": list(event.evidence)}))
    core.begin_parking(event.now_s, f"generation {event.generation} hangs: {event.reason}", None, out)
    core.saw(event.now_s, "watch", f"all wait for each other: {event.reason}")
    if suspect is not None and ledger.hangs > 1 and ledger.is_member(suspect):
        until_s = event.now_s + core.spec.last_holder_grace_s
        ledger.workers.update_facts(suspect, why=event.reason, suspected_until_s=until_s)
    return True


def blame_for_hang(core: Core, now_s: float, out: list[Command]) -> bool:
    """All have parked after a hang. True: the suspect has been killed, and is waited for."""
    ledger = core.ledger
    hung, suspect = ledger.hung, None if ledger.hung is None else ledger.hung.suspect
    if hung is None or suspect is None or ledger.hangs < 2 or not ledger.is_member(suspect):
        return False
    if core.held_alone(suspect) and suspect not in ledger.reprieved:
        ledger.reprieved[suspect] = ledger.generation
        return False
    condemn(core, now_s, suspect, "frozen", f"second hang in a row: {hung.reason}", hung.evidence, out)
    return True


def on_preemption(core: Core, event: ev.PreemptionNotice, out: list[Command]) -> bool:
    """A drain that is never refused. The stand-in is asked for now, and warms while the old worker still trains; half
    of the time is for that, half for handing over.
    """
    ledger, now_s = core.ledger, event.now_s
    if isinstance(core.state, Finishing) or ledger.stop is not None:
        return False
    there = {worker for worker, facts in ledger.workers.items() if event.node and facts.node == event.node}
    if event.worker is not None and event.worker in ledger.workers:
        there.add(event.worker)
    new = [w for w in sorted(there) if w not in ledger.notices and not ledger.workers[w].doomed]
    new = [w for w in new if ledger.workers[w].role is not Role.LEAVING]
    is_news = bool(event.node) and not is_going(ledger.nodes, event.node)
    if is_news:
        limits.avoid(core, now_s, event.node, event.deadline_s, "going")
    if not new:
        return is_news
    data = {
        "node": event.node or ledger.workers[new[0]].node,
        "workers": new,
        "reason": event.reason,
        "notice_s": event.deadline_s - now_s,
    }
    out.append(Announce("preemption", data))
    for worker in new:
        if not core.spec.replace and worker not in ledger.draining:
            ledger.complement = max(0, ledger.complement - 1)
            ledger.target = max(core.spec.min_workers, ledger.target - 1)
        if ledger.workers[worker].role is Role.MEMBER:
            half_s = max(0.0, event.deadline_s - now_s) / 2
            ledger.notices[worker] = Notice(event.deadline_s, now_s + half_s, event.reason)
        else:  # it holds nothing
            core.retire(worker, out)
    return True


def on_cluster(core: Core, event: ev.ClusterChanged, out: list[Command]) -> bool:
    ledger = core.ledger
    if (set(event.nodes), event.capacity) == (set(ledger.nodes), ledger.capacity):
        return False
    ledger.capacity = event.capacity
    keep_only(ledger.nodes, event.nodes, event.now_s)
    return True


def on_back(core: Core, event: ev.ControllerBack, out: list[Command]) -> bool:
    """Nobody listened for a while: whoever was asked before has had no chance to answer. Everybody gets the same time
    as before; only a preemption does not wait.
    """
    state, ledger, gone_s = core.state, core.ledger, event.gone_s
    if isinstance(state, Forming | Parking | Finishing):
        state.deadline_s += gone_s
    if isinstance(state, Forming | Parking):
        state.started_s += gone_s  # what is learnt from how long it took must not learn the gap
    if isinstance(state, Running):
        state.ask_again_s += gone_s
    if ledger.start_retry_at_s is not None:
        ledger.start_retry_at_s += gone_s
    for worker, facts in list(ledger.workers.items()):
        if facts.suspected_until_s is not None:
            ledger.workers.update_facts(worker, suspected_until_s=facts.suspected_until_s + gone_s)
    out.append(Announce("controller_back", {"gone_s": gone_s, "phase": state.phase.value}))
    core.saw(event.now_s, "controller", f"was away for {gone_s:.1f} s")
    return True


def release_notices(core: Core, now_s: float, out: list[Command]) -> bool:
    """Condition move: members whose machine is about to go leave as soon as a stand-in waits, or none will come, or
    half of the notice is over.
    """
    ledger = core.ledger
    if not ledger.notices:
        return False
    waiting = len(ledger.workers.of(Role.READY)) - sum(notice.released for notice in ledger.notices.values())
    changed = False
    for worker, notice in sorted(ledger.notices.items(), key=lambda item: (item[1].deadline_s, item[0])):
        due = now_s >= notice.leave_by_s
        released = notice.released or due or waiting > 0 or not core.spec.replace
        if (released, due or notice.due) == (notice.released, notice.due):
            continue
        if released and not notice.released:
            waiting -= 1
            if worker not in ledger.draining:
                ledger.draining.append(worker)
        ledger.notices[worker] = replace(notice, released=released, due=due or notice.due)
        changed = True
        if isinstance(core.state, Running):
            core.state.asked = None  # a pause that was asked for before may not have been for this
    return changed


def let_go_of_stored(core: Core, now_s: float, out: list[Command]) -> bool:
    """Condition move: a member that has to go keeps a waiting run from forming, but its state is stored: it need not
    stay until its machine goes.
    """
    ledger, state = core.ledger, core.state
    if not isinstance(state, Gathering) or not ledger.notices:
        return False
    due = [w for w, notice in ledger.notices.items() if notice.due and w in state.parked]
    step = max((report.applied_step for report in state.parked.values()), default=0)
    there = len(state.parked) - len(due) + len(ledger.workers.of(Role.READY))
    if not due or max(ledger.checkpoints, default=-1) != step or there < core.spec.min_workers:
        return False
    for worker in due:
        core.doom(worker, f"its machine goes, and its state is in the checkpoint of step {step}", out)
    return True
