"""Whole simulations: repeated exactly, each kind of fault alone, the controller's own death."""

from __future__ import annotations

import pytest

from elastictrain.sim import Costs, FaultRates, Report, Scenario, simulate

CALM = FaultRates.none()


def day(workers: int = 12, hours: float = 6.0, rates: FaultRates = CALM, **settings: object) -> Report:
    settings = {"workers_per_node": 4, "seed": 3, "check": "all"} | settings
    return simulate(Scenario.model_validate({"workers": workers, "hours": hours, "rates": rates, **settings}))


def only(kind: str, mean_h: float = 20.0, **shares: float) -> FaultRates:
    return CALM.model_copy(update={kind: mean_h} | shares)


def test_an_undisturbed_day_is_start_up_and_steps() -> None:
    report = day()
    costs = Costs()
    assert (report.phase, report.generations, report.recoveries, report.faults) == ("stopped", 1, None, {})
    assert report.steps_redone == report.went_back == 0
    begun_s = 1.2 * costs.start_s + costs.forming_time_s(12, restores=False) + 1.0
    assert report.steps >= (6 * 3600 - begun_s) / costs.step_s
    assert report.goodput == pytest.approx(report.steps * costs.step_s / (report.hours * 3600), abs=1e-4)


def test_the_same_seed_is_the_same_day() -> None:
    rates = FaultRates().worse(300)
    assert day(rates=rates) == day(rates=rates)
    assert day(rates=rates) != day(rates=rates, seed=4)


def test_checking_changes_nothing() -> None:
    rates = FaultRates().worse(300)
    checked, unchecked = day(rates=rates).as_dict(), day(rates=rates, check="off").as_dict()
    assert checked.pop("checks") == checked["events"] > 0
    assert unchecked.pop("checks") == 0
    assert checked == unchecked


def test_one_kind_of_fault_more_does_not_move_the_others() -> None:
    alone = day(rates=only("worker_death_h"))
    both = day(rates=CALM.model_copy(update={"worker_death_h": 20.0, "controller_death_h": 1.0}))
    assert alone.faults["worker death"] == both.faults["worker death"] > 0
    assert both.faults["controller death"] > 0


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("worker_death_h", "worker death"),
        ("worker_freeze_h", "worker freeze"),
        ("node_loss_h", "node loss"),
        ("node_partition_h", "partition"),
    ],
)
def test_one_kind_of_fault_alone(kind: str, name: str) -> None:
    report = day(rates=only(kind, 4.0))
    assert set(report.faults) == {name}
    assert set(report.outages) == {name}
    assert report.recoveries is not None
    assert 0 < report.recoveries.p50_s <= report.recoveries.p95_s <= report.recoveries.longest_s
    assert report.steps_redone > 0
    assert report.phase == "stopped"


def test_a_torn_apply_costs_no_step_if_a_survivor_has_applied_it() -> None:
    report = day(rates=only("torn_apply_h", 8.0), workers=40)
    assert report.faults["torn apply"] > 10
    assert report.steps_redone == 0
    assert report.went_back == 0


def test_a_preempted_machine_costs_a_pause_and_no_step() -> None:
    report = day(rates=only("node_notice_h", 8.0), spares=4)
    assert report.faults["preemption"] > 0
    assert report.pauses is not None
    assert report.pauses.count >= report.faults["preemption"] / 2  # some machines held only spares
    assert (report.recoveries, report.steps_redone) == (None, 0)


def test_a_controllers_death_stops_no_step() -> None:
    report = day(rates=only("controller_death_h", 0.2))
    assert report.controller_deaths > 10
    assert report.replayed > 0
    assert (report.recoveries, report.pauses, report.steps_redone) == (None, None, 0)
    assert report.steps == day().steps


def test_a_frozen_worker_that_nobody_names_is_found_by_a_deadline() -> None:
    """All wait for each other until a collective's own timeout; then the controller's deadline for parking kills it."""
    costs = Costs()
    seen = day(rates=only("worker_freeze_h"), hours=1.5, spares=0, seed=6)
    unseen = day(rates=only("worker_freeze_h", unseen_freeze=1.0), hours=1.5, spares=0, seed=6)
    assert seen.faults == unseen.faults == {"worker freeze": 1}
    assert seen.recoveries is not None
    assert unseen.recoveries is not None
    assert seen.recoveries.longest_s < 10.0
    assert costs.collective_timeout_s < unseen.recoveries.longest_s < costs.collective_timeout_s + 70.0


def test_without_mirrors_a_death_goes_back_to_a_checkpoint() -> None:
    report = day(rates=only("worker_death_h"), mirrors=False)
    assert report.went_back > 0
    assert report.steps_redone > report.went_back
    assert report.goodput < day(rates=only("worker_death_h")).goodput


def test_a_corrupt_checkpoint_costs_the_steps_since_the_one_before() -> None:
    whole = day(rates=only("worker_death_h"), mirrors=False)
    corrupt = day(rates=only("worker_death_h", corrupt_checkpoint=0.5), mirrors=False)
    assert corrupt.steps_redone > whole.steps_redone


def test_a_run_may_finish_before_its_time() -> None:
    report = day(rates=FaultRates().worse(200), steps=3000)
    assert (report.phase, report.steps, report.error) == ("finished", 3000, None)
    assert report.hours < 6.0


def test_a_smaller_world_takes_longer_steps() -> None:
    scenario = Scenario(workers=8, lanes_per_worker=4)
    assert scenario.step_time_s(8) == Costs().step_s
    assert scenario.step_time_s(7) == Costs().step_s * 5 / 4
    assert scenario.step_time_s(4) == Costs().step_s * 2


def test_a_thousand_workers_meet_every_kind_of_fault() -> None:
    rates = FaultRates(torn_apply_h=20_000.0, controller_death_h=12.0, unseen_freeze=0.0)
    report = simulate(Scenario(workers=1000, hours=12.0, seed=1, rates=rates.worse(6)))
    assert len(report.faults) >= 7
    assert report.controller_deaths > 0
    assert report.goodput > 0.98
    assert report.steps_lost == report.steps_twice == 0
