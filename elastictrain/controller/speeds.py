"""Learned speeds: lanes that move between two steps, and workers that leave because moving lanes is not enough.

A split is numbered from 1 in each generation (0: its layout's own). It is offered to all members, who switch at the
first step at which all votes name it (`offers`), without a pause. So until the next generation the lanes in force are
those of the newest split that has been offered, or for a moment of the one before. The next generation deals the lanes
out by the speeds that came with it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from statistics import median

from elastictrain.controller import events as ev
from elastictrain.controller.commands import Announce, Command, OfferLanes
from elastictrain.controller.core import Core
from elastictrain.controller.facts import Ledger, MachineSpec, Role
from elastictrain.controller.phases import Running
from elastictrain.controller.policies import even_layout, refuse_drain, shortfall
from elastictrain.layout import Layout, deal_lanes

MOST_OFFERS = 1000
"""In one generation: the watch holds still between two moves, so more would be an error of ours."""

_HEARD = 3
"""What is heard is of one of the last so many splits, or of the layout's own."""


def by_speed(spec: MachineSpec, ledger: Ledger) -> MachineSpec:
    """The spec with what has been learned about speed in place of `workers.lane_shares`."""
    known = {worker: share for worker, share in ledger.speeds.items() if worker in ledger.workers}
    return replace(spec, lane_shares=known) if known else spec  # relative to others' speeds, so not mixed with shares


def relative_speeds(speeds: Mapping[int, float], workers: Sequence[int]) -> tuple[float, ...]:
    """Of these workers, the median of those that are known counting as 1, and so whoever is not known."""
    usual = median(speeds.values()) if speeds else 1.0
    return tuple(speeds.get(worker, usual) / usual for worker in workers)


def with_and_without_speeds(spec: MachineSpec, ledger: Ledger) -> tuple[MachineSpec, ...]:
    """The specs under which a layout is looked for, in turn: more lanes need more memory, where even ones may fit."""
    learned = by_speed(spec, ledger)
    return (learned,) if learned == spec else (learned, spec)


def lanes_in_force(spec: MachineSpec, ledger: Ledger) -> Layout | None:
    """The layout of the newest generation with the newest split of its lanes."""
    if ledger.plan is None or not ledger.lane_offers:
        return None if ledger.plan is None else ledger.plan.layout
    return ledger.plan.layout.with_lanes(deal_lanes(spec.lane_count, ledger.lane_offers[-1], spec.lane_order))


def splits_in_force(ledger: Ledger) -> tuple[tuple[int, ...], ...]:
    """Lane counts by rank of the splits that the members may be at, the newest first."""
    if ledger.plan is None:
        return ()
    return (*reversed(ledger.lane_offers[-_HEARD:]), tuple(map(len, ledger.plan.layout.lanes)))


def offered_again(core: Core) -> list[Command]:
    """What a new controller offers: the split that it knows to be in force, also that of the layout, whatever the one
    before it may have offered besides. A line of the journal that is lost is a split of which nobody knows any more.
    """
    watch = core.spec.stragglers
    return [newest_offer(core)] if core.ledger.lane_offers or (watch is not None and watch.moves) else []


def newest_offer(core: Core) -> OfferLanes:
    """The split in force, as it was offered."""
    layout = lanes_in_force(core.spec, core.ledger)
    assert layout is not None
    ledger = core.ledger
    return OfferLanes(ledger.generation, len(ledger.lane_offers), layout.lanes, tuple(ledger.members()))


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
    after = before.with_lanes(deal_lanes(spec.lane_count, event.lanes, spec.lane_order))
    reason = shortfall(spec, after, ledger.memory())
    if reason is not None:
        return _refuse_lanes(core, event, reason, out)
    ledger.lane_offers = (*ledger.lane_offers, tuple(event.lanes))
    if event.action == "move_back":
        speeds = ledger.speeds_before
    else:
        ledger.speeds_before = ledger.speeds
    ledger.speeds = {worker: share for worker, share in speeds.items() if worker in ledger.workers}
    changed = {
        worker: [len(old), new]
        for worker, old, new in zip(members, before.lanes, event.lanes, strict=True)
        if len(old) != new
    }
    data = {"action": event.action, "lanes": changed, "reason": event.reason, "step": event.step}
    data |= {"before_s": round(event.before_s, 6), "after_s": round(event.after_s, 6)}
    out.append(Announce("lanes_moved", data))
    out.append(newest_offer(core))
    return True


def _refuse_lanes(core: Core, event: ev.LanesProposed, reason: str, out: list[Command]) -> bool:
    """More lanes may need more sums of gradients than there is room for. Said once: the same is proposed again."""
    if core.ledger.lanes_refused == tuple(event.lanes):
        return False
    core.ledger.lanes_refused = tuple(event.lanes)
    lanes = dict(zip(core.ledger.members(), event.lanes, strict=False))
    out.append(Announce("lanes_refused", {"lanes": lanes, "reason": reason, "step": event.step}))
    return True


def on_speeds(core: Core, event: ev.SpeedsLearned, out: list[Command]) -> bool:  # noqa: ARG001
    """For the next generation; nothing moves now."""
    ledger, speeds = core.ledger, dict(event.speeds)
    sound = all(math.isfinite(share) and share > 0 for share in speeds.values())
    if event.generation != ledger.generation or not sound or set(speeds) != set(ledger.members()):
        return False
    known = {**ledger.speeds, **speeds}
    ledger.speeds = {worker: share for worker, share in known.items() if worker in ledger.workers}
    return True


def on_let_go(core: Core, event: ev.StragglerLeaves, out: list[Command]) -> bool:
    """A slow worker hands over and leaves: for a spare that takes its place, or without one."""
    ledger = core.ledger
    facts = ledger.workers.get(event.worker)
    if event.generation != ledger.generation or not isinstance(core.state, Running) or ledger.stop is not None:
        return False
    if facts is None or facts.role is not Role.MEMBER or facts.doomed or event.worker in ledger.draining:
        return False
    replaced = event.action == "replace"
    if replaced and not ledger.workers.of(Role.READY):
        return False  # the spare has been taken meanwhile
    if not replaced:
        if leaver_refused(core, event.worker) is not None:
            return False
        ledger.target -= 1
        ledger.complement -= 1
    ledger.draining.append(event.worker)
    data = {"action": event.action, "worker": event.worker, "node": facts.node, "reason": event.reason}
    data |= {"step": event.step, "before_s": round(event.before_s, 6), "after_s": round(event.after_s, 6)}
    out.append(Announce("straggler_leaves", data))
    return True


def leaver_refused(core: Core, worker: int) -> str | None:
    """Why a watch may not leave member `worker` out, in words; None when it may."""
    ledger, spec = core.ledger, core.spec
    staying = [member for member in ledger.members() if member not in (worker, *ledger.draining)]
    if spec.mirrors and len(staying) < 2:  # a user may ask for that, a watch not
        return f"without worker {worker} nobody would hold a mirror"
    reason = refuse_drain(spec, worker, ledger.members(), ledger.draining, ledger.target)
    return too_big_for(core, staying) if reason is None else reason


def too_big_for(core: Core, staying: list[int]) -> str | None:
    """Why a smaller world could not hold the state, in words. A world that grows, or waits, is not asked."""
    ledger = core.ledger
    if not staying or len(staying) >= len(ledger.members()):
        return None
    memory = ledger.memory()
    layout = even_layout(core.spec, max(1, ledger.generation), staying, ledger.domains(), (), memory)
    return shortfall(core.spec, layout, memory)
