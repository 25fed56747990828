"""What a plan means in words: why it wins, what limits it, and what would help where nothing fits."""

from __future__ import annotations

import math
from collections.abc import Callable

from elastictrain.planner.profiles import GIB, Cluster

MOST_TIMES = 1024
MOST_MEMORY_TIMES = 64

Fits = Callable[[Cluster], bool | None]
"""Whether there is a plan on a cluster; None when that was not found out in the time there is."""


def smallest_help(fits: Fits, cluster: Cluster) -> str:
    """The least that makes the model fit, as a sentence: a higher limit on the memory, where there is one, else more
    nodes of a group, or more memory in its devices.

    More nodes are preferred to larger devices when they are enough, since they can be had; the number is the smallest
    (found by doubling and halving: what fits on some nodes fits on more). Of up to `MOST_TIMES` times as many.
    """
    asked = _Asked(fits)
    for kind in (_limits, _nodes, _memory):
        found = kind(asked, cluster)
        if found:
            least = min(found)[1]
            if kind is _memory and not asked.unknown:
                return f"no number of nodes up to {MOST_TIMES:,} times as many helps; what would: {least}"
            most = "a thing" if asked.unknown else "the smallest thing"
            return f"{most} that would help: {least}"
    if asked.unknown:
        return "what would help was not found in the time there is: try more nodes, or devices with more memory"
    return (
        f"neither {MOST_TIMES:,} times as many nodes nor devices with {MOST_MEMORY_TIMES} times as much memory would "
        "help: use a smaller model, or shorter sequences"
    )


class _Asked:
    """`fits`, and whether it ever did not know."""

    def __init__(self, fits: Fits) -> None:
        self.fits, self.unknown = fits, False

    def __call__(self, cluster: Cluster) -> bool:
        answer = self.fits(cluster)
        self.unknown = self.unknown or answer is None
        return answer is True


_Found = list[tuple[float, str]]
"""By how much each is more than what is there, and in words."""


def _limits(fits: _Asked, cluster: Cluster) -> _Found:
    found = []
    for number, group in enumerate(cluster.groups):
        limit, there = group.memory_limit_bytes, cluster.device(group).memory_bytes
        if limit is None or limit >= there:
            continue

        def with_limit(size: int, number: int = number, there: float = there) -> bool:
            return fits(_changed(cluster, number, memory_limit_bytes=min(size * GIB, there)))

        size = _least(with_limit, math.floor(limit / GIB), math.ceil(there / GIB))
        if size is not None:
            raised = min(size * GIB, there)
            words = f"groups.{number}.memory_limit_bytes: {raised:.4g} instead of {limit:.4g}"
            found.append((raised / limit, words))
    return found


def _nodes(fits: _Asked, cluster: Cluster) -> _Found:
    found = []
    for number, group in enumerate(cluster.groups):

        def with_nodes(nodes: int, number: int = number) -> bool:
            return fits(_changed(cluster, number, nodes=nodes))

        nodes = _least(with_nodes, group.nodes, group.nodes * MOST_TIMES)
        if nodes is not None:
            more = nodes - group.nodes
            words = f"{more} more node{'s' if more > 1 else ''} of {group.device} (groups.{number}.nodes: {nodes})"
            found.append((more / group.nodes, words))
    return found


def _memory(fits: _Asked, cluster: Cluster) -> _Found:
    found = []
    for number, group in enumerate(cluster.groups):
        # A limit alone does not help, or it would have been raised.
        gib = round(cluster.device(group).memory_bytes / GIB)

        def with_memory(size: int, number: int = number) -> bool:
            return fits(_with_memory(cluster, number, size * GIB))

        size = _least(with_memory, gib, gib * MOST_MEMORY_TIMES)
        if size is not None:
            words = f"devices with {size} GiB instead of {group.device} with {gib} GiB (group {number})"
            found.append((size / max(gib, 1), words))
    return found


def _least(holds: Callable[[int], bool], low: int, most: int) -> int | None:
    """The smallest number above `low`, up to `most`, for which it holds, where it holds for all larger ones."""
    high, step = low, 1
    while not holds(high := min(low + step, most)):
        if high >= most:
            return None
        low, step = high, 2 * step
    while high - low > 1:
        middle = (low + high) // 2
        if holds(middle):
            high = middle
        else:
            low = middle
    return high


def _changed(cluster: Cluster, number: int, **changes: object) -> Cluster:
    groups = list(cluster.groups)
    groups[number] = groups[number].model_copy(update=changes)
    return cluster.model_copy(update={"groups": tuple(groups)})


def _with_memory(cluster: Cluster, number: int, size_bytes: float) -> Cluster:
    group = cluster.groups[number]
    larger = cluster.device(group).model_copy(update={"name": f"{group.device}-larger", "memory_bytes": size_bytes})
    changed = _changed(cluster, number, device=larger.name, memory_limit_bytes=None)
    return changed.model_copy(update={"devices": (*cluster.devices, larger)})
