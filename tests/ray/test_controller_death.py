"""The controller may die at any moment: the workers step on, another one takes over, and the bits stay."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

import elastictrain as et
from elastictrain.observe import Blind, Event, RunDirectory
from tests.support.process_cluster import RAY_STEPS as STEPS
from tests.support.process_cluster import byte_job

pytestmark = [pytest.mark.ray, pytest.mark.timeout(240), pytest.mark.usefixtures("shared_ray")]


class AtRow(Blind):
    """Calls `acts[n]` when the n-th row has arrived; remembers who is who."""

    def __init__(self, acts: Mapping[int, Callable[[], None]]) -> None:
        self.acts, self.rows, self.pids, self.nodes = dict(acts), 0, dict[int, int](), dict[int, str]()
        self.members: list[int] = []

    def row(self, metrics: Mapping[str, Any]) -> None:
        del metrics
        self.rows += 1
        if act := self.acts.pop(self.rows, None):
            act()

    def event(self, event: Event) -> None:
        if event.kind == "forming":
            self.members = event.data["workers"]
        if event.kind == "worker_prepared":
            self.pids[event.data["worker"]] = event.data["pid"]
            self.nodes[event.data["worker"]] = event.data["domain"]


def job(folder: Path, name: str) -> et.Job:
    folder.mkdir(exist_ok=True)
    workers = {"max": 3, "replace": False}
    return byte_job(folder, workers=workers, steps=STEPS, run_dir=str(folder / name))


def kill_controller(run_dir: Path) -> None:
    """Whoever writes to the run directory is the controller."""
    os.kill(json.loads((run_dir / "lock").read_text())["pid"], signal.SIGKILL)


def test_killed_twice_and_a_worker_with_it(tmp_path: Path, undisturbed: str) -> None:
    run_dir = tmp_path / "disturbed"

    def both() -> None:
        kill_controller(run_dir)
        os.kill(watcher.pids[1], signal.SIGKILL)  # nobody is there to hear of it

    watcher = AtRow({20: lambda: kill_controller(run_dir), 90: both})
    disturbed = et.run(job(tmp_path, "disturbed"), observer=watcher)
    assert disturbed.digest == undisturbed
    assert not watcher.acts, "both have happened"
    run = RunDirectory.open(run_dir)
    assert [row.step for row in run.metrics()] == list(range(1, STEPS + 1)), "every step once"
    back = [event.data for event in run.events() if event.kind == "controller_back"]
    assert len(back) == 2
    assert all(event["gone_s"] < 20 for event in back), "it is restarted, not waited out"
    assert disturbed.world_sizes == [3, 2]
    (recovery,) = disturbed.recoveries
    assert recovery.steps_redone <= 1
    assert len({event.data["worker"] for event in run.events() if event.kind == "worker_prepared"}) == 3, "none again"
