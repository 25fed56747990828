"""Lanes that are late are dropped: the run is its own replay, bit for bit, whoever dies meanwhile; and where nothing
was dropped it is the undisturbed run.

Who is late is planted, so that nothing depends on how busy this machine is (`plants_dropping`).
"""

from __future__ import annotations

from typing import Any

import pytest

from elastictrain.data.audit import Auditor, Verdict
from elastictrain.data.stages import first_stage, open_stage
from elastictrain.engine.resume import find_start
from elastictrain.faults import add, drain, kill, slow
from elastictrain.job import Job
from elastictrain.stragglers.signals import decode
from tests.support.plants import both
from tests.support.plants_dropping import late, never
from tests.support.plants_sharing import SLOW
from tests.support.plants_storing import all_is_known_before, commits_are_fast
from tests.support.process_cluster import RECIPES, Run, byte_job, plans_of, run_job

pytestmark = [pytest.mark.processes, pytest.mark.timeout(120)]
STEPS = tuple(range(3, 7))
LAST = [6, 7]
"""Of the lanes of worker 1, 4 to 7."""


def dropping_job(folder, workers: int | dict[str, Any] = 3, **settings: Any) -> Job:
    return byte_job(folder, workers, **({"redundancy": {"lanes": "drop_slowest", "drop_at_most": 2}} | settings))


def dropped(run: Run) -> dict[int, list[int]]:
    """By step; what happened last counts, as in metrics.jsonl."""
    return {row["step"]: row["lanes_dropped"] for row in run.record.rows}


def rows_of(run: Run) -> dict[int, tuple[Any, ...]]:
    said = ("loss", "grad_norm", "samples", "tokens", "samples_hash", "lanes_dropped")
    return {row["step"]: tuple(row[name] for name in said) for row in run.record.rows}


def replay(run: Run, job: Job, workers: int) -> Run:
    """The run again, on another number of workers, where the same lanes do not count."""
    recorded = {step: tuple(lanes) for step, lanes in dropped(run).items() if lanes}
    changes = {"redundancy": {"replay": recorded}, "workers": {"max": workers, "replace": False}, "checkpoint": None}
    return run_job(Job(**(job.model_dump() | changes)))


def is_its_replay(run: Run, job: Job, workers: int = 2) -> None:
    assert run.outcome.outcome == "finished", run.record.events[-5:]
    again = replay(run, job, workers)
    assert again.digest == run.digest
    assert rows_of(again) == rows_of(run)


@pytest.mark.parametrize("when", ["before", "within", "after"])
def test_lanes_that_are_late_do_not_count(folder, reference, when):
    """With BatchNorm, so with a counter, and a buffer whose mean is over the lanes that count."""
    job = dropping_job(folder)
    run = run_job(job, patch=late(STEPS, when=when))
    assert dropped(run) == {step: LAST if step in STEPS else [] for step in range(1, 9)}
    assert run.digest != reference.digest
    assert [run.losses[step] == reference.losses[step] for step in (1, 2, 3)] == [True, True, False]
    assert all(row["samples"] == 2 * (9 if row["step"] in STEPS else 11) for row in run.record.rows)
    assert "taken_over" not in run.record.rows[0]
    for workers in (1, 2, 4):
        is_its_replay(run, job, workers)
    said = {said.step: decode(said.records)["lanes"].tolist() for said, _ in run.record.signalled}
    assert all(said[step] == [4, 3 if when == "after" else 2, 3] for step in STEPS), said


def test_where_nothing_is_dropped_it_is_the_undisturbed_run(folder, reference):
    run = run_job(dropping_job(folder), [kill(2, 4, "claim")], patch=never)
    assert (run.digest, run.losses) == (reference.digest, reference.losses)
    assert dropped(run) == {step: [] for step in range(1, 9)}


def test_a_worker_may_lose_its_only_lane(folder):
    """A model without integer buffers."""
    job = dropping_job(
        folder, recipe=f"{RECIPES}:Plain", lanes=3, redundancy={"lanes": "drop_slowest"}
    )  # fmt: skip
    run = run_job(job, patch=late(STEPS))
    assert dropped(run) == {step: [1] if step in STEPS else [] for step in range(1, 9)}
    is_its_replay(run, job, 3)


