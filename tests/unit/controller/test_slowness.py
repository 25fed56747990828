"""What is done about what the watch says, and what is not: words that have piled up are no reason to act."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from elastictrain.controller import events as ev
from elastictrain.controller.facts import StragglerSpec
from elastictrain.controller.slowness import FRESH_S, FRESH_STEPS, SETTLE_STEPS, Freshness, Slowness
from elastictrain.protocol import StepSignals
from elastictrain.stragglers.signals import Signal
from tests.unit.controller.scene import Scene

OLD = FRESH_S + 1.0


def said(step: int, factors: tuple[float, ...] = (1.0, 1.0, 1.0), *, generation: int = 1, age_s: float = 0.0) -> Any:
    """Three workers with three, three and two lanes of 0.1 s."""
    raw = b"".join(
        Signal(lanes, 0.1 * lanes * factor, arrive_s=0.1 * lanes * factor, exchange_s=0.01).encode()
        for lanes, factor in zip((3, 3, 2), factors, strict=True)
    )
    return StepSignals(generation, step, raw, age_s)


def watched() -> tuple[Scene, Slowness]:
    scene = Scene(steps=100_000, stragglers=StragglerSpec(moves=True)).run()
    return scene, Slowness(scene.machine, StragglerSpec(moves=True))


def hear(slowness: Slowness, signals: Iterable[StepSignals], newest: int = 0) -> list[Any]:
    """The steps and splits that are proposed."""
    events = [slowness.hear(one, newest)[1] for one in signals]
    return [(event.step, event.lanes) for event in events if isinstance(event, ev.LanesProposed)]


def test_a_slow_worker_that_is_slow_now_loses_lanes() -> None:
    _, slowness = watched()
    assert hear(slowness, (said(step) for step in range(1, 20))) == []
    (step, lanes), *_ = hear(slowness, (said(step, (1.0, 3.0, 1.0)) for step in range(20, 30)))
    assert step == 22
    assert lanes[1] == 1


def test_a_controller_that_comes_back_does_not_act_on_what_has_piled_up() -> None:
    """Worker 1 was slow while nobody listened, and is fast again: its lanes stay, although it is told."""
    _, slowness = watched()
    backlog = [said(step, (1.0, 3.0 if 20 <= step < 60 else 1.0, 1.0), age_s=OLD) for step in range(1, 100)]
    told = [one.data for signals in backlog for one in slowness.hear(signals, 100)[0]]
    assert [(one["what"], one["worker"]) for one in told] == [("slow", 1), ("recovered", 1)]
    assert hear(slowness, (said(step) for step in range(100, 140))) == []


def test_what_was_slow_when_the_last_word_was_kept_may_be_fast_by_now() -> None:
    """An outbox keeps the first steps of a long absence and not the last ones."""
    _, slowness = watched()
    assert hear(slowness, (said(step, (1.0, 3.0, 1.0) if step > 20 else (1.0,) * 3, age_s=OLD)
                           for step in range(1, 80)), newest=5000) == []  # fmt: skip
    assert hear(slowness, (said(step) for step in range(5001, 5040))) == []


def test_who_is_still_slow_when_a_controller_is_back_loses_lanes_a_few_steps_later() -> None:
    _, slowness = watched()
    slow = (1.0, 3.0, 1.0)
    assert hear(slowness, (said(step, slow if step > 20 else (1.0,) * 3, age_s=OLD) for step in range(1, 80)), 80) == []
    (step, lanes), *_ = hear(slowness, (said(step, slow) for step in range(80, 120)))
    assert step == 80 - FRESH_STEPS + SETTLE_STEPS - 1
    assert lanes[1] == 1


def test_many_steps_in_one_poll_are_no_backlog_nor_are_few_long_ones() -> None:
    for newest, age_s in ((1000, FRESH_S / 2), (FRESH_STEPS, 1000.0)):
        freshness = Freshness()
        assert all(freshness.may_act(said(step, age_s=age_s), newest) for step in range(1, 10))


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from([0, 1, 1, 1, 1, 2, 30]), st.sampled_from([0, 0, 0, 40]), st.booleans()),
             max_size=60),
    st.integers(0, 60),
)  # fmt: skip
def test_nothing_is_done_within_ten_steps_of_anything_old(script: list[tuple[int, int, bool]], turn: int) -> None:
    """Steps that are repeated, missing, or were said long ago, in any order; another generation begins at once."""
    freshness, step, since, generation = Freshness(), 0, SETTLE_STEPS, 1
    for at, (ahead, newer, old) in enumerate(script):
        generation += at == turn
        stale = newer > FRESH_STEPS and old
        first = at in (0, turn)
        may = freshness.may_act(said(step + ahead, generation=generation, age_s=OLD if old else 0.0),
                                step + ahead + newer)  # fmt: skip
        if ahead == 0 and not first:
            assert not may, "heard already"
            continue
        if stale or (ahead > 1 and not first):
            since = 0
        else:
            since += 1
        step += ahead
        assert may == (since >= SETTLE_STEPS)


@pytest.mark.parametrize("moves", [True, False])
def test_who_only_watches_does_nothing(moves: bool) -> None:
    scene, _ = watched()
    slowness = Slowness(scene.machine, StragglerSpec(moves=moves))
    proposed = hear(slowness, (said(step, (1.0, 3.0 if step > 19 else 1.0, 1.0)) for step in range(1, 40)))
    assert bool(proposed) == moves


def test_lanes_that_no_split_has_are_not_believed() -> None:
    """The controller knows what it has dealt out, before and after it has moved lanes."""
    _, slowness = watched()
    raw = Signal(40, 0.3, arrive_s=0.3, exchange_s=0.01).encode()
    wrong = [StepSignals(1, step, raw + said(step).records[len(raw) :]) for step in range(1, 5)]
    told = [one.data for signals in wrong for one in slowness.hear(signals)[0]]
    assert [(one["what"], one["worker"]) for one in told] == [("nonsense", 0)]
    assert told[0]["reason"].startswith("reports lanes or times that cannot be true ({'lanes': 40,")

    scene, slowness = watched()
    hear(slowness, (said(step) for step in range(1, 20)))
    speeds = tuple((worker, 1.0) for worker in range(3))
    scene.send(ev.LanesProposed(0.0, 1, 20, (2, 4, 2), speeds, "move_lanes", "", 1.0, 0.5))
    assert scene.machine.core.ledger.lane_offers == ((2, 4, 2),)
    for lanes in ((3, 3, 2), (2, 4, 2)):  # before and after they have heard of it
        raw = b"".join(Signal(own, 0.1 * own, arrive_s=0.1 * own, exchange_s=0.01).encode() for own in lanes)
        said_now = [slowness.hear(StepSignals(1, 20 + step + 10 * lanes[0], raw))[0] for step in range(9)]
        assert said_now == [[]] * 9
