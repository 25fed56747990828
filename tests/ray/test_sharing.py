"""A worker with hiccups on Ray: others take over its lanes within the step, and the bits stay."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

import elastictrain as et
from elastictrain.faults import KillController, kill, slow
from elastictrain.job import load_job
from elastictrain.observe import Blind, RunDirectory
from elastictrain.observe.standing import status_of
from tests.support.process_cluster import RECIPES, byte_job, run_job

pytestmark = [pytest.mark.ray, pytest.mark.timeout(300), pytest.mark.usefixtures("shared_ray")]
LANES, STEPS, SLOW = 12, 120, 1


class Hurries(Blind):
    """Lets the lanes wait no more once some of the slow worker's were taken over in two steps."""

    def __init__(self, until: Path) -> None:
        self.until, self.seen = until, 0

    def row(self, metrics: Mapping[str, Any]) -> None:
        if "lanes_dropped" in metrics:
            self.seen += bool(metrics["lanes_dropped"])
        else:
            losers = metrics["taken_over"]["from"]
            self.seen += str(SLOW) in losers or SLOW in losers
        if self.seen >= 2:
            self.until.touch()


def test_lanes_of_a_worker_with_hiccups_are_taken_over(tmp_path: Path) -> None:
    """Every eighth step is one, as long as nobody has helped; and then one of those who have claimed lanes dies."""
    waits = {"recipe": f"{RECIPES}:Unhurried", "recipe_args": {"until": str(tmp_path / "hurry")}}
    settings = {"lanes": LANES, "steps": STEPS, **waits}
    hurries = Hurries(tmp_path / "hurry")
    shared = byte_job(tmp_path, 3, redundancy={"lanes": "first_result"}, run_dir=str(tmp_path / "run"), **settings)
    hiccups = [slow(SLOW, step, factor=8.0, steps=1) for step in range(10, STEPS - 20, 8)]
    summary = et.run(shared, faults=[*hiccups, kill(0, STEPS - 10, "claim")], observer=hurries)
    hurries.until.touch()
    assert summary.digest == run_job(byte_job(tmp_path, 1, **settings)).digest
    run = RunDirectory.open(tmp_path / "run")
    assert [row.step for row in run.metrics()] == list(range(1, STEPS + 1)), "every step once"
    assert hurries.seen >= 2
    assert sum(row.taken_over.losers.get(SLOW, 0) for row in run.metrics() if row.taken_over is not None) >= 2
    assert len(summary.recoveries) == 1
    assert status_of(run).taken_over is not None


def test_a_run_that_dropped_lanes_is_repeated_from_its_directory(tmp_path: Path) -> None:
    """Its controller is replaced meanwhile, and a worker dies."""
    waits = {"recipe": f"{RECIPES}:Unhurried", "recipe_args": {"until": str(tmp_path / "hurry")}}
    settings = {"lanes": LANES, "steps": STEPS, **waits}
    hurries = Hurries(tmp_path / "hurry")
    drops = {"lanes": "drop_slowest", "drop_at_most": 3}
    job = byte_job(tmp_path, 3, redundancy=drops, run_dir=str(tmp_path / "run"), **settings)
    hiccups = [slow(SLOW, step, factor=8.0, steps=1) for step in range(10, STEPS - 20, 8)]
    faults = [*hiccups, KillController(step=STEPS - 30), kill(0, STEPS - 10, "claim")]
    summary = et.run(job, faults=faults, observer=hurries)
    hurries.until.touch()
    run = RunDirectory.open(tmp_path / "run")
    assert [row.step for row in run.metrics()] == list(range(1, STEPS + 1)), "every step once"
    assert hurries.seen >= 2
    assert status_of(run).lanes_dropped is not None
    again = byte_job(tmp_path, 2, redundancy={"replay": str(run.path)}, run_dir=str(tmp_path / "again"), **settings)
    assert et.run(again).digest == summary.digest
    repeated = RunDirectory.open(tmp_path / "again")
    assert [row.lanes_dropped for row in repeated.metrics()] == [row.lanes_dropped for row in run.metrics()]
    assert load_job(repeated.path / "job.yaml").redundancy.replayed, "it needs the other run no more"
