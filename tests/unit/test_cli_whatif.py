"""`elastictrain whatif` as a user sees it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from elastictrain.cli import app
from elastictrain.observe.signal_log import SignalLog
from elastictrain.observe.whatif_view import MOST_ROWS, replan, shrunk
from elastictrain.stragglers.whatif import timings_of, what_if
from tests.support.signals import LAYOUT, records

STEPS = 60


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("COLUMNS", "200")
    folder = tmp_path / "slow-run"
    folder.mkdir()
    (folder / "job.yaml").write_text("name: slow-run\n")
    log = SignalLog(folder, LAYOUT, excused=11)
    log.append(1, 1, (0, 1, 2, 5), records([5.0] * 4, flags=[8] * 4))
    for step in range(2, STEPS + 2):
        log.append(1, step, (0, 1, 2, 5), records([0.4, 0.4, 0.8, 0.4], host_s=0.0))
    log.close()
    return folder


def test_words_and_a_table(run: Path) -> None:
    done = CliRunner().invoke(app, ["whatif", str(run)])
    assert done.exit_code == 0, done.output
    said = " ".join(done.stdout.split())
    assert "60 steps took 51.3 s; without anybody's slowness 27.3 s: 46.8% of the time was lost to it" in said
    assert "(1 more say nothing of speed: checkpoints, evaluations, first steps)" in said
    assert "Worker 2 cost most: alone healthy it would have saved 100% of that. It computes slowly (24 s)." in said
    assert "the planner would move lanes" in said
    assert "worker 2: 2 instead of 4" in said
    assert "What slowness has cost" in said


def test_json_for_programs(run: Path) -> None:
    done = CliRunner().invoke(app, ["whatif", str(run), "--json"])
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert found["slowdown"] == pytest.approx(51.3 / 27.3, rel=1e-4)
    assert [worker["worker"] for worker in found["workers"]] == [2]
    now = found["now"]
    assert now["workers"] == [0, 1, 2, 5]
    assert now["lanes"] == [4, 4, 4, 4]
    assert sum(now["planned"]) == 16
    assert now["planned"][2] == 2
    assert now["before_s"] == pytest.approx(0.8)
    assert now["after_s"] == pytest.approx(0.5)
    assert now["bound_s"] <= now["after_s"]
    own = CliRunner().invoke(app, ["whatif", str(run), "--json", "--against", "itself"])
    assert json.loads(own.stdout)["workers"] == []


@pytest.mark.parametrize(("name", "begins"), [("heat.png", b"\x89PNG"), ("heat.svg", b"<?xml")])
def test_a_heat_map(run: Path, name: str, begins: bytes) -> None:
    done = CliRunner().invoke(app, ["whatif", str(run), "--picture", str(run / name)])
    assert done.exit_code == 0, done.output
    assert (run / name).read_bytes().startswith(begins)


def test_a_run_without_signals(tmp_path: Path) -> None:
    (tmp_path / "job.yaml").write_text("name: run\n")
    done = CliRunner().invoke(app, ["whatif", str(tmp_path)])
    assert done.exit_code == 2
    assert "has recorded no signals of its workers" in done.output
    done = CliRunner().invoke(app, ["whatif", str(tmp_path / "none")])
    assert done.exit_code == 2
    assert "no such run" in done.output


def test_one_slow_worker_among_thousands_is_still_seen() -> None:
    random = np.random.default_rng(1)
    steps = []
    for n in range(1, 31):
        compute = random.uniform(0.99, 1.01, 1000)
        compute[777] = 3.0
        steps.append((n, tuple(range(1000)), records(compute.tolist())))
    timings, _ = timings_of(steps, 0)
    answer = what_if(timings)
    cells, group, first = shrunk(answer)
    assert len(cells) <= MOST_ROWS
    assert len(first) == 30
    assert (cells[777 // group] > 2.5).all()
    assert float(np.delete(cells, 777 // group, axis=0).max()) < 1.1
    plan = replan(timings)
    assert sum(plan.split.parts) == 4000
    assert plan.split.parts[777] == 1


def test_the_planner_takes_the_speeds_of_the_lanes_that_are_dealt_out_now() -> None:
    steps = [(n, (0, 1), records([0.4, 0.8])) for n in range(1, 30)]
    steps += [(n, (0, 1), records([0.5, 0.54], lanes=[5, 3])) for n in range(30, 35)]
    timings, _ = timings_of(steps, 0)
    plan = replan(timings)
    assert plan.lanes == (5, 3)
    assert plan.lane_s == pytest.approx((0.1, 0.18))
    assert plan.split.parts == (5, 3)
