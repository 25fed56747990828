"""The vote says the same whatever the layout, byte for byte where the bits count."""

from __future__ import annotations

import math
import struct
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from elastictrain.engine.verdict import Claims
from elastictrain.engine.vote import Ballot, Tally, VoteFormat, gradient_scale, norm_roots, root_sums
from elastictrain.errors import InternalError
from elastictrain.layout import Layout, Shard
from elastictrain.stragglers.signals import RECORD_BYTES
from elastictrain.tree import Node, finish, whole


@st.composite
def layouts(draw: st.DrawFn, lanes: int, blocks: int) -> Layout:
    """Any number of workers; some own nothing, some own several shards that do not touch, some have no lane."""
    world = draw(st.integers(1, 5))
    workers = tuple(draw(st.permutations(range(10, 10 + world))))
    lane_owner = draw(st.lists(st.integers(0, world - 1), min_size=lanes, max_size=lanes))
    dealt = tuple(tuple(i for i in range(lanes) if lane_owner[i] == r) for r in range(world))
    borders = sorted(draw(st.sets(st.integers(1, max(1, blocks - 1)), max_size=7)) - {blocks})
    edges = [0, *borders, blocks]
    owners = [draw(st.sampled_from(workers)) for _ in edges[1:]]
    shards = tuple(Shard(lo, hi, owner, None) for lo, hi, owner in zip(edges[:-1], edges[1:], owners, strict=True))
    return Layout(3, workers, dealt, shards, lanes)


def ballots(layout: Layout, active: int, squares: dict[int, float], lanes: list[tuple[float, float]]) -> list[Ballot]:
    found = []
    for rank, worker in enumerate(layout.workers):
        mine = {b for s in layout.owned(worker) for b in range(s.lo, min(s.hi, active))}
        found.append(
            Ballot(
                generation=3,
                step=8,
                flags=1 << rank,
                plan=7 + rank,
                counter_hash=2**63 - 1,
                tokens=100 + rank,
                lanes=tuple(lanes[i] for i in layout.lanes[rank]),
                norms=root_sums(norm_roots(layout, worker, active), {b: squares[b] for b in mine}),
                largest=(rank, -5 * rank),
                samples_hash=(1 << 64) - 1 - rank,
            )
        )
    return found


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_round_trip_for_any_layout_and_the_same_norm_bits_for_all_of_them(data: st.DataObject) -> None:
    blocks = data.draw(st.integers(1, 40))
    active = data.draw(st.integers(1, blocks))
    count = data.draw(st.integers(1, 9))
    layout = data.draw(layouts(count, blocks))
    number = st.floats(-1e6, 1e6)
    lanes = data.draw(st.lists(st.tuples(number, st.floats(0.5, 99)), min_size=count, max_size=count))
    squares = dict(enumerate(data.draw(st.lists(st.floats(0, 1e12), min_size=active, max_size=active))))
    form = VoteFormat(layout, active, 2)
    payloads = [form.encode(ballot) for ballot in ballots(layout, active, squares, lanes)]
    assert {len(raw) for raw in payloads} == {form.size}
    tally = form.tally(b"".join(payloads))
    assert (tally.step, tally.flags) == (8, (1 << layout.world_size) - 1)
    assert tally.plan == (7 if layout.world_size == 1 else None)
    assert tally.losses == tuple(loss for loss, _ in lanes)
    assert tally.weights == tuple(weight for _, weight in lanes)
    assert tally.tokens == sum(100 + r for r in range(layout.world_size))
    assert tally.counters_agree
    assert tally.largest == (layout.world_size - 1, 0)
    assert tally.samples_hash == sum((1 << 64) - 1 - rank for rank in range(layout.world_size)) % (1 << 64)
    leaves = {Node(b, b + 1): value for b, value in squares.items()}
    assert tally.norm == math.sqrt(finish(leaves, lambda a, b: a + b, whole(active)))


def vote(world: int = 2, **changes: object) -> tuple[VoteFormat, list[Ballot]]:
    """Two workers, three lanes, four blocks, and nothing special in the vote."""
    shards = (Shard(0, 1, 0, None), Shard(1, 4, 1, None)) if world == 2 else (Shard(0, 4, 0, None),)
    lanes = ((0, 1), (2,)) if world == 2 else ((0, 1, 2),)
    layout = Layout(3, tuple(range(world)), lanes, shards, 3)
    plain = ballots(layout, 4, {0: 1.0, 1: 4.0, 2: 9.0, 3: 2.0}, [(1.0, 2.0), (3.0, 4.0), (5.0, 6.0)])
    return VoteFormat(layout, 4, 2), plain


def tally_with(rank: int, **changes: object) -> Tally:
    form, plain = vote()
    parts = [{name: getattr(b, name) for name in Ballot.__slots__} for b in plain]
    parts[rank] |= changes
    return form.tally(b"".join(form.encode(Ballot(**part)) for part in parts))


