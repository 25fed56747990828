"""Splits of the lanes for which the workers have memory. Pure.

What a worker needs for its lanes depends on which they are (how many sums of gradients they leave), so whether a split
fits is asked of whoever knows (`Room`), one split at a time. Where what a worker needs depends on the number of its
lanes alone, and grows with it, the split that is found is the best of those that fit; else it is one that fits, and
better than the one in force, if one is found.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from elastictrain.errors import CapacityError
from elastictrain.planner.split import split_affine

MOST_ASKED, FEWEST_ASKED, ASKED_BY_ALL = 200, 8, 3200
"""Splits that are asked about, in each of the two ways in which one is looked for; and with many workers, of whom a
question takes longer (2 ms of 64, 90 ms of 1,000), that times their number.
"""


@dataclass(frozen=True, slots=True)
class NoRoom:
    """A split does not fit. `worker`: the place of one that has too little memory; None when it is nobody's alone."""

    worker: int | None
    reason: str


Fits = Callable[[tuple[int, ...]], NoRoom | None]
"""Whether these lanes fit, by place: None, or who has no room."""


class Room(Protocol):
    """What the memory of the workers has room for, by their places."""

    def split(self, lanes: tuple[int, ...]) -> NoRoom | None:
        """Of these workers."""

    def without(self, worker: int, lanes: tuple[int, ...]) -> NoRoom | None:
        """Of the others, when `worker` has left; `lanes` and places are theirs."""

    def replaced(self, worker: int, lanes: tuple[int, ...]) -> NoRoom | None:
        """Of the same places, when a spare is in that of `worker`."""


class Plenty:
    """Everything fits, or nobody knows."""

    def split(self, lanes: tuple[int, ...]) -> NoRoom | None:  # noqa: ARG002
        return None

    def without(self, worker: int, lanes: tuple[int, ...]) -> NoRoom | None:  # noqa: ARG002
        return None

    def replaced(self, worker: int, lanes: tuple[int, ...]) -> NoRoom | None:  # noqa: ARG002
        return None


PLENTY = Plenty()


@dataclass(frozen=True, slots=True)
class Found:
    """`lanes`: the best split that was found; None when none fits. `lack`: why the best of all does not fit, and
    `wanted` that split; None when it does.
    """

    lanes: tuple[int, ...] | None
    wanted: tuple[int, ...]
    lack: NoRoom | None


class Answers:
    """What was found lately. Noise asks for a slightly other split in each step, and a question may cost a
    millisecond in a large world: so each is answered anew when what it is `about` has changed, or after so many steps.
    """

    def __init__(self, again_steps: int) -> None:
        self.again_steps = again_steps
        self._known: dict[object, tuple[object, int, Found]] = {}

    def get(self, what: object, about: object, step: int) -> Found | None:
        known = self._known.get(what)
        return known[2] if known is not None and known[0] == about and step < known[1] else None

    def keep(self, what: object, about: object, step: int, found: Found) -> Found:
        self._known[what] = (about, step + self.again_steps, found)
        return found


def makespan_s(unit_s: Sequence[float], lanes: Sequence[float]) -> float:
    """Seconds until the last worker has computed its lanes."""
    return max(unit * own for unit, own in zip(unit_s, lanes, strict=True))


def best_with_room(
    total: int,
    unit_s: Sequence[float],
    fits: Fits,
    *,
    least: Sequence[int],
    most: Sequence[int] | None = None,
    before: tuple[int, ...] | None = None,
) -> Found:
    """The split of `total` lanes with the smallest makespan that fits, between `least` and `most` of each worker.
    `before`: the one in force, which fits.
    """
    most = [total] * len(unit_s) if most is None else most
    wanted = split_affine(total, [0.0] * len(unit_s), unit_s, least=least, most=most, before=before).parts
    lack = None if wanted == before else fits(wanted)
    if lack is None:
        return Found(wanted, wanted, None)
    found = [_with_limits(total, unit_s, fits, least, most, before, wanted, lack)]
    if before is not None:
        found.append(_step_by_step(unit_s, fits, least, most, before))
    there = [lanes for lanes in found if lanes is not None]
    best = min(there, key=lambda lanes: makespan_s(unit_s, lanes), default=None)
    return Found(best, wanted, lack)


def _most_asked(workers: int) -> int:
    return min(MOST_ASKED, max(FEWEST_ASKED, ASKED_BY_ALL // workers))


def _with_limits(
    total: int, unit_s: Sequence[float], fits: Fits, least: Sequence[int], most: Sequence[int],
    before: tuple[int, ...] | None, lanes: tuple[int, ...], lack: NoRoom,
) -> tuple[int, ...] | None:  # fmt: skip
    """From the best split of all downwards: whoever has no room gets a lane less (or gives up one less)."""
    low, high = list(least), list(most)
    known: NoRoom | None = lack
    for _ in range(_most_asked(len(unit_s))):
        short = None if known is None else known.worker
        if known is None:
            return lanes
        if short is None:
            return None
        if before is not None and lanes[short] < before[short]:
            low[short] = lanes[short] + 1
        else:
            high[short] = lanes[short] - 1
        try:
            lanes = split_affine(total, [0.0] * len(unit_s), unit_s, least=low, most=high, before=before).parts
        except CapacityError:
            return None
        known = None if lanes == before else fits(lanes)
    return None


def _step_by_step(
    unit_s: Sequence[float], fits: Fits, least: Sequence[int], most: Sequence[int], before: tuple[int, ...]
) -> tuple[int, ...]:
    """From the split in force upwards: lanes of the last worker to the one that is done first with them, as many as
    make the step shortest, while that fits.
    """
    lanes, asked = before, 0
    while True:
        last = max(range(len(lanes)), key=lambda place: unit_s[place] * lanes[place])
        now_s, better = unit_s[last] * lanes[last], list[tuple[float, int, tuple[int, ...]]]()
        for to in range(len(lanes)):
            for more in range(1, lanes[last] - least[last] + 1 if to != last else 1):
                if unit_s[to] * (lanes[to] + more) >= now_s or lanes[to] + more > most[to]:
                    break
                after = list(lanes)
                after[last], after[to] = lanes[last] - more, lanes[to] + more
                better.append((max(unit_s[last] * after[last], unit_s[to] * after[to]), more, tuple(after)))
        for _, _, candidate in sorted(better):
            asked += 1
            if asked > _most_asked(len(lanes)):
                return lanes
            if fits(candidate) is None:
                lanes = candidate
                break
        else:
            return lanes
