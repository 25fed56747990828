"""Lanes that more than one worker may compute: whoever does, and whoever dies meanwhile, the bits stay.

Who is late is planted, so that nothing depends on how busy this machine is (`plants_sharing`).
"""

from __future__ import annotations

import os
import signal
from collections import Counter
from typing import Any

import pytest

from elastictrain.engine.lane_checks import lane_check
from elastictrain.faults import add, drain, freeze, kill, slow
from elastictrain.job import Job
from elastictrain.stragglers.signals import dealt, decode
from elastictrain_actors.driver import Driver
from tests.support.plants import both
from tests.support.plants_sharing import SLOW, behind, eager, held_up, impatient, overtaken
from tests.support.process_cluster import RECIPES, Run, byte_job, plans_of, run_job

pytestmark = [pytest.mark.processes, pytest.mark.timeout(120)]
STEPS = tuple(range(3, 7))


def shared_job(folder, way: str = "take_over", workers: int | dict[str, Any] = 3, **settings: Any) -> Job:
    return byte_job(folder, workers, **({"redundancy": {"lanes": way, "depth": 2}} | settings))


def taken(run: Run, step: int) -> dict[str, Any]:
    (row,) = [row for row in run.record.rows if row["step"] == step]
    return dict(row["taken_over"])


def same(run: Run, reference: Run) -> None:
    assert run.outcome.outcome == "finished", run.record.events[-5:]
    assert run.digest == reference.digest
    assert run.losses == reference.losses
    hashes = [{row["step"]: row["samples_hash"] for row in one.record.rows} for one in (run, reference)]
    assert hashes[0] == hashes[1]


def test_lanes_that_are_not_begun_are_taken_over(folder, reference):
    run = run_job(shared_job(folder), patch=held_up(STEPS))
    same(run, reference)
    for step in STEPS:
        assert taken(run, step)["from"][SLOW] == 2
    assert len(plans_of(run)) == 1
    said = {said.step: decode(said.records) for said, _ in run.record.signalled}
    for step in STEPS:
        assert dealt(said[step]).tolist() == [4, 4, 3]
        assert said[step]["lanes"][SLOW] == 2 + Counter(taken(run, step)["by"])[SLOW]
        assert said[step]["lanes"].sum() == 11


def test_without_the_setting_nothing_is_said_of_it(reference):
    assert "taken_over" not in reference.record.rows[0]


@pytest.mark.parametrize("looks", [True, False])
def test_the_first_result_of_a_lane_counts(folder, reference, looks):
    """A copy is done first: the other one breaks off, or throws its result away. With BatchNorm, so with a counter."""
    run = run_job(shared_job(folder, "first_result"), patch=overtaken(STEPS, looks=looks))
    same(run, reference)
    for step in STEPS:
        assert taken(run, step)["from"] == {SLOW: 1}
        assert taken(run, step)["in_vain"] == 1


@pytest.fixture(scope="module")
def plain(folder) -> dict[str, Any]:
    """A model without integer buffers: a worker may end a step without a lane."""
    return {"recipe": f"{RECIPES}:Plain", "lanes": 3, "block_elements": 4096}


@pytest.fixture(scope="module")
def plain_reference(folder, plain) -> Run:
    return run_job(byte_job(folder, 1, **plain))


def test_a_worker_may_end_a_step_without_a_lane(folder, plain, plain_reference):
    run = run_job(shared_job(folder, "first_result", **plain), patch=overtaken(STEPS, looks=True))
    same(run, plain_reference)
    said = {said.step: decode(said.records)["lanes"].tolist() for said, _ in run.record.signalled}
    assert all(said[step] == [1, 0, 2] for step in STEPS), said


@pytest.mark.parametrize("workers", [2, 3, 5])
def test_one_of_a_group_with_the_same_lanes_is_enough(folder, reference, plain, plain_reference, workers):
    run = run_job(shared_job(folder, "coded", workers))
    same(run, reference)
    lanes = [taken(run, row["step"])["lanes"] for row in run.record.rows]
    groups = workers // 2
    assert all(groups <= n <= 11 for n in lanes), "of every whole group one has the other's lanes"
    if workers == 3:
        same(run_job(shared_job(folder, "coded", 3, **plain)), plain_reference)


