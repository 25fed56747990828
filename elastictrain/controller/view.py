"""What a user may know about the run: a read-only picture of the machine as plain data, for status and live views."""

from __future__ import annotations

from collections import Counter
from typing import Any

from elastictrain.controller.facts import Role
from elastictrain.controller.machine import Machine
from elastictrain.controller.phases import Ended, Gathering
from elastictrain.controller.speeds import lanes_in_force


def view(machine: Machine) -> dict[str, Any]:
    """JSON-ready status.

    `phase`, `reason` (while gathering), `generation`, `step` (published), `steps`, `checkpointed_step`,
    `checkpoint_given_up` (until the next one is committed), `copies` (by place: newest step, those that wait, what is
    wrong), `world`, `workers` (rank order: worker, lanes, blocks owned, failure domain, node), `held_once` (blocks with
    a single live holder), `spares`, `starting`, `draining`,
    `preempted` (worker and the time at which it goes), `fenced`, `nodes_set_aside` (node, its failures), `target`,
    `speeds` (relative, by worker, once lanes were dealt out by them),
    `last_recovery`, `recoveries` and `incidents` (the last hundred), `digest` and `error` (at the end).
    """
    core = machine.core
    ledger, state = core.ledger, core.state
    layout = lanes_in_force(core.spec, ledger)
    workers = []
    members, owned = set(ledger.members()), Counter[int]()
    for shard in layout.shards if layout is not None else ():
        owned[shard.owner] += shard.hi - shard.lo
    for worker, lanes in zip(layout.workers, layout.lanes, strict=True) if layout is not None else ():
        if worker in members:
            facts = ledger.workers[worker]
            share = {"lanes": list(lanes), "blocks_owned": owned[worker]}
            workers.append({"worker": worker, **share, "domain": facts.domain, "node": facts.node})
    return {
        "phase": state.phase.value,
        "reason": _waits_for(machine, state) if isinstance(state, Gathering) else None,
        "generation": ledger.generation,
        "step": ledger.published_step,
        "steps": core.spec.steps,
        "checkpointed_step": max(ledger.checkpoints, default=None),
        "checkpoint_given_up": None if ledger.given_up is None else dict(ledger.given_up),
        "copies": {path: dict(standing) for path, standing in sorted(ledger.copies.items())},
        "world": len(workers),
        "workers": workers,
        "held_once": held_once(machine),
        "spares": ledger.with_role(Role.READY),
        "starting": ledger.with_role(Role.STARTING),
        "draining": list(ledger.draining),
        "preempted": [{"worker": w, "deadline_s": notice.deadline_s} for w, notice in sorted(ledger.notices.items())],
        "fenced": sorted(ledger.fenced),
        "nodes_set_aside": {
            node: [what for _, what in facts.failures]
            for node, facts in sorted(ledger.nodes.items())
            if facts.aside_until_s is not None
        },
        "target": ledger.target,
        "speeds": {worker: round(share, 4) for worker, share in sorted(ledger.speeds.items())},
        "last_recovery": dict(ledger.recoveries[-1]) if ledger.recoveries else None,
        "recoveries": [dict(recovery) for recovery in ledger.recoveries],
        "incidents": [dict(incident) for incident in ledger.incidents],
        "digest": state.digest if isinstance(state, Ended) else None,
        "error": state.error if isinstance(state, Ended) else None,
    }


def _waits_for(machine: Machine, state: Gathering) -> str:
    """What is missing, who is on the way, and what the cluster has."""
    ledger, spec = machine.core.ledger, machine.spec
    words = [state.reason]
    if ledger.plan is None:
        ready, least = len(ledger.with_role(Role.READY)), spec.min_workers
        words.append(f"{ready} of {spec.initial_workers} are ready, workers.min={least}")
    if starting := ledger.with_role(Role.STARTING):
        words.append(f"{len(starting)} are starting")
    if ledger.start_failures:
        words.append(f"the last {ledger.start_failures} could not start: {ledger.start_error}")
    if ledger.capacity:
        words.append(ledger.capacity)
    return "; ".join(words)


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
