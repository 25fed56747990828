"""What each process of a mesh holds, against torch's own way to cut tensors; and what the processes hand each other: it
makes every tensor whole, stored once, wherever it lies.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.placement_types import _StridedShard

from elastictrain_checkpoint import InvalidPiece, hashing, shares
from elastictrain_checkpoint.layouts import Cut, Held, boxes_of, held_by, lay_out, local_shape, runs_of
from elastictrain_checkpoint.shares import Spread, hand_over, plan_shares

GRID = hashing.DIGEST_BLOCK_ELEMENTS
Cuts = tuple[Cut | None, ...]


@st.composite
def placed(draw: st.DrawFn, most: int = 9) -> tuple[tuple[int, ...], tuple[int, ...], Cuts]:
    """A shape, a mesh, and what its axes do."""
    shape = tuple(draw(st.lists(st.integers(0, most), min_size=0, max_size=3)))
    mesh = tuple(draw(st.lists(st.integers(1, 3), min_size=1, max_size=3)))
    one = st.none()
    if shape:
        one |= st.builds(Cut, st.integers(0, len(shape) - 1), st.integers(1, 4))
    return shape, mesh, tuple(draw(one) for _ in mesh)


def coordinates(mesh: Sequence[int]) -> list[tuple[int, ...]]:
    return list(itertools.product(*map(range, mesh)))


def placement(cut: Cut | None) -> Any:
    if cut is None:
        return Replicate()
    return Shard(cut.dim) if cut.pieces == 1 else _StridedShard(cut.dim, split_factor=cut.pieces)


def cut_by_torch(whole: torch.Tensor, mesh: Sequence[int], cuts: Cuts, at: Sequence[int]) -> torch.Tensor:
    """As `distribute_tensor` does it: axis by axis, from the left."""
    local = whole
    for length, cut, number in zip(mesh, cuts, at, strict=True):
        if cut is not None:
            local = placement(cut)._split_tensor(local, length, with_padding=False)[0][number]
    return local


@given(placed())
@example(((9,), (4, 2), (Cut(0, 2), Cut(0))))
@example(((5, 3), (2, 2), (Cut(0), Cut(0))))
def test_everybody_holds_what_torch_gives_it(case: tuple[tuple[int, ...], tuple[int, ...], Cuts]) -> None:
    shape, mesh, cuts = case
    whole = torch.arange(math.prod(shape)).reshape(shape)
    for at in coordinates(mesh):
        held, local = held_by(shape, mesh, cuts, at), cut_by_torch(whole, mesh, cuts, at)
        assert local_shape(held) == tuple(local.shape)
        assert all(low < high for intervals in held for low, high in intervals)
        assert all(a[1] < b[0] for intervals in held for a, b in itertools.pairwise(intervals))
        found = torch.full_like(local, -1)
        for (offsets, sizes), place in boxes_of(held):
            found[place] = whole[tuple(slice(o, o + n) for o, n in zip(offsets, sizes, strict=True))]
        assert torch.equal(found, local)
        if local.numel():
            runs = runs_of(shape, held)
            flat = [r for s, n in zip(runs.starts, np.diff(runs.bounds), strict=True) for r in range(s, s + n)]
            assert flat == local.flatten().tolist()
            for low, high in ((0, whole.numel()), (whole.numel() // 3, whole.numel() // 2), (1, 1)):
                first, last = runs.between(low, high)
                assert flat[first:last] == [place for place in flat if low <= place < high]
                follow = next((n for n in itertools.count() if low + n >= high or low + n not in flat), 0)
                assert runs.from_place(low, high) == follow


@given(placed(), st.integers(1, 4), st.data())
def test_what_one_holds_is_put_where_it_belongs(
    case: tuple[tuple[int, ...], tuple[int, ...], Cuts], item: int, data: st.DataObject
) -> None:
    shape, mesh, cuts = case
    held = held_by(shape, mesh, cuts, data.draw(st.sampled_from(coordinates(mesh))))
    if not all(held) or not math.prod(shape):
        return
    runs = runs_of(shape, held)
    count = int(runs.bounds[-1])
    first = data.draw(st.integers(0, count - 1))
    last = data.draw(st.integers(first + 1, count))
    flat = np.concatenate([np.arange(s, s + n) for s, n in zip(runs.starts, np.diff(runs.bounds), strict=True)])
    base = data.draw(st.integers(0, int(flat[first])))
    size = data.draw(st.integers(int(flat[last - 1]) + 1 - base, math.prod(shape) - base))
    local = np.random.default_rng(0).integers(1, 256, count * item, dtype=np.uint8).reshape(count, item)
    out = np.zeros((size, item), dtype=np.uint8)
    runs.put(first, last, local[first:last].reshape(-1).data, out.reshape(-1).data, base, item)
    expected = np.zeros_like(out)
    expected[flat[first:last] - base] = local[first:last]
    assert np.array_equal(out, expected)


@given(
    st.lists(placed(most=40), min_size=1, max_size=4),
    st.lists(st.integers(1, 3), min_size=1, max_size=3),
    st.integers(1, 4),
    st.sampled_from([1, 64, 4096]),
    st.data(),
)
def test_shares_are_whole_stored_once_and_on_the_grid(
    cases: list[tuple[tuple[int, ...], tuple[int, ...], Cuts]],
    mesh: list[int],
    item: int,
    split_bytes: int,
    data: st.DataObject,
) -> None:
    """All ranks play their part, on a small grid so that shares have many ends."""
    ranks = data.draw(st.permutations(coordinates(mesh)))
    world = len(ranks)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shares, "DIGEST_BLOCK_ELEMENTS", 8)
        patch.setattr(shares, "SPLIT_BYTES", split_bytes)
        spreads, wholes, locals_ = [], {}, [dict[str, memoryview]() for _ in ranks]
        for number, (shape, _, drawn) in enumerate(cases):
            cuts = (*drawn, None, None, None)[: len(mesh)]
            name = f"t{number}"
            whole = np.random.default_rng(number).integers(0, 256, (*shape, item), dtype=np.uint8)
            helds = [held_by(shape, mesh, cuts, at) for at in ranks]
            spreads.append(Spread(name, item, lay_out(name, shape, helds)))
            wholes[name] = whole
            for rank, held in enumerate(helds):
                locals_[rank][name] = memoryview(_taken(whole, held).tobytes())
        plan = plan_shares(spreads, world)
        moves = [hand_over(spreads, locals_[rank], plan, rank, world) for rank in range(world)]
        for receiver in range(world):
            for sender in range(world):
                out, coming = moves[sender].out[receiver], moves[receiver].coming[sender]
                assert [len(view) for view in out] == [one.size_bytes for one in coming]
                assert not out or sender != receiver
                for view, one in zip(out, coming, strict=True):
                    one.put(view)
        for spread in spreads:
            stored = [(one[0], one[1], rank) for rank, one in enumerate(plan[spread.name]) if one[0] < one[1]]
            count, flat = math.prod(spread.layout.shape), wholes[spread.name].tobytes()
            at = 0
            for start, stop, rank in sorted(stored):
                assert start == at
                assert stop % 8 == 0 or stop == count
                at = stop
                share = moves[rank].shares[spread.name]
                assert len(share.live) % (8 * item) == 0 or not share.own
                assert share.start == start
                assert bytes(share.live) + bytes(share.own) == flat[start * item : stop * item]
            assert at == count


def _taken(whole: np.ndarray, held: Held) -> np.ndarray:
    for axis, intervals in enumerate(held):
        index = [i for low, high in intervals for i in range(low, high)]
        whole = np.take(whole, np.array(index, dtype=np.int64), axis=axis)
    return np.ascontiguousarray(whole)


MESH = (2, 2)


def spread_of(shape: tuple[int, ...], cuts: Cuts, mesh: tuple[int, ...] = MESH) -> Spread:
    return Spread("w", 4, lay_out("w", shape, [held_by(shape, mesh, cuts, at) for at in coordinates(mesh)]))


def live_share(spread: Spread, rank: int) -> float:
    """The part of a rank's share that stays where it is."""
    world = len(spread.layout.of)
    group = spread.layout.groups[spread.layout.of[rank] or 0]
    local = memoryview(bytes(int(group.runs.bounds[-1]) * 4))
    share = hand_over([spread], {"w": local}, plan_shares([spread], world), rank, world).shares["w"]
    return len(share.live) / max(1, len(share.live) + len(share.own))


