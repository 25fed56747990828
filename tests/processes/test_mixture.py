"""A run on a mixture with stages: the same bits for any number of workers, and after a kill."""

from __future__ import annotations

from pathlib import Path

import pytest

from elastictrain.faults import kill
from elastictrain.job import Job, Mixture
from tests.support.process_cluster import byte_job, run_job

pytestmark = [pytest.mark.processes, pytest.mark.timeout(120)]


def mixed_job(folder: Path, other: Path, workers: int) -> Job:
    """Two sources of text packed by best fit, other weights from step 3 on, shorter rows from step 5 on."""
    job = byte_job(folder, workers=workers)
    source = job.data.model_copy(update={"packing": "best_fit"})
    other.mkdir(exist_ok=True)
    (other / "lines.txt").write_text("".join(f"line {n} {'abc' * (n % 9)}\n" for n in range(400)))
    lines = {"kind": "text", "path": str(other), "text_column": "text", "packing": "best_fit"}
    data = Mixture.model_validate(
        {
            "sources": {"files": source.model_dump(), "lines": lines},
            "sequence_length": source.sequence_length,
            "weights": {"files": 0.75, "lines": 0.25},
            "stages": [{"from_step": 3, "weights": {"lines": 1}}, {"from_step": 5, "sequence_length": 16}],
        }
    )
    return job.model_copy(update={"data": data})


def test_a_mixture_gives_the_same_bits_on_any_workers_and_after_a_kill(folder: Path, tmp_path: Path) -> None:
    other = tmp_path / "lines"
    alone = run_job(mixed_job(folder, other, workers=1))
    assert alone.outcome.outcome == "finished"
    several = run_job(mixed_job(folder, other, workers=3), [kill(worker=1, step=4, phase="exchange")])
    assert several.outcome.outcome == "finished"
    assert several.digest == alone.digest
    assert several.losses == alone.losses
