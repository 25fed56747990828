"""What is a change and what is not: levels that are not known well, hiccups in a row, two workers, noise."""

from __future__ import annotations

from collections.abc import Callable
from random import Random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from elastictrain.sim.speeds import SpeedScenario, run_speeds
from elastictrain.stragglers.alarms import Alarm
from elastictrain.stragglers.detector import Detector
from elastictrain.stragglers.robust import middle, spread, variance
from elastictrain.stragglers.signals import table

Factor = Callable[[int, int], float]
"""Of step and worker: how many times as long as usual it takes."""


def run(
    factor: Factor, *, workers: int, steps: int, seed: int = 0, noise: float = 0.01,
    lengths: float = 0.0, data_s: Factor = lambda step, worker: 0.0,
) -> tuple[list[Alarm], Detector]:  # fmt: skip
    detector, rng, alarms = Detector(workers), Random(seed), list[Alarm]()
    for step in range(1, steps + 1):
        length = [max(0.3, rng.gauss(1.0, lengths)) if lengths else 1.0 for _ in range(workers)]
        compute = [
            0.4 * rng.lognormvariate(0.0, noise) * factor(step, worker) * (0.7 * own + 0.3 * own * own)
            for worker, own in enumerate(length)
        ]
        waited = [data_s(step, worker) for worker in range(workers)]
        arrive = [own + wait for own, wait in zip(compute, waited, strict=True)]
        records = table(
            lanes=[4] * workers, compute_s=compute, data_s=waited, arrive_s=arrive,
            exchange_s=[max(arrive) - own + 0.01 for own in arrive],
            tokens=[4000.0 * own for own in length], squares=[4e6 * own * own for own in length],
        )  # fmt: skip
        alarms += detector.observe(step, records)
    return alarms, detector


def steps_of(worker: int, first: int, factors: list[float]) -> Factor:
    return lambda step, own: factors[step - first] if own == worker and 0 <= step - first < len(factors) else 1.0


def test_three_hiccups_in_a_row_are_of_different_sizes_and_no_slowness():
    assert run(steps_of(3, 40, [2.5, 2.2, 1.8]), workers=8, steps=80)[0] == []
    alarms, _ = run(steps_of(3, 40, [2.2, 2.25, 2.2]), workers=8, steps=42)
    assert [(alarm.worker, alarm.step, alarm.is_slow) for alarm in alarms] == [(3, 42, True)], "these agree"


def test_a_slowness_that_varies_is_found_two_steps_later():
    alarms, _ = run(steps_of(3, 40, [2.5, 2.0, 1.6, 2.4, 1.9] * 10), workers=8, steps=60)
    assert [(alarm.worker, alarm.step, alarm.onset) for alarm in alarms] == [(3, 44, 40)]


def test_a_slowness_that_varies_is_not_told_again_and_again():
    """The noise around the new level is at least what its first steps show."""
    again = 0
    for seed in range(8):
        drawn = Random(seed)
        factors = [2.0 * drawn.lognormvariate(0.0, 0.15) for _ in range(120)]
        alarms, _ = run(steps_of(3, 40, factors), workers=8, steps=159, seed=seed)
        assert {alarm.worker for alarm in alarms} == {3}
        assert alarms[0].factor == pytest.approx(2.0, rel=0.15)
        again += len(alarms) - 1
    assert again <= 10


def test_two_workers_that_recover_one_after_the_other_are_both_well():
    def both(step: int, worker: int) -> float:
        return (2.3 if 20 <= step < 60 else 1.0) if worker else (1.9 if 40 <= step < 61 else 1.0)

    alarms, detector = run(both, workers=2, steps=90)
    assert [(alarm.worker, alarm.is_slow) for alarm in alarms] == [(1, True), (0, True), (1, False), (0, False)]
    assert detector.slowness[0] == pytest.approx([1.0, 1.0], abs=0.05)


@pytest.mark.parametrize("workers", [2, 4])
def test_noise_of_a_few_workers_raises_nothing(workers):
    """Each of 20 runs; of two workers one always counts as unchanged, which must not halve the noise."""
    said = [run(lambda step, own: 1.0, workers=workers, steps=150, seed=seed, noise=0.04)[0] for seed in range(20)]
    assert said == [[]] * 20


