"""DTensors as layouts, the ranks' agreement on what is saved, and the one exchange of elements that a save needs.

The exchange is one `all_to_all` at the time of the call; nothing runs in the background. What every rank has (plain
tensors, `Replicate`) is shared out without any.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.placement_types import Partial, _StridedShard

from elastictrain_checkpoint.dtypes import item_bytes
from elastictrain_checkpoint.errors import InvalidPiece, SaveFailed
from elastictrain_checkpoint.layouts import Cut, Held, Layout, held_by, lay_out, local_shape
from elastictrain_checkpoint.shares import Moves, Range, Share, Spread, hand_over
from elastictrain_checkpoint.torch.tree import Flat, stored_facts

Coordinate = tuple[int, ...] | None
"""Where a rank stands on a mesh; None: outside of it."""


def cuts_of(tensor: DTensor, name: str) -> tuple[Cut | None, ...]:
    """What each axis of a DTensor's mesh does to it.

    Raises:
        InvalidPiece: a placement that says not which elements a process has, such as `Partial`, or axes of the mesh
            that cut in another order than that of the mesh, which placements do not show.

    """
    _check_order(tensor, name)
    cuts: list[Cut | None] = []
    for axis, placed in enumerate(tensor.placements):
        if type(placed) is Replicate:
            cuts.append(None)
        elif type(placed) in (Shard, _StridedShard):
            pieces = int(getattr(placed, "split_factor", 1))
            cuts.append(Cut(placed.dim % max(1, tensor.dim()), pieces))  # type: ignore[attr-defined]
        else:
            why = "its ranks hold terms of a sum, not elements" if isinstance(placed, Partial) else "it is not known"
            raise InvalidPiece(
                f"{name} is placed as {tuple(tensor.placements)}: axis {axis} of its mesh is {placed}, and {why}; "
                "redistribute it to Shard or Replicate first"
            )
    return tuple(cuts)


def _check_order(tensor: DTensor, name: str) -> None:
    """From torch 2.13 on a DTensor may be cut by the axes of its mesh in any order, which its spec alone says."""
    order = getattr(tensor._spec, "shard_order", None)
    for entry in order or ():
        axes = tuple(entry.mesh_dims)
        if axes != tuple(sorted(axes)):
            raise InvalidPiece(
                f"{name} is placed as {tuple(tensor.placements)}: dimension {entry.tensor_dim} is cut by the axes "
                f"{axes} of its mesh, in this order; expected the order of the mesh. Redistribute it to these "
                "placements in the usual order first (torch: shard_order)"
            )


def local_held(tensor: DTensor, name: str) -> Held | None:
    """What this process holds of a DTensor; None: nothing, because it is outside of the mesh.

    Raises:
        InvalidPiece: as `cuts_of`, or the local tensor has not the shape that the placements give it.

    """
    mesh, cuts = tensor.device_mesh, cuts_of(tensor, name)
    coordinate = mesh.get_coordinate()
    if coordinate is None:
        return None
    held = held_by(tuple(tensor.shape), tuple(mesh.shape), cuts, coordinate)
    found = tuple(tensor.to_local().shape)
    if found != local_shape(held):
        raise InvalidPiece(
            f"{name} is placed as {tuple(tensor.placements)} over a mesh of {tuple(mesh.shape)}; at "
            f"{tuple(coordinate)} that is a local tensor of {list(local_shape(held))}, but it is of {list(found)}: "
            "distribute it in chunks as torch cuts them (ceil(size / chunks)), or make the size divisible"
        )
    return held


@dataclass(frozen=True, slots=True)
class Facts:
    """What a rank says of the state that it is to save.

    Attributes:
        tensors: (name, type, shape, placement) of every name; the same on every rank. The placement of a DTensor is
            (number of its mesh, shape of the mesh, cuts).
        coordinates: this rank's on each mesh, by number.
        aliases: further name → name of the tensor that has the same memory here.
        hollow: names of tensors of which nothing is here, so that nobody can see whether they share memory.

    """

    tensors: list[Any]
    coordinates: list[Coordinate]
    aliases: dict[str, str]
    hollow: frozenset[str]


def facts_of(flat: Flat) -> Facts:
    """Facts about a flat state dict. Raises InvalidPiece as `local_held`."""
    meshes: list[Any] = []
    tensors, hollow = [], set()
    for _, name in flat.places:
        tensor = flat.tensors[flat.aliases.get(name, name)]
        placement = None
        if isinstance(tensor, DTensor):
            held, mesh = local_held(tensor, name), tensor.device_mesh
            if mesh not in meshes:
                meshes.append(mesh)
            placement = meshes.index(mesh), tuple(mesh.shape), cuts_of(tensor, name)
            if tensor.numel() and (held is None or not all(held)):
                hollow.add(name)
        tensors.append((name, *stored_facts(tensor), placement))
    coordinates = [None if (at := mesh.get_coordinate()) is None else tuple(at) for mesh in meshes]
    return Facts(tensors, coordinates, dict(flat.aliases), frozenset(hollow))


@dataclass(frozen=True, slots=True)
class Agreed:
    """What the ranks have found out: whether any is busy, the names that share memory, everybody's coordinates."""

    busy: bool
    aliases: dict[str, str]
    coordinates: list[list[Coordinate]]