DEATHS = [
    *((0, phase) for phase in ("compute", "claim", "agree", "exchange", "mirror", "vote", "apply", "gather")),
    *((SLOW, phase) for phase in ("compute", "agree", "vote", "apply")),
]


@pytest.mark.parametrize(("victim", "phase"), DEATHS)
def test_whoever_dies_in_whatever_phase_it_is_its_own_replay(folder, victim, phase):
    """A step that was committed keeps what was dropped in it; another one is decided anew: of two workers one has
    nothing to say of the other's lanes 4 to 7."""
    job = dropping_job(folder)
    run = run_job(job, [kill(victim, 4, phase)], patch=late(STEPS))
    assert len(plans_of(run)) == 2
    assert dropped(run)[3] == LAST
    is_its_replay(run, job)
    if phase in ("apply", "gather"):
        assert dropped(run)[4] == LAST, "it was applied by those that are left"
    if victim == SLOW:
        assert all(dropped(run)[step] == [] for step in (5, 6))


def test_whoever_drops_dies_in_the_middle_of_it(folder):
    job = dropping_job(folder)
    run = run_job(job, [kill(0, 4, "drop")], patch=late(STEPS, first=0))
    assert len(plans_of(run)) == 2
    is_its_replay(run, job)


def test_what_is_computed_again_after_going_back_is_decided_anew(folder, tmp_path):
    """Both holders of some blocks die in step 8. Rows of the steps that are computed again replace those before."""
    job = dropping_job(folder, checkpoint={"path": str(tmp_path / "ckpt"), "every_steps": 4})
    patch = both(both(late(STEPS), commits_are_fast), all_is_known_before(8))
    run = run_job(job, [kill(0, 8, "exchange")], die_together=(0, 1), patch=patch)
    (back,) = run.record.of("went_back")
    assert back["to_step"] == 4
    for step in (5, 6):
        said = [row["lanes_dropped"] for row in run.record.rows if row["step"] == step]
        assert said == [LAST, []], "worker 2 is alone then"
    is_its_replay(run, job)


def test_a_resumed_run_goes_on_in_its_record(folder, tmp_path):
    settings = {"checkpoint": {"path": str(tmp_path / "ckpt"), "every_steps": 4, "keep": 10}}
    job = dropping_job(folder, **settings)
    first = run_job(job, patch=both(late(STEPS), commits_are_fast))
    start = find_start(job, resume=True, step=4)
    then = run_job(job, restore=start.restore, base_generation=start.generation, patch=late((7,)))
    assert dropped(then) == {5: [], 6: [], 7: LAST, 8: []}
    first.record.rows += then.record.rows
    first.outcome = then.outcome
    is_its_replay(first, job)


def test_workers_come_and_go(folder):
    job = dropping_job(folder, {"max": 4, "start": 3, "min": 2}, steps=12)
    run = run_job(job, [add(2), drain(0, 5)], patch=late(tuple(range(3, 10))))
    is_its_replay(run, job, 5)


def test_in_a_step_in_which_a_lane_is_checked_all_count(folder):
    job = dropping_job(folder, integrity={"recompute_every": 2})
    run = run_job(job, patch=late((3, 5)))
    assert dropped(run) == {step: LAST if step in (3, 5) else [] for step in range(1, 9)}
    is_its_replay(run, job, 3)


def test_the_audit_says_which_samples_did_not_count(folder):
    job = dropping_job(folder)
    run = run_job(job, patch=late(STEPS))
    auditor, verdict = Auditor((first_stage(job),), lambda stage: open_stage(job, stage)), Verdict()
    recorded = [(row["step"], row["samples_hash"]) for row in run.record.rows]
    for step in auditor.audit(recorded, dropped(run)):
        verdict.add(step)
    assert verdict.agrees
    assert (verdict.samples, verdict.dropped, verdict.dropped_in) == (8 * 22 - 16, 8, list(STEPS))
    auditor.close()
    others = Auditor((first_stage(job),), lambda stage: open_stage(job, stage))
    wrong = [step.step for step in others.audit(recorded) if not step.agrees]
    others.close()
    assert wrong == list(STEPS)


def test_a_slowness_on_purpose_is_replayed(folder):
    """With real waiting, and real clocks: what is dropped, if anything, depends on the machine."""
    job = dropping_job(folder)
    is_its_replay(run_job(job, [slow(1, 4, factor=20.0, steps=2), slow(2, 6, factor=9.0)]), job)
