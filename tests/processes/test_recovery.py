"""Disturbed run == undisturbed run, by digest: the real controller and engine on gloo processes."""

from __future__ import annotations

import itertools

import pytest

from elastictrain.controller import events as ev
from elastictrain.faults import PHASES, add, drain, kill
from tests.support.plants import both, die_while_blocks_move, last_rows_are_lost, wait_for_company
from tests.support.plants_storing import all_is_known_before, commits_are_fast
from tests.support.process_cluster import Run, byte_job, plans_of, run_job

pytestmark = [pytest.mark.processes, pytest.mark.timeout(120)]


def same(run: Run, reference: Run) -> None:
    """The same state, the same losses, every step published once."""
    assert run.digest == reference.digest, run.record.events[-10:]
    assert run.losses == reference.losses
    steps = [row["step"] for row in run.record.rows]
    if not run.record.of("went_back"):
        assert steps == list(range(1, 9))


LAYOUTS = {
    "2 even": {"workers": {"max": 2}},
    "2 uneven": {"workers": {"max": 2, "lane_shares": {0: 3, 1: 1}, "block_shares": {0: 1, 1: 4}}},
    "3 handed over": {"workers": {"max": 3}, "gradients": "hand_over"},
    "3, one owns nothing": {"workers": {"max": 3, "block_shares": {1: 0}}},
    "4 uneven, handed over": {
        "workers": {"max": 4, "lane_shares": {2: 4}, "block_shares": {0: 3}},
        "gradients": "hand_over",
    },
    "4 in two micro-batches": {"workers": {"max": 4}},
    "7": {"workers": {"max": 7}},
    "no mirrors": {"workers": {"max": 2}, "mirrors": False},
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_gives_the_same_bits(folder, reference, name):
    same(run_job(byte_job(folder, **LAYOUTS[name])), reference)


@pytest.mark.parametrize(("phase", "worker"), [*itertools.product(PHASES, (0, 1, 2))])
def test_a_worker_may_die_in_any_phase(folder, reference, phase, worker):
    run = run_job(byte_job(folder), [kill(worker, 4, phase)])
    same(run, reference)
    (recovery,) = run.record.of("recovery")
    assert recovery["workers"] == [worker]
    assert (recovery["world_before"], recovery["world_after"]) == (3, 2)
    assert recovery["steps_redone"] in ((0, 1) if phase in ("apply", "gather") else (1,))
    assert recovery["restored_from"] is None  # no storage is read


def test_a_schedule_that_raises_ends_the_run_and_tears_nothing(folder):
    """The recipe's code runs before apply touches the state: the user's error, not a death of every worker."""
    run = run_job(byte_job(folder, recipe_args={"fail_at": 4}))
    assert run.outcome.outcome == "failed"
    assert "ValueError: no learning rate for step 4" in (run.outcome.error or "")
    assert not run.record.of("worker_lost")
    assert not run.record.of("went_back")


def test_the_one_that_took_over_dies_too(folder, reference):
    faults = [kill(1, 4, "exchange"), kill(2, 5, "mirror")]
    run = run_job(byte_job(folder), faults, patch=all_is_known_before(5))  # else the two are one recovery
    same(run, reference)
    assert [r["world_after"] for r in run.record.of("recovery")] == [2, 1]
    assert not run.record.of("went_back")


def test_two_at_once_that_do_not_mirror_each_other(folder, reference):
    run = run_job(byte_job(folder, workers=4), [kill(0, 4, "exchange")], die_together=(0, 2))
    same(run, reference)
    assert not run.record.of("went_back")
    assert run.record.of("recovery")[-1]["world_after"] == 2


@pytest.mark.parametrize("checkpoint", [True, False], ids=["checkpoint", "initial state"])
def test_both_holders_lost_goes_back_and_says_so(folder, tmp_path, reference, checkpoint):
    settings = {"checkpoint": {"path": str(tmp_path / "ckpt"), "every_steps": 2}} if checkpoint else {}
    run = run_job(byte_job(folder, **settings), [kill(0, 6, "exchange")], die_together=(0, 1), patch=commits_are_fast)
    same(run, reference)
    (back,) = run.record.of("went_back")
    assert back["to_step"] == (4 if checkpoint else 0)
    assert back["steps_redone"] == 5 - back["to_step"]
    assert run.record.of("recovery")[-1]["steps_redone"] == 6 - back["to_step"]  # with the one that was under way


def test_both_holders_lost_one_after_the_other_goes_back_too(folder, tmp_path, reference):
    """The second dies when the survivors of the first have parked: the same is redone, and said to be."""
    job = byte_job(folder, checkpoint={"path": str(tmp_path / "ckpt"), "every_steps": 2})
    patch = both(commits_are_fast, die_while_blocks_move(generation=2, victim=1, source=2))
    run = run_job(job, [kill(0, 6, "exchange")], patch=patch)
    same(run, reference)
    (back,) = run.record.of("went_back")
    assert (back["to_step"], back["steps_redone"]) == (4, 1)
    assert run.record.of("recovery")[-1]["steps_redone"] == 2


def test_world_of_one_dies_and_goes_on_from_its_checkpoint(folder, tmp_path, reference):
    job = byte_job(
        folder, checkpoint={"path": str(tmp_path / "c"), "every_steps": 3}, workers={"max": 1, "replace": True}
    )
    run = run_job(job, [kill(0, 6, "compute")], patch=commits_are_fast)
    same(run, reference)
    assert run.record.of("went_back")[0]["to_step"] == 3


def test_a_worker_joins_and_one_is_drained(folder, reference):
    job = byte_job(folder, steps=60, workers={"max": 4, "start": 2, "replace": False})
    undisturbed = run_job(byte_job(folder, steps=60, workers=1))
    run = run_job(job, [add(1), drain(0, 4)], patch=wait_for_company(3, generations=1))
    assert run.digest == undisturbed.digest
    assert run.losses == undisturbed.losses
    resized = run.record.of("resized")
    assert {w for r in resized for w in r["joined"]} == {2}
    assert {w for r in resized for w in r["left"]} == {0}
    assert all(r["steps_redone"] == 0 for r in resized)  # planned: nothing is redone


def test_a_warm_spare_takes_the_place_at_once(folder, reference):
    job = byte_job(folder, workers={"max": 3, "spares": 1, "replace": False})
    run = run_job(job, [kill(1, 4, "vote")], all_ready_first=True)
    same(run, reference)
    (recovery,) = run.record.of("recovery")
    assert (recovery["world_after"], recovery["joined"]) == (3, [3])


def test_a_death_while_the_next_generation_forms(folder, reference):
    run = run_job(byte_job(folder, workers=4), [kill(1, 4, "compute"), kill(3, 4, "form")])
    same(run, reference)
    assert run.record.of("recovery")[-1]["world_after"] == 2


def test_a_joiner_that_dies_while_it_joins(folder):
    job = byte_job(folder, steps=30, workers={"max": 3, "start": 2, "replace": False})
    faults = [add(1), *(kill(2, step, "form") for step in range(2, 31))]
    run = run_job(job, faults, patch=wait_for_company(3, generations=1))
    assert run.digest == run_job(byte_job(folder, steps=30, workers=1)).digest
    assert run.record.rows[-1]["world"] == 2
    assert [lost["worker"] for lost in run.record.of("worker_lost")] == [2]


@pytest.mark.parametrize("dtype", ["bf16", "f32"])
def test_what_a_failed_forming_had_begun_to_bring_does_not_count(folder, dtype):
    """Worker 3 takes up blocks in generation 2, which fails before their values come; generation 3 leaves them to
    others. In bf16 a master is memory of its own: published, it would spoil the parameters that worker 3 computes with.
    """
    job = byte_job(folder, workers=5, numerics={"compute_dtype": dtype})
    alone = run_job(byte_job(folder, workers=1, numerics={"compute_dtype": dtype}))
    run = run_job(job, [kill(1, 4, "compute")], patch=die_while_blocks_move(generation=2, victim=4, source=2))
    first, failed, last = (plan.layout for plan in plans_of(run))
    assert failed.held(3) - first.held(3) - last.held(3), "the scenario: blocks that only the failed forming brings"
    assert run.digest == alone.digest
    assert run.losses == alone.losses
    assert run.record.of("recovery")[-1]["world_after"] == 3
    assert not run.record.of("went_back")


def test_no_row_is_lost_when_one_publisher_after_the_other_dies(folder, reference):
    """Worker 1 publishes what worker 0 no longer could, and dies at once with those rows: a seal at step 3 says that
    step 3 is not redone, not that anybody has seen its row.
    """
    faults = [kill(0, 4, "exchange"), kill(1, 4, "vote")]
    run = run_job(byte_job(folder, workers=4), faults, patch=last_rows_are_lost(1, generation=2))
    assert [plan.layout.workers for plan in plans_of(run)] == [(0, 1, 2, 3), (1, 2, 3), (2, 3)]
    assert plans_of(run)[1].step == 3
    same(run, reference)


def test_a_newcomer_publishes_what_happened_before_it_came_when_nobody_else_is_left_to(folder, reference):
    """Workers 0 and 1 take steps 1 to 3, worker 2 joins, and whatever 0 and 1 have to say of steps dies with them."""
    lost = both(last_rows_are_lost(0, generation=2), last_rows_are_lost(1, generation=3))
    patch = both(wait_for_company(3, generations=1), both(last_rows_are_lost(0, generation=1), lost))

    def add_one(driver, kind):
        if kind == "running" and driver.machine.generation == 1:
            driver.request(ev.AddRequested(0.0))

    job = byte_job(folder, workers={"max": 3, "start": 2, "replace": False})
    run = run_job(job, [kill(0, 5, "exchange"), kill(1, 6, "exchange")], patch=patch, on_event=add_one)
    assert [plan.layout.workers for plan in plans_of(run)] == [(0, 1), (0, 1, 2), (1, 2), (2,)]
    assert [plan.published_step for plan in plans_of(run)] == [0, 0, 0, 0]
    same(run, reference)


def test_many_faults_in_one_run(folder):
    """Replaced workers die as well; the numbers go up and the bits stay."""
    steps = 60
    undisturbed = run_job(byte_job(folder, steps=steps, workers=1))
    faults = [kill(w, 4 + 7 * w, PHASES[w % 6]) for w in range(7)]
    job = byte_job(folder, steps=steps, workers={"max": 3, "spares": 1, "replace": True})
    run = run_job(job, faults, patch=wait_for_company(3), all_ready_first=True)
    assert run.digest == undisturbed.digest
    assert run.losses == undisturbed.losses
    assert sorted(lost["worker"] for lost in run.record.of("worker_lost")) == list(range(7))


@pytest.mark.parametrize(
    "settings",
    [
        {"numerics": {"compute_dtype": "bf16"}},
        {"ownership": "whole"},
        {"gradients": "hand_over", "lane_batch_size": 4, "micro_batches": 2},
        {"evaluate_every": 3, "clip_grad_norm": None},
    ],
    ids=["bf16", "whole parameters", "handed over in micro-batches", "evaluation"],
)
def test_the_same_under_other_settings(folder, settings):
    alone = run_job(byte_job(folder, workers=1, **settings))
    run = run_job(byte_job(folder, workers=3, **settings), [kill(0, 4, "mirror"), kill(2, 6, "apply")])
    assert run.digest == alone.digest
    assert run.losses == alone.losses
    if "evaluate_every" in settings:
        found = {row["step"]: row["evaluation"] for row in run.record.rows if "evaluation" in row}
        assert found == {row["step"]: row["evaluation"] for row in alone.record.rows if "evaluation" in row}
        assert sorted(found) == [3, 6, 8]