@pytest.mark.parametrize(
    ("cuts", "live"),
    [
        ((None, None), 1.0),
        ((None, Cut(0)), 0.99),
        ((Cut(0), None), 0.99),
        ((Cut(0), Cut(0)), 0.99),
        ((Cut(0, 2), Cut(0)), 0.99),
        ((Cut(0), Cut(1)), 0.0),
        ((None, Cut(1)), 0.0),
    ],
)
def test_all_ranks_write_alike_and_move_only_what_they_must(cuts: Cuts, live: float) -> None:
    spread = spread_of((1000, 4100), cuts)
    sizes = [stop - start for start, stop in plan_shares([spread], 4)["w"]]
    assert max(sizes) - min(sizes) <= 2 * GRID
    assert all(live_share(spread, rank) >= live for rank in range(4))


def test_replicas_hand_on_alike() -> None:
    """Two replicas of columns: every rank gets half of its quarter from the other columns, and hands on as much."""
    spread = spread_of((512, 4096), (None, Cut(1)))
    plan = plan_shares([spread], 4)
    sent = [
        [(other, last - first) for other, first, last in shares.outgoing(spread.layout, plan["w"], r)] for r in range(4)
    ]
    assert [sum(size for _, size in one) for one in sent] == [512 * 4096 // 8] * 4


def test_small_tensors_go_to_who_has_them_and_are_spread_over_all() -> None:
    cuts: Cuts = (None, None)
    spreads = [Spread(f"w{i}", 4, spread_of((10, 10), cuts).layout) for i in range(40)]
    plan = plan_shares(spreads, 4)
    assert [sum(stop > start for start, stop in (plan[s.name][r] for s in spreads)) for r in range(4)] == [10] * 4


def test_ranks_that_have_not_all_are_refused() -> None:
    with pytest.raises(InvalidPiece) as refused:
        lay_out("w", (8, 4), [held_by((8, 4), (4,), (Cut(0),), (at,)) for at in (0, 1, 3)] + [None])
    assert str(refused.value) == (
        "w: the 4 ranks that save hold 24 of 32 elements between them; the group that saves must have all ranks of the "
        "mesh that the tensor is placed on"
    )
