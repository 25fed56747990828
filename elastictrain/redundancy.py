"""Lanes that more than one worker may compute: who may, who should, and who has. Pure.

A step's lanes are dealt out as always (`layout`). Where a job asks for it, the last lanes of every worker have a
*second holder* too. Whoever begins such a lane claims it first, so that nobody else does; who is done with its own
lanes takes over those that a late worker has not begun, or, where that is asked for, computes a copy of the one that it
is in, and the first result counts. Before the exchange all say which lanes they have, and from that everybody knows
the assignment of this step. A lane gives the same bits whoever computes it, and the sum does not depend on it.

Or the last lanes to be done are *dropped* (Chen et al. 2016, "Revisiting distributed synchronous SGD"): the only way
that changes what is learned. Which were is said in the same words, and recorded.

The decisions here are those of speculative execution: what is late is seen against what was usual (LATE: Zaharia et
al. 2008), and a copy is begun when the wait has cost as much as it will (ski rental).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import inf
from statistics import median
from typing import Literal

from elastictrain.tree import Node, most_sums, roots, whole

Lanes = tuple[tuple[int, ...], ...]
"""By rank, ascending."""
Way = Literal["none", "take_over", "first_result", "coded", "drop_slowest"]

SLACK = 0.25
"""Of a lane's usual time: less is noise."""
REMEMBERED = 9
"""Steps whose times of a lane are usual."""


@dataclass(frozen=True)
class Sharing:
    """`lanes`: as dealt out, by rank. `second`: by rank, the lanes of others that it may compute too. `droppable`:
    those that may be dropped; `shown`: those of which all are told that they are done, these among them.
    """

    lanes: Lanes
    second: Lanes
    droppable: frozenset[int] = frozenset()
    shown: frozenset[int] = frozenset()

    @cached_property
    def _owners(self) -> dict[int, tuple[int, int]]:
        return {lane: (rank, place) for rank, own in enumerate(self.lanes) for place, lane in enumerate(own)}

    def owner(self, lane: int) -> tuple[int, int]:
        """(rank, place among its lanes) of whoever the lane is dealt out to."""
        return self._owners[lane]

    @cached_property
    def shared(self) -> frozenset[int]:
        """The lanes that have a second holder, or may be dropped: who begins one must claim it."""
        return self.shown.union(*self.second)

    @property
    def most(self) -> int:
        """The most lanes that one worker can compute in a step."""
        return max(len(own) + len(more) for own, more in zip(self.lanes, self.second, strict=True))


def second_holders(lanes: Lanes, depth: int, *, firsts: bool, kinds: Sequence[str] = ()) -> Sharing:
    """The last `depth` lanes of every worker get a second holder each, and each of them another one: what a late worker
    has not begun is taken over by several at once. `firsts`: also its first lane, which it has begun before anybody can
    take it over. `kinds`: of numerics, by rank: only workers that compute the same bits stand in for each other.
    """
    world = len(lanes)
    second: list[list[int]] = [[] for _ in lanes]
    for rank, own in enumerate(lanes):
        others = [(rank + 1 + n) % world for n in range(world - 1)]
        others = [other for other in others if not kinds or kinds[other] == kinds[rank]]
        shared = own[::-1][: min(depth, len(own) if firsts else len(own) - 1)]
        for turn, lane in enumerate(shared if others else ()):
            second[others[turn % len(others)]].append(lane)
    return Sharing(lanes, tuple(tuple(sorted(more)) for more in second))


def groups_of(lanes: Lanes, size: int, *, kinds: Sequence[str] = ()) -> Sharing:
    """Fractional repetition (Tandon et al. 2017, "Gradient coding"): `size` neighbouring workers have the same lanes,
    those of all of them, and one of the group is enough. The last group may be smaller. `kinds`: as above; a worker of
    another kind than the first of its group keeps to its own lanes.
    """
    second: list[tuple[int, ...]] = []
    for rank in range(len(lanes)):
        members = group_of(rank, len(lanes), size, kinds)
        second.append(tuple(sorted(lane for other in members if other != rank for lane in lanes[other])))
    return Sharing(lanes, tuple(second))


