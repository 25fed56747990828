"""Small pure decisions about who takes part and who holds what. Each takes plain facts and returns a value."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from types import MappingProxyType

from elastictrain.controller.facts import GradientSpec, MachineSpec
from elastictrain.layout import Layout, balanced, promoted
from elastictrain.protocol import COUNTED_SUMS
from elastictrain.redundancy import group_of, most_roots, sharing_of
from elastictrain.tree import most_sums, roots

UNEVEN, WORTH_A_PAUSE = 1.5, 1.1
"""An owner with more than 1.5 x the mean elements is worth a pause, if the heaviest then has a tenth less."""


@dataclass(frozen=True, slots=True)
class Proposal:
    """What a planned pause would change: the new layout, who joins, who is left out of it."""

    layout: Layout
    join: tuple[int, ...]
    leave: tuple[int, ...]


def world_cap(spec: MachineSpec) -> int:
    return min(spec.max_workers, spec.lane_count)


def even_layout(
    spec: MachineSpec,
    generation: int,
    workers: Sequence[int],
    domains: Mapping[int, str],
    empty_handed: Collection[int] = (),
    memory: Mapping[int, int] = MappingProxyType({}),
) -> Layout:
    """A balanced layout; the workers in `empty_handed` own no blocks (they are about to leave). Where the job plans,
    and the `memory` of all is known, the one of which the fullest worker is least full.
    """
    shares = {worker: spec.block_shares.get(worker, 1.0) for worker in workers}
    layout = _with_shares(spec, generation, workers, domains, shares, empty_handed)
    if not spec.plans or spec.bytes_per_held_element <= 0 or not all(worker in memory for worker in workers):
        return layout
    room = room_bytes(spec, layout, memory)
    if len(set(room.values())) == 1:
        return layout
    best, fullest = layout, fullest_share(spec, layout, memory)
    for power, lean in product(MEMORY_POWERS, MIRRORS_LEAN):
        shares = {worker: max(own, 1) ** power for worker, own in room.items()}
        loads = mirror_loads(spec, room, lean)
        other = _with_shares(spec, generation, workers, domains, shares, empty_handed, loads)
        full = fullest_share(spec, other, memory)
        if full < fullest * (1 - 1e-9):  # of two that are as full, the more even one
            best, fullest = other, full
    return best


MEMORY_POWERS = (0.0, 0.5, -0.5, 1.0, -1.0, -2.0)
"""Powers of the room in memory by which blocks are dealt out to their owners. Negative ones are needed since a shard
has one mirror: the blocks of two small workers may both be mirrored by a large one, but not the other way round.
"""


MIRRORS_LEAN = (1, 3)
"""How strongly mirrors follow the room in memory; more than in proportion, since they come in whole shards."""


def room_bytes(spec: MachineSpec, layout: Layout, memory: Mapping[int, int]) -> dict[int, int]:
    """What each worker has left for blocks, beside what it needs whatever it holds."""
    sums = sums_bytes(spec, layout)
    return {worker: max(0, memory[worker] - spec.fixed_bytes - sums.get(worker, 0)) for worker in layout.workers}


def mirror_loads(spec: MachineSpec, room: Mapping[int, int], lean: int) -> dict[int, int]:
    """Elements that each worker is taken to mirror already, so that mirrors, of which whoever has least is given the
    next one, follow the room in memory (`lean`: 1 for in proportion).
    """
    elements, total, most = lean * sum(spec.block_elements), max(1, sum(room.values())), max(room.values())
    return {worker: elements * (most - own) // total for worker, own in room.items()}


def fullest_share(spec: MachineSpec, layout: Layout, memory: Mapping[int, int]) -> float:
    """Of its memory, what the fullest worker needs; above 1 when it does not fit."""
    needs = needed_bytes(spec, layout)
    return max(needs[worker] / max(1, memory[worker]) for worker in layout.workers)


def _with_shares(
    spec: MachineSpec,
    generation: int,
    workers: Sequence[int],
    domains: Mapping[int, str],
    shares: Mapping[int, float],
    empty_handed: Iterable[int],
    mirror_loads: Mapping[int, int] = MappingProxyType({}),
) -> Layout:
    shares = {**shares, **dict.fromkeys(empty_handed, 0.0)}
    if sum(shares.values()) <= 0:  # only workers with share 0 are left: somebody has to own the blocks
        shares = dict.fromkeys(workers, 1.0)
    return balanced(
        generation,
        workers,
        spec.lane_count,
        spec.block_elements,
        domains=domains,
        lane_shares=spec.lane_shares,
        block_shares=shares,
        lane_order=spec.lane_order,
        mirrors=spec.mirrors,
        mirror_loads=mirror_loads,
    )


def layout_after_loss(
    spec: MachineSpec, truth: Layout, generation: int, group: Sequence[int], domains: Mapping[int, str]
) -> Layout:
    """The layout for `group` after the other workers of `truth` were lost. Every shard has a holder in `group`.

    A newcomer takes a dead worker's place (rank, lanes, blocks): as many bytes are copied as for promoting the mirrors,
    and the blocks stay even. Without newcomers the mirrors are promoted in place (R4). Of the two, the one with fewer
    blocks on a single failure domain is taken.
    """
    here, before = set(group), set(truth.workers)
    dead = [worker for worker in truth.workers if worker not in here]
    stand_ins = dict(_pair(dead, [worker for worker in group if worker not in before], domains))
    order = [stand_ins.get(worker, worker) for worker in truth.workers if worker in here or worker in stand_ins]
    placed = set(order)
    order += [worker for worker in group if worker not in placed]

    def promote(layout: Layout) -> Layout:
        return promoted(
            layout,
            generation,
            order,
            spec.block_elements,
            domains=domains,
            lane_shares=spec.lane_shares,
            lane_order=spec.lane_order,
            mirrors=spec.mirrors,
        )

    in_place = promote(truth)
    if not stand_ins:
        return in_place
    replaced = promote(_replaced(truth, stand_ins))
    return replaced if _close_blocks(replaced, domains) <= _close_blocks(in_place, domains) else in_place


def _pair(dead: Sequence[int], newcomers: Sequence[int], domains: Mapping[int, str]) -> list[tuple[int, int]]:
    """A newcomer for each dead worker while there are any; those of the same failure domain first."""
    free = list(newcomers)
    pairs: list[tuple[int, int]] = []
    for worker in dead:
        if free:
            same = [new for new in free if worker in domains and domains.get(new) == domains[worker]]
            chosen = (same or free)[0]
            free.remove(chosen)
            pairs.append((worker, chosen))
    return pairs


def _replaced(layout: Layout, stand_ins: Mapping[int, int]) -> Layout:
    shards = tuple(
        replace(
            shard,
            owner=stand_ins.get(shard.owner, shard.owner),
            mirror=None if shard.mirror is None else stand_ins.get(shard.mirror, shard.mirror),
        )
        if shard.owner in stand_ins or shard.mirror in stand_ins
        else shard
        for shard in layout.shards
    )
    return replace(layout, workers=tuple(stand_ins.get(w, w) for w in layout.workers), shards=shards)


def _close_blocks(layout: Layout, domains: Mapping[int, str]) -> int:
    """Blocks whose owner and mirror share a failure domain, or that have no mirror."""
    return sum(
        shard.hi - shard.lo
        for shard in layout.shards
        if shard.mirror is None or domains.get(shard.owner, shard.owner) == domains.get(shard.mirror, shard.mirror)
    )


def propose(
    spec: MachineSpec,
    truth: Layout,
    generation: int,
    *,
    newcomers: Sequence[int],
    draining: Sequence[int],
    target: int,
    domains: Mapping[int, str],
    memory: Mapping[int, int],
    rebalance: bool,
) -> Proposal | None:
    """What a planned pause should change now; None: nothing, so that no pause is needed.

    A drained worker is left out at once when every block that it holds has another holder among those that stay. If it
    is the only one (mirrors are off, or both holders leave together) it first hands over: it stays in the group but
    owns nothing, and leaves with the next pause. Nobody is left out below `min_workers`.
    """
    members = frozenset(truth.workers) if draining else frozenset()
    wanted_to_leave = [worker for worker in draining if worker in members]
    staying = len(truth.workers) - len(wanted_to_leave)
    join = tuple(newcomers[: max(0, min(target, world_cap(spec)) - staying)])
    if not (wanted_to_leave or join or rebalance):
        return None
    group: list[int] = list(truth.workers)
    leave: list[int] = []
    handing: list[int] = []
    held = truth.by_holder()
    left = set(group)
    for worker in wanted_to_leave:
        if len(group) - len(handing) + len(join) - 1 < spec.min_workers or len(group) == 1:
            continue
        if all(any(other in left and other != worker for other in s.holders()) for s in held.get(worker, ())):
            left.discard(worker)
            group.remove(worker)
            leave.append(worker)
        else:
            handing.append(worker)
    join = join[: max(0, world_cap(spec) - len(group))]
    if leave or handing or join or rebalance:
        layout = even_layout(spec, generation, [*group, *join], domains, handing, memory)
        if shortfall(spec, layout, memory) is None:
            return Proposal(layout, join, tuple(leave))
    if (leave or handing) and (join or rebalance):  # perhaps it fits when nobody leaves
        join = join[: max(0, world_cap(spec) - len(truth.workers))]
        layout = even_layout(spec, generation, [*truth.workers, *join], domains, (), memory)
        if (join or rebalance) and shortfall(spec, layout, memory) is None:
            return Proposal(layout, join, ())
    return None


def is_uneven(
    spec: MachineSpec, layout: Layout, domains: Mapping[int, str], memory: Mapping[int, int] = MappingProxyType({})
) -> bool:
    """Whether the heaviest owner has more than `UNEVEN` x the mean, and a balanced layout would have it lighter, by
    enough to be worth a pause: that layout depends on the speeds learned so far, which never stand quite still.
    """
    mean = sum(spec.block_elements) / layout.world_size
    heaviest = _heaviest(spec, layout)
    if heaviest <= UNEVEN * mean:
        return False
    even = even_layout(spec, layout.generation, layout.workers, domains, (), memory)
    return WORTH_A_PAUSE * _heaviest(spec, even) < heaviest


def _heaviest(spec: MachineSpec, layout: Layout) -> int:
    owned: dict[int, int] = {}
    for shard in layout.shards:
        owned[shard.owner] = owned.get(shard.owner, 0) + sum(spec.block_elements[shard.lo : shard.hi])
    return max(owned.values())


def shortfall(spec: MachineSpec, layout: Layout, memory: Mapping[int, int]) -> str | None:
    """Why `layout` does not fit into the memory of its workers, in words; None when it fits or memory is unknown."""
    found = lacking(spec, layout, memory)
    return None if found is None else found[1]


def lacking(spec: MachineSpec, layout: Layout, memory: Mapping[int, int]) -> tuple[int, str] | None:
    """The first worker that has not enough memory for `layout`, and what it lacks in words."""
    if not memory:
        return None
    held, sums = _held(spec, layout), sums_bytes(spec, layout)
    for worker, need in needed_bytes(spec, layout).items():
        if worker in memory and need > memory[worker]:
            more = f", {sums[worker]} for the sums of {len(layout.lanes_of(worker))} lanes" if sums.get(worker) else ""
            fewer = ", lower its share in workers.lane_shares" if sums.get(worker) else ""
            return worker, (
                f"worker {worker} has {memory[worker]} bytes of memory but would need {need} "
                f"({spec.fixed_bytes} fixed{more}, and {held[worker]} elements held with "
                f"{layout.world_size} workers); add workers (raise workers.start or workers.max), "
                f"lower its share in workers.block_shares{fewer}, or give workers more memory"
            )
    return None


def _held(spec: MachineSpec, layout: Layout) -> Counter[int]:
    """Elements that each worker holds, as owner or as mirror."""
    held = Counter[int]()
    for shard in layout.shards:
        for worker in shard.holders():
            held[worker] += sum(spec.block_elements[shard.lo : shard.hi])
    return held


def needed_bytes(spec: MachineSpec, layout: Layout) -> dict[int, int]:
    """What each worker needs under `layout`."""
    held, sums = _held(spec, layout), sums_bytes(spec, layout)
    return {
        worker: spec.fixed_bytes + int(held[worker] * spec.bytes_per_held_element) + sums.get(worker, 0)
        for worker in layout.workers
    }


def sums_bytes(spec: MachineSpec, layout: Layout) -> dict[int, int]:
    """By worker: bytes of sums of gradients beyond those that `fixed_bytes` has room for. While its lanes are computed
    a worker has up to `most_sums` of them. In the exchange it has its roots, and of its own blocks those of all others;
    they come to lie where sums were that are needed no more.
    """
    if spec.gradients is None:
        return {}
    elements = sum(spec.block_elements[: spec.gradients.blocks])
    owned = Counter[int]()
    for shard in layout.shards:
        owned[shard.owner] += sum(spec.block_elements[shard.lo : min(shard.hi, spec.gradients.blocks)])
    computed, own, everybodys = _sums(spec.gradients, layout)
    found: dict[int, int] = {}
    for worker, sums, mine in zip(layout.workers, computed, own, strict=True):
        computing = elements * sums
        exchanging = elements * mine + owned[worker] * (everybodys - mine)
        found[worker] = 4 * max(0, max(computing, exchanging) - COUNTED_SUMS * elements)
    return found


def _sums(gradients: GradientSpec, layout: Layout) -> tuple[list[int], list[int], int]:
    """By rank: sums of gradients at once while its lanes are computed, and those that it hands over, at most. Then how
    many all together hand over: of a group with the same lanes only one.
    """
    count = layout.lane_count
    if gradients.way == "none" or layout.world_size == 1:
        computed = [most_sums(lanes, count, apart=gradients.apart) for lanes in layout.lanes]
        handed = [len(roots(lanes, count)) for lanes in layout.lanes]
        return computed, handed, sum(handed)
    sharing = sharing_of(gradients.way, layout.lanes, depth=gradients.depth, group=gradients.group)
    found = most_roots(sharing, gradients.way, count)
    handed = [own for _, own in found]
    everybodys = sum(
        own
        for rank, own in enumerate(handed)
        if gradients.way != "coded" or group_of(rank, layout.world_size, gradients.group)[0] == rank
    )
    return [sums + gradients.apart for sums, _ in found], handed, everybodys


def refuse_drain(
    spec: MachineSpec, worker: int, members: Sequence[int], draining: Sequence[int], target: int
) -> str | None:
    """Why member `worker` may not be drained, in words; None when it may."""
    if worker in draining:
        return f"worker {worker} is being drained already"
    left = len(members) - len([member for member in members if member in draining]) - 1
    if left < 1:
        return f"worker {worker} is the last one; add a worker first, or stop the run"
    if min(left, target - 1) < spec.min_workers:
        return (
            f"draining worker {worker} would leave {min(left, target - 1)} workers, fewer than "
            f"workers.min={spec.min_workers}; add a worker first, or lower workers.min"
        )
    return None


def refuse_resize(spec: MachineSpec, target: int) -> str | None:
    """Why the world may not be resized to `target`, in words; None when it may."""
    if not spec.min_workers <= target <= spec.max_workers:
        return (
            f"{target} workers are outside workers.min={spec.min_workers} .. workers.max={spec.max_workers}; "
            "ask for a number in between, or change these settings"
        )
    return None
