"""The head of a Ray cluster dies and comes back, with its tables in Redis: the run steps on, recovers from a death
while the head is away, and gets a stand-in when it is back.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.process_cluster import run_job
from tests.support.redis_head import LOSE_AFTER, START_AFTER, STEPS, WORKERS, unhurried_job

pytestmark = [
    pytest.mark.ray,
    pytest.mark.timeout(480),
    pytest.mark.skipif(shutil.which("redis-server") is None, reason="needs a redis-server on PATH"),
]


def test_a_head_that_is_killed_and_started_again(tmp_path: Path) -> None:
    hurry = tmp_path / "undisturbed"
    hurry.touch()
    undisturbed = run_job(unhurried_job(tmp_path, hurry, workers=1)).digest
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    done = subprocess.run(
        [sys.executable, "-m", "tests.support.redis_head", str(tmp_path)],
        env=environment, capture_output=True, text=True, timeout=360, check=False, cwd=Path(__file__).parents[2],
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-5000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["controller_beside_us"], "it lives on the node of whoever started the run"
    assert not found["listened"], "the head was away all the time"
    assert found["lost_at"] - found["killed_at"] >= LOSE_AFTER / 2, "without it, workers step on"
    assert found["started_at"] - found["lost_at"] >= START_AFTER / 2, "and also the two that are left, after a recovery"
    assert found["worlds"] == [WORKERS, WORKERS - 1, WORKERS], "a stand-in through the head that came back"
    assert found["redone"] in ([0], [1])
    assert found["members"] == list(range(WORKERS + 1))
    assert found["rows"] == list(range(1, STEPS + 1)), "every step once"
    assert found["kinds"].count("controller_back") == 0, "the controller lived on"
    assert found["kinds"].count("worker_lost") == 1, "nobody was lost but the one that was killed"
    assert found["kinds"].count("node_lost") == 0
    assert found["digest"] == undisturbed
