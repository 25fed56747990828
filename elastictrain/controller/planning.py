"""From parked survivors and waiting workers to the plan of the next generation. Pure: reads the ledger only.

**How a drained worker leaves.** Lanes are free to move, and with mirrors every block that the drained worker holds has
another holder. So the next generation is formed without it: its blocks come from their other holders, while it stays
parked with its copies (role LEAVING) until all members have seen the seal, and is retired only then. Until the seal it
still counts as a holder (R4): if the forming fails and it turns out to be the last holder of a block, it is taken into
the next group again. Only when it is the sole holder from the start (mirrors off, or both holders drained together)
does it take part once more, owning nothing, to hand its blocks over (`policies.propose`). The other choice, to keep it
in the group for one generation in every case, would cost every drain a second pause.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from elastictrain.controller.facts import Ledger, MachineSpec, Role
from elastictrain.controller.policies import (
    Proposal,
    even_layout,
    is_uneven,
    layout_after_loss,
    propose,
    shortfall,
    world_cap,
)
from elastictrain.controller.recovery import Standing
from elastictrain.controller.speeds import relative_speeds, with_and_without_speeds
from elastictrain.layout import Layout, moves_between
from elastictrain.planner.pace import best_size
from elastictrain.protocol import FormPlan, ParkReport


@dataclass(frozen=True, slots=True)
class Shortage:
    """No generation can be formed now. `kind`: "workers", "memory" or "preemption"; `reason` in words."""

    kind: str
    reason: str


def plan_next(
    spec: MachineSpec,
    ledger: Ledger,
    standing: Standing,
    reports: Mapping[int, ParkReport],
    *,
    planned: bool,
) -> FormPlan | Shortage:
    """The next generation, or why there can be none.

    `reports`: of the parked members. `standing`: of them and of the leaving workers, without lost shards. `planned`:
    nobody was lost since the last seal, so that holders may change.
    """
    found: FormPlan | Shortage | None = None
    for under in with_and_without_speeds(spec, ledger):
        found = _plan_under(under, spec, ledger, standing, reports, planned=planned)
        if isinstance(found, FormPlan) or found.kind != "memory":
            break
    assert found is not None
    return found


def _plan_under(
    spec: MachineSpec,
    plain: MachineSpec,
    ledger: Ledger,
    standing: Standing,
    reports: Mapping[int, ParkReport],
    *,
    planned: bool,
) -> FormPlan | Shortage:
    if standing.truth is None:
        return _plan_restore(spec, ledger, reports)
    truth, generation = standing.truth, ledger.generation + 1
    known = {**ledger.leaving, **reports}
    candidates = _candidates(ledger, truth, reports)
    holders = set(truth.workers)
    least = sum(worker in known and worker in holders for worker in candidates)
    if ledger.stop is not None:  # to store what they hold: nobody new is needed for that, and nobody is too few
        candidates = candidates[:least]
    elif len(candidates) < spec.min_workers:
        return _too_few(spec, len(candidates))
    size = max(least, wanted(plain, ledger, candidates, least))
    if planned and not standing.behind and all(worker in known for worker in truth.workers):
        uneven = is_uneven(spec, truth, ledger.domains(), ledger.memory())
        # What the run has paused for was found with the plain spec too; with the learned one it might not be again.
        proposal = propose_now(plain, ledger, truth, generation, learners(truth, reports), uneven)
        if proposal is not None:
            return _plan(ledger, standing, proposal.layout, reports)
        due = [worker for worker in candidates if worker in ledger.notices and ledger.notices[worker].due]
        if due:
            return _must_go(spec, len(candidates) - len(due), due)
    reason, domains, memory = "", ledger.domains(), ledger.memory()
    while size <= world_cap(spec):  # more than the target only when the state does not fit otherwise
        group = candidates[:size]
        for remake in (partial(layout_after_loss, spec, truth), partial(even_layout, spec, memory=memory)):
            layout = remake(generation, group, domains)
            why = shortfall(spec, layout, memory)
            if why is None:
                return _plan(ledger, standing, layout, reports)
            reason = reason or why
        if size >= len(candidates):
            break
        size += 1
    return Shortage("memory", reason)


def learners(truth: Layout, reports: Mapping[int, ParkReport]) -> list[int]:
    """Parked members that do not hold anything that counts: they were joining when the last forming failed."""
    holders = set(truth.workers)
    return [worker for worker in sorted(reports) if worker not in holders]


def propose_now(
    spec: MachineSpec,
    ledger: Ledger,
    truth: Layout,
    generation: int,
    first: Sequence[int] = (),
    rebalance: bool = False,
) -> Proposal | None:
    """`policies.propose` with the facts of the ledger; `first` join before the waiting workers do."""
    room = min(ledger.target, world_cap(spec)) > truth.world_size and (first or ledger.workers.of(Role.READY))
    if not (room or rebalance or ledger.draining):
        return None  # asked at every event: nobody may come, nobody leaves
    newcomers = [*first, *ledger.with_role(Role.READY)]
    staying = [worker for worker in truth.workers if worker not in ledger.draining]
    target = wanted(spec, ledger, [*staying, *newcomers], len(staying))
    for under in with_and_without_speeds(spec, ledger):
        proposal = propose(
            under,
            truth,
            generation,
            newcomers=newcomers,
            draining=ledger.draining,
            target=target,
            domains=ledger.domains(),
            memory=ledger.memory(),
            rebalance=rebalance,
        )
        if proposal is not None:
            return proposal
    return None


def wanted(spec: MachineSpec, ledger: Ledger, order: Sequence[int], least: int) -> int:
    """How many workers should take part, at most; of those in `order` the first. `least` of them take part anyway.

    A job that plans takes in nobody who would not make a step quicker by the cost model and the speeds learned so far:
    they wait, as spares. Nobody is sent away for that: to hand over what a member holds costs more than it brings.
    """
    most = min(ledger.target, world_cap(spec))
    there = order[:most]
    floor = max(least, spec.min_workers, 2 if spec.mirrors else 1)
    if spec.pace is None or not floor < len(there) < spec.initial_workers:
        return most  # where all are there that were planned with, all take part
    return best_size(spec.pace, spec.lane_count, relative_speeds(ledger.speeds, there), floor)


def left_waiting(spec: MachineSpec, ledger: Ledger, members: Sequence[int]) -> dict[str, object] | None:
    """What there is to tell of workers that wait because the plan has no use for them; None: there are none."""
    room = min(ledger.target, world_cap(spec)) - len(members)
    waiting = ledger.with_role(Role.READY)[: max(0, room)]
    if spec.pace is None or not waiting:
        return None
    both = [relative_speeds(ledger.speeds, who) for who in (members, [*members, *waiting])]
    with_members, with_all = (spec.pace.step_s(spec.lane_count, speeds) for speeds in both)
    return {"workers": list(members), "waiting": waiting, "step_s": with_members, "all_s": with_all}


def _candidates(ledger: Ledger, truth: Layout, reports: Mapping[int, ParkReport]) -> list[int]:
    """Holders first (also a leaving one without which a block would be lost), then learners, then waiting workers."""
    holders = [worker for worker in truth.workers if worker in reports]
    taken = set(holders)
    for shard in truth.shards:
        if not any(worker in taken for worker in shard.holders()):
            kept = [worker for worker in shard.holders() if worker in ledger.leaving][:1]
            holders += kept
            taken.update(kept)
    return [*holders, *learners(truth, reports), *ledger.with_role(Role.READY)]


def _plan_restore(spec: MachineSpec, ledger: Ledger, reports: Mapping[int, ParkReport]) -> FormPlan | Shortage:
    """Everything from a checkpoint or the initial state: nobody holds anything, so the layout is made afresh."""
    waiting = sorted([*sorted(reports), *ledger.with_role(Role.READY)], key=lambda worker: worker in ledger.draining)
    if len(waiting) < spec.min_workers:
        return _too_few(spec, len(waiting))
    size, reason = wanted(spec, ledger, waiting, spec.min_workers), ""
    domains, memory = ledger.domains(), ledger.memory()
    while size <= world_cap(spec):
        layout = even_layout(spec, ledger.generation + 1, waiting[:size], domains, (), memory)
        why = shortfall(spec, layout, memory)
        if why is None:
            return FormPlan(
                generation=layout.generation,
                step=ledger.restore.step,
                layout=layout,
                previous=None,
                moves=(),
                roll_forward=None,
                restore=ledger.restore,
                gather_to=layout.workers,
                store="",
                published_step=min(ledger.shown_step, ledger.restore.step),
                checkpointed_step=_checkpointed(ledger),
                given_up=ledger.heard_given_up,
                joiners=_joiners(layout, reports),
            )
        reason = reason or why
        if size >= len(waiting):
            break
        size += 1
    return Shortage("memory", reason)


def _plan(ledger: Ledger, standing: Standing, layout: Layout, reports: Mapping[int, ParkReport]) -> FormPlan:
    assert standing.truth is not None
    known = {**ledger.leaving, **reports}
    holders = set(standing.truth.workers)
    joiners = tuple(worker for worker in layout.workers if worker not in holders)
    alive = [worker for worker in layout.workers if worker in known and worker in holders]
    behind = not set(standing.behind).isdisjoint(layout.workers)
    gather_to = tuple(w for w in layout.workers if behind or w not in holders or not known[w].gathered)
    return FormPlan(
        generation=layout.generation,
        step=standing.step,
        layout=layout,
        previous=standing.truth,
        moves=moves_between(standing.truth, layout, alive),
        roll_forward=standing.roll_forward if behind else None,
        restore=None,
        gather_to=gather_to,
        store="",
        published_step=ledger.shown_step,
        checkpointed_step=_checkpointed(ledger),
        given_up=ledger.heard_given_up,
        joiners=joiners,
    )


def _joiners(layout: Layout, reports: Mapping[int, ParkReport]) -> tuple[int, ...]:
    """Members that have never been part of a sealed generation."""
    return tuple(w for w in layout.workers if w not in reports or reports[w].sealed_generation == 0)


def _checkpointed(ledger: Ledger) -> int:
    return max(ledger.checkpoints, default=0)


def _must_go(spec: MachineSpec, staying: int, due: Sequence[int]) -> Shortage:
    who = f"worker {due[0]}" if len(due) == 1 else f"workers {', '.join(map(str, due))}"
    return Shortage(
        "preemption",
        f"the machine of {who} is about to go, and without it {staying} workers are there, which is not enough "
        f"(workers.min={spec.min_workers}) or cannot hold the state",
    )


def _too_few(spec: MachineSpec, there: int) -> Shortage:
    return Shortage("workers", f"{there} workers are there, workers.min={spec.min_workers} are needed")
