"""From what was measured on the nodes to a cluster that `elastictrain plan` reads. Pure.

Nodes with the same devices that are about as quick form one group; slower ones form a group of their own, with a
`slowdown`. Nodes that reach each other about as quickly as the quickest pair form an island.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Literal

from elastictrain.errors import ConfigError
from elastictrain.planner.profiles import DEVICES, Cluster, Device, Dtype, Group, Link

ALIKE = 1.1
"""Nodes whose devices differ by less than this factor are alike."""
NEAR = 0.5
"""Nodes are on one island when they reach each other with this share of the best bandwidth, or more."""
Pattern = Literal["alone", "contiguous", "strided"]
Times = tuple[tuple[float, float], ...]
"""(bytes, seconds) of transfers one way."""

# What a driver calls a device, in small letters, and what else tells two of them apart: bytes of memory.
_NAMES = (
    ("h200", "h200", 0.0), ("h100 pcie", "h100-pcie", 0.0), ("h100", "h100", 0.0), ("a100", "a100-80", 60e9),
    ("a100", "a100-40", 0.0), ("a10g", "a10g", 0.0), ("l40s", "l40s", 0.0), ("l4", "l4", 0.0), ("a6000", "a6000", 0.0),
    ("3090", "rtx3090", 0.0), ("4090", "rtx4090", 0.0), ("v100", "v100-32", 24e9), ("v100", "v100-16", 0.0),
    ("tesla t4", "t4", 0.0), ("p40", "p40", 0.0), ("p100", "p100", 0.0),
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Product:
    """A matrix product of (m, k) by (k, n) and the seconds that it took."""

    m: int
    n: int
    k: int
    dtype: Dtype
    seconds: float

    @property
    def flops(self) -> float:
        return 2.0 * self.m * self.n * self.k / self.seconds

    @property
    def side(self) -> int:
        return min(self.m, self.n, self.k)


@dataclass(frozen=True, slots=True)
class NodeReading:
    """One node. `device`: as its driver calls it. Bandwidths in bytes/s; `within`: between two of its devices (for CPUs
    between two of its processes).
    """

    host: str
    device: str
    devices: int
    memory_bytes: float
    bandwidth_bytes_s: float
    products: tuple[Product, ...]
    within: Times
    host_memory_bytes: float
    host_bandwidth_bytes_s: float
    disk_bytes_s: float


@dataclass(frozen=True, slots=True)
class PairReading:
    """Two nodes, by number. "alone": nobody else sent; "contiguous", "strided": all nodes sent at once, each to its
    neighbour, or to one far away.
    """

    a: int
    b: int
    pattern: Pattern
    times: Times


def fit_link(times: Iterable[tuple[float, float]]) -> tuple[float, float]:
    """(alpha in s, beta in bytes/s): the line through the smallest transfer, which is nearly all latency, and the
    largest one, which is nearly all bandwidth. What lies between follows other protocols than either, and would bend a
    line through all of them. A transfer that took longer than a larger one was disturbed: what the larger one took then
    counts for it too.

    Raises ConfigError when there are no two sizes, or the largest takes no longer.
    """
    points = sorted((size, seconds) for size, seconds in times if seconds > 0)
    if len({size for size, _ in points}) < 2:
        raise ConfigError(f"a link needs transfers of two sizes or more, got {points}")
    small, (large, slow) = points[0][0], points[-1]
    quick = min(seconds for _, seconds in points)
    if slow <= quick:
        raise ConfigError(f"a link whose larger transfers take no longer cannot be: {points}")
    beta = (large - small) / (slow - quick)
    return max(0.0, quick - small / beta), beta


def device_of(name: str, nodes: Sequence[NodeReading]) -> Device:
    """The profile of a kind of device: peaks from the data sheet where it is known, else the best that was reached."""
    known = DEVICES.get(name)
    dtypes: list[Dtype] = sorted({product.dtype for node in nodes for product in node.products})
    best = {
        dtype: max(p.flops for node in nodes for p in node.products if p.dtype == dtype) for dtype in dtypes
    }  # fmt: skip
    peaks: dict[Dtype, float] = {**best, **(known.peak_flops if known is not None else {})}
    # The planner has one table for a device: of the dtype that its matrix units are for.
    shown: Dtype = "bf16" if "bf16" in best and best["bf16"] > best.get("f32", 0.0) else dtypes[-1]
    table = {}
    for side in sorted({p.side for node in nodes for p in node.products if p.dtype == shown}):
        reached = [p.flops for node in nodes for p in node.products if (p.side, p.dtype) == (side, shown)]
        table[side] = min(1.0, max(1e-6, median(reached) / max(peaks[shown], best[shown])))
    return Device(
        name=f"measured-{name}", peak_flops=peaks, memory_bytes=min(node.memory_bytes for node in nodes),
        bandwidth_bytes_s=median(node.bandwidth_bytes_s for node in nodes), gemm_efficiency=table,
        source=f"measured on {len(nodes)} node{'s' if len(nodes) > 1 else ''}, "
        + ("peak from the data sheet" if known is not None else "peak: the best that was reached"),
    )  # fmt: skip


def device_name(driver_name: str, memory_bytes: float) -> str:
    """Our name of a device, or its driver's in a form that fits into YAML."""
    lower = driver_name.lower()
    for part, name, least in _NAMES:
        words = lower.replace("-", " ").split()
        if (part in words or (part in lower and " " in part)) and memory_bytes >= least:
            return name
    return "-".join("".join(c if c.isalnum() else " " for c in lower).split()) or "unknown"


