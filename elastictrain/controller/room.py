"""For which splits of the lanes the members have memory, and the world that follows when one of them leaves. Pure."""

from __future__ import annotations

from collections.abc import Sequence

from elastictrain.controller.core import Core
from elastictrain.controller.facts import Role
from elastictrain.controller.policies import even_layout, lacking
from elastictrain.controller.speeds import lanes_in_force, leaver_refused
from elastictrain.layout import Layout, deal_lanes
from elastictrain.stragglers.room import NoRoom


class MemoryRoom:
    """Of the running generation's members, by rank: what the straggler watch asks before it proposes anything."""

    def __init__(self, core: Core) -> None:
        self._core = core

    def split(self, lanes: tuple[int, ...]) -> NoRoom | None:
        layout = lanes_in_force(self._core.spec, self._core.ledger)
        return None if layout is None else self._lack(layout, lanes)

    def without(self, worker: int, lanes: tuple[int, ...]) -> NoRoom | None:
        members = self._members()
        refused = leaver_refused(self._core, members[worker])
        if refused is not None:
            return NoRoom(None, refused)
        return self._remade(members[:worker] + members[worker + 1 :], lanes)

    def replaced(self, worker: int, lanes: tuple[int, ...]) -> NoRoom | None:
        """The spare comes last in the new generation, whosever place it takes."""
        ledger = self._core.ledger
        members, spares = self._members(), ledger.with_role(Role.READY)
        if not spares:
            return NoRoom(None, "no spare waits any more")
        order = [*range(worker), *range(worker + 1, len(members)), worker]
        group = [*members[:worker], *members[worker + 1 :], spares[0]]
        lack = self._remade(group, [lanes[place] for place in order])
        return lack if lack is None or lack.worker is None else NoRoom(order[lack.worker], lack.reason)

    def _members(self) -> tuple[int, ...]:
        """In rank order, as the watch counts them."""
        plan = self._core.ledger.plan
        return () if plan is None else plan.layout.workers

    def _remade(self, group: Sequence[int], lanes: Sequence[int]) -> NoRoom | None:
        """A generation begins with the lanes of its layout; the watch moves them when it knows its speeds."""
        spec, ledger = self._core.spec, self._core.ledger
        layout = even_layout(spec, ledger.generation + 1, group, ledger.domains(), (), ledger.memory())
        first = lacking(spec, layout, ledger.memory())
        return NoRoom(None, first[1]) if first is not None else self._lack(layout, lanes)

    def _lack(self, layout: Layout, lanes: Sequence[int]) -> NoRoom | None:
        spec = self._core.spec
        after = layout.with_lanes(deal_lanes(spec.lane_count, lanes, spec.lane_order))
        found = lacking(spec, after, self._core.ledger.memory())
        return None if found is None else NoRoom(layout.workers.index(found[0]), found[1])