@pytest.mark.parametrize(
    ("workers", "speeds", "seed"),
    [
        (2, (), 300200),
        (8, (0.5, *(1.0,) * 7), 300163),
        (4, (1.0, 0.5, 1.0, 1.0), 27),
        (8, (1.0, 1.0, 1.0, 0.5, 1.0, 1.0, 1.0, 0.5), 301024),
    ],
)
def test_a_level_learned_before_lengths_are_known_is_corrected_without_a_word(workers, speeds, seed):
    """What long and short sequences cost is learned in the first steps too, and moves the levels learned in them; in
    these runs by a tenth to a fifth.
    """
    report = run_speeds(SpeedScenario(workers, 8 * workers, 100, seed, speeds=speeds, noise=0.01, lengths=0.3))
    assert report.findings == []


def test_a_level_that_is_known_well_is_not_corrected_without_a_word():
    for noise in (0.01, 0.03):
        alarms, _ = run(lambda step, own: 1.16 if own == 1 and step >= 50 else 1.0, workers=8, steps=70, noise=noise)
        assert [(alarm.worker, alarm.onset) for alarm in alarms] == [(1, 50)]


def test_slow_data_is_told_once_whatever_the_lengths():
    for seed in range(6):
        alarms, _ = run(
            lambda step, own: 1.0, workers=8, steps=200, seed=seed, noise=0.02, lengths=0.15,
            data_s=lambda step, own: 0.5 if own == 4 and 60 <= step < 150 else 0.0,
        )  # fmt: skip
        assert [(alarm.worker, alarm.cause, alarm.is_slow) for alarm in alarms] == [
            (4, "data", True),
            (4, "data", False),
        ]


@pytest.mark.parametrize("hiccup", [False, True])
def test_what_all_share_while_lanes_move_is_no_part_of_the_new_levels(hiccup):
    """All are throttled for six steps, or the one whose lanes stay has a hiccup in the last step that counts."""
    detector, rng, alarms = Detector(4), Random(3), list[Alarm]()
    for step in range(1, 71):
        lanes = (5, 5, 2, 4) if step >= 30 else (4, 4, 4, 4)
        factors = [1.5 if 30 <= step < 36 and not hiccup else 1.0] * 4
        if step == 32 and hiccup:
            factors[3] = 2.0
        took = [0.1 * own * rng.lognormvariate(0.0, 0.01) * f for own, f in zip(lanes, factors, strict=True)]
        waits = [max(took) - own + 0.01 for own in took]
        alarms += detector.observe(step, table(lanes=lanes, compute_s=took, arrive_s=took, exchange_s=waits))
    assert alarms == []
    assert detector.unit_s == pytest.approx([0.1] * 4, rel=0.05)


@given(st.lists(st.lists(st.one_of(st.just(float("nan")), st.floats(-5, 5)), min_size=5, max_size=5), min_size=1))
def test_the_middle_is_the_median_of_what_is_there(rows):
    values = np.array(rows)
    there = [np.sort(row[~np.isnan(row)]) for row in values]
    wanted = [np.median(row) if len(row) else 0.0 for row in there]
    found = middle(values, 1e9)
    assert np.allclose([one for one, row in zip(found, there, strict=True) if len(row) != 2],
                       [one for one, row in zip(wanted, there, strict=True) if len(row) != 2])  # fmt: skip
    for one, row in zip(middle(values, 0.0), there, strict=True):
        low, high = (row[(len(row) - 1) // 2], row[len(row) // 2]) if len(row) else (0.0, 0.0)
        assert one in (low, high)
        assert abs(one) == min(abs(low), abs(high))


def test_spread_and_variance_are_those_of_normal_numbers():
    rng = np.random.default_rng(0)
    drawn = rng.normal(3.0, 0.5, (4000, 25))
    assert np.mean([spread(row) for row in drawn]) == pytest.approx(0.5, rel=0.05)
    assert variance(0.5, 25) == pytest.approx(np.var(np.median(drawn, axis=1)), rel=0.1)
    wild = drawn[0].copy()
    wild[:5] = 1e9
    assert spread(wild) < 1.0
