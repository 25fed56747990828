"""Who of several processes stores what: a pure plan, and the one exchange that it needs.

Storage and digest know flat runs that begin on the digest grid; the shards of a DTensor begin anywhere. So the runs are
moved to the grid: for `Shard(0)` a rank gets the few elements up to the next grid border from its neighbours, for other
dimensions the tensor is turned into flat runs. This is one `all_to_all` at the time of the call; nothing runs in the
background. What every rank has (plain tensors, `Replicate`) is shared out without any exchange.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor, Replicate, Shard

from elastictrain_checkpoint.boxes import Box, box_runs
from elastictrain_checkpoint.dtypes import num_elements
from elastictrain_checkpoint.errors import InvalidPiece, SaveFailed
from elastictrain_checkpoint.hashing import DIGEST_BLOCK_ELEMENTS

SPLIT_BYTES = 1 << 20
"""A replicated tensor that is smaller is stored whole by one rank."""


@dataclass(frozen=True, slots=True)
class Spread:
    """How a tensor lies in the world.

    Attributes:
        name: of the tensor.
        shape: as stored (see `stored_facts`).
        item: bytes of an element as stored.
        dim: the dimension that is sharded, or None: every rank has all.

    """

    name: str
    shape: tuple[int, ...]
    item: int
    dim: int | None


def local_box(tensor: DTensor) -> Box:
    """(offsets, sizes) of this process's shard.

    Raises:
        InvalidPiece: placements that are not one `Shard` or `Replicate` over a mesh of one dimension.

    """
    dim = sharded_dim(tensor, "a DTensor")
    mesh = tensor.device_mesh
    return shard_box(tuple(tensor.shape), dim, mesh.size(), mesh.get_local_rank())


def sharded_dim(tensor: DTensor, name: str) -> int | None:
    """The sharded dimension; None for a replicated tensor. Raises InvalidPiece as `local_box`."""
    placements = tensor.placements
    if tensor.device_mesh.ndim != 1 or type(placements[0]) not in (Shard, Replicate):
        raise InvalidPiece(
            f"{name} is placed as {tuple(placements)} over a mesh of {tensor.device_mesh.ndim} dimensions; supported "
            "is one of Shard(dim) and Replicate over one dimension: redistribute it first"
        )
    placed = placements[0]
    return placed.dim % max(1, tensor.dim()) if isinstance(placed, Shard) else None


def shard_box(shape: tuple[int, ...], dim: int | None, world: int, rank: int) -> Box:
    """The box of a rank: chunks of equal size along `dim`, the last ones smaller or empty, as DTensor cuts them."""
    if dim is None:
        return (0,) * len(shape), shape
    chunk = -(-shape[dim] // world)
    low, high = min(rank * chunk, shape[dim]), min((rank + 1) * chunk, shape[dim])
    offsets, sizes = [0] * len(shape), list(shape)
    offsets[dim], sizes[dim] = low, high - low
    return tuple(offsets), tuple(sizes)


def plan_shares(spreads: Sequence[Spread], world: int) -> dict[str, list[tuple[int, int]]]:
    """For each tensor the flat run [start, stop) that each rank stores; all begin on the digest grid. Every rank comes
    to the same plan from the same names and shapes. Small replicated tensors go, the largest first, to the rank with
    the least to write (longest processing time first: Graham 1969).
    """
    shares: dict[str, list[tuple[int, int]]] = {}
    load = [0] * world
    whole: list[Spread] = []
    for spread in spreads:
        count = num_elements(spread.shape)
        if spread.dim is None and (count * spread.item < SPLIT_BYTES * world or count <= DIGEST_BLOCK_ELEMENTS):
            whole.append(spread)
            continue
        if spread.dim == 0 and count:
            inner = count // spread.shape[0]
            ends = [sum(pair) for pair in _rows(spread.shape, world)]
            edges = [_up(end * inner, count) for end in ends]
        else:
            edges = [_up(count * (rank + 1) // world, count) for rank in range(world)]
        shares[spread.name] = list(zip([0, *edges[:-1]], edges, strict=True))
        for rank, (start, stop) in enumerate(shares[spread.name]):
            load[rank] += (stop - start) * spread.item
    for spread in sorted(whole, key=lambda s: (-num_elements(s.shape) * s.item, s.name)):
        count = num_elements(spread.shape)
        rank = load.index(min(load))
        load[rank] += count * spread.item
        shares[spread.name] = [(0, count) if r == rank else (0, 0) for r in range(world)]
    return shares


def _rows(shape: tuple[int, ...], world: int) -> Iterator[tuple[int, int]]:
    for rank in range(world):
        offsets, sizes = shard_box(shape, 0, world, rank)
        yield offsets[0], sizes[0]


def _up(at: int, count: int) -> int:
    return min(count, -(-at // DIGEST_BLOCK_ELEMENTS) * DIGEST_BLOCK_ELEMENTS)


def overlaps(box: Box, shape: tuple[int, ...], low: int, high: int) -> list[tuple[int, int, int]]:
    """Where the flat run [low, high) lies in a box: (place among the box's elements, place in the tensor, elements)."""
    if low >= high or 0 in box[1]:
        return []
    starts, run = box_runs(shape, *box)
    found = []
    for number, start in enumerate(starts.tolist()):
        first, last = max(low, start), min(high, start + run)
        if first < last:
            found.append((number * run + first - start, first, last - first))
    return found


@dataclass(frozen=True, slots=True)
class Share:
    """What this rank stores of one tensor: the run from `start` on, in live memory, then in memory of its own."""

    start: int
    live: memoryview
    own: memoryview


def exchange(
    spreads: Sequence[Spread],
    local: Mapping[str, memoryview],
    shares: Mapping[str, Sequence[tuple[int, int]]],
    group: dist.ProcessGroup,
) -> dict[str, Share]:
    """Bring every rank the elements of its share that lie with others. A collective of `group`; every rank calls it.

    Args:
        spreads: of all tensors, in the same order everywhere.
        local: the bytes of this rank's shard of each, row-major.
        shares: the plan.
        group: its backend must move CPU tensors.

    """
    rank, world = dist.get_rank(group), dist.get_world_size(group)
    sharded = [spread for spread in spreads if spread.dim is not None]
    outgoing: list[list[memoryview]] = [[] for _ in range(world)]
    found: dict[str, Share] = {}
    awaited: list[list[tuple[memoryview, int, int]]] = [[] for _ in range(world)]
    for spread in spreads:
        low, high = shares[spread.name][rank]
        data, item = local[spread.name], spread.item
        if spread.dim is None:
            found[spread.name] = Share(low, data[low * item : high * item], memoryview(b""))
    for spread in sharded:
        mine = shard_box(spread.shape, spread.dim, world, rank)
        data, item = local[spread.name], spread.item
        for other in range(world):
            for at, _, count in overlaps(mine, spread.shape, *shares[spread.name][other]) if other != rank else ():
                outgoing[other].append(data[at * item : (at + count) * item])
        found[spread.name] = _own_share(spread, mine, data, shares[spread.name][rank])
        share = found[spread.name]
        low, high = shares[spread.name][rank]
        first = low + len(share.live) // item  # where the memory of its own begins
        for other in range(world):
            box = shard_box(spread.shape, spread.dim, world, other)
            for _, flat, count in overlaps(box, spread.shape, low, high) if other != rank else ():
                awaited[other].append((share.own, (flat - first) * item, count * item))
    if sharded and world > 1:
        _swap(outgoing, awaited, group)
    return found


def _own_share(spread: Spread, mine: Box, data: memoryview, wanted: tuple[int, int]) -> Share:
    """The share with what this rank has; of a tensor sharded by rows most of it stays where it is."""
    low, high = wanted
    item = spread.item
    held = overlaps(mine, spread.shape, low, high)
    live = memoryview(b"")
    first = low
    if spread.dim == 0 and held and held[0][1] == low:
        at, _, count = held[0]
        if low + count < high:  # the rest, from the last grid border on, comes together in memory of its own
            count -= count % DIGEST_BLOCK_ELEMENTS
        live, first = data[at * item : (at + count) * item], low + count
    own = memoryview(bytearray((high - first) * item))
    for at, flat, count in held:
        skip = max(0, first - flat)
        if skip < count:
            begin = (flat + skip - first) * item
            own[begin : begin + (count - skip) * item] = data[(at + skip) * item : (at + count) * item]
    return Share(low, live, own)


def _swap(
    outgoing: Sequence[Sequence[memoryview]],
    awaited: Sequence[Sequence[tuple[memoryview, int, int]]],
    group: dist.ProcessGroup,
) -> None:
    sizes_out = [sum(map(len, views)) for views in outgoing]
    sizes_in = [sum(size for _, _, size in places) for places in awaited]
    raw = bytearray(b"".join(view for views in outgoing for view in views))
    sent = torch.frombuffer(raw, dtype=torch.uint8) if raw else torch.empty(0, dtype=torch.uint8)
    got = torch.empty(sum(sizes_in), dtype=torch.uint8)
    dist.all_to_all_single(got, sent, sizes_in, sizes_out, group=group)
    data = memoryview(got.numpy())  # type: ignore[arg-type]
    at = 0
    for places in awaited:
        for out, begin, size in places:
            out[begin : begin + size] = data[at : at + size]
            at += size


def agree(facts: list[Any], busy: bool, problem: Exception | None, group: dist.ProcessGroup) -> bool:
    """Refuse state dicts that differ between ranks, and tell whether any rank is busy. A collective of `group`: a rank
    that has a problem takes part, so that no other waits for it.

    Raises:
        InvalidPiece: on every rank, naming the first that differs from rank 0.
        SaveFailed: another rank has a problem. The one that has raises it as it is.

    """
    world = dist.get_world_size(group)
    said: list[Any] = [None] * world
    mine = (hashlib.sha256(repr(facts).encode()).hexdigest(), busy, "" if problem is None else str(problem))
    dist.all_gather_object(said, mine, group=group)
    if problem is not None:
        raise problem
    for rank, (_, _, text) in enumerate(said):
        if text:
            raise SaveFailed(f"rank {rank} could not begin to save: {text}")
    if len({digest for digest, _, _ in said}) > 1:
        whole: list[Any] = [None] * world
        dist.all_gather_object(whole, [repr(fact) for fact in facts], group=group)
        rank = next(rank for rank in range(world) if whole[rank] != whole[0])
        differ = sorted(set(whole[rank]) ^ set(whole[0])) or ["the order of the keys"]
        raise InvalidPiece(
            f"the state dict of rank {rank} differs from that of rank 0: {'; '.join(differ[:3])}; every rank must pass "
            "the same keys, shapes and placements"
        )
    return any(busy for _, busy, _ in said)
