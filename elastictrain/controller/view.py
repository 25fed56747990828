"""What a user may know about the run: a read-only picture of the machine as plain data, for status and live views."""

from __future__ import annotations

from collections import Counter
from typing import Any

from elastictrain.controller.facts import Role
from elastictrain.controller.machine import Machine
from elastictrain.controller.phases import Ended, Gathering


def view(machine: Machine) -> dict[str, Any]:
    """JSON-ready status.

    `phase`, `reason` (while gathering), `generation`, `step` (published), `steps`, `checkpointed_step`, `world`,
    `workers` (rank order: worker, lanes, blocks owned, failure domain), `held_once` (blocks with a single live holder),
    `spares`, `starting`, `draining`, `target`, `last_recovery`, `recoveries`, `digest` and `error` (at the end).
    """
    core = machine.core
    ledger, state = core.ledger, core.state
    layout = None if ledger.plan is None else ledger.plan.layout
    workers = []
    members, owned = set(ledger.members()), Counter[int]()
    for shard in layout.shards if layout is not None else ():
        owned[shard.owner] += shard.hi - shard.lo
    for worker, lanes in zip(layout.workers, layout.lanes, strict=True) if layout is not None else ():
        if worker in members:
            facts = {"lanes": list(lanes), "blocks_owned": owned[worker], "domain": ledger.workers[worker].domain}
            workers.append({"worker": worker, **facts})
    return {
        "phase": state.phase.value,
        "reason": state.reason if isinstance(state, Gathering) else None,
        "generation": ledger.generation,
        "step": ledger.published_step,
        "steps": core.spec.steps,
        "checkpointed_step": max(ledger.checkpoints, default=None),
        "world": len(workers),
        "workers": workers,
        "held_once": held_once(machine),
        "spares": ledger.with_role(Role.READY),
        "starting": ledger.with_role(Role.STARTING),
        "draining": list(ledger.draining),
        "target": ledger.target,
        "last_recovery": dict(ledger.recoveries[-1]) if ledger.recoveries else None,
        "recoveries": [dict(recovery) for recovery in ledger.recoveries],
        "digest": state.digest if isinstance(state, Ended) else None,
        "error": state.error if isinstance(state, Ended) else None,
    }


def held_once(machine: Machine) -> int:
    """Blocks of the sealed layout with fewer than two live holders (R4); 0 while nothing is sealed."""
    ledger = machine.core.ledger
    if ledger.truth is None:
        return 0
    return sum(
        shard.hi - shard.lo
        for shard in ledger.truth.shards
        if sum(worker in ledger.workers for worker in shard.holders()) < 2
    )
