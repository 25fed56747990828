"""What could be done about slow places of a pipeline: every way, how long a step would take then, and its price. Pure.

Of each pipeline: its layers cut anew (`move_layers`), two workers that exchange their stages, with the layers as they
are or cut anew (`swap_roles`), a waiting worker in the place of a slow one (`replace`), one stage fewer (`leave_out`).
Every cut is the planner's exact one for that order of workers, within their memory. A step takes as long as the slowest
pipeline, so the ways of all of them are put together, all in one pause.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Literal

from elastictrain.planner.pipelines import Pipelines, Placement

StageAction = Literal["move_layers", "swap_roles", "replace", "leave_out"]
ACTIONS: tuple[StageAction, ...] = ("move_layers", "swap_roles", "replace", "leave_out")
"""The more of them a change has, the later it stands here."""


@dataclass(frozen=True, slots=True)
class Price:
    """What a change costs: `pause_s`, for all, and what is received goes over a link of `link_bytes_s`."""

    pause_s: float = 5.0
    link_bytes_s: float = 12.5e9


@dataclass(frozen=True, slots=True)
class Way:
    """Of one pipeline. `action`: None leaves it as it is. `step_s`: of a step, replayed, if it were the only one.
    `moved_s`: until every worker has received its state.
    """

    action: StageAction | None
    placement: Placement
    step_s: float
    moved_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Change:
    """Ways of all pipelines in one pause. `step_s`: of a step then; `cost_s`: of the change."""

    ways: tuple[Way, ...]
    step_s: float
    cost_s: float

    @property
    def action(self) -> StageAction:
        """The furthest of what is done."""
        return max((way.action for way in self.ways if way.action is not None), key=ACTIONS.index)

    @property
    def placements(self) -> tuple[Placement, ...]:
        return tuple(way.placement for way in self.ways)


def ways_of(
    work: Pipelines,
    placement: Placement,
    factors: Sequence[float],
    *,
    slow: Sequence[int] = (),
    spares: Sequence[int] = (),
    allowed: Sequence[StageAction] = ACTIONS,
    price: Price | None = None,
) -> list[Way]:
    """Every way for one pipeline that fits, leaving it as it is the first. `slow`: who may be replaced or left out, and
    of whom one at least takes part in an exchange of stages (nobody slow: any two that are not alike).
    """
    price = price or Price()
    found = [Way(None, placement, work.step_s(placement, factors))]
    known: dict[tuple[object, ...], float] = {}
    for action, other in _placements(work, placement, factors, slow, spares, allowed):
        if other is None or other == placement:
            continue
        key = (*((work.kind_of[w], factors[w]) for w in other.seats), other.layers, other.again)
        if key not in known:
            known[key] = work.step_s(other, factors)
        found.append(Way(action, other, known[key], work.moved_bytes(placement, other) / price.link_bytes_s))
    return found


def _placements(
    work: Pipelines,
    placement: Placement,
    factors: Sequence[float],
    slow: Sequence[int],
    spares: Sequence[int],
    allowed: Sequence[StageAction],
) -> Iterator[tuple[StageAction, Placement | None]]:
    seats, layers = placement.seats, placement.layers
    cuts: dict[tuple[object, ...], Placement | None] = {}

    def best(order: tuple[int, ...]) -> Placement | None:
        """The best cut; workers that are alike have it alike."""
        key = tuple((work.kind_of[worker], factors[worker]) for worker in order)
        if key not in cuts:
            cuts[key] = work.best(order, factors)
        cut = cuts[key]
        return None if cut is None else Placement(order, cut.layers, cut.again)

    if "move_layers" in allowed:
        yield "move_layers", best(seats)
    if "swap_roles" in allowed:
        for a, b in combinations(range(len(seats)), 2):
            one, other = seats[a], seats[b]
            alike = (work.kind_of[one], factors[one]) == (work.kind_of[other], factors[other])
            if alike or (slow and one not in slow and other not in slow):
                continue
            order = (*seats[:a], other, *seats[a + 1 : b], one, *seats[b + 1 :])
            yield "swap_roles", work.kept(order, layers)
            yield "swap_roles", best(order)
    for worker in slow:
        if worker not in seats:
            continue
        at = seats.index(worker)
        if "replace" in allowed:
            for spare in spares:
                order = (*seats[:at], spare, *seats[at + 1 :])
                yield "replace", work.kept(order, layers)
                yield "replace", best(order)
        if "leave_out" in allowed and len(seats) > 1:
            yield "leave_out", best((*seats[:at], *seats[at + 1 :]))


def changes_of(each: Sequence[Sequence[Way]], price: Price) -> list[Change]:
    """Of every time that a step could take: the change that is done soonest. `each`: the ways of every pipeline. One
    pipeline at most takes a waiting worker at a time, so that two do not take the same.
    """
    times = sorted({way.step_s for ways in each for way in ways})
    found: dict[tuple[Placement, ...], Change] = {}
    for taker in range(-1, len(each)):
        for limit_s in times:
            chosen = [
                min(
                    (way for way in ways
                     if way.step_s <= limit_s and (way.action != "replace" or number == taker)),
                    key=lambda way: (way.moved_s, way.action is not None, way.step_s), default=None,
                )
                for number, ways in enumerate(each)
            ]  # fmt: skip
            picked = tuple(way for way in chosen if way is not None)
            if len(picked) < len(each) or all(way.action is None for way in picked):
                continue
            cost_s = price.pause_s + max(way.moved_s for way in picked)
            change = Change(picked, max(way.step_s for way in picked), cost_s)
            found.setdefault(change.placements, change)
    return list(found.values())
