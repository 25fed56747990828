"""When to save: promises kept, conflicts said."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from elastictrain_checkpoint import Cadence, InvalidPiece, Measured


def saved(cadence: Cadence, at_s: float, stall_s: float, durable_s: float) -> None:
    cadence.began(at_s)
    cadence.stalled(stall_s)
    cadence.durable(at_s + durable_s)


def test_the_first_save_is_due_at_once_and_one_is_under_way_at_a_time() -> None:
    cadence = Cadence(0.0, max_overhead=0.01)
    assert cadence.due(0.0)
    cadence.began(1.0)
    assert not cadence.due(1e9)
    cadence.stalled(0.5)
    cadence.stalled(0.5)
    cadence.durable(5.0)
    assert cadence.measured == Measured(1.0, 4.0)
    assert cadence.interval_s == 100.0
    assert not cadence.due(100.9)
    assert cadence.due(101.0)


def test_a_loss_bound_leaves_time_to_become_durable_and_for_a_step() -> None:
    cadence = Cadence(0.0, max_loss=timedelta(seconds=60))
    saved(cadence, 0.0, 1.0, 10.0)
    cadence.stepped(2.0)
    assert cadence.interval_s == 48.0
    assert not cadence.due(47.9)
    assert cadence.due(48.0)
    assert cadence.conflict() is None


def test_the_budget_is_used_where_it_allows_more() -> None:
    cadence = Cadence(0.0, max_overhead=0.1, max_loss=timedelta(minutes=5))
    saved(cadence, 0.0, 1.0, 2.0)
    assert (cadence.interval_s, cadence.conflict()) == (10.0, None)


def test_the_loss_bound_wins_and_says_so() -> None:
    cadence = Cadence(0.0, max_overhead=0.01, max_loss=timedelta(seconds=60))
    saved(cadence, 0.0, 2.0, 10.0)
    assert cadence.interval_s == 50.0
    assert cadence.conflict() == (
        "max_loss of 60.0 s asks for a save every 50.0 s, which costs 4.00% and not 1.00% of the time (max_overhead); "
        "max_loss is kept. Raise one of them"
    )


def test_a_bound_that_cannot_be_kept_is_said() -> None:
    cadence = Cadence(0.0, max_loss=timedelta(seconds=10))
    saved(cadence, 0.0, 2.0, 15.0)
    cadence.stepped(1.0)
    assert cadence.interval_s == 15.0
    assert cadence.due(15.0)
    assert cadence.conflict() == (
        "max_loss of 10.0 s cannot be kept: a save takes 15.0 s until it is durable, the next one begins after that, "
        "and a step takes 1.0 s: 31.0 s in all. Saves follow one another without a pause. Raise max_loss, or store "
        "faster"
    )


def test_a_bound_that_is_longer_than_one_save_may_be_shorter_than_two() -> None:
    cadence = Cadence(0.0, max_loss=timedelta(seconds=30))
    saved(cadence, 0.0, 1.0, 16.0)
    assert "32.0 s in all" in str(cadence.conflict())
    saved(cadence, 20.0, 1.0, 15.0)
    assert cadence.conflict() is None


def test_exposure_is_since_the_state_that_is_durable() -> None:
    cadence = Cadence(100.0, max_overhead=0.5)
    assert cadence.exposure_s(103.0) == 3.0
    cadence.began(110.0)
    assert cadence.exposure_s(115.0) == 15.0
    cadence.durable(116.0)
    assert cadence.exposure_s(117.0) == 7.0
    cadence.durable(118.0)  # nothing was under way
    assert cadence.exposure_s(118.0) == 8.0


def test_a_failed_save_counts_as_cost_and_not_as_safety() -> None:
    cadence = Cadence(0.0, max_overhead=0.1)
    cadence.began(0.0)
    cadence.stalled(3.0)
    cadence.failed()
    assert cadence.exposure_s(20.0) == 20.0
    assert not cadence.due(29.0)
    assert cadence.due(30.0)
    bounded = Cadence(0.0, max_loss=timedelta(seconds=60))
    saved(bounded, 0.0, 1.0, 10.0)
    bounded.began(50.0)
    bounded.failed()
    assert bounded.due(51.0)  # the old one is what counts


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "a cadence needs max_overhead, max_loss or both"),
        ({"max_overhead": 0}, "max_overhead=0: expected a fraction above 0 and at most 1"),
        ({"max_overhead": 1.1}, "max_overhead=1.1: expected a fraction"),
        ({"max_loss": timedelta(0)}, "max_loss=0:00:00: expected a time above 0"),
    ],
)
def test_senseless_limits_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidPiece, match=message):
        Cadence(0.0, **arguments)


costs = st.tuples(st.floats(0.001, 5), st.floats(0, 20))


@given(st.lists(costs, min_size=1, max_size=20), st.floats(0.01, 1), st.floats(0.1, 3))
def test_the_budget_holds_over_any_history(history: list[tuple[float, float]], overhead: float, step_s: float) -> None:
    """Simulated: steps follow one another, each save stalls them; every save is paid for before the next one."""
    cadence, now_s, began_s = Cadence(0.0, max_overhead=overhead), 0.0, []
    for stall_s, durable_s in history:
        while not cadence.due(now_s):
            now_s += step_s
            cadence.stepped(step_s)
        began_s.append(now_s)
        saved(cadence, now_s, stall_s, stall_s + durable_s)
        now_s += stall_s + durable_s
    for (stall_s, _), a, b in zip(history, began_s, began_s[1:], strict=False):
        assert stall_s <= overhead * (b - a) * (1 + 1e-9)


@given(st.floats(0.001, 5), st.floats(0, 20), st.floats(0.1, 3), st.floats(30, 300), st.floats(0.001, 1))
def test_the_loss_bound_holds_when_saves_cost_the_same(
    stall_s: float, flush_s: float, step_s: float, loss_s: float, overhead: float
) -> None:
    cadence = Cadence(0.0, max_overhead=overhead, max_loss=timedelta(seconds=loss_s))
    now_s, worst_s, durable_at = 0.0, 0.0, None
    for _ in range(400):
        if durable_at is not None and now_s >= durable_at:
            worst_s = max(worst_s, cadence.exposure_s(durable_at))
            cadence.durable(durable_at)
            durable_at = None
        if cadence.due(now_s):
            cadence.began(now_s)
            cadence.stalled(stall_s)
            durable_at = now_s + stall_s + flush_s
            now_s += stall_s
        else:
            now_s += step_s
            cadence.stepped(step_s)
    # A timedelta counts in microseconds; the first save has nothing before it to be compared with.
    assert worst_s <= loss_s + 1e-5 or cadence.conflict() is not None