def test_a_plain_vote() -> None:
    tally = tally_with(0)
    assert tally.norm == 4.0
    assert tally.weight == 12.0
    assert tally.loss == 9.0 / 12.0
    assert tally.bad_lanes == ()
    assert tally.is_finite


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_lane_that_is_not_finite_is_named(bad: float) -> None:
    tally = tally_with(0, lanes=((1.0, 2.0), (bad, 4.0)))
    assert tally.bad_lanes == (1,)
    assert math.isnan(tally.loss)
    assert not tally.is_finite
    assert tally_with(1, lanes=((5.0, bad),)).bad_lanes == (2,)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_is_seen_although_every_loss_is(bad: float) -> None:
    tally = tally_with(1, norms=(bad, 1.0))
    assert tally.bad_lanes == ()
    assert not tally.is_finite


def test_no_weight_at_all_is_no_step() -> None:
    form, plain = vote()
    none = [
        Ballot(**{n: getattr(b, n) for n in Ballot.__slots__} | {"lanes": tuple((0.0, 0.0) for _ in b.lanes)})
        for b in plain
    ]
    tally = form.tally(b"".join(map(form.encode, none)))
    assert tally.weight == 0
    assert math.isnan(tally.loss)
    assert not tally.is_finite


def test_flags_are_united_and_a_plan_counts_only_when_all_name_it() -> None:
    tally = tally_with(1, flags=6, plan=2)
    assert tally.flags == 7
    assert tally.plan is None, "7 and 2: not even the older one is everybody's"
    assert tally_with(1, plan=7).plan == 7
    assert tally_with(1, plan=2**63 - 1).plan is None


def test_signals_travel_beside_all_else_and_change_nothing_of_it() -> None:
    layout = Layout(3, (10, 11), ((0, 1), (2,)), (Shard(0, 2, 10, 11), Shard(2, 4, 11, 10)), 3)
    plain = ballots(layout, 4, dict.fromkeys(range(4), 4.0), [(1.0, 2.0)] * 3)
    records = [bytes([rank + 1]) * RECORD_BYTES for rank in range(2)]
    claims = Claims(True, 5, {0: 1, 2: 2}, {0: 3, 2: 4})
    for with_claims in (False, True):
        form = VoteFormat(layout, 4, 2, claims=with_claims, signals=True)
        without = VoteFormat(layout, 4, 2, claims=with_claims)
        told = [replace(b, signal=raw, claims=claims) for b, raw in zip(plain, records, strict=True)]
        result = b"".join(map(form.encode, told))
        assert form.size == without.size + RECORD_BYTES == len(result) // 2
        assert form.signals(result) == b"".join(records)
        bare = b"".join(map(without.encode, told))
        assert without.signals(bare) == b""
        assert form.tally(result) == without.tally(bare)
        assert form.claims(result) == without.claims(bare)
        short = form.encode(replace(told[0], signal=b"x"))
        assert len(short) == form.size, "whatever is said has its fixed room"
        assert len(form.encode(replace(told[0], signal=b"x" * 1000))) == form.size


def test_counters_that_differ_are_seen() -> None:
    assert not tally_with(1, counter_hash=5).counters_agree


@pytest.mark.parametrize("change", [{"step": 9}, {"generation": 4}])
def test_parts_of_different_votes_are_never_one(change: dict[str, int]) -> None:
    with pytest.raises(InternalError, match=r"^a vote mixes \(generation, step\) \["):
        tally_with(1, **change)


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_the_norm_is_that_of_torch_and_clips_as_torch_does(data: st.DataObject) -> None:
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 1000)))
    sizes = data.draw(st.lists(st.integers(1, 5000), min_size=1, max_size=9))
    params = [torch.nn.Parameter(torch.zeros(n, dtype=torch.float64)) for n in sizes]
    scale = 10.0 ** data.draw(st.integers(-4, 3))
    for p in params:
        p.grad = (torch.randn(p.shape, generator=generator) * scale).double()
    summed = [p.grad.clone() for p in params if p.grad is not None]
    squares = {b: float(g.square().sum()) for b, g in enumerate(summed)}
    layout = data.draw(layouts(1, len(sizes)))
    form = VoteFormat(layout, len(sizes), 2)
    weight = data.draw(st.floats(0.5, 20))
    tally = form.tally(b"".join(form.encode(b) for b in ballots(layout, len(sizes), squares, [(1.0, weight)])))
    for p, g in zip(params, summed, strict=True):
        p.grad = g / weight
    clip = data.draw(st.sampled_from([1e-3, 1.0, 1e6]))
    norm = torch.nn.utils.clip_grad_norm_(params, clip)
    assert tally.norm / tally.weight == pytest.approx(float(norm), rel=1e-12)
    for p, g in zip(params, summed, strict=True):
        torch.testing.assert_close(g * gradient_scale(tally, clip), p.grad, rtol=1e-9, atol=0)
        torch.testing.assert_close(g * gradient_scale(tally, None), g / weight, rtol=1e-12, atol=0)


def test_a_payload_is_a_plain_run_of_eight_byte_numbers() -> None:
    form, plain = vote()
    raw = form.encode(plain[1])
    assert struct.unpack("<9q", raw[:72]) == (3, 8, 2, 8, 2**63 - 1, 101, -2, 1, -5)
    # one lane of at most two, then the norms: blocks 1, and 2 with 3
    assert struct.unpack("<6d", raw[72:]) == (5.0, 6.0, 0.0, 0.0, 4.0, 11.0)
