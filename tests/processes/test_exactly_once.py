"""Real kills, joins and drains: the samples that workers say they used are those of the order, step by step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict

import pytest

from elastictrain.data.audit import Auditor, Verdict
from elastictrain.data.ids import split_ids
from elastictrain.data.stages import Skip, first_stage, open_stage
from elastictrain.engine.resume import find_start
from elastictrain.faults import PHASES, add, drain, kill
from elastictrain.job import Job
from elastictrain.protocol import Stage
from tests.processes.test_mixture import mixed_job
from tests.support.process_cluster import Run, byte_job, run_job

pytestmark = [pytest.mark.processes, pytest.mark.timeout(120)]


def audited(job: Job, rows: Sequence[dict], stages: Sequence[Stage] = ()) -> Verdict:
    auditor = Auditor(stages or (first_stage(job),), lambda stage: open_stage(job, stage))
    verdict = Verdict()
    for step in auditor.audit([(row["step"], row["samples_hash"]) for row in rows]):
        verdict.add(step)
    auditor.close()
    return verdict


def happened(run: Run) -> Sequence[dict]:
    """Of a run that lost both holders of a block, which steps it has taken since; of others, all that it said."""
    return (
        list({row["step"]: row for row in run.record.rows}.values()) if run.record.of("went_back") else run.record.rows
    )


def hashes(run: Run) -> dict[int, str]:
    return {row["step"]: row["samples_hash"] for row in run.record.rows}


@pytest.fixture(scope="module")
def calm(folder, reference) -> dict[int, str]:
    verdict = audited(byte_job(folder, workers=1), reference.record.rows)
    assert verdict.agrees
    assert (verdict.steps, verdict.samples, verdict.unrecorded) == (8, 8 * 22, 0)
    assert verdict.running == verdict.running_recorded
    assert len(set(hashes(reference).values())) == 8
    return hashes(reference)


@pytest.mark.parametrize("phase", PHASES)
def test_a_kill_in_any_phase_changes_no_sample(folder, calm, phase):
    assert hashes(run_job(byte_job(folder), [kill(1, 4, phase)])) == calm


@pytest.mark.parametrize("workers", [2, 3, 5, 7, 8])
def test_kills_joins_and_drains_in_worlds_of_many_sizes(folder, calm, workers):
    faults = [kill(0, 2, "vote"), add(3), drain(1, 5), kill(workers, 7, "compute")]
    job = byte_job(folder, workers={"max": workers + 1, "start": workers, "min": 1, "replace": True})
    run = run_job(job, faults)
    assert hashes(run) == calm
    assert audited(job, happened(run)).agrees


def test_kills_joins_and_drains_in_a_world_of_thirteen(folder):
    """More workers than the other runs' eleven lanes: nobody to compare with, the audit says what the ids are."""
    workers = {"max": 14, "start": 13, "min": 1, "replace": True}
    run = run_job(
        byte_job(folder, lanes=14, workers=workers), [kill(0, 2, "vote"), add(3), drain(1, 5), kill(12, 7, "compute")]
    )
    verdict = audited(byte_job(folder, lanes=14), happened(run))
    assert (verdict.agrees, verdict.steps, verdict.samples) == (True, 8, 8 * 28)
    assert verdict.running == verdict.running_recorded
    assert 13 in {row["world"] for row in run.record.rows}


def test_a_mixture_whose_shares_and_lengths_change_is_used_exactly_once(folder, tmp_path):
    job = mixed_job(folder, tmp_path / "lines", workers=3)
    run = run_job(job, [kill(worker=1, step=4, phase="exchange")])
    verdict = audited(job, run.record.rows)
    assert verdict.agrees
    assert (verdict.steps, verdict.unrecorded) == (job.steps, 0)
    assert verdict.running == verdict.running_recorded
    assert hashes(run_job(mixed_job(folder, tmp_path / "lines", workers=1))) == hashes(run)


def test_what_is_skipped_is_used_no_more_whatever_happens_then(folder, tmp_path, reference, calm):
    job = byte_job(folder, checkpoint={"path": str(tmp_path / "ckpt"), "every_steps": 4, "keep": 10})
    before = run_job(job)
    assert hashes(before) == calm
    auditor = Auditor((first_stage(job),), lambda stage: open_stage(job, stage))
    blocks, rows = split_ids(auditor.ids(6, 3))
    poison = {(int(b), int(r)) for b, r in zip(blocks, rows, strict=True)}
    skips = [Skip("step 6, lane 3", row, row + 1, block=block) for block, row in sorted(poison)]
    skips.append(Skip("step 7", 6, 7, order=0))
    start = find_start(job, resume=True, step=4, skips=skips)
    assert [kind for kind, _ in start.notes] == ["data_skipped", "given_up"]
    assert start.stages[-1].skips == len(skips)
    runs = [
        run_job(job, faults, restore=start.restore, base_generation=start.generation + 10 * n, stages=start.stages)
        for n, faults in enumerate(([], [kill(0, 6, "exchange")]))
    ]
    assert runs[0].digest == runs[1].digest != reference.digest
    assert hashes(runs[0]) == hashes(runs[1])
    assert audited(job, runs[1].record.rows, start.stages).agrees
    assert hashes(runs[0])[5] == calm[5]
    assert all(hashes(runs[0])[step] != calm[step] for step in (6, 7, 8))
    after = Auditor(start.stages, lambda stage: open_stage(job, stage))
    for step in range(5, 9):
        for lane in range(job.lanes):
            assert not poison & set(zip(*(a.tolist() for a in split_ids(after.ids(step, lane))), strict=True))
    again = find_start(job, resume=True, skips=skips)  # the manifest of step 8 holds the stage: nothing new to do
    assert again.notes == ()
    assert [asdict(stage) for stage in again.stages] == [asdict(stage) for stage in start.stages]
