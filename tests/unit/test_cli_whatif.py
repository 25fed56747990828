"""`elastictrain whatif` as a user sees it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from elastictrain.cli import app
from elastictrain.observe.signal_log import SignalLog
from elastictrain.observe.whatif_view import MOST_ROWS, picture_of, replan, shrunk
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


def test_lanes_that_others_have_computed_are_dealt_out_to_whom_they_were() -> None:
    """Worker 0 is three times as slow, and worker 1 has taken over two of its four lanes."""
    shared = records([0.6, 0.6], lanes=[2, 6], flags=[(256 - 2) << 8, 2 << 8], host_s=0.0)
    alone = records([1.2, 0.4], host_s=0.0)
    for steps in ([shared] * 8, [alone] * 4 + [shared] * 4):
        timings, _ = timings_of([(n, (0, 1), record) for n, record in enumerate(steps)], excused=11)
        plan = replan(timings)
        assert plan.lanes == (4, 4)
        assert plan.split.parts == (2, 6)
        assert plan.lane_s == pytest.approx((0.3, 0.1))
        assert (plan.before_s, plan.after_s) == pytest.approx((1.2, 0.6))


@pytest.mark.parametrize("workers", [2, 5, 40])
def test_all_words_of_the_picture_can_be_read(workers: int) -> None:
    """None is cut, and the legend does not lie over the lines."""
    steps = [records([0.4 + 0.1 * (n % 7 == 0)] * (workers - 1) + [0.9]) for n in range(30)]
    timings, _ = timings_of([(n, tuple(range(workers)), record) for n, record in enumerate(steps)], excused=11)
    figure = picture_of(what_if(timings), title="a-run")
    figure.canvas.draw()
    heat, line, bar = figure.axes
    for axes in (heat, line, bar):
        inside = axes.get_tightbbox()
        assert figure.bbox.x0 <= inside.x0
        assert inside.x1 <= figure.bbox.x1
        assert figure.bbox.y0 <= inside.y0
        assert inside.y1 <= figure.bbox.y1
    assert not line.get_legend().get_window_extent().overlaps(line.bbox.shrunk(0.999, 0.999))
    assert not line.get_legend().get_window_extent().overlaps(heat.get_tightbbox())
    said = [text for axes in (heat, bar) for text in (axes.get_title(loc="right"), axes.get_ylabel()) if text]
    assert any("grey: not there" in text for text in said)
