"""`plan: auto` in a run: fewer workers than allowed, the same bits, and a line that says why."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

import elastictrain as et
from elastictrain.observe import RunDirectory
from tests.support.process_cluster import byte_job, run_job

pytestmark = [pytest.mark.ray, pytest.mark.timeout(300)]


def test_the_same_bits_whatever_it_chooses(shared_ray: None, tmp_path: Path) -> None:
    expected = run_job(byte_job(tmp_path, steps=4, workers=1)).digest
    slow = {"name": "slow", "alpha_s": 0.5, "beta_bytes_s": 1e6}
    there = {"groups": [{"device": "a100-80", "nodes": 3, "inter": "slow"}], "links": [slow]}
    (tmp_path / "cluster.yaml").write_text(yaml.safe_dump(there))
    job = byte_job(
        tmp_path, steps=4, workers={"min": 1, "max": 3}, plan="auto", cluster=str(tmp_path / "cluster.yaml"),
        run_dir=str(tmp_path / "run"),
    )  # fmt: skip
    summary = et.run(job)
    assert summary.digest == expected
    (chosen,) = [event for event in RunDirectory.open(tmp_path / "run").events() if event.kind == "plan_chosen"]
    assert chosen.data["workers"] == 1
    assert (tmp_path / "run" / "job.yaml").read_text().count("plan: auto") == 1
