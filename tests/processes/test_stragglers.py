"""A worker that becomes slow: it is named, its lanes move without a pause, and no bit changes.

What the workers say of their times is made up here, so that nothing depends on how busy this machine is; all that
follows from it is real: the vote that carries it, the watch, the controller, the switch, the training.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest

from elastictrain.controller.speeds import newest_offer
from elastictrain.engine.session import Session
from elastictrain.engine.signals import StepClock
from elastictrain.faults import kill, slow
from elastictrain.job import Job
from elastictrain.layout import deal_lanes
from elastictrain.stragglers.signals import Signal, decode
from elastictrain_actors.driver import Driver
from tests.support.process_cluster import Run, byte_job, run_job

pytestmark = [pytest.mark.processes, pytest.mark.timeout(120)]
LANES, STEPS, LONG, FIRST = 16, 32, 64, 10
LANE_S = 0.01


def says(factors: dict[int, float], *, since: int = 1, what: str = "compute_s", until: int = 10**9) -> Callable:
    """Every worker's lanes take 10 ms; from step `since` on those of some take longer by a factor."""
    return partial(_says, factors, since, until, what)


def _says(factors: dict[int, float], since: int, until: int, what: str, worker: int) -> None:
    real, steps = StepClock.signal, [0]

    def signal(self: StepClock, lanes: int, *args: Any, **kwargs: Any) -> Signal:
        steps[0] += 1
        factor = factors.get(worker, 1.0) if since <= steps[0] < until else 1.0
        own = lanes * LANE_S * (1.0 + 0.001 * ((steps[0] * 7 + worker) % 3))
        seconds = {"compute_s": own, "data_s": 0.0}
        if what == "compute_s":
            seconds["compute_s"] *= factor
        elif factor > 1.0:
            seconds[what] = factor - 1.0 if factor < 100.0 else float("nan")
        said = real(self, lanes, *args, **kwargs)
        made_up = {"exchange_s": 0.001, "arrive_s": sum(seconds.values()), "collected_s": 0.0, "flags": 0}
        return replace(said, **made_up, **seconds)

    StepClock.signal = signal  # type: ignore[method-assign]


def straggling_job(folder, workers: int | dict[str, Any] = 4, action: str = "lanes", **settings: Any) -> Job:
    return byte_job(folder, workers, **({"lanes": LANES, "steps": STEPS, "stragglers": {"action": action}} | settings))


@pytest.fixture(scope="module")
def undisturbed(folder) -> Run:
    return run_job(straggling_job(folder, 1, "off"))


@pytest.fixture(scope="module")
def undisturbed_long(folder) -> Run:
    return run_job(straggling_job(folder, 1, "off", steps=LONG))


