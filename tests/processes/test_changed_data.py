"""Runs whose data change while they stand still: what comes after the change is the same bits, whatever happens."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from elastictrain.data.audit import Auditor, Verdict
from elastictrain.data.kept import Beside
from elastictrain.data.stages import open_stage
from elastictrain.engine.resume import Start, find_start
from elastictrain.faults import kill
from elastictrain.job import Job, Mixture
from tests.support.process_cluster import Run, byte_job, run_job

pytestmark = [pytest.mark.processes, pytest.mark.timeout(180)]

CHANGE = 4


def single(folder: Path, tmp_path: Path, workers: int, **settings: Any) -> Job:
    where = tmp_path / "text"
    job = byte_job(folder, workers=workers, checkpoint={"path": str(tmp_path / "ckpt"), "every_steps": 2, "keep": 10},
                   **settings)  # fmt: skip
    if not where.exists():
        where.mkdir()
        shutil.copy(job.data.path, where / "one.parquet")
    return job.model_copy(update={"data": job.data.model_copy(update={"path": str(where)})})


def mixed(folder: Path, tmp_path: Path, workers: int, **settings: Any) -> Job:
    job = single(folder, tmp_path, workers, **settings)
    other = tmp_path / "lines.txt"
    if not other.exists():
        other.write_text("".join(f"line {n} {'abc' * (n % 9)}\n" for n in range(400)))
    lines = {"kind": "text", "path": str(other), "text_column": "text"}
    data = {"sources": {"files": job.data.model_dump(), "lines": lines}, "weights": {"files": 2, "lines": 1}}
    return job.model_copy(update={"data": Mixture.model_validate({**data, "sequence_length": 32})})


def change(tmp_path: Path) -> None:
    table = pa.table({"text": [f"another text, number {n}. " * (n % 7 + 1) for n in range(300)]})
    pq.write_table(table, tmp_path / "text" / "two.parquet", row_group_size=50)


def hashes(run: Run) -> dict[int, str]:
    return {row["step"]: row["samples_hash"] for row in run.record.rows}


@pytest.mark.parametrize("job_of", [single, mixed])
def test_after_a_change_any_workers_kills_and_resumes_give_the_same_bits(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, job_of: Any
) -> None:
    begun = job_of(folder, tmp_path, 2, steps=CHANGE)
    first = find_start(begun, resume=False)
    for one in first.kept.values():
        one.write(tmp_path / "kept")
    before = run_job(begun, stages=first.stages)
    assert before.outcome.outcome == "finished"
    change(tmp_path)
    start = find_start(job_of(folder, tmp_path, 1), resume=True, changed="new_stage")
    assert next(kind for kind, _ in start.notes) == "data_changed"

    def go_on(start: Start, workers: int, faults: Any = (), later: int = 0) -> Run:
        job = job_of(folder, tmp_path, workers)
        run = run_job(job, faults, restore=start.restore, base_generation=start.generation + later, stages=start.stages)
        assert run.outcome.outcome == "finished", run.outcome.error
        return run

    undisturbed = go_on(start, 1)
    killed = go_on(start, 3, [kill(1, 5, "compute"), kill(0, 7, "apply")], later=10)
    assert killed.digest == undisturbed.digest
    assert hashes(killed) == hashes(undisturbed)
    again = find_start(job_of(folder, tmp_path, 2), resume=True, step=6)
    assert [kind for kind, _ in again.notes] == ["given_up"], "the checkpoint knows of the stage"
    assert again.stages == start.stages
    assert go_on(again, 2, [kill(1, 8, "exchange")], later=10).digest == undisturbed.digest

    names = {name: one.identity for name, one in first.kept.items()}
    beside = Beside(tmp_path / "kept", names, start.stages[-1].data)
    job, verdict = job_of(folder, tmp_path, 1), Verdict()
    auditor = Auditor(start.stages, lambda stage: open_stage(job, stage, start.stages[: stage.index], beside=beside))
    recorded = hashes(before) | hashes(killed)
    for step in auditor.audit(sorted(recorded.items())):
        verdict.add(step)
    assert verdict.agrees
    assert (verdict.steps, verdict.unrecorded) == (8, 0)
