"""`elastictrain whatif` on a run that has just ended."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

import elastictrain as et
from elastictrain.cli import app
from tests.support.process_cluster import byte_job

pytestmark = [pytest.mark.ray, pytest.mark.timeout(300)]


def test_what_a_run_has_recorded_is_taken_apart(shared_ray: None, tmp_path: Path) -> None:
    run_dir, steps = tmp_path / "run", 24
    et.run(byte_job(tmp_path, steps=steps, workers=2, run_dir=str(run_dir)))
    lines = [json.loads(line) for line in (run_dir / "signals.jsonl").read_text().splitlines()]
    assert len(lines) > steps // 2
    done = CliRunner().invoke(app, ["whatif", str(run_dir), "--json"])
    assert done.exit_code == 0, done.output
    assert json.loads(done.output)["workers"]
