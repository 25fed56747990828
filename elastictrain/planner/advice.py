"""What a plan means in words: why it wins, what limits it, and what would help where nothing fits."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from elastictrain.planner.profiles import GIB, Cluster

MOST_TIMES = 64


def smallest_help(fits: Callable[[Cluster], bool], cluster: Cluster) -> str:
    """The least that makes the model fit, as a sentence: more nodes of a group, or more memory in its devices.

    `fits` says whether there is any plan on a cluster. More nodes are preferred when they are enough, since they can be
    had; the number is the smallest (found by halving: what fits on some nodes fits on more).
    """
    found = []
    for number, group in enumerate(cluster.groups):
        most = group.nodes * MOST_TIMES

        def with_nodes(nodes: int, number: int = number) -> bool:
            return fits(_changed(cluster, number, nodes=nodes))

        nodes = _least(with_nodes, group.nodes, most)
        if nodes is not None:
            more = nodes - group.nodes
            found.append(
                (
                    more / group.nodes,
                    f"{more} more node{'s' if more > 1 else ''} of {group.device} (groups.{number}.nodes: {nodes})",
                )
            )
    if found:
        return f"the smallest thing that would help: {min(found)[1]}"
    for number, group in enumerate(cluster.groups):
        device = cluster.device(group)
        gib = round((group.memory_limit_bytes or device.memory_bytes) / GIB)

        def with_memory(size: int, number: int = number) -> bool:
            return fits(_with_memory(cluster, number, size * GIB))

        size = _least(with_memory, gib, gib * MOST_TIMES)
        if size is not None:
            found.append(
                (size / gib, f"devices with {size} GiB instead of {group.device} with {gib} GiB (group {number})")
            )
    if found:
        return f"no number of nodes helps; what would: {min(found)[1]}"
    return "no more nodes and no larger devices would help: use a smaller model, or shorter sequences"


def _least(holds: Callable[[int], bool], low: int, high: int) -> int | None:
    """The smallest number above `low`, up to `high`, for which it holds, where it holds for all larger ones."""
    if not holds(high):
        return None
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


def shares(values: Sequence[float]) -> dict[int, float]:
    """Values of workers 0, 1, … as the settings `workers.lane_shares` and `workers.block_shares` take them."""
    return {number: round(value, 4) for number, value in enumerate(values)}
