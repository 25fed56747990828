"""Short lanes on shared cores: times that vary by a quarter and more. What is told, how soon, in which words."""

from __future__ import annotations

import numpy as np
import pytest

from elastictrain.stragglers.alarms import Alarm, Together, Tuning
from elastictrain.stragglers.signals import table
from elastictrain.stragglers.watch import Finding, StragglerWatch

FIRST = 30


def run(
    workers: int, noise: float, seed: int, factors: dict[int, float], *, steps: int = 90, shared: float = 0.0,
    transfer: float = 0.0,
) -> list[Finding]:  # fmt: skip
    """From step `FIRST` on workers take `factors` times as long. `shared`: noise that all have in common; `transfer`:
    of the exchange, which takes half as long as the lanes.
    """
    rng, watch, found = np.random.default_rng(seed), StragglerWatch(10_000), []
    for step in range(1, steps + 1):
        took = 0.02 * np.exp(noise * rng.standard_normal(workers) + shared * rng.standard_normal())
        if step >= FIRST:
            took *= [factors.get(worker, 1.0) for worker in range(workers)]
        sent = 0.01 * np.exp(transfer * rng.standard_normal())
        records = table(lanes=[4] * workers, compute_s=took, arrive_s=took, exchange_s=took.max() - took + sent)
        found += watch.feed(1, range(workers), step, records.tobytes(), acts=False).findings
    return found


def delays(found: list[list[Finding]], worker: int) -> list[int]:
    """Steps until the first alarm of that worker since `FIRST`; 99: none."""
    steps = [
        [one.step - FIRST + 1 for one in each if (one.kind, one.worker) == ("slow", worker) and one.step >= FIRST]
        for each in found
    ]
    return sorted(min(each, default=99) for each in steps)


@pytest.mark.parametrize(("noise", "factor", "within"), [(0.2, 2.0, 14), (0.2, 3.0, 6), (0.25, 3.0, 8)])
def test_a_large_change_is_found_in_large_noise(noise, factor, within):
    """A sum that looks for 15 % in a noise of 25 % takes tens of steps to see three times as much."""
    found = [run(4, noise, seed, {1: factor}) for seed in range(10)]
    assert delays(found, 1)[-1] <= within
    assert sum(one.worker != 1 for each in found for one in each) <= 1


def test_of_two_workers_history_says_who_has_changed():
    """As on two shared cores: one is made slow by waiting, and the other one has more of the cores for itself. What a
    step takes varies by half for both alike.
    """
    found = [run(2, 0.15, seed, {0: 0.6, 1: 2.0}, shared=0.5) for seed in range(10)]
    late = delays(found, 1)
    assert late[4] <= 8
    assert late[-2] <= 15, late
    assert not [one for each in found for one in each if one.kind == "recovered"], "nobody was slow before"


def test_who_was_never_slow_is_not_fast_again():
    found = [one for seed in range(10) for one in run(4, 0.02, seed, {2: 0.5}, steps=50)]
    assert {(one.kind, one.worker) for one in found} == {("faster", 2)}
    assert found[0].words == f"since step {found[0].since} its lanes take {found[0].factor:.2f} x what was usual"


def test_who_is_less_slow_is_told_so_with_both_numbers():
    rng, watch, found = np.random.default_rng(0), StragglerWatch(10_000), []
    for step in range(1, 90):
        took = 0.02 * np.exp(0.01 * rng.standard_normal(4))
        took[1] *= 1.0 if step < 30 else 3.0 if step < 60 else 2.0
        records = table(lanes=[4] * 4, compute_s=took, arrive_s=took, exchange_s=took.max() - took + 0.001)
        found += watch.feed(1, range(4), step, records.tobytes(), acts=False).findings
    assert [(one.kind, one.worker) for one in found] == [("slow", 1), ("slow", 1)]
    said = found[1].words
    assert said.startswith("since step 60 its lanes take 0.66 x what was usual, and still 1.9"), said


@pytest.mark.parametrize("workers", [2, 4])
def test_a_network_that_varies_is_hardly_ever_told(workers):
    found = [run(workers, 0.05, seed, {}, steps=150, transfer=0.5) for seed in range(6)]
    told = [one for each in found for one in each if one.worker is None]
    assert len(told) <= 1, "in 900 steps"


def network(changes: list[tuple[int, float]], noise: float = 0.01) -> list[Alarm]:
    """Alarms of a transfer whose logarithm is at each step that of the last change, as levels take it up slowly."""
    rng, together, found, level = np.random.default_rng(2), Together(Tuning()), [], 0.0
    for step in range(1, 300):
        now = [value for since, value in changes if since <= step][-1]
        common = now + noise * rng.standard_normal() - level
        found += together.observe(step, common, True)
        level += 0.02 * common
    return found


def test_words_about_the_network_agree_with_its_numbers():
    """Also after the levels have taken up all of a change: what was slow is fast again, and slow no more."""
    assert network([(1, 0.0)]) == []
    slow, less, fast = network([(1, 0.0), (30, 0.6), (150, 0.3), (250, 0.0)])
    assert [(one.kind, one.onset) for one in (slow, less, fast)] == [("slow", 30), ("slow", 150), ("recovered", 250)]
    assert (slow.factor, less.factor, fast.factor) == pytest.approx((1.82, 0.74, 0.74), rel=0.05)
    assert (slow.slowness, less.slowness, fast.slowness) == pytest.approx((1.82, 1.35, 1.0), rel=0.05)
    assert network([(1, 0.0), (30, -0.5)]) == [], "faster than ever is not worth a word"
    (again,) = network([(1, 0.0), (30, -0.5), (250, 0.0)])
    assert (again.kind, again.onset) == ("slow", 250)