def droppable_lanes(lanes: Lanes, at_most: int, *, firsts: bool) -> Sharing:
    """Of a step `at_most` lanes may be dropped, so no other than the last ones of each worker. `firsts`: also its first
    one; else that one is shown only.
    """
    shown = [own[-at_most:] for own in lanes]
    kept = frozenset[int]() if firsts else frozenset(own[0] for own in lanes)
    watched = frozenset(lane for own in shown for lane in own)
    return Sharing(lanes, tuple(() for _ in lanes), watched - kept, watched)


def group_of(rank: int, world: int, size: int, kinds: Sequence[str] = ()) -> tuple[int, ...]:
    """The ranks that have the same lanes as `rank`, itself among them."""
    first = rank - rank % size
    members = range(first, min(first + size, world))
    kind = kinds[rank] if kinds else ""
    leads = kinds[first] if kinds else ""
    return (rank,) if kind != leads else tuple(other for other in members if not kinds or kinds[other] == leads)


def sharing_of(
    way: Way, lanes: Lanes, *, depth: int, group: int, kinds: Sequence[str] = (), counters: bool = False
) -> Sharing:
    """Who may compute what, as a job asks for it. `counters`: the model has integer buffers, whose new values are not
    exchanged: so every worker has a lane that nobody else begins.
    """
    if way == "none":
        return Sharing(lanes, tuple(() for _ in lanes))
    if way == "coded":
        return groups_of(lanes, group, kinds=kinds)
    if way == "drop_slowest":
        return droppable_lanes(lanes, depth, firsts=not counters)
    return second_holders(lanes, depth, firsts=way == "first_result" and not counters, kinds=kinds)


def most_roots(sharing: Sharing, way: Way, lane_count: int) -> tuple[tuple[int, int], ...]:
    """By rank: (sums that are there at once while it computes, sums that it hands over), at most, whichever of its own
    shared lanes others have, and whichever of theirs it has.
    """
    return tuple(most_of_rank(sharing, rank, way, lane_count) for rank in range(len(sharing.lanes)))


def most_of_rank(sharing: Sharing, rank: int, way: Way, lane_count: int) -> tuple[int, int]:
    """As `most_roots`, of one rank."""
    own, more = sharing.lanes[rank], sharing.second[rank]
    if way == "coded":
        both = tuple(sorted(own + more))
        return most_sums(both, lane_count), len(roots(both, lane_count))
    kept = tuple(lane for lane in own if lane not in sharing.shared)  # the first ones: those that follow may be lost
    handed = _most_kept(kept, (*own[len(kept) :], *more), lane_count)
    # While it computes its own, those up to some lane, without lost ones: the sums that lie there before a lane is
    # added, and the lane, are as many as there are with it where its sibling is not there.
    begun = [_most_kept(kept, own[len(kept) : n], lane_count) for n in range(len(kept), len(own))]
    return max(most_sums(kept, lane_count), handed, *begun) + (way in ("first_result", "drop_slowest")), handed


def _most_kept(always: Sequence[int], perhaps: Sequence[int], lane_count: int) -> int:
    """The most roots that the lanes `always` and any of `perhaps` can have."""

    def most(node: Node, sure: list[int], maybe: list[int]) -> tuple[bool, float]:
        """Of a node: whether all its lanes can be there, and the most roots below it while they are not."""
        size = node.hi - node.lo
        if not maybe:
            return len(sure) == size, len(roots(sure, lane_count)) if len(sure) < size else -inf
        if node.is_leaf:
            return True, 0
        left, right = node.children()
        (l_full, l_most), (r_full, r_most) = (
            most(half, [n for n in sure if half.lo <= n < half.hi], [n for n in maybe if half.lo <= n < half.hi])
            for half in (left, right)
        )
        partly = max(l_most + r_most, 1 + r_most if l_full else -inf, l_most + 1 if r_full else -inf)
        return l_full and r_full, partly

    full, partly = most(whole(lane_count), sorted(always), sorted(perhaps))
    return int(max(partly, 1 if full else -inf))