def agree(facts: Facts, more: Any, busy: bool, problem: Exception | None, group: dist.ProcessGroup) -> Agreed:
    """Refuse state dicts that differ between ranks. A collective of `group`: a rank that has a problem takes part, so
    that no other waits for it.

    Args:
        facts: of this rank.
        more: anything else that must be the same everywhere.
        busy: whether this rank is.
        problem: of this rank.
        group: of all who save.

    Raises:
        InvalidPiece: on every rank, naming the first that differs from rank 0.
        SaveFailed: another rank has a problem. The one that has raises it as it is.

    """
    world = dist.get_world_size(group)
    said: list[Any] = [None] * world
    shown = [*map(repr, facts.tensors), repr(more)]
    digest = hashlib.sha256("\n".join(shown).encode()).hexdigest()
    text = "" if problem is None else str(problem)
    dist.all_gather_object(said, (text, digest, busy, facts.aliases, facts.hollow, facts.coordinates), group=group)
    if problem is not None:
        raise problem
    for rank, (text, *_) in enumerate(said):
        if text:
            raise SaveFailed(f"rank {rank} could not begin to save: {text}")
    if len({digest for _, digest, *_ in said}) > 1:
        whole: list[Any] = [None] * world
        dist.all_gather_object(whole, shown, group=group)
        rank = next(rank for rank in range(world) if whole[rank] != whole[0])
        differ = sorted(set(whole[rank]) ^ set(whole[0])) or ["the order of the keys"]
        raise InvalidPiece(
            f"the state dict of rank {rank} differs from that of rank 0: {'; '.join(differ[:3])}; every rank must pass "
            "the same keys, shapes and placements"
        )
    aliases = common_aliases([(one[3], one[4]) for one in said])
    return Agreed(any(one[2] for one in said), aliases, [one[5] for one in said])


def common_aliases(said: Sequence[tuple[Mapping[str, str], Iterable[str]]]) -> dict[str, str]:
    """The names that share memory, from what each rank says: its aliases, and the names of which it has nothing. Pure.

    Raises:
        InvalidPiece: two names share memory on one rank and have memory of their own on another.

    """
    found: dict[str, str] = {}
    for aliases, _ in said:
        found |= aliases
    for rank, (aliases, hollow) in enumerate(said):
        for name, target in found.items():
            if name not in set(hollow) and aliases.get(name) != target:
                raise InvalidPiece(
                    f"{name} and {target} share memory on some ranks, but not on rank {rank}; tie them on every rank, "
                    "or on none"
                )
    return found


def spreads_of(facts: Facts, aliases: Mapping[str, str], coordinates: Sequence[Sequence[Coordinate]]) -> list[Spread]:
    """How every tensor that is stored lies in the world.

    Args:
        facts: of any rank.
        aliases: names that are not stored.
        coordinates: of every rank, on every mesh.

    Raises:
        InvalidPiece: the ranks do not hold the whole of a tensor.

    """
    layouts: dict[Any, Layout] = {}
    spreads = []
    for name, dtype, shape, placement in facts.tensors:
        if name in aliases:
            continue
        layout = layouts.get((shape, placement))
        if layout is None:
            helds = [_held(shape, placement, mine) for mine in coordinates]
            layout = layouts[shape, placement] = lay_out(name, shape, helds)
        spreads.append(Spread(name, item_bytes(dtype), layout))
    return spreads


def _held(shape: tuple[int, ...], placement: Any, coordinates: Sequence[Coordinate]) -> Held | None:
    if placement is None:
        return held_by(shape, (), (), ())
    number, mesh, cuts = placement
    at = coordinates[number]
    return None if at is None else held_by(shape, mesh, cuts, at)


def exchange(
    spreads: Sequence[Spread],
    local: Mapping[str, memoryview],
    shares: Mapping[str, Sequence[Range]],
    group: dist.ProcessGroup,
) -> dict[str, Share]:
    """Bring every rank the elements of its share that lie with others. A collective of `group`, whose backend must move
    CPU tensors; see `hand_over` for the rest.
    """
    moves = hand_over(spreads, local, shares, dist.get_rank(group), dist.get_world_size(group))
    if any(len(spread.layout.groups) > 1 for spread in spreads):
        _swap(moves, group)
    return moves.shares


def _swap(moves: Moves, group: dist.ProcessGroup) -> None:
    sizes_out = [sum(map(len, views)) for views in moves.out]
    sizes_in = [sum(one.size_bytes for one in places) for places in moves.coming]
    sent, got = (torch.empty(sum(sizes), dtype=torch.uint8) for sizes in (sizes_out, sizes_in))
    data = memoryview(sent.numpy())  # type: ignore[arg-type]
    at = 0
    for view in (view for views in moves.out for view in views):
        data[at : at + len(view)] = view
        at += len(view)
    dist.all_to_all_single(got, sent, sizes_in, sizes_out, group=group)
    data = memoryview(got.numpy())  # type: ignore[arg-type]
    at = 0
    for one in (one for places in moves.coming for one in places):
        one.put(data[at : at + one.size_bytes])
        at += one.size_bytes
