"""Schedules: closed forms against their replay, and what every schedule obeys."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from elastictrain.planner.model import Cut, Schedule
from elastictrain.planner.schedule import Operation, bubble_share, in_flight, order_of, replay, replayed_s, sends

SCHEDULES: list[tuple[Schedule, int]] = [("1f1b", 1), ("gpipe", 1), ("zb-h1", 1), ("1f1b", 2), ("1f1b", 4)]
sizes = st.tuples(st.integers(2, 6), st.integers(1, 18), st.sampled_from(SCHEDULES))


def shaped(stages: int, count: int, schedule: Schedule, chunks: int) -> Cut:
    if chunks > 1:
        count = -(-count // stages) * stages
    return Cut(pipeline=stages, micro_batches=count, schedule=schedule, chunks=chunks)


@given(size=sizes)
@settings(deadline=None)
def test_equal_stages_take_what_the_closed_form_says(size: tuple[int, int, tuple[Schedule, int]]) -> None:
    stages, count, (schedule, chunks) = size
    assume(schedule != "zb-h1" or count >= stages)
    cut = shaped(stages, count, schedule, chunks)
    share = bubble_share(cut)
    closed = 3.0 * (share * stages + cut.micro_batches - share)
    done = replay([1.0] * stages, [2.0] * stages, cut.micro_batches, schedule=schedule, chunks=chunks)
    assert max(op.end_s for op in done) == pytest.approx(closed)


@given(size=sizes, times=st.lists(st.tuples(st.floats(0.1, 3), st.floats(0.1, 3)), min_size=6, max_size=6))
@settings(deadline=None)
def test_a_replay_does_everything_once_in_order_and_keeps_no_more_than_said(
    size: tuple[int, int, tuple[Schedule, int]], times: list[tuple[float, float]]
) -> None:
    stages, count, (schedule, chunks) = size
    cut = shaped(stages, count, schedule, chunks)
    forward, backward = ([pair[n] for pair in times[:stages]] for n in (0, 1))
    done = replay(forward, backward, cut.micro_batches, send_s=[0.05] * (stages - 1), schedule=schedule, chunks=chunks)
    kinds = 3 if schedule == "zb-h1" else 2
    assert len(done) == len({(op.stage, op.kind, op.micro_batch, op.chunk) for op in done})
    assert len(done) == stages * cut.micro_batches * chunks * kinds
    at = {(op.stage, op.kind, op.micro_batch, op.chunk): op for op in done}
    for (stage, kind, m, chunk), op in at.items():
        if kind == "forward" and stage:
            assert op.begin_s >= at[stage - 1, kind, m, chunk].end_s + 0.05 - 1e-9
        if kind == "forward" and stage == 0 and chunk:
            assert op.begin_s >= at[stages - 1, kind, m, chunk - 1].end_s
        if kind == "backward" and stage < stages - 1:
            assert op.begin_s >= at[stage + 1, kind, m, chunk].end_s + 0.05 - 1e-9
        if kind == "weight":
            assert op.begin_s >= at[stage, "backward", m, chunk].end_s
    for stage in range(stages):
        mine = sorted((op for op in done if op.stage == stage), key=lambda op: op.begin_s)
        assert all(a.end_s <= b.begin_s + 1e-9 for a, b in pairwise(mine))
        assert kept_at_most(mine, schedule) / chunks == pytest.approx(in_flight(cut, stage))
    worst = max(f + b for f, b in zip(forward, backward, strict=True))
    assert max(op.end_s for op in done) >= cut.micro_batches * worst - 1e-9


def kept_at_most(mine: list[Operation], schedule: Schedule) -> int:
    last = "weight" if schedule == "zb-h1" else "backward"
    now = most = 0
    for op in mine:
        now += op.kind == "forward"
        most = max(most, now)
        now -= op.kind == last
    return most


@given(
    size=st.tuples(st.integers(2, 4), st.sampled_from(SCHEDULES)),
    times=st.lists(st.tuples(st.floats(0.5, 2), st.floats(0.5, 2)), min_size=4, max_size=4),
)
@settings(deadline=None, max_examples=15)
def test_many_micro_batches_are_foreseen_from_the_first(
    size: tuple[int, tuple[Schedule, int]], times: list[tuple[float, float]]
) -> None:
    stages, (schedule, chunks) = size
    cut = shaped(stages, 24 * stages, schedule, chunks)
    forward, backward = ([pair[n] for pair in times[:stages]] for n in (0, 1))
    send = [0.1] * (stages - 1)
    done = replay(forward, backward, cut.micro_batches, send_s=send, wrap_s=0.1, schedule=schedule, chunks=chunks)
    found = replayed_s(forward, backward, cut, send_s=send, wrap_s=0.1)
    assert found == pytest.approx(max(op.end_s for op in done), rel=0.02)


@given(
    size=sizes,
    times=st.lists(st.tuples(st.floats(0.1, 4), st.floats(0.1, 4), st.floats(0, 1)), min_size=6, max_size=6),
    wrap=st.floats(0, 1),
)
@settings(deadline=None, max_examples=60)
def test_whatever_crosses_a_border_is_sent_once_and_there_in_time(
    size: tuple[int, int, tuple[Schedule, int]], times: list[tuple[float, float, float]], wrap: float
) -> None:
    stages, count, (schedule, chunks) = size
    cut = shaped(stages, count, schedule, chunks)
    forward, backward, send = ([one[n] for one in times[:stages]] for n in (0, 1, 2))
    done = replay(forward, backward, cut.micro_batches, send_s=send[1:], wrap_s=wrap, schedule=schedule, chunks=chunks)
    sent = sends(done, send_s=send[1:], wrap_s=wrap, chunks=chunks)
    assert len(sent) == 2 * (stages * chunks - 1) * cut.micro_batches
    ends = {(op.stage, op.kind, op.micro_batch, op.end_s) for op in done}
    for one in sent:
        assert (one.sender, one.kind, one.micro_batch, one.begin_s) in ends
        way = [*send[1:], wrap][(one.sender if one.kind == "forward" else one.receiver) % stages]
        assert one.end_s == pytest.approx(one.begin_s + way)
        assert (one.receiver - one.sender) % stages == (1 if one.kind == "forward" else stages - 1) % stages
        theirs = [op for op in done if (op.stage, op.kind, op.micro_batch) == (one.receiver, one.kind, one.micro_batch)]
        assert any(op.begin_s >= one.end_s - 1e-9 for op in theirs)


def test_interleaving_wants_a_multiple_of_the_stages() -> None:
    with pytest.raises(ValueError, match=r"^5 micro-batches: interleaving over 2 stages wants a multiple of those$"):
        replay([1.0, 1.0], [1.0, 1.0], 5, chunks=2)


def test_the_order_of_zb_h1_for_two_stages() -> None:
    short = {"forward": "f", "backward": "b", "weight": "w"}
    said = [
        " ".join(f"{short[kind]}{m}" for kind, m, _ in order_of("zb-h1", stage, 2, 3)) for stage in range(2)
    ]  # fmt: skip
    assert said == ["f0 f1 b0 w0 f2 b1 w1 b2 w2", "f0 b0 f1 b1 w0 f2 b2 w1 w2"]
