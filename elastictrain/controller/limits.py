"""Counting what fails: per hour and cause, per node, and in rounds at one step. What the counts mean is in `budgets`
and `nodes`; here they are kept, and a run that is over its budget is ended.
"""

from __future__ import annotations

from elastictrain.controller.budgets import WINDOW_S, Loss, Round, verdict
from elastictrain.controller.commands import Announce, Command
from elastictrain.controller.core import Core
from elastictrain.controller.facts import Role
from elastictrain.controller.nodes import LOST_REST_S, NodeFacts, count_failure, should_set_aside, take_back
from elastictrain.controller.phases import Forming, Parking, Running


def failed(core: Core, now_s: float, kind: str, node: str, out: list[Command]) -> None:
    """A failure of `kind` has happened, on `node` if that is known and at fault. A node that keeps failing is set
    aside.

    `kind`: died, frozen, torn, corrupt, troubled (generations ended in vain because of it), start (a worker did not
    start), node (a node was lost), hung.
    """
    ledger, budget = core.ledger, core.spec.budget
    recent = [at_s for at_s in ledger.failures.get(kind, ()) if at_s > now_s - WINDOW_S]
    ledger.failures[kind] = [*recent, now_s]
    if not node:
        return
    count_failure(ledger.nodes, node, now_s, kind)
    if should_set_aside(budget, ledger.nodes, node):
        facts = ledger.nodes[node]
        facts.aside_until_s = now_s + budget.node_rest_s
        data = {"node": node, "failures": [what for _, what in facts.failures], "after_s": budget.node_rest_s}
        out.append(Announce("node_set_aside", data))


def avoid(core: Core, now_s: float, node: str, until_s: float, why: str) -> None:
    """Start nobody on `node` for a while."""
    if node:
        facts = core.ledger.nodes.setdefault(node, NodeFacts())
        facts.avoid_until_s = max(facts.avoid_until_s or now_s, until_s + LOST_REST_S)
        facts.avoided = why


def lost(core: Core, now_s: float, worker: int, kind: str, cause: str, out: list[Command]) -> None:
    """A worker was lost by itself: count it, against its node too, and as a member against the step it worked at."""
    ledger, facts = core.ledger, core.ledger.workers[worker]
    failed(core, now_s, kind, facts.node, out)
    if facts.role is not Role.MEMBER or not isinstance(core.state, Forming | Running | Parking) or ledger.plan is None:
        return
    if isinstance(core.state, Parking) and worker in core.state.reports:
        return  # it had parked: whatever it died of, it was not the step
    stepping = ledger.sealed == ledger.generation
    ledger.losses.append(Loss(worker, kind, cause, ledger.plan.layout.lanes_of(worker) if stepping else ()))


def end_round(core: Core, reached: int, exact: bool, out: list[Command]) -> bool:
    """A generation is over, and the job has come to step `reached`, as far as is known (`exact`: survivors say so).
    True: the run has failed, over its budget.
    """
    ledger = core.ledger
    losses, hung, ledger.losses, ledger.hung = ledger.losses, ledger.hung, [], None
    if reached > ledger.reached:
        ledger.reached, ledger.rounds = reached, []
    if not losses and hung is None:
        return False
    ledger.rounds.append(Round(ledger.generation, tuple(losses), "" if hung is None else hung.reason, exact))
    words = verdict(core.spec.budget, ledger.rounds, ledger.reached, core.resume_words())
    if words is not None:
        core.fail(words, out)
    return words is not None


def over_budget(core: Core, now_s: float, out: list[Command]) -> bool:
    """Condition move: too many failures of one cause within an hour end the run."""
    budget = core.spec.budget
    if max(map(len, core.ledger.failures.values()), default=0) <= budget.per_hour:
        return False
    cap = budget.hourly(core.spec.max_workers)
    for kind, times in core.ledger.failures.items():
        recent = sum(at_s > now_s - WINDOW_S for at_s in times) if len(times) > cap else 0
        if recent > cap:
            core.fail(
                f"ClusterError: {recent} failures within an hour ({KINDS[kind]}), more than {cap}, which is generous: "
                f"the cluster is not fit for this job; look at events.jsonl for what they have in common; "
                f"{core.resume_words()}",
                out,
            )
            return True
    return False


KINDS = {
    "died": "workers died",
    "frozen": "workers froze",
    "torn": "updates failed half-way",
    "corrupt": "workers computed or stored wrong numbers",
    "troubled": "workers were replaced because generations ended in vain",
    "start": "workers could not start",
    "node": "nodes were lost",
    "hung": "all workers waited for each other",
}


def nodes_back(core: Core, now_s: float, out: list[Command]) -> bool:
    """End the rest of nodes whose time has come; who still waits for a place because of them is asked for anew."""
    back = take_back(core.ledger.nodes, now_s)
    out += [Announce("node_taken_back", {"node": node}) for node in back]
    for worker in core.ledger.with_role(Role.STARTING) if back else []:
        facts = core.ledger.workers[worker]
        if not facts.node and set(facts.avoid) & set(back):
            core.retire(worker, out)
    return bool(back)
