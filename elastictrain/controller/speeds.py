"""Learned speeds: lanes that move between two steps, and workers that leave because moving lanes is not enough.

A split is numbered from 1 in each generation. It is offered to all members, who switch at the first step at which every
vote has seen it (`engine.stepping`), without a pause. So until the next generation the lanes in force are those of the
newest split that has been offered, or for a moment of the one before. The next generation deals the lanes out by the
speeds that came with it.
"""

from __future__ import annotations

import math
from dataclasses import replace

from elastictrain.controller import events as ev
from elastictrain.controller.commands import Announce, Command, OfferLanes
from elastictrain.controller.core import Core
from elastictrain.controller.facts import Ledger, MachineSpec, Role
from elastictrain.controller.phases import Running
from elastictrain.controller.policies import even_layout, refuse_drain, shortfall
from elastictrain.layout import Layout, deal_lanes

MOST_OFFERS = 1000
"""In one generation: the watch holds still between two moves, so more would be an error of ours."""


def by_speed(spec: MachineSpec, ledger: Ledger) -> MachineSpec:
    """The spec with what has been learned about speed in place of `workers.lane_shares`."""
    known = {worker: share for worker, share in ledger.speeds.items() if worker in ledger.workers}
    return replace(spec, lane_shares=known) if known else spec  # relative to others' speeds, so not mixed with shares


def lanes_in_force(spec: MachineSpec, ledger: Ledger) -> Layout | None:
    """The layout of the newest generation with the newest split of its lanes."""
    if ledger.plan is None or not ledger.lane_offers:
        return None if ledger.plan is None else ledger.plan.layout
    return ledger.plan.layout.with_lanes(deal_lanes(spec.lane_count, ledger.lane_offers[-1], spec.lane_order))


def offers(core: Core) -> list[Command]:
    """All splits of this generation, as they were offered: for a new controller, which offers them again."""
    ledger, spec = core.ledger, core.spec
    workers = tuple(ledger.members())
    return [
        OfferLanes(ledger.generation, number, deal_lanes(spec.lane_count, counts, spec.lane_order), workers)
        for number, counts in enumerate(ledger.lane_offers, 1)
    ]


def on_lanes(core: Core, event: ev.LanesProposed, out: list[Command]) -> bool:
    """Offer another split to the members, if all of them step and it is one of this generation's lanes."""
    ledger, spec = core.ledger, core.spec
    if event.generation != ledger.generation or not isinstance(core.state, Running) or ledger.plan is None:
        return False
    members = ledger.plan.layout.workers
    sound = len(event.lanes) == len(members) and min(event.lanes) >= 1 and sum(event.lanes) == spec.lane_count
    speeds = dict(event.speeds)
    sound = sound and all(math.isfinite(share) and share > 0 for share in speeds.values())
    if not sound or len(ledger.lane_offers) >= MOST_OFFERS or ledger.stop is not None:
        return False
    before = lanes_in_force(spec, ledger)
    assert before is not None
    if tuple(map(len, before.lanes)) == tuple(event.lanes):
        return False  # asked for by who has not seen it yet
    ledger.lane_offers = (*ledger.lane_offers, tuple(event.lanes))
    ledger.speeds = {worker: share for worker, share in speeds.items() if worker in ledger.workers}
    changed = {
        worker: [len(old), new]
        for worker, old, new in zip(members, before.lanes, event.lanes, strict=True)
        if len(old) != new
    }
    data = {"action": event.action, "lanes": changed, "reason": event.reason, "step": event.step}
    data |= {"before_s": round(event.before_s, 6), "after_s": round(event.after_s, 6)}
    out.append(Announce("lanes_moved", data))
    out.append(offers(core)[-1])
    return True


def on_let_go(core: Core, event: ev.StragglerLeaves, out: list[Command]) -> bool:
    """A slow worker hands over and leaves: for a spare that takes its place, or without one."""
    ledger, spec = core.ledger, core.spec
    facts = ledger.workers.get(event.worker)
    if event.generation != ledger.generation or not isinstance(core.state, Running) or ledger.stop is not None:
        return False
    if facts is None or facts.role is not Role.MEMBER or facts.doomed or event.worker in ledger.draining:
        return False
    replaced = event.action == "replace"
    if replaced and not ledger.workers.of(Role.READY):
        return False  # the spare has been taken meanwhile
    if not replaced:
        staying = [worker for worker in ledger.members() if worker not in (event.worker, *ledger.draining)]
        alone = spec.mirrors and len(staying) < 2  # nobody would hold a mirror: a user may ask for that, a watch not
        reason = refuse_drain(spec, event.worker, ledger.members(), ledger.draining, ledger.target)
        if alone or reason is not None or too_big_for(core, staying) is not None:
            return False
        ledger.target -= 1
        ledger.complement -= 1
    ledger.draining.append(event.worker)
    data = {"action": event.action, "worker": event.worker, "node": facts.node, "reason": event.reason}
    data |= {"step": event.step, "before_s": round(event.before_s, 6), "after_s": round(event.after_s, 6)}
    out.append(Announce("straggler_leaves", data))
    return True


def too_big_for(core: Core, staying: list[int]) -> str | None:
    """Why a smaller world could not hold the state, in words. A world that grows, or waits, is not asked."""
    ledger = core.ledger
    if not staying or len(staying) >= len(ledger.members()):
        return None
    layout = even_layout(core.spec, max(1, ledger.generation), staying, ledger.domains())
    return shortfall(core.spec, layout, ledger.memory())
