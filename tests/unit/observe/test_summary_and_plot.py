from __future__ import annotations

import json
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from elastictrain.errors import ClusterError, ConfigError
from elastictrain.job import parse_job
from elastictrain.observe import Event, RunDirectory, summarise
from elastictrain.observe.events import make_event
from elastictrain.observe.marks import marks
from elastictrain.observe.metrics import MetricsRow
from elastictrain.observe.plot import draw, plot_run
from tests.unit.observe.story import STEPS, job, tell

NOW = datetime(2026, 11, 22, 10, 0, 0, tzinfo=UTC)


def test_summary(tmp_path: Path) -> None:
    line = summarise(tell(tmp_path / "run")).line()
    assert "\n" not in line
    summary = json.loads(line)
    assert summary.pop("wall_s") >= 0
    assert summary == {
        "run_dir": str(tmp_path / "run"),
        "outcome": "finished",
        "steps": STEPS,
        "digest": "ab12",
        "first_loss": 10.0,
        "last_loss": 0.25,
        "world_sizes": [3, 2, 3, 2],
        "recoveries": [{"cause": "signal 9", "generation": 2, "seconds": 0.25, "steps_redone": 1}],
        "resizes": [
            {"cause": "a worker is ready", "generation": 3, "seconds": 0.25, "steps_redone": 0},
            {"cause": "drain", "generation": 4, "seconds": 0.25, "steps_redone": 0},
        ],
        "tokens_per_s": 200.0,
        "evaluation": {"accuracy": 1.0},
        "skipped_steps": [15],
        "error": None,
    }


@pytest.mark.parametrize("end", ["failed", "stopped", None])
def test_outcome(end: str | None, tmp_path: Path) -> None:
    assert summarise(tell(tmp_path / "run", end=end)).outcome == (end or "running")


def test_a_run_taken_up_again_is_running_again(tmp_path: Path) -> None:
    tell(tmp_path / "run", end="stopped")
    with RunDirectory.resume(tmp_path / "run", job()) as run:
        run.event("run_resumed", {"step": STEPS})
        assert summarise(run).outcome == "running"


def test_an_empty_run(tmp_path: Path) -> None:
    with RunDirectory.create(tmp_path / "run", job()) as run:
        summary = summarise(run)
        assert (summary.steps, summary.first_loss, summary.world_sizes, summary.wall_s) == (0, None, [], None)
        with pytest.raises(ConfigError, match="nothing to plot: no step has been published yet"):
            plot_run(run)


def test_marks(tmp_path: Path) -> None:
    run = tell(tmp_path / "run")
    found = [(mark.step, mark.family, mark.label) for mark in marks(run.events(), run.metrics())]
    assert found == [
        (10.5, "loss", "worker 1 lost"),
        (15, "skipped", "skipped"),
        (20.5, "join", "worker 3 joined"),
        (30.5, "drain", "worker 0 left"),
    ]


def test_a_mark_without_a_step_stands_before_its_generation(tmp_path: Path) -> None:
    with RunDirectory.create(tmp_path / "run", job()) as run:
        run.event("recovery", {"generation": 2, "cause": "lost"})
        run.event("recovery", {"generation": 9, "cause": "never got anywhere"})
        run.event("went_back", {"to_step": 4})
        rows = [MetricsRow(step=step, generation=1 + (step > 6)) for step in range(1, 9)]
        assert [(m.step, m.label) for m in marks(run.events(), rows)] == [(4.5, "back to step 4"), (6.5, "lost")]


@pytest.mark.parametrize(
    ("workers", "cause", "label"),
    [
        ([1], "worker 1 is frozen: no sign of life", "worker 1 frozen"),
        ([1, 2], "its node n is lost: no round trip", "workers 1, 2 lost with its node"),
        ([1], "torn apply: RuntimeError", "worker 1 torn"),
        ([0, 1, 2, 3, 4], "its process died", "5 workers lost"),
        ([], "generation 3 hangs: all wait for each other", "generation 3 hangs: all wait"),
    ],
)
def test_a_loss_says_how(workers: list[int], cause: str, label: str) -> None:
    event = make_event("recovery", {"step": 4, "workers": workers, "cause": cause}, time=NOW)
    assert [(mark.step, mark.label) for mark in marks([event], [])] == [(4.5, label)]


