"""What a run would have been: against steps whose truth is known."""

from __future__ import annotations

from random import Random
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from elastictrain.errors import ConfigError
from elastictrain.stragglers.whatif import Against, Answer, timings_of, what_if, work_of
from tests.support.signals import records

STEPS = 40
REST_S = 0.01 + 0.05 + 0.005
"""Host, transfer and vote of `records`."""


def answer(steps: list[Any], workers: Any = None, against: Against = "peers") -> Answer:
    numbered = [(n + 1, workers or tuple(range(len(record))), record) for n, record in enumerate(steps)]
    timings, left_out = timings_of(numbered, excused=0b1011)
    return what_if(timings, left_out=left_out, against=against)


def test_one_slow_worker_costs_what_it_is_slower() -> None:
    found = answer([records([1.0, 1.0, 2.0, 1.0])] * STEPS)
    assert found.actual_s == pytest.approx(STEPS * (2 + REST_S))
    assert found.healthy_s == pytest.approx(STEPS * (1 + REST_S))
    (cost,) = found.costs
    assert cost.worker == 2
    assert cost.without_s == pytest.approx(STEPS * 1.0)
    assert cost.alone_s == pytest.approx(STEPS * 1.0)
    assert [cause for cause, _ in cost.causes] == ["compute"]
    assert cost.causes[0][1] == pytest.approx(STEPS * 1.0)
    assert cost.steps == STEPS
    assert found.slowness[0] == pytest.approx([1, 1, 2.01 / 1.01, 1])


def test_of_two_slow_workers_the_second_hides_behind_the_first() -> None:
    found = answer([records([1.0, 1.5, 2.0, 1.0, 1.0])] * STEPS)
    first, second = found.costs
    assert (first.worker, second.worker) == (2, 1)
    assert first.without_s == pytest.approx(STEPS * 0.5)  # then the other one is the last
    assert first.alone_s == pytest.approx(STEPS * 1.0)
    assert second.without_s == pytest.approx(0)
    assert second.alone_s == pytest.approx(STEPS * 0.5)


def test_of_two_workers_the_quicker_one_is_healthy() -> None:
    found = answer([records([1.0, 2.0])] * STEPS)
    assert found.slowdown == pytest.approx((2 + REST_S) / (1 + REST_S))
    assert [cost.worker for cost in found.costs] == [1]


def test_alike_workers_with_a_little_noise_lose_nothing() -> None:
    random = Random(3)
    found = answer([records([random.uniform(0.99, 1.01) for _ in range(6)]) for _ in range(STEPS)])
    assert found.slowdown == pytest.approx(1, abs=1e-6)  # records are in f32
    assert found.costs == ()


def test_causes_are_told_apart() -> None:
    slow_data = records([1.0] * 4, data_s=[0.0, 0.5, 0.0, 0.0])
    held_up = records([1.0] * 4, host_s=[0.01, 0.01, 0.4, 0.01])
    collected = records([1.0, 1.0, 1.0, 1.6], collected_s=[0.0, 0.0, 0.0, 0.6])
    for record, worker, cause, seconds in (
        (slow_data, 1, "data", 0.5), (held_up, 2, "host", 0.39), (collected, 3, "collector", 0.6),
    ):  # fmt: skip
        found = answer([record] * STEPS)
        (cost,) = found.costs
        assert cost.worker == worker
        assert cost.causes == ((cause, pytest.approx(STEPS * seconds)),)
        assert found.actual_s - found.healthy_s == pytest.approx(STEPS * seconds)


def test_a_single_long_step_is_a_hiccup_and_not_a_slow_worker() -> None:
    steps = [records([1.0, 1.0, 1.0]) for _ in range(STEPS)]
    steps[20] = records([1.0, 3.0, 1.0])
    (cost,) = answer(steps).costs
    assert cost.worker == 1
    assert cost.causes == (("hiccup", pytest.approx(2.0)),)
    assert cost.steps == 1


def test_a_slow_stretch_costs_only_its_steps() -> None:
    steps = [records([1.0, 1.0, 1.0, 2.0 if 10 <= n < 30 else 1.0]) for n in range(STEPS)]
    found = answer(steps)
    assert found.actual_s - found.healthy_s == pytest.approx(20, rel=1e-6)
    assert found.costs[0].steps == 20


def test_more_lanes_are_no_slowness_but_uneven_work() -> None:
    found = answer([records([2.0, 1.0, 1.0], lanes=[8, 4, 4])] * STEPS)
    assert found.costs == ()
    assert found.slowdown == pytest.approx(1)
    assert found.healthy_s - found.even_s == pytest.approx(STEPS * (2 - 4 / 3))


