"""`plan: auto` in a run: fewer workers than allowed, the same bits, and a line that says why."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

import elastictrain as et
from elastictrain.cli import app
from elastictrain.observe import RunDirectory
from elastictrain.observe.signal_log import read_signals
from tests.support.process_cluster import byte_job, run_job

pytestmark = [pytest.mark.ray, pytest.mark.timeout(300)]


def test_the_same_bits_whatever_it_chooses(shared_ray: None, tmp_path: Path) -> None:
    expected = run_job(byte_job(tmp_path, steps=4, workers=1)).digest
    for beta, chosen in ((1e6, 1), (1e12, 3)):
        link = {"name": "own", "alpha_s": 0.5 / beta, "beta_bytes_s": beta, "crowd": 0}
        there = {"groups": [{"device": "a100-80", "nodes": 3, "inter": "own"}], "links": [link]}
        (tmp_path / "cluster.yaml").write_text(yaml.safe_dump(there))
        folder = tmp_path / f"run-{chosen}"
        job = byte_job(
            tmp_path, steps=4, workers={"min": 1, "max": 3}, plan="auto", cluster=str(tmp_path / "cluster.yaml"),
            run_dir=str(folder),
        )  # fmt: skip
        summary = et.run(job)
        assert summary.digest == expected
        (said,) = [event for event in RunDirectory.open(folder).events() if event.kind == "plan_chosen"]
        assert said.data["workers"] == chosen
    # Three workers have said how their steps went.
    records, _ = read_signals(tmp_path / "run-3")
    assert {record.workers for record in records} == {(0, 1, 2)}
    assert [record.step for record in records] == [1, 2, 3, 4]
    done = CliRunner().invoke(app, ["whatif", str(tmp_path / "run-3"), "--json"])
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["steps"] + json.loads(done.stdout)["left_out"] == 4