class Pace:
    """What a lane usually takes each worker, in seconds: the median of the last steps, so that a hiccup is none."""

    def __init__(self, world: int) -> None:
        self._seen: list[deque[float]] = [deque(maxlen=REMEMBERED) for _ in range(world)]

    def learn(self, lane_s: Sequence[float]) -> None:
        """Seconds of a lane in a step, by rank; 0 where a worker has computed none."""
        for seen, seconds in zip(self._seen, lane_s, strict=True):
            if 0 < seconds < float("inf"):
                seen.append(seconds)

    def usual_s(self) -> tuple[float, ...]:
        """By rank; 0 for one that has not been measured yet."""
        return tuple(median(seen) if seen else 0.0 for seen in self._seen)


def to_take(
    sharing: Sharing, rank: int, tried: Collection[int], now_s: float, usual_s: Sequence[float]
) -> tuple[int, ...]:
    """The lanes of others that `rank`, done with its own, should try to claim, the one that would come last first.

    `now_s`: since the step has begun. A lane is worth it if its worker should have begun it some time ago (if it has,
    the claim fails, and no harm is done), or would by its usual pace be done with it later than we. Nobody who would
    need much longer for it than its worker takes one. While a pace is not known nothing is taken.
    """
    mine_s = usual_s[rank]
    found: list[tuple[float, int]] = []
    for lane in sharing.second[rank]:
        owner, place = sharing.owner(lane)
        theirs_s = usual_s[owner]
        if lane in tried or mine_s <= 0 or theirs_s <= 0:
            continue
        is_late = now_s >= (place + SLACK) * theirs_s
        # Of one that is late and has not begun it, no lane before it took less on the average.
        pace_s = max(theirs_s, now_s / place) if place else theirs_s
        early = now_s + mine_s + SLACK * theirs_s <= (place + 1) * theirs_s
        if early or (is_late and mine_s <= (1 + SLACK) * pace_s):
            found.append(((place + 1) * theirs_s, lane))
    return tuple(lane for _, lane in sorted(found, reverse=True))


def next_take_s(sharing: Sharing, rank: int, tried: Collection[int], now_s: float, usual_s: Sequence[float]) -> float:
    """When `to_take` may first say yes where it says no now, if nothing is begun until then, in seconds since the step
    has begun. inf: not before the slowest worker's usual end, when a step that is as usual is over.
    """
    mine_s = usual_s[rank]
    if not all(seconds > 0 for seconds in usual_s):
        return inf
    end_s = max(len(own) * seconds for own, seconds in zip(sharing.lanes, usual_s, strict=True))
    found_s = inf
    for lane in sharing.second[rank]:
        owner, place = sharing.owner(lane)
        theirs_s = usual_s[owner]
        worth_s = 0.0 if mine_s <= (1 + SLACK) * theirs_s else place * mine_s / (1 + SLACK) if place else inf
        at_s = max((place + SLACK) * theirs_s, worth_s * (1 + 1e-9))  # surely, whichever way it is rounded
        if lane not in tried and now_s < at_s < end_s:
            found_s = min(found_s, at_s)
    return found_s


def is_late(sharing: Sharing, lane: int, now_s: float, usual_s: Sequence[float], copy_s: float) -> bool:
    """Whether whoever has begun `lane`, its own worker, should have been done with it so long ago that a copy (of
    `copy_s` seconds) would have been worth it: never more than twice the least that could have been waited.
    """
    owner, place = sharing.owner(lane)
    theirs_s = usual_s[owner]
    return theirs_s > 0 and copy_s > 0 and now_s >= (place + 1) * theirs_s + max(copy_s, SLACK * theirs_s)