def test_a_notice_stands_between_the_steps_whose_time_is_known() -> None:
    def at(second: float, kind: str, **data: Any) -> Event:
        return make_event(kind, data, time=NOW + timedelta(seconds=second))

    story = [
        at(0, "preemption", node="n"),
        at(1, "running", step=10),
        at(2, "controller_back", gone_s=1.0),
        at(5, "checkpoint", step=50, path="p"),
        at(6, "storage_stalled", reason="r"),
        at(7, "running", step=20),
        at(8, "node_set_aside", node="n"),
    ]
    assert [(mark.step, mark.label) for mark in marks(story, [])] == [
        (10.5, "preemption notice"),
        (20.5, "controller back"),
        (20.5, "node set aside"),
        (50.5, "storage stood still"),
    ]
    assert {mark.family for mark in marks(story, [])} == {"notice"}
    assert marks(story[:1], [])[0].step == 0.5, "nothing is known yet"


def test_plot_shows_loss_marks_world_and_evaluation(tmp_path: Path) -> None:
    run = tell(tmp_path / "run")
    rows = run.metrics()
    figure = draw(rows, marks(run.events(), rows), title="a title")
    loss, accuracy, world = figure.axes
    assert [panel.get_ylabel() for panel in figure.axes] == ["loss", "accuracy", "workers"]
    assert loss.get_title(loc="left") == "a title"
    curve = next(line for line in loss.lines if line.get_label() == "loss")
    assert list(curve.get_xdata()) == list(range(1, STEPS + 1))
    assert list(curve.get_ydata())[:2] == [10.0, 5.0]
    vertical = sorted(line.get_xdata()[0] for line in loss.lines if line is not curve)
    assert vertical == [10.5, 15, 20.5, 30.5]
    assert [text.get_text() for text in loss.texts] == ["worker 1 lost", "worker 3 joined", "worker 0 left"]
    assert {text.get_text() for text in loss.get_legend().get_texts()} == {
        "loss", "worker lost", "step skipped", "joined", "drained",
    }  # fmt: skip
    assert list(accuracy.lines[0].get_ydata()) == [0.5, 1.0]
    assert [patch.get_data().values.max() for patch in world.patches] == [3, 3]
    assert world.get_ylim()[0] == 0


def test_png(tmp_path: Path) -> None:
    run = tell(tmp_path / "run")
    assert plot_run(run) == tmp_path / "run" / "loss.png"
    data = run.loss_png.read_bytes()
    assert data.startswith(b"\x89PNG")
    assert plot_run(run, tmp_path / "other.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ClusterError, match=r"missing/x.png: cannot be written: No such file"):
        plot_run(run, tmp_path / "missing" / "x.png")


@pytest.mark.parametrize("rows", [1, 2, 500])
def test_any_length_can_be_drawn(rows: int) -> None:
    # One worker, no marks, losses that are not finite at the start.
    made = [MetricsRow(step=s, generation=1, world=1, loss=None if s < 3 else 1.0) for s in range(1, rows + 1)]
    figure = draw(made, [], title="t")
    low, high = figure.axes[0].get_xlim()
    assert low < 1
    assert high > rows
    figure.canvas.draw()


def test_matplotlib_keeps_its_state(tmp_path: Path) -> None:
    """In a process of its own, where warnings and what others imported do not count."""
    tell(tmp_path / "run")
    code = f"""
import sys, matplotlib
def settings():  # without asking for the backend, which would import pyplot
    return list(dict.items(matplotlib.rcParams))
before = settings()
from elastictrain.observe import find_run
from elastictrain.observe.plot import plot_run
plot_run(find_run({str(tmp_path / "run")!r}))
assert settings() == before
assert "matplotlib.pyplot" not in sys.modules
"""
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True, timeout=100)


def test_without_matplotlib_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ConfigError, match=r"needs matplotlib .*pip install 'elastictrain\[plot\]'"):
        plot_run(tell(tmp_path / "run"))


def test_parse_job_is_what_the_story_uses() -> None:
    assert job() == parse_job(job().model_dump())


def test_a_step_is_skipped_although_no_lane_is_to_blame(tmp_path: Path) -> None:
    """A gradient may overflow while every lane's loss is finite: no lane is named, the step is skipped."""
    with RunDirectory.create(tmp_path / "run", job()) as run:
        run.row({"step": 1, "loss": 1.0})
        run.row({"step": 2, "loss": 1.0, "skipped": []})
    assert summarise(run).skipped_steps == [2]
    assert [(mark.step, mark.family) for mark in marks([], run.metrics())] == [(2, "skipped")]