def cluster_of(nodes: Sequence[NodeReading], pairs: Sequence[PairReading] = ()) -> Cluster:
    """The measured cluster. Raises ConfigError when there are no nodes, or a node has no products."""
    if not nodes or any(not node.products for node in nodes):
        raise ConfigError("nothing was measured: no node answered, or one without any matrix product")
    islands = islands_of(len(nodes), pairs)
    links: list[Link] = []
    kinds: dict[tuple[str, int], list[int]] = {}
    for number, node in enumerate(nodes):
        kinds.setdefault((device_name(node.device, node.memory_bytes), node.devices), []).append(number)
    devices: dict[str, Device] = {}
    groups: list[Group] = []
    for (name, per_node), members in kinds.items():
        readings = [nodes[number] for number in members]
        speeds = {number: speed_of(nodes[number]) for number in members}
        quick = [nodes[n] for n in members if speeds[n] * ALIKE >= max(speeds.values())]
        if name not in devices:
            devices[name] = device_of(name, quick)
        links.append(_link(f"within-{name}-{per_node}", [node.within for node in readings], None))
        for island, slow, numbers in _alike(members, speeds, islands):
            groups.append(
                Group(
                    device=devices[name].name, nodes=len(numbers), per_node=per_node,
                    intra=links[-1].name, inter="loopback", island=island, slowdown=slow,
                    host_memory_bytes=min(nodes[n].host_memory_bytes for n in numbers),
                    host_bandwidth_bytes_s=median(nodes[n].host_bandwidth_bytes_s for n in numbers),
                    disk_bytes_s=median(nodes[n].disk_bytes_s for n in numbers),
                )
            )  # fmt: skip
    groups, between = _joined(groups, links, islands, pairs)
    return Cluster(groups=tuple(groups), between=between, devices=tuple(devices.values()), links=tuple(links))


def speed_of(node: NodeReading) -> float:
    """FLOP/s over all products that were measured, as the geometric mean: so that no shape counts more than another."""
    return math.exp(sum(math.log(product.flops) for product in node.products) / len(node.products))


