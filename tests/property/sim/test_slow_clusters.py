"""Small clusters in which workers become slow while others die, join, are frozen and preempted, and the controller dies
too: under the real machine, the real straggler watch and the real agreement on splits. Every lane of every step is
computed once, whoever has it, and lanes do not swing. A failure names its seed.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from random import Random

import pytest

from elastictrain.controller.commands import OfferLanes
from elastictrain.controller.slowness import FRESH_S
from elastictrain.layout import deal_lanes
from elastictrain.offers import Lanes, Split
from elastictrain.sim import Costs, FaultRates, Report, Scenario, Violation, simulate
from elastictrain.sim.pace import undisturbed
from elastictrain.sim.paced import PacedCrew

SEEDS = range(16)


def scenario(seed: int) -> Scenario:
    """Twenty stormy minutes, drawn from `seed`."""
    rng = Random(f"slow {seed}")
    rates = FaultRates().worse(rng.choice([100.0, 1000.0, 4000.0]))
    more = {"slow_down_h": rng.choice([0.5, 2.0, 8.0]), "controller_death_h": rng.choice([None, 0.05, 0.3])}
    away_s = rng.choice([2.0, 10 * FRESH_S])
    return Scenario(
        workers=rng.randint(1, 10),
        hours=0.35,
        seed=seed,
        spares=rng.randint(0, 2),
        min_workers=1,
        workers_per_node=rng.randint(1, 4),
        lanes_per_worker=rng.choice([1, 2, 4]),
        mirrors=rng.random() < 0.8,
        stragglers=rng.choice(["lanes", "evict"]),
        speeds=rng.choice([(1.0,), (1.0, 2.0, 4.0)]),
        noise=rng.choice([0.005, 0.02]),
        **rng.choice([{}, {"shared_lanes": rng.choice([1, 3]), "hiccups": 0.02}]),
        check="all",
        rates=rates.model_copy(update=more),
        costs=Costs(checkpoint_every_s=120.0, checkpoint_write_s=10.0, restore_s=5.0, controller_back_s=away_s),
    )


@cache
def storm(seed: int) -> Report:
    return simulate(scenario(seed))


@pytest.mark.parametrize("seed", SEEDS)
def test_lanes_move_in_a_storm_and_every_step_gives_the_same(seed: int) -> None:
    chosen, report = scenario(seed), storm(seed)
    where = (seed, chosen)
    assert report.steps_lost == report.steps_twice == 0, where
    assert report.samples == undisturbed(chosen.lanes_per_worker * chosen.workers, report.steps), where
    assert report.lanes_swung == 0, where


def test_the_storms_are_storms() -> None:
    """Else the test above would show nothing: lanes move, workers die and join, the controller dies, all at once."""
    found = [storm(seed) for seed in SEEDS]
    assert sum(report.lanes_moved for report in found) > 12
    assert sum(report.generations for report in found) > 36
    assert sum(report.controller_deaths for report in found) > 6
    assert sum(report.faults.get("slow-down", 0) for report in found) > 12
    assert sum(report.lanes_moved > 0 and report.generations > 3 for report in found) > 2
    assert sum(report.lanes_taken_over > 0 and report.lanes_moved > 0 for report in found) > 2


def test_a_split_that_two_workers_understand_differently_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """The simulator's own eyes: splits that are agreed on by their number, where workers were told different ones."""
    real, hear = Split.after, PacedCrew._hear

    def by_number(self: Split, generation: int, number: int, lanes: Lanes, epoch: int = 0) -> Split:
        return replace(real(self, generation, number, lanes, epoch), mark=number)

    def misheard(self: PacedCrew, worker: int, command: OfferLanes, epoch: int) -> None:
        lanes = deal_lanes(self.layout.lane_count, [len(own) for own in reversed(command.lanes)], "contiguous")
        hear(self, worker, replace(command, lanes=lanes) if worker % 2 else command, epoch)

    monkeypatch.setattr(PacedCrew, "_hear", misheard)
    simulate(scenario(0))  # nobody switches, and nothing is wrong
    monkeypatch.setattr(Split, "after", by_number)
    with pytest.raises(Violation, match=r"which is not each of \d+ lanes once \(seed \d+, second"):
        list(map(simulate, map(scenario, SEEDS)))


def test_moving_lanes_wins_most_of_what_slow_workers_cost() -> None:
    """Three quarters of an hour without faults: nobody slow, nothing done about it, and lanes moved."""
    slow = FaultRates.none().model_copy(update={"slow_down_h": 0.7})
    base = Scenario(workers=6, hours=0.75, seed=5, lanes_per_worker=8, rates=slow, noise=0.01)
    calm = simulate(base.model_copy(update={"rates": FaultRates.none(), "stragglers": "watch"}))
    idle, moved = (simulate(base.model_copy(update={"stragglers": action})) for action in ("watch", "lanes"))
    assert idle.faults == moved.faults
    assert idle.lanes_moved == calm.lanes_moved == 0 < moved.lanes_moved <= 3 * moved.faults["slow-down"]
    assert moved.goodput - idle.goodput > 0.5 * (calm.goodput - idle.goodput)
    assert calm.stragglers == {}


def test_taking_lanes_over_wins_what_hiccups_cost() -> None:
    """Half an hour of eight workers of which each hiccups in a step of thirty: every fourth step has one."""
    base = Scenario(workers=8, hours=0.5, seed=3, lanes_per_worker=8, rates=FaultRates.none(), noise=0.01)
    calm, alone, shared = (
        simulate(base.model_copy(update={"stragglers": "watch", **more}))
        for more in ({}, {"hiccups": 1 / 30}, {"hiccups": 1 / 30, "shared_lanes": 6})
    )
    assert calm.lanes_taken_over == alone.lanes_taken_over == 0 < shared.lanes_taken_over
    assert shared.goodput - alone.goodput > 0.5 * (calm.goodput - alone.goodput)
    assert shared.stragglers == {}, "nobody is called slow for it"
    assert shared.samples == undisturbed(64, shared.steps)
