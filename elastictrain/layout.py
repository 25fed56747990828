"""Who owns what: the layout of a generation, and how one layout follows from another. Pure; no torch, no Ray.

A layout deals out two lists that never mention a machine: the `L` lanes of a step and the blocks of the state. Every
shard (a run of blocks) has an owner and, if there is more than one worker, a mirror on another failure domain.
Workers are numbered over the life of a run and numbers are never used again; a worker's rank is its place in
`Layout.workers`.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right, insort
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Literal

from elastictrain.errors import CapacityError, InternalError

LaneOrder = Literal["contiguous", "round_major"]


@dataclass(frozen=True, slots=True)
class Shard:
    """Blocks `lo .. hi-1`, the worker that owns them and the one that mirrors them (None: held once)."""

    lo: int
    hi: int
    owner: int
    mirror: int | None

    def holders(self) -> tuple[int, ...]:
        return (self.owner,) if self.mirror is None else (self.owner, self.mirror)


@dataclass(frozen=True, slots=True)
class Move:
    """A copy of the state of blocks `lo .. hi-1` from one worker to another while a generation forms."""

    source: int
    target: int
    lo: int
    hi: int


@dataclass(frozen=True, slots=True)
class Layout:
    """The map of one generation.

    `workers`: worker numbers in rank order. `lanes`: for every rank its lanes, ascending. `shards`: tile the blocks
    `0 .. blocks-1` in order. `lane_count` is the job's L and never changes with the world.
    """

    generation: int
    workers: tuple[int, ...]
    lanes: tuple[tuple[int, ...], ...]
    shards: tuple[Shard, ...]
    lane_count: int

    def __post_init__(self) -> None:
        if len(set(self.workers)) != len(self.workers) or not self.workers:
            raise InternalError(f"layout needs distinct workers, got {self.workers}")
        if len(self.lanes) != len(self.workers):
            raise InternalError(f"{len(self.workers)} workers but {len(self.lanes)} lane sets")
        if sorted(lane for lanes in self.lanes for lane in lanes) != list(range(self.lane_count)):
            raise InternalError(f"lanes {self.lanes} do not cover 0..{self.lane_count - 1} exactly once")
        at, workers = 0, {None, *self.workers}
        for shard in self.shards:
            if shard.lo != at or shard.hi <= shard.lo:
                raise InternalError(f"shards do not tile the blocks: {shard} after block {at}")
            if shard.owner == shard.mirror or shard.owner not in workers or shard.mirror not in workers:
                raise InternalError(f"{shard} is held by workers that are equal or not in {self.workers}")
            at = shard.hi

    @property
    def world_size(self) -> int:
        return len(self.workers)

    @property
    def blocks(self) -> int:
        return self.shards[-1].hi if self.shards else 0

    def rank(self, worker: int) -> int:
        return self.workers.index(worker)

    def lanes_of(self, worker: int) -> tuple[int, ...]:
        return self.lanes[self.rank(worker)]

    def owned(self, worker: int) -> tuple[Shard, ...]:
        return tuple(shard for shard in self.shards if shard.owner == worker)

    def mirrored(self, worker: int) -> tuple[Shard, ...]:
        return tuple(shard for shard in self.shards if shard.mirror == worker)

    def held(self, worker: int) -> frozenset[int]:
        """The blocks whose state this worker keeps, as owner or as mirror."""
        return frozenset(
            block for shard in self.shards if worker in shard.holders() for block in range(shard.lo, shard.hi)
        )

    def by_holder(self) -> dict[int, list[Shard]]:
        """The shards that each worker owns or mirrors, for all workers in one pass; who holds none is not in it."""
        found: dict[int, list[Shard]] = {}
        for shard in self.shards:
            for worker in shard.holders():
                found.setdefault(worker, []).append(shard)
        return found

    def with_lanes(self, lanes: tuple[tuple[int, ...], ...]) -> Layout:
        """The same layout with the lanes dealt out otherwise."""
        return replace(self, lanes=lanes)

    @property
    def held_once(self) -> int:
        """How many blocks have a single holder."""
        return sum(shard.hi - shard.lo for shard in self.shards if shard.mirror is None)


def cut(total: int, shares: Sequence[float]) -> list[int]:
    """Whole numbers that add up to `total`, in proportion to `shares` (largest remainder, ties to the first)."""
    if not shares or min(shares) < 0 or sum(shares) <= 0:
        raise ValueError(f"shares must be non-negative with a positive sum, got {list(shares)}")
    share_sum = sum(shares)
    exact = [total * share / share_sum for share in shares]
    parts = [int(part) for part in exact]
    by_remainder = sorted(range(len(parts)), key=lambda i: (parts[i] - exact[i], i))
    for i in by_remainder[: total - sum(parts)]:
        parts[i] += 1
    return parts


def deal_lanes(lane_count: int, shares: Sequence[float], order: LaneOrder) -> tuple[tuple[int, ...], ...]:
    """Lanes per rank in proportion to `shares`; every rank gets at least one.

    `contiguous` gives each rank a run of lanes (few roots: the gradient is summed locally). `round_major` deals lanes
    in rounds, so that the lanes computed at the same time are neighbours in the tree and the owners, to whom every
    lane is handed over, can combine them at once.
    """
    if lane_count < len(shares):
        raise CapacityError(
            f"{len(shares)} workers for {lane_count} lanes: every worker needs a lane; "
            f"set `lanes` to {len(shares)} or more, or `workers.max` to {lane_count} or less"
        )
    counts = cut(lane_count, shares)
    while 0 in counts:  # the one with the most lanes feels the loss of one least
        counts[counts.index(max(counts))] -= 1
        counts[counts.index(0)] += 1
    if order == "contiguous":
        ends = list(accumulate(counts))
        return tuple(tuple(range(end - n, end)) for n, end in zip(counts, ends, strict=True))
    dealt: list[list[int]] = [[] for _ in shares]
    lane = 0
    for turn in range(max(counts)):
        for rank, count in enumerate(counts):
            if turn < count:
                dealt[rank].append(lane)
                lane += 1
    return tuple(tuple(lanes) for lanes in dealt)


def deal_blocks(block_elements: Sequence[int], shares: Sequence[float]) -> list[int]:
    """Borders (`len(shares) + 1` block numbers) of contiguous runs whose elements are in proportion to `shares`.

    Cut on whole blocks: each border is the one nearest to the exact place. Runs may be empty when there are fewer
    blocks than workers.
    """
    ends = [0, *accumulate(block_elements)]
    borders, share_sum, seen = [0], sum(shares), 0.0
    for share in shares[:-1]:
        seen += share
        target = ends[-1] * seen / share_sum
        right = min(bisect_left(ends, target), len(ends) - 1)
        at = right if right == 0 or ends[right] - target <= target - ends[right - 1] else right - 1
        borders.append(max(at, borders[-1]))
    borders.append(len(block_elements))
    return borders


class Candidates:
    """Who may mirror what: ranks ordered by the elements they mirror already, so that a choice among ten thousand
    workers costs about as much as a binary search.

    `domains`: failure domain by worker, by default one of its own each. `load`: elements that each mirrors already.
    """

    def __init__(self, workers: Sequence[int], domains: Mapping[int, str], load: Mapping[int, int]) -> None:
        self.workers = workers
        self.rank = {worker: rank for rank, worker in enumerate(workers)}
        self.domain = [domains.get(worker, str(worker)) for worker in workers]
        self.size = Counter(self.domain)
        self.load = [load.get(worker, 0) for worker in workers]
        self.levels: dict[int, list[int]] = {}  # ascending ranks by load
        for rank, elements in enumerate(self.load):
            self.levels.setdefault(elements, []).append(rank)
        self.loads = sorted(self.levels)
        world = len(workers)
        self.next_foreign = list(range(world))  # the next rank, cyclically, on another domain
        for rank in range(2 * world - 2, -1, -1):
            after = (rank + 1) % world
            same = self.domain[rank % world] == self.domain[after]
            self.next_foreign[rank % world] = self.next_foreign[after] if same else after

    def add(self, worker: int, elements: int) -> None:
        """`worker` mirrors `elements` more."""
        rank = self.rank[worker]
        level = self.levels[self.load[rank]]
        del level[bisect_left(level, rank)]
        if not level:
            del self.levels[self.load[rank]]
            del self.loads[bisect_left(self.loads, self.load[rank])]
        self.load[rank] += elements
        if self.load[rank] not in self.levels:
            self.levels[self.load[rank]] = []
            insort(self.loads, self.load[rank])
        insort(self.levels[self.load[rank]], rank)

    def next_in(self, level: Sequence[int], start: int) -> int | None:
        """The first rank of `level` cyclically after `start`, on another domain if there is one at all."""
        world = len(self.workers)
        if self.size[self.domain[start]] == world:
            found = level[bisect_right(level, start) % len(level)]
            return None if found == start else found
        want = self.next_foreign[start]
        while True:
            found = level[bisect_left(level, want) % len(level)]
            if (found - start) % world < (want - start) % world:
                return None  # all around
            if self.domain[found] != self.domain[start]:
                return found
            past, want = want, self.next_foreign[found]
            if (want - start) % world <= (past - start) % world:
                return None


def choose_mirror(owner: int, candidates: Candidates) -> int | None:
    """The mirror for something that `owner` owns: another failure domain first, then the least load, then the next
    rank. None when the owner is alone.
    """
    start = candidates.rank[owner]
    found = (candidates.next_in(candidates.levels[load], start) for load in candidates.loads)
    return next((candidates.workers[rank] for rank in found if rank is not None), None)


def balanced(
    generation: int,
    workers: Sequence[int],
    lane_count: int,
    block_elements: Sequence[int],
    *,
    domains: Mapping[int, str] | None = None,
    lane_shares: Mapping[int, float] | None = None,
    block_shares: Mapping[int, float] | None = None,
    lane_order: LaneOrder = "contiguous",
    mirrors: bool = True,
    mirror_loads: Mapping[int, int] | None = None,
) -> Layout:
    """A layout from scratch: lanes by `lane_shares` (speed), blocks by `block_shares` (memory), default even.
    `mirror_loads`: elements that workers are taken to mirror already; who has least mirrors next.
    """
    lanes = deal_lanes(lane_count, [(lane_shares or {}).get(w, 1.0) for w in workers], lane_order)
    borders = deal_blocks(block_elements, [(block_shares or {}).get(w, 1.0) for w in workers])
    candidates = Candidates(workers, domains or {}, mirror_loads or {})
    shards: list[Shard] = []
    for worker, lo, hi in zip(workers, borders[:-1], borders[1:], strict=True):
        if lo == hi:
            continue
        mirror = choose_mirror(worker, candidates) if mirrors else None
        if mirror is not None:
            candidates.add(mirror, sum(block_elements[lo:hi]))
        shards.append(Shard(lo, hi, worker, mirror))
    return Layout(generation, tuple(workers), lanes, tuple(shards), lane_count)


def lost_blocks(layout: Layout, gone: Iterable[int]) -> tuple[Shard, ...]:
    """The shards of which no holder is left."""
    dead = set(gone)
    return tuple(shard for shard in layout.shards if dead.issuperset(shard.holders()))


def promoted(
    layout: Layout,
    generation: int,
    survivors: Sequence[int],
    block_elements: Sequence[int],
    *,
    domains: Mapping[int, str] | None = None,
    lane_shares: Mapping[int, float] | None = None,
    lane_order: LaneOrder = "contiguous",
    mirrors: bool = True,
) -> Layout:
    """The layout after a loss (invariant R4): mirrors become owners in place, with the old borders; ranges that are now
    held once get a new mirror; lanes are dealt out again. Nothing else moves. `survivors` may include newcomers, which
    then get lanes and mirror what has become single.

    Raises InternalError when a range has lost both holders: the caller decides on a restore before it asks.
    """
    alive = set(survivors)
    kept: list[Shard] = []
    for shard in layout.shards:
        if shard.owner in alive and (shard.mirror is None or shard.mirror in alive):
            kept.append(shard)
            continue
        holders = [worker for worker in shard.holders() if worker in alive]
        if not holders:
            raise InternalError(f"{shard} has lost both holders; only a checkpoint can bring it back")
        kept.append(replace(shard, owner=holders[0], mirror=None))
    load: dict[int, int] = {}
    for shard in kept:
        if shard.mirror is not None:
            load[shard.mirror] = load.get(shard.mirror, 0) + sum(block_elements[shard.lo : shard.hi])
    candidates = Candidates(survivors, domains or {}, load)
    shards: list[Shard] = []
    for shard in kept:
        if shard.mirror is None and mirrors:
            mirror = choose_mirror(shard.owner, candidates)
            if mirror is not None:
                candidates.add(mirror, sum(block_elements[shard.lo : shard.hi]))
            shard = replace(shard, mirror=mirror)
        shards.append(shard)
    lanes = deal_lanes(layout.lane_count, [(lane_shares or {}).get(w, 1.0) for w in survivors], lane_order)
    return Layout(generation, tuple(survivors), lanes, tuple(shards), layout.lane_count)


def moves_between(before: Layout, after: Layout, alive: Iterable[int]) -> tuple[Move, ...]:
    """What must be copied so that every holder of `after` has its blocks: each run from a live holder of `before`.

    The owner is the source unless it is gone; sources are balanced between owner and mirror by blocks sent. Raises
    InternalError when a needed block has no live holder.
    """
    living = set(alive)
    sent: dict[int, int] = {}
    moves: list[Move] = []
    begins = [old.lo for old in before.shards]
    for shard in after.shards:
        first = max(0, bisect_right(begins, shard.lo) - 1)
        overlapping = before.shards[first : bisect_left(begins, shard.hi)]
        for target in shard.holders():
            for old in overlapping:
                lo, hi = max(shard.lo, old.lo), min(shard.hi, old.hi)
                if lo >= hi or target in old.holders():
                    continue
                sources = [worker for worker in old.holders() if worker in living]
                if not sources:
                    raise InternalError(f"blocks {lo}..{hi - 1} have no live holder among {old.holders()}")
                source = min(sources, key=lambda worker: sent.get(worker, 0))
                sent[source] = sent.get(source, 0) + hi - lo
                moves.append(Move(source, target, lo, hi))
    return tuple(moves)
