"""What the outer search goes over: candidates, branches of them, and ways to take devices from a cluster's groups."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations, permutations, product

from elastictrain.planner.collectives import all_gather_s, share_across
from elastictrain.planner.compute import Constants
from elastictrain.planner.cost import Place
from elastictrain.planner.plan import Plan
from elastictrain.planner.profiles import Cluster, Group

WorkOut = Callable[[float], Plan | None]
MOST_DEALS = 64


@dataclass(frozen=True, slots=True)
class Shape:
    """One worker of a pipeline: `tensor` devices a stage, `pipeline` stages, sequences of a micro-batch."""

    tensor: int
    pipeline: int
    micro_batch: int


@dataclass(frozen=True, slots=True)
class Candidate:
    """`work_out(worst)` gives the plan, or None when it takes `worst` seconds or more, or fits nowhere."""

    bound_s: float
    work_out: WorkOut


@dataclass(frozen=True, slots=True)
class Branch:
    """Candidates of which none takes less than `bound_s`, `size` of them; in further branches where they are many.
    `open(worst)`: those that take `worst` seconds or more, as far as that is soon known, stay a branch.
    """

    bound_s: float
    open: Callable[[float], Sequence[Branch | Candidate]]
    size: int


def place_of(cluster: Cluster, group: Group) -> Place:
    """A group as the cost model sees it."""
    return Place(
        device=cluster.device(group), per_node=group.per_node, inside=cluster.link(group.intra),
        across=cluster.link(group.inter), slowdown=group.slowdown,
    )  # fmt: skip


def memory_bytes(cluster: Cluster, number: int) -> float:
    """What a device of a group may use."""
    group = cluster.groups[number]
    return group.memory_limit_bytes or cluster.device(group).memory_bytes


def divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]


def fewest_workers(lanes: int) -> set[int]:
    """Of all numbers of workers that have the same largest number of lanes the smallest."""
    return {-(-lanes // each) for each in range(1, lanes + 1)}


def subsets(count: int) -> Iterator[tuple[int, ...]]:
    """Every choice of groups, the small ones first."""
    for size in range(1, count + 1):
        yield from combinations(range(count), size)


def slowest_ring_s(size_bytes: float, cluster: Cluster, constants: Constants, used: Mapping[int, int]) -> float:
    """One all-gather of `size_bytes` over `used[group]` devices of each group, on as few nodes as hold them: as slow as
    the slowest link on its way.
    """
    devices = sum(used.values())
    nodes = sum(-(-count // cluster.groups[n].per_node) for n, count in used.items())
    islands = {cluster.groups[n].island for n in used}
    slowest = 0.0
    for number, count in used.items():
        group = cluster.groups[number]
        if nodes == 1:
            return all_gather_s(size_bytes, devices, cluster.link(group.intra), constants.inside)
        for name in (group.inter, cluster.between) if len(islands) > 1 else (group.inter,):
            link = cluster.link(name)
            share = constants.across * share_across(link, min(count, group.per_node), group.per_node, nodes)
            slowest = max(slowest, all_gather_s(size_bytes, devices, link, share))
    return slowest


def deals(sizes: Sequence[int], total: int) -> Iterator[tuple[int, ...]]:
    """Ways to take `total` devices from groups of these sizes, one at least from each.

    All of them where there are few; of more than `MOST_DEALS`, those that take as many as there are from one group
    after the other, for every order of the groups.
    """
    if not len(sizes) <= total <= sum(sizes):
        return
    largest = max(range(len(sizes)), key=sizes.__getitem__)
    others = [n for n in range(len(sizes)) if n != largest]
    if math.prod(sizes[n] for n in others) <= MOST_DEALS:
        for taken in product(*(range(1, sizes[n] + 1) for n in others)):
            if 1 <= (rest := total - sum(taken)) <= sizes[largest]:
                yield (*taken[:largest], rest, *taken[largest:])
        return
    seen = set()
    for order in permutations(range(len(sizes))):
        counts, left = [1] * len(sizes), total - len(sizes)
        for n in order:
            more = min(left, sizes[n] - 1)
            counts[n] += more
            left -= more
        seen.add(tuple(counts))
    yield from sorted(seen)
