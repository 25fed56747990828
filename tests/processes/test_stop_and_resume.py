"""A run that ends before its last step, and the run that goes on from what it has stored."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from elastictrain.controller import events as ev
from elastictrain.engine.resume import find_start
from elastictrain.faults import kill
from elastictrain.job import Job
from elastictrain_checkpoint import Store, list_steps, load
from tests.support.plants import wait_for_pause
from tests.support.process_cluster import Run, byte_job, plans_of, run_job

pytestmark = [pytest.mark.processes, pytest.mark.timeout(120)]


def stored(path: Path, *, every_steps: int, at_end: bool = True) -> dict[str, Any]:
    return {"path": str(path / "ckpt"), "every_steps": every_steps, "keep": 10, "at_end": at_end}


def go_on(job: Job, step: int | None = None) -> tuple[Run, list[tuple[str, dict[str, Any]]]]:
    """What `elastictrain run --resume [--resume-step]` does, on processes: the run, and the notes of its start."""
    start = find_start(job, resume=True, step=step)
    return run_job(job, restore=start.restore, base_generation=start.generation), list(start.notes)


def stopped_in_step_6(job: Job) -> Run:
    """A stop is requested when the row of step 4 is recorded, so after vote 5; vote 6 waits until it says so."""

    def stop(driver: Any, values: Any) -> None:
        if values["step"] == 4:
            driver.request(ev.StopRequested(0.0, "enough"))

    run = run_job(job, patch=wait_for_pause(6), on_row=stop)
    assert (run.outcome.outcome, run.outcome.error, run.outcome.step) == ("stopped", "enough", 6)
    return run


def test_a_stop_stores_the_commit_that_it_stops_at(folder, tmp_path, reference):
    job = byte_job(folder, checkpoint=stored(tmp_path, every_steps=4))
    run = stopped_in_step_6(job)
    assert [event["step"] for event in run.record.of("checkpoint")] == [4, 6]
    assert list_steps(Store(job.checkpoint.path)) == [4, 6]
    assert [row["step"] for row in run.record.rows] == [1, 2, 3, 4, 5, 6]
    then, notes = go_on(byte_job(folder, workers=2, checkpoint=stored(tmp_path, every_steps=4)))
    assert notes == []
    assert then.digest == reference.digest
    assert run.losses | then.losses == reference.losses
    assert sorted(then.losses) == [7, 8]


def test_a_stop_while_workers_are_missing_stores_what_the_others_hold(folder, tmp_path, reference):
    def stop(driver: Any, kind: str) -> None:
        if kind == "gathering":
            driver.request(ev.StopRequested(0.0, "enough"))

    all_or_none = {"min": 3, "max": 3, "replace": True}
    job = byte_job(folder, workers=all_or_none, checkpoint=stored(tmp_path, every_steps=8))
    run = run_job(job, [kill(worker=1, step=5, phase="exchange")], on_event=stop, patch=wait_for_pause(6))
    assert (run.outcome.outcome, run.outcome.error) == ("stopped", "enough")
    assert [event["step"] for event in run.record.of("checkpoint")] == [run.outcome.step]
    assert run.outcome.step in (5, 6), "what was committed, and at most one step until the pause"
    last = plans_of(run)[-1]
    assert last.layout.workers == (0, 2)
    then, notes = go_on(byte_job(folder, workers=2, checkpoint=stored(tmp_path, every_steps=8)))
    assert notes == []
    assert then.digest == reference.digest
    assert run.losses | then.losses == reference.losses


def test_a_stop_without_a_checkpoint_setting_ends_as_clean(folder, reference):
    run = stopped_in_step_6(byte_job(folder))
    assert run.record.of("checkpoint") == []
    assert run.record.of("worker_lost") == []
    assert [(row["step"], row["loss"]) for row in run.record.rows] == [*reference.losses.items()][: len(run.losses)]


def test_an_older_step_is_gone_on_from_and_what_came_after_it_is_given_up(folder, tmp_path, reference):
    whole = run_job(byte_job(folder, checkpoint=stored(tmp_path, every_steps=2)))
    assert whole.digest == reference.digest
    again = byte_job(folder, workers=2, checkpoint=stored(tmp_path, every_steps=3, at_end=False))
    store = Store(again.checkpoint.path)
    assert list_steps(store) == [2, 4, 6, 8]
    run, notes = go_on(again, step=2)
    assert notes == [("given_up", {"step": 2, "steps": [4, 6, 8]})]
    assert [event["step"] for event in run.record.of("checkpoint")] == [3, 6]
    assert run.digest == reference.digest
    assert {step: loss for step, loss in reference.losses.items() if step > 2} == run.losses
    # 4 and 8 have not happened in the history of this run; they went when 3 was there. 6 was written anew.
    assert list_steps(store) == [2, 3, 6]
    assert load(store, 6).generation > load(store, 2).generation
