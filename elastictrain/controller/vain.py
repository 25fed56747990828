"""Generations that end in vain: no commit, and nobody lost, hung, come or gone who could explain it. Without a limit a
worker that is troubled again and again (a bad network card, a port that is blocked one way, a driver) would have a
generation formed after the other for ever: nobody dies, so no other budget is touched.

After `FailureBudget.vain` of them in a row the worker that the trouble came from most often is replaced, as a frozen
one would be; when `vain_replaced` workers have been replaced and it still goes on, the run fails and says who and why.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from elastictrain.controller.commands import Command
from elastictrain.controller.core import Core
from elastictrain.controller.facts import Role, Vain
from elastictrain.controller.moves import condemn
from elastictrain.protocol import Doubt


@dataclass(frozen=True, slots=True)
class End:
    """How a generation ended. `commits`: it has committed steps; `further`: the job has come further than ever before;
    `doubt`: what its members said against their state, which voids those commits; `lost`: blocks have lost all holders.
    """

    commits: bool
    further: bool
    doubt: Doubt | None
    lost: bool


def end_in_vain(core: Core, end: End, now_s: float, out: list[Command]) -> bool:
    """All have parked. Count the generation if it was in vain. True: the run has failed, or a worker was told to die
    and is waited for.
    """
    ledger, plan, incident = core.ledger, core.ledger.plan, core.ledger.incident
    if end.further:
        ledger.vain, ledger.vain_replaced = [], []
        return False
    if plan is None or incident is None or incident.planned or (ledger.counted_in_vain == plan.generation):
        return False
    members = tuple(ledger.members())
    if members != plan.layout.workers or end.lost:  # somebody is gone: that is counted elsewhere, and is a new start
        ledger.vain = []
        return False
    if end.commits and end.doubt is None:
        return False
    if ledger.vain and ledger.vain[-1].members != members:
        ledger.vain = []
    accused = end.doubt.suspects if end.doubt is not None else ledger.accused
    reason = end.doubt.reason if end.doubt is not None else incident.cause
    ledger.vain.append(Vain(plan.generation, members, tuple(w for w in accused if w in members), reason))
    ledger.counted_in_vain = plan.generation
    if len(ledger.vain) < core.spec.budget.vain:
        return False
    worker = whom_to_replace(core, ledger.vain)
    if worker is None:
        core.fail(_words(core), out)
        return True
    return _replace(core, worker, now_s, out)


def whom_to_replace(core: Core, vain: Sequence[Vain]) -> int | None:
    """The one that was accused most often, if anybody was and may be replaced; of several rather one whose blocks have
    another holder, then the one that was accused last.
    """
    spec, ledger = core.spec, core.ledger
    there = len(ledger.members()) + len(ledger.workers.of(Role.READY))
    if len(ledger.vain_replaced) >= spec.budget.vain_replaced or (not spec.replace and there <= spec.min_workers):
        return None
    times = Counter(worker for one in vain for worker in one.accused)
    newest = {worker: index for index, one in enumerate(vain) for worker in one.accused}
    most = [worker for worker, count in times.items() if count == max(times.values())]
    return min(most, key=lambda worker: (core.held_alone(worker) > 0, -newest[worker], worker), default=None)


def _replace(core: Core, worker: int, now_s: float, out: list[Command]) -> bool:
    ledger = core.ledger
    accused = [one for one in ledger.vain if worker in one.accused]
    reason = (
        f"{len(ledger.vain)} generations in a row ended without a commit, {len(accused)} of them by trouble of this "
        f"worker, last: {accused[-1].reason}"
    )
    evidence = tuple(f"generation {one.generation}: {one.reason}" for one in accused)
    ledger.vain_replaced.append((worker, accused[-1].reason))
    ledger.vain = []
    condemn(core, now_s, worker, "troubled", reason, evidence, out)
    core.saw(now_s, "controller", f"worker {worker}: {reason}")
    return True


def _words(core: Core) -> str:
    ledger = core.ledger
    vain = ledger.vain
    listed = "; ".join(f"generation {one.generation}: {one.reason}" for one in vain[-8:])
    tried = ", ".join(f"worker {worker} ({reason})" for worker, reason in ledger.vain_replaced)
    helped = f"Replacing {tried} has not helped. " if tried else "There was nobody to replace. "
    workers = ", ".join(map(str, vain[-1].members))
    return (
        f"ClusterError: no step after {ledger.reached} could be committed: the last {len(vain)} generations, of "
        f"workers {workers}, ended without a commit although nobody was lost ({listed}). {helped}Look at the "
        "network between their nodes (every worker must reach every other one on any port) and at their logs; "
        f"{core.resume_words()}"
    )
