"""Nodes that go, on several raylets: with a notice nothing is redone; a silent one is lost to our own heartbeats long
before Ray sees it, and stays fenced when it is back.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.support.raylets import WORKERS

pytestmark = [pytest.mark.ray, pytest.mark.timeout(300)]
STEPS = 250


def test_a_drained_and_a_silent_node_on_five_raylets(tmp_path: Path, undisturbed: str) -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    done = subprocess.run(
        [sys.executable, "-m", "tests.support.raylets", str(tmp_path)],
        env=environment, capture_output=True, text=True, timeout=280, check=False, cwd=Path(__file__).parents[2],
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    silent_node(found, undisturbed)
    drained_node(found["drained"], undisturbed)
    addressed_node(found["addressed"], undisturbed)


def drained_node(found: dict[str, Any], digest: str) -> None:
    assert found["digest"] == digest
    assert found["worlds"] == [3, 3], "a stand-in came before the machine went"
    assert found["redone"] == []
    assert found["rows"] == list(range(1, STEPS + 1)), "every step once"
    (incident,) = found["incidents"]
    assert "Ray drains its node" in str(incident)
    assert len(set(found["nodes"])) == WORKERS + 1, "the spare stands in"
    assert found["gone"], "it has left"


def silent_node(found: dict[str, Any], digest: str) -> None:
    assert found["digest"] == digest
    assert found["worlds"] == [3, 2]
    assert found["redone"][0] <= 1
    assert found["rows"] == list(range(1, STEPS + 1)), "every step once"
    kinds = [kind for kind, _ in found["events"]]
    assert kinds.count("node_lost") == 1
    reason = dict(found["events"])["node_lost"]
    assert "no round trip of heartbeats" in reason
    assert found["to_commit_s"] < 30, "by our heartbeats, not by Ray's health check"
    assert found["fenced_ended"], "the worker that came back was ended"
    assert found["controller_beside_us"], "on the node of whoever started the run, one of five"


def addressed_node(found: dict[str, Any], digest: str) -> None:
    assert found["digest"] == digest
    assert found["worlds"] == [3, 2]
    assert found["redone"] in ([0], [1])
    assert found["rows"] == list(range(1, STEPS + 1)), "every step once"
    (lost,) = found["lost"]
    told = found["worker_events"]
    # Two watches race: the one over nodes, and the one over steps, which may have ended the worker before.
    first = [] if "worker_lost" in told[: told.index("node_lost")] else [1]
    assert (lost["node"], lost["workers"]) == (found["node"], first), told
    assert "no round trip of heartbeats" in lost["reason"], "worker and agent stopped together"
    assert found["fenced_ended"], "and nothing of it is left when it is continued"
