"""Workers that live and do nothing, on real actors: named, killed by their node's agent, confirmed gone; same bits."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest

import elastictrain as et
from elastictrain.observe import RunDirectory
from tests.ray.test_controller_death import AtRow, job
from tests.support.raylets import ends_within

pytestmark = [pytest.mark.ray, pytest.mark.timeout(240), pytest.mark.usefixtures("shared_ray")]


def frozen_events(run_dir: Path) -> list[dict[str, Any]]:
    return [event.data for event in RunDirectory.open(run_dir).events() if event.kind == "frozen"]


def test_a_worker_that_is_told_to_go_hands_over_and_leaves(tmp_path: Path, undisturbed: str) -> None:
    watcher = AtRow({20: lambda: os.kill(watcher.pids[1], signal.SIGTERM)})
    disturbed = et.run(job(tmp_path, "told"), observer=watcher)
    assert disturbed.digest == undisturbed
    assert disturbed.world_sizes == [3, 2]
    assert disturbed.recoveries == [], "nothing was lost and nothing redone"
    (notice,) = [e.data for e in RunDirectory.open(tmp_path / "told").events() if e.kind == "preemption"]
    assert (notice["workers"], notice["reason"]) == ([1], "SIGTERM")
    assert notice["notice_s"] == pytest.approx(30.0, abs=1.0), "workers.notice_s"
    assert not frozen_events(tmp_path / "told"), "and nobody was taken for frozen"
    assert ends_within(watcher.pids[1], 20.0)


def test_a_stopped_process_is_named_and_replaced_although_ray_never_notices(tmp_path: Path, undisturbed: str) -> None:

    def freeze(worker: int) -> None:
        os.kill(watcher.pids[worker], signal.SIGSTOP)

    watcher = AtRow({20: lambda: freeze(1), 120: lambda: freeze(0)})
    disturbed = et.run(job(tmp_path, "frozen"), observer=watcher)
    assert disturbed.digest == undisturbed
    assert [event["worker"] for event in frozen_events(tmp_path / "frozen")] == [1, 0]
    assert all("stopped by a signal" in event["reason"] for event in frozen_events(tmp_path / "frozen"))
    assert disturbed.world_sizes == [3, 2, 1]
    assert [r.steps_redone <= 1 for r in disturbed.recoveries] == [True, True]
    for pid in (watcher.pids[0], watcher.pids[1]):
        assert not Path(f"/proc/{pid}/cmdline").exists() or not Path(f"/proc/{pid}/cmdline").read_bytes(), "gone"