def test_long_sequences_are_no_slowness() -> None:
    random = Random(5)
    steps = []
    for _ in range(STEPS):
        lengths = [[random.uniform(100, 2000) for _ in range(4)] for _ in range(4)]
        tokens = [sum(worker) for worker in lengths]
        squares = [sum(length**2 for length in worker) for worker in lengths]
        compute = [1e-4 * t + 1e-7 * s for t, s in zip(tokens, squares, strict=True)]
        compute[2] *= 1.5
        steps.append(records(compute, tokens=tokens, squares=squares))
    found = answer(steps)
    assert [cost.worker for cost in found.costs if cost.without_s > 0.01 * found.actual_s] == [2]
    assert np.nanmedian(found.slowness[:, [0, 1, 3]]) == pytest.approx(1, abs=0.01)
    assert np.nanmedian(found.slowness[:, 2]) == pytest.approx(1.5, rel=0.05)


def test_slow_transfers_are_nobodys() -> None:
    steps = [records([1.0] * 3, transfer_s=0.35 if n % 10 == 0 else 0.05) for n in range(STEPS)]
    found = answer(steps)
    assert found.link_s == pytest.approx(4 * 0.3)
    assert found.actual_s - found.healthy_s == pytest.approx(4 * 0.3)
    assert found.costs == ()


def test_a_slow_kind_of_device_is_healthy_against_itself() -> None:
    steps = [records([1.0, 1.0, 1.0, 2.0 if n < 30 else 4.0]) for n in range(STEPS)]
    own = answer(steps, against="itself")
    assert own.actual_s - own.healthy_s == pytest.approx(10 * 2.0, rel=1e-6)
    assert answer(steps).costs[0].alone_s == pytest.approx(30 * 1.0 + 10 * 3.0, rel=1e-6)


def test_workers_come_and_go() -> None:
    steps = [(n + 1, (0, 1, 2), records([1.0, 1.0, 2.0])) for n in range(20)]
    steps += [(n + 1, (0, 3), records([1.0, 1.0])) for n in range(20, 30)]
    timings, _ = timings_of(steps, excused=0)
    found = what_if(timings)
    assert found.workers == (0, 1, 2, 3)
    assert np.isnan(found.slowness[25, 2])
    assert np.isnan(found.slowness[5, 3])
    assert [(cost.worker, cost.steps) for cost in found.costs] == [(2, 20)]
    assert found.costs[0].without_s == pytest.approx(20)


def test_steps_that_say_nothing_of_speed_are_left_out() -> None:
    steps = [records([1.0, 1.0])] * 5
    steps += [records([9.0, 1.0], flags=[1, 0]), records([1.0, 9.0], flags=[0, 8])]
    nonsense = [records([1.0, float("nan")]), records([1.0, -1.0]), records([1.0, 1.0], lanes=[4, 0])]
    found = answer([*steps, *nonsense, records([1.0, 1.0], flags=[4, 0])])
    assert found.left_out == 5
    assert found.costs == ()
    assert len(found.steps) == 6
    with pytest.raises(ConfigError, match=r"^of 1 recorded steps none can be counted: all were beside a checkpoint"):
        answer([nonsense[0]])


@settings(deadline=None, max_examples=60)
@given(
    paces=st.lists(st.lists(st.floats(0.1, 5), min_size=4, max_size=4), min_size=1, max_size=12),
    data=st.lists(st.floats(0, 2), min_size=4, max_size=4),
)
def test_nobody_loses_more_than_the_run_does(paces: list[list[float]], data: list[float]) -> None:
    found = answer([records(pace, data_s=data) for pace in paces])
    lost = found.actual_s - found.healthy_s
    tiny = 1e-5 * found.actual_s  # records are in f32
    assert lost >= -tiny
    assert found.even_s <= found.healthy_s + tiny
    assert np.nanmin(found.slowness) >= 1 - 1e-6
    for cost in found.costs:
        assert -tiny <= cost.without_s <= lost + tiny
        assert -tiny <= cost.alone_s <= lost + tiny
    if len(found.costs) == 1:
        assert found.costs[0].without_s == pytest.approx(found.costs[0].alone_s, abs=2 * tiny)


def test_work_is_lanes_where_lengths_are_alike() -> None:
    timings, _ = timings_of([(1, (0, 1), records([1.0, 2.0], tokens=[100.0, 100.0], squares=[1e4, 1e4]))], 0)
    assert work_of(timings).tolist() == [[4.0, 4.0]]
