"""Ballots that say which lanes they are of: a vote is read alike whoever has computed which lane."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from elastictrain.engine.vote import Ballot, VoteFormat
from elastictrain.errors import InternalError
from elastictrain.layout import Layout, Shard, deal_lanes
from elastictrain.stragglers.signals import RECORD_BYTES

COUNT, WORKERS = 7, (4, 9, 11)


def layout() -> Layout:
    return Layout(3, WORKERS, deal_lanes(COUNT, [1.0] * 3, "contiguous"), (Shard(0, 3, 4, 9),), COUNT)


def vote(form: VoteFormat, found: list[list[int]], dropped: list[list[int]] | None = None) -> bytes:
    """Lane `i` has the loss 10 i and the weight i + 1. `dropped`: by rank."""
    raws = [
        form.encode(
            Ballot(
                3, 8, 0, 1, 5, 7, tuple((10.0 * lane, lane + 1.0) for lane in own), (2.0,) if rank == 0 else (),
                numbers=tuple(own), lane_s=0.5 * rank, in_vain=rank, signal=bytes([rank]) * RECORD_BYTES,
                dropped=() if dropped is None else tuple(dropped[rank]),
            )
        )
        for rank, own in enumerate(found)
    ]  # fmt: skip
    assert {len(raw) for raw in raws} == {form.size}
    return b"".join(raws)


@settings(max_examples=80)
@given(st.permutations(range(COUNT)), st.lists(st.integers(0, 2), min_size=COUNT, max_size=COUNT))
def test_whoever_has_computed_a_lane_in_whatever_order(order: list[int], ranks: list[int]) -> None:
    found = [[lane for lane in order if ranks[lane] == rank] for rank in range(3)]
    form = VoteFormat(layout(), 1, 0, signals=True, shared=COUNT)
    tally = form.tally(vote(form, found))
    assert tally.losses == tuple(10.0 * lane for lane in range(COUNT))
    assert tally.weights == tuple(lane + 1.0 for lane in range(COUNT))
    assert tally.shares is not None
    assert tally.shares.lanes == tuple(map(tuple, found))
    assert (tally.shares.lane_s, tally.shares.in_vain) == ((0.0, 0.5, 1.0), (0, 1, 2))
    row = tally.shares.row()["taken_over"]
    moved = [(lane, ranks[lane]) for lane in range(COUNT) if lane not in layout().lanes[ranks[lane]]]
    assert row["lanes"] == len(moved) == sum(row["from"].values()) == sum(row["by"].values())
    assert set(row["by"]) == {WORKERS[rank] for _, rank in moved}
    assert row["in_vain"] == 3
    assert form.signals(vote(form, found)) == b"".join(bytes([rank]) * RECORD_BYTES for rank in range(3))


@pytest.mark.parametrize("found", [[[0, 1, 2], [3, 4], [5]], [[0, 1, 2], [3, 4], [4, 5, 6]]])
def test_lanes_that_nobody_has_or_two_have_were_never_agreed_on(found: list[list[int]]) -> None:
    form = VoteFormat(layout(), 1, 0, shared=COUNT)
    with pytest.raises(InternalError, match="which is not each of 7 once"):
        form.tally(vote(form, found))


@settings(max_examples=80)
@given(st.sets(st.integers(0, COUNT - 1), max_size=COUNT - 1))
def test_lanes_that_were_dropped_have_no_part(dropped: set[int]) -> None:
    kept = [[lane for lane in own if lane not in dropped] for own in layout().lanes]
    lost = [[lane for lane in own if lane in dropped] for own in layout().lanes]
    form = VoteFormat(layout(), 1, 0, shared=3, drops=True)
    tally = form.tally(vote(form, kept, lost))
    assert tally.lanes == COUNT - len(dropped)
    assert tally.losses == tuple(0.0 if lane in dropped else 10.0 * lane for lane in range(COUNT))
    assert tally.weight == sum(lane + 1.0 for lane in range(COUNT) if lane not in dropped)
    assert tally.shares is not None
    assert tally.shares.dropped == tuple(sorted(dropped))
    assert tally.shares.row() == {"lanes_dropped": sorted(dropped)}
    if dropped:
        with pytest.raises(InternalError, match="which is not each of 7 once"):
            form.tally(vote(form, kept))
        other = VoteFormat(layout(), 1, 0, shared=3)
        with pytest.raises(InternalError, match="and the job drops none"):
            other.tally(vote(other, kept, lost))


def test_all_lanes_count_where_none_may_be_dropped() -> None:
    form = VoteFormat(layout(), 1, 0, shared=COUNT)
    tally = form.tally(vote(form, [list(own) for own in layout().lanes]))
    assert tally.lanes == COUNT
    assert tally.shares is not None
    assert tally.shares.dropped is None


def test_a_format_without_it_is_as_it_was() -> None:
    form = VoteFormat(layout(), 1, 0)
    assert form.size == 8 * (7 + 2 * 3 + 1)
    assert form.tally(vote(form, [list(own) for own in layout().lanes])).shares is None