def lanes_of(run: Run) -> list[int]:
    """How many lanes each of four workers had at the end."""
    counts = dict.fromkeys(range(4), LANES // 4)
    for move in run.record.of("lanes_moved"):
        counts |= {int(worker): new for worker, (_, new) in move["lanes"].items()}
    return [counts[worker] for worker in range(4)]


def test_a_slow_worker_gets_fewer_lanes_and_no_bit_changes(folder, undisturbed):
    run = run_job(straggling_job(folder), patch=says({2: 2.0}, since=FIRST))
    assert run.outcome.outcome == "finished"
    assert run.digest == undisturbed.digest
    assert run.losses == undisturbed.losses
    (named,) = run.record.of("straggler")
    assert (named["worker"], named["cause"], named["what"], named["since"]) == (2, "compute", "slow", FIRST)
    assert named["step"] == FIRST + 2
    (move,) = run.record.of("lanes_moved")
    assert move["action"] == "move_lanes"
    assert sorted(lanes_of(run)) == [2, 4, 5, 5]
    assert lanes_of(run)[2] == 2
    assert lanes_said(run)[STEPS] == tuple(lanes_of(run)), "and that is what they compute"
    assert not run.record.of("parking"), "lanes move without a pause"
    assert len(run.record.of("running")) == 1


def test_lanes_come_back_to_a_worker_that_has_recovered(folder, undisturbed_long):
    run = run_job(straggling_job(folder, steps=LONG), patch=says({2: 2.0}, since=FIRST, until=22))
    assert run.digest == undisturbed_long.digest
    assert [said["what"] for said in run.record.of("straggler")] == ["slow", "recovered"]
    assert len(run.record.of("lanes_moved")) == 2
    assert lanes_of(run) == [4, 4, 4, 4]


def told_otherwise(first: int, worker: int) -> None:
    """Worker 2 is slow; worker 1 hears of the first split from a controller that means another one by that number."""
    says({2: 2.0}, since=FIRST)(worker)
    if worker == 1:
        real = Session.offer_lanes

        def offer_lanes(self: Session, generation: int, plan: int, lanes: Any, epoch: int = 0) -> None:
            counts = [len(own) for own in reversed(lanes)]
            real(self, generation, plan, lanes if plan > first else deal_lanes(LANES, counts, "contiguous"), epoch)

        Session.offer_lanes = offer_lanes  # type: ignore[method-assign]


def lanes_said(run: Run) -> dict[int, tuple[int, ...]]:
    """What the workers have computed, by step."""
    return {said.step: tuple(int(n) for n in decode(said.records)["lanes"]) for said, _ in run.record.signalled}


def test_two_splits_under_one_number_are_never_switched_in(folder, undisturbed):
    """As after a controller whose successor has lost a line of the journal. Nobody switches: no lane is computed twice,
    none is left out."""
    run = run_job(straggling_job(folder), patch=partial(told_otherwise, 1))
    assert run.digest == undisturbed.digest
    assert run.losses == undisturbed.losses
    assert run.record.of("lanes_moved"), "a split was offered"
    assert set(lanes_said(run).values()) == {(4, 4, 4, 4)}


def test_what_a_newer_controller_offers_to_all_is_switched_in(folder, undisturbed):
    """The same, and then another controller offers the split to all under its own number."""

    def offers_again(driver: Driver, row: Any) -> None:
        if row["step"] == 24:
            offer = newest_offer(driver.machine.core)
            driver.effects.perform(replace(offer, plan=7))

    run = run_job(straggling_job(folder), patch=partial(told_otherwise, 1), on_row=offers_again)
    assert run.digest == undisturbed.digest
    assert run.losses == undisturbed.losses
    said = lanes_said(run)
    assert said[20] == (4, 4, 4, 4)
    assert said[STEPS] == tuple(lanes_of(run)) != (4, 4, 4, 4)


def test_slow_data_are_told_and_move_nothing(folder, undisturbed):
    run = run_job(straggling_job(folder), patch=says({1: 1.05}, since=FIRST, what="data_s"))
    assert run.digest == undisturbed.digest
    assert {(said["worker"], said["cause"]) for said in run.record.of("straggler")} == {(1, "data")}
    assert not run.record.of("lanes_moved")


def says_the_link(worker: int) -> None:
    """Times are made up, but for what a fault has really waited after the exchange."""
    says({})(worker)
    made_up = StepClock.signal

    def signal(self: StepClock, lanes: int, seconds: dict[str, float], *args: Any, **kwargs: Any) -> Signal:
        said = made_up(self, lanes, seconds, *args, **kwargs)
        return replace(said, exchange_s=0.001 + seconds.get("dragged_s", 0.0), mirror_s=0.0)

    StepClock.signal = signal  # type: ignore[method-assign]


def test_a_slow_link_is_named_and_no_bit_changes(folder, undisturbed):
    """The fault really waits, in the exchange of four workers over gloo."""
    faults = [slow(2, FIRST, what="link", delay_s=0.1, steps=8)]
    run = run_job(straggling_job(folder), faults, patch=says_the_link)
    assert run.digest == undisturbed.digest
    assert run.losses == undisturbed.losses
    named = [(said["worker"], said["cause"], said["what"]) for said in run.record.of("straggler")]
    assert named == [(2, "link", "slow"), (2, "link", "recovered")]
    assert run.record.of("straggler")[0]["since"] == FIRST
    assert not run.record.of("lanes_moved")


def test_unequal_devices_are_learned_from_the_first_steps(folder, undisturbed):
    """Speeds 1 : 2 : 4 from the start; nobody is called slow for it."""
    run = run_job(straggling_job(folder, 3), patch=says({1: 2.0, 2: 4.0}))
    assert run.digest == undisturbed.digest
    assert run.losses == undisturbed.losses
    assert not run.record.of("straggler")
    move = run.record.of("lanes_moved")[0]
    assert move["step"] <= 9
    assert move["after_s"] == pytest.approx(0.10, rel=0.02)  # 10 or 9, 4 or 5, and 2 lanes; even: 0.20
    assert move["lanes"][2] == [5, 2]


@pytest.mark.parametrize("phase", ["exchange", "apply", "gather"])
def test_a_loss_after_a_move_recovers_under_the_learned_speeds(folder, undisturbed, phase):
    """The vote that is rolled forward with, or thrown away, is of another split than the plan of its generation."""
    run = run_job(straggling_job(folder), [kill(3, 20, phase)], patch=says({2: 4.0}))
    assert run.digest == undisturbed.digest
    assert run.losses == undisturbed.losses
    assert run.record.of("lanes_moved")[0]["step"] < 20
    last = run.machine.core.ledger.plan.layout
    assert len(last.lanes_of(2)) < min(len(last.lanes_of(worker)) for worker in (0, 1))


def test_a_job_that_plans_deals_out_by_what_was_learned_when_the_world_changes(folder, undisturbed):
    """Nothing moves before; and the same without a plan: even lanes."""
    planned = {"plan": "auto", "cluster": "not read here"}
    for settings in (planned, {}):
        job = straggling_job(folder, action="watch", **settings)
        run = run_job(job, [kill(3, 20, "exchange")], patch=says({2: 4.0}))
        assert run.digest == undisturbed.digest
        assert run.losses == undisturbed.losses
        assert not run.record.of("lanes_moved")
        last = run.machine.core.ledger.plan.layout
        counts = {worker: len(last.lanes_of(worker)) for worker in (0, 1, 2)}
        assert (counts[2] < min(counts[0], counts[1]) - 2) == bool(settings), counts


def test_who_only_watches_moves_nothing(folder, undisturbed):
    run = run_job(straggling_job(folder, action="watch"), patch=says({2: 2.0}, since=FIRST))
    assert run.digest == undisturbed.digest
    assert [said["worker"] for said in run.record.of("straggler")] == [2]
    assert not run.record.of("lanes_moved")


def test_a_broken_clock_is_ignored_and_told_once(folder, undisturbed):
    run = run_job(straggling_job(folder), patch=says({1: 1000.0}, since=FIRST, what="data_s"))
    assert run.digest == undisturbed.digest
    (said,) = run.record.of("straggler")
    assert (said["worker"], said["what"]) == (1, "nonsense")
    assert not run.record.of("lanes_moved")


def babbles(who: int, worker: int) -> None:
    """Worker 2 becomes slow; of `who` nothing can be believed from then on."""
    says({2: 2.0}, since=FIRST)(worker)
    if worker == who:
        _says({who: 1000.0}, FIRST, 10**9, "data_s", worker)


def test_who_talks_nonsense_keeps_its_lanes_and_those_of_others_move(folder, undisturbed):
    run = run_job(straggling_job(folder), patch=partial(babbles, 1))
    assert run.digest == undisturbed.digest
    assert run.losses == undisturbed.losses
    assert {(said["worker"], said["what"]) for said in run.record.of("straggler")} == {(1, "nonsense"), (2, "slow")}
    (move,) = run.record.of("lanes_moved")
    assert move["action"] == "move_lanes"
    assert lanes_of(run) == [5, 4, 2, 5]
    assert lanes_said(run)[STEPS] == (5, 4, 2, 5), "and that is what they compute"


def test_a_worker_that_is_far_too_slow_gives_its_place_to_a_spare(folder, undisturbed_long):
    job = straggling_job(folder, {"max": 4, "min": 2, "spares": 1, "replace": True}, "evict", steps=LONG)
    run = run_job(job, patch=says({2: 100.0}, since=FIRST), all_ready_first=True)
    assert run.digest == undisturbed_long.digest
    (left,) = run.record.of("straggler_leaves")
    assert (left["worker"], left["action"]) == (2, "replace")
    assert 2 not in run.machine.core.ledger.plan.layout.workers
    assert run.machine.core.ledger.plan.layout.world_size == 4


def test_a_slowness_on_purpose_changes_no_bit(folder, undisturbed):
    """The fault itself, with real waiting; who is named then depends on the machine."""
    run = run_job(straggling_job(folder, 2), [slow(1, 3, factor=3.0, steps=2), slow(0, 5, steps=2, what="data")])
    assert run.digest == undisturbed.digest
    assert run.losses == undisturbed.losses