HELPER = 0
"""Its store has everybody's claims."""
DEATHS = [
    *(("take_over", HELPER, phase) for phase in ("compute", "claim", "agree", "exchange", "mirror", "vote", "apply")),
    ("take_over", SLOW, "agree"),
    *(("first_result", SLOW, phase) for phase in ("compute", "agree", "vote", "apply")),
    ("first_result", HELPER, "gather"),
]


@pytest.mark.parametrize(("way", "victim", "phase"), DEATHS)
def test_whoever_dies_in_whatever_phase_the_bits_stay(folder, reference, way, victim, phase):
    run = run_job(shared_job(folder, way), [kill(victim, 4, phase)], patch=held_up(STEPS))
    same(run, reference)
    assert len(plans_of(run)) == 2


@pytest.mark.parametrize("phase", ["compute", "claim", "agree", "apply"])
def test_a_death_in_a_group_with_the_same_lanes(folder, reference, phase):
    """Of the one that is first in its group: its mate waits for it, or would often be done before it."""
    run = run_job(shared_job(folder, "coded", 4), [kill(2, 4, phase)], patch=behind(4, mate=3))
    same(run, reference)
    assert len(plans_of(run)) == 2


def test_who_dies_with_a_lane_of_another_one_leaves_it_to_all(folder, reference):
    run = run_job(shared_job(folder), patch=held_up(STEPS, dies_at=4, helper=2))
    same(run, reference)
    assert len(plans_of(run)) == 2


def test_a_frozen_store_of_claims_is_waited_for_no_longer_than_it_may_be(folder, reference, tmp_path):
    """Worker 0 stops while worker 1 asks its store: nothing ends that question by itself. Whoever finds out that it is
    frozen is played by the test."""

    def kills_the_frozen(driver: Driver, kind: str) -> None:
        if kind == "parking":
            os.kill(driver.effects.processes[0].pid, signal.SIGKILL)

    plants = both(held_up(STEPS), impatient(tmp_path / "frozen"))
    run = run_job(shared_job(folder), [freeze(0, 4, "claim")], patch=plants, on_event=kills_the_frozen)
    same(run, reference)
    assert "the first member's store gave no answer" in str(run.record.events)
    assert len(plans_of(run)) == 2


def test_workers_come_and_go(folder, reference):
    job = shared_job(folder, "first_result", {"max": 4, "start": 3, "min": 2})
    run = run_job(job, [add(2), drain(0, 5)], patch=eager)
    same(run, reference)


def test_a_lane_that_is_checked_is_nobody_elses(folder, reference):
    """In every step one lane is computed by two workers and compared: by the one that it was dealt out to."""
    checks = {"integrity": {"recompute_every": 1}}
    run = run_job(shared_job(folder, **checks), patch=held_up(tuple(range(2, 9))))
    same(run, reference)
    layout = run.machine.core.ledger.plan.layout
    checked = [lane_check(layout, step, seed=0, every=1) for step in range(2, 9)]
    assert {check.lane for check in checked if check is not None} & set(layout.lanes_of(SLOW)[-2:])
    same(run_job(shared_job(folder, "coded", **checks)), reference)


def test_lanes_move_beside_it(folder):
    """A split is switched in while lanes are shared: who may have which follows it."""
    from tests.processes.test_stragglers import says

    settings = {"lanes": 16, "steps": 32, "stragglers": {"action": "lanes"}}
    reference = run_job(byte_job(folder, 1, **settings))
    run = run_job(shared_job(folder, "take_over", 4, **settings), patch=both(says({2: 2.0}, since=10), eager))
    same(run, reference)
    (move,) = run.record.of("lanes_moved")
    assert move["lanes"][2][1] == 2


def test_a_slowness_on_purpose_changes_no_bit(folder, reference):
    """With real waiting, and real clocks: who takes over what depends on the machine."""
    run = run_job(shared_job(folder, "first_result"), [slow(1, 4, factor=20.0, steps=2), slow(2, 6, factor=9.0)])
    same(run, reference)