def drop_from_s(sharing: Sharing, undone: Collection[int], since_s: float, usual_s: Sequence[float]) -> float:
    """When the lanes `undone` are to be dropped, in seconds since the step has begun. They are all that is not done,
    since `since_s`. Never, while somebody's pace is not known.

    Nobody is dropped for being as slow as always: lanes of slow devices would never count. And what is late by that is
    waited for until the wait has cost as much as the lanes are worth, their share of a step (ski rental: never more
    than twice the least that could have been lost), or a quarter of a lane, since less is noise.
    """
    if not all(seconds > 0 for seconds in usual_s):
        return inf
    due_s = max((place + 1) * usual_s[rank] for rank, place in map(sharing.owner, undone))
    step_s = max(len(own) * seconds for own, seconds in zip(sharing.lanes, usual_s, strict=True))
    worth_s = step_s * len(undone) / sum(map(len, sharing.lanes))
    noise_s = SLACK * max(usual_s[sharing.owner(lane)[0]] for lane in undone)
    return max(since_s, due_s) + max(worth_s, noise_s)


# --- who has which lane ---


@dataclass(frozen=True, slots=True)
class Claim:
    """In `step`, `rank` has begun a lane (or, with `done`, has computed it, and its result counts)."""

    step: int
    rank: int
    done: bool = False

    def encode(self) -> str:
        return f"{self.step}:{self.rank}{'!' if self.done else ''}"


def read_claim(text: str) -> Claim | None:
    """What `Claim.encode` has written; None for anything else."""
    step, _, rank = text.removesuffix("!").partition(":")
    return Claim(int(step), int(rank), text.endswith("!")) if step.isdigit() and rank.isdigit() else None


def say_lanes(step: int, lanes: Collection[int], lane_count: int, dropped: Collection[int] = ()) -> bytes:
    """What a worker says before the exchange: the step, and one bit for each lane that it has, then one for each of its
    own that was dropped. Equally long for all.
    """
    masks = [sum(1 << lane for lane in some).to_bytes(-(-lane_count // 8), "little") for some in (lanes, dropped)]
    return step.to_bytes(8, "little") + b"".join(masks)


def agreed(said: Sequence[bytes], step: int, lane_count: int, *, at_most: int = 0) -> tuple[Lanes, frozenset[int]]:
    """Who has which lane in this step, from what all have said, in rank order; some may have none. And which were
    dropped.

    Raises ValueError when a lane is missing or there twice, more than `at_most` were dropped, or somebody means another
    step.
    """
    steps = {int.from_bytes(raw[:8], "little") for raw in said}
    if steps != {step}:
        raise ValueError(f"in step {step} lanes of steps {sorted(steps)} were said")
    size = -(-lane_count // 8)
    found, lost = (
        tuple(_lanes_in(raw[at : at + size], lane_count) for raw in said) for at in (8, 8 + size)
    )  # fmt: skip
    dropped = frozenset(lane for some in lost for lane in some)
    everything = sorted(lane for own in (*found, *lost) for lane in own)
    if everything != list(range(lane_count)):
        missing = sorted(set(range(lane_count)) - set(everything))
        twice = sorted({lane for lane in everything if everything.count(lane) > 1})
        raise ValueError(f"in step {step} nobody has lanes {missing}, and several have lanes {twice}")
    if len(dropped) > at_most:
        raise ValueError(f"in step {step} lanes {sorted(dropped)} were dropped, of which there may be {at_most}")
    return found, dropped


def _lanes_in(mask: bytes, lane_count: int) -> tuple[int, ...]:
    bits = int.from_bytes(mask, "little")
    return tuple(lane for lane in range(lane_count) if bits >> lane & 1)


def taken_over(dealt: Lanes, found: Lanes) -> tuple[tuple[int, int, int], ...]:
    """(lane, rank that it was dealt out to, rank that has computed it) of every lane where these differ."""
    has = {lane: rank for rank, own in enumerate(found) for lane in own}
    return tuple((lane, rank, has[lane]) for rank, own in enumerate(dealt) for lane in own if has[lane] != rank)