def _alike(
    members: Sequence[int], speeds: Mapping[int, float], islands: Sequence[str]
) -> Iterable[tuple[str, float, list[int]]]:
    """(island, slowdown, nodes): by island, the quick ones together, then those that are slower by about as much."""
    best = max(speeds.values())
    for island in sorted({islands[number] for number in members}):
        here = sorted((n for n in members if islands[n] == island), key=lambda n: (-speeds[n], n))
        while here:
            top = speeds[here[0]]
            together = [n for n in here if speeds[n] * ALIKE >= top]
            slow = best / median(speeds[n] for n in together)
            yield island, 1.0 if slow < ALIKE else round(slow, 3), together
            here = [n for n in here if n not in together]


def islands_of(count: int, pairs: Sequence[PairReading]) -> list[str]:
    """An island's name for every node: joined are those with a quick link between them."""
    alone = [(pair, fit_link(pair.times)[1]) for pair in pairs if pair.pattern == "alone"]
    best = max((beta for _, beta in alone), default=0.0)
    name = list(range(count))
    for pair, beta in alone:
        if beta >= NEAR * best:
            low, high = sorted((name[pair.a], name[pair.b]))
            name = [low if n == high else n for n in name]
    order = {found: rank for rank, found in enumerate(sorted(set(name)))}
    return [f"island-{order[n]}" for n in name]


def crowding(pairs: Sequence[PairReading], count: int) -> float | None:
    """The exponent with which bandwidth falls with the number of nodes, when all send at once and far; None where that
    was not measured.
    """
    alone = [fit_link(pair.times)[1] for pair in pairs if pair.pattern == "alone"]
    together = [fit_link(pair.times)[1] for pair in pairs if pair.pattern == "strided"]
    if count < 4 or not alone or not together:
        return None
    return max(0.0, -math.log(median(together) / median(alone)) / math.log(count))


def _joined(
    groups: Sequence[Group], links: list[Link], islands: Sequence[str], pairs: Sequence[PairReading]
) -> tuple[list[Group], str]:
    """The groups with the links between their nodes, and the name of the link between islands."""
    crowd = crowding(pairs, len(islands))
    names = {}
    for island in sorted(set(islands)):
        inside = [p for p in pairs if p.pattern == "alone" and islands[p.a] == islands[p.b] == island]
        if inside:
            names[island] = f"{island}-nodes"
            links.append(_link(names[island], [p.times for p in inside], crowd))
    for pattern in ("contiguous", "strided"):  # written down for people; `crowd` is what the planner takes of them
        found = [p.times for p in pairs if p.pattern == pattern]
        if found:
            links.append(_link(f"all-at-once-{pattern}", found, crowd))
    across = [p.times for p in pairs if p.pattern == "alone" and islands[p.a] != islands[p.b]]
    between = next(iter(names.values()), links[0].name)
    if across:
        between = "between-islands"
        links.append(_link(between, across, crowd))
    return [group.model_copy(update={"inter": names.get(group.island, group.intra)}) for group in groups], between


def _link(name: str, times: Sequence[Times], crowd: float | None) -> Link:
    """A class of links: the median of its members."""
    fits = [fit_link(each) for each in times]
    more = {} if crowd is None else {"crowd": crowd}
    return Link(
        name=name, alpha_s=median(alpha for alpha, _ in fits), beta_bytes_s=median(beta for _, beta in fits),
        per="node" if "nodes" in name or "islands" in name or "at-once" in name else "device",
        source=f"measured on {len(times)} link{'s' if len(times) > 1 else ''}", **more,
    )  # fmt: skip


def pairs_to_measure(count: int) -> list[tuple[int, int, Pattern]]:
    """Which pairs of nodes are measured: each with the next and with the first alone; then, from four nodes on, all at
    once with their neighbour and with the node half-way around.
    """
    wanted: dict[tuple[int, int], None] = {}
    for n in range(1, count):
        wanted[n - 1, n] = wanted[0, n] = None
    found: list[tuple[int, int, Pattern]] = [(a, b, "alone") for a, b in wanted]
    if count >= 4:
        half = count // 2
        found += [(n, n + 1, "contiguous") for n in range(0, count - 1, 2)]
        found += [(n, n + half, "strided") for n in range(half)]
    return found
