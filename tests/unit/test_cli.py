from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file
from typer.testing import CliRunner

from elastictrain.cli import app
from elastictrain.errors import CapacityError, ConfigError, DataError, InternalError, PeerLost
from elastictrain.faults import add, kill
from elastictrain.observe import Blind, RunDirectory, Summary, summarise
from elastictrain.observe.live import LiveView
from elastictrain_checkpoint.store import Store
from tests.unit.checkpoint.build import make_state, save
from tests.unit.observe.story import tell

JOB = "name: gpt\nrecipe: mod:Class\ndata: {kind: jsonl, path: x}\nsteps: 9\nlanes: 8\nworkers: {min: 2, max: 3}\n"


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    (tmp_path / "job.yaml").write_text(JOB)
    return tmp_path


class FakeRun(ModuleType):
    """Stands for `elastictrain.run`: notes what it is asked, writes a small run, or raises."""

    def __init__(self) -> None:
        super().__init__("elastictrain.run")
        self.asked: dict[str, Any] = {}
        self.error: BaseException | None = None
        self.outcome = "finished"

    def run(self, job: Any, **settings: Any) -> Summary:
        self.asked = {"job": job, **settings}
        observer = settings["observer"]
        with RunDirectory.create(None, job) as run:
            observer.update({"name": job.name, "steps": job.steps, "state": "running"})
            observer.event(run.event("run_started", {"name": job.name}))
            if self.error is not None:
                raise self.error
            row = {"step": 1, "loss": 2.5, "generation": 1, "world": 2}
            run.row(row)
            observer.row(row)
            observer.event(run.event(self.outcome, {"step": 1, "digest": "ab12", "error": "it broke"}))
            return summarise(run)

    def submit(self, job_path: Path, address: str, *, wait: bool) -> str:
        self.asked = {"job_path": job_path, "address": address, "wait": wait}
        return "raysubmit_1"


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> FakeRun:
    module = FakeRun()
    monkeypatch.setitem(sys.modules, "elastictrain.run", module)
    return module


def call(*arguments: str) -> Any:
    return CliRunner().invoke(app, list(arguments))


def test_run_prints_the_summary_as_its_last_line(fake: FakeRun) -> None:
    result = call("run", "job.yaml", "--json")
    assert result.exit_code == 0, result.output
    assert result.stdout.count("\n") == 1, "standard output is for programs"
    summary = json.loads(result.stdout)
    assert (summary["steps"], summary["digest"], summary["last_loss"]) == (1, "ab12", 2.5)
    assert {"run_dir", "first_loss", "world_sizes", "recoveries", "tokens_per_s"} <= summary.keys()
    assert "run started (gpt)" in result.stderr


def test_run_shows_lines_and_a_table(fake: FakeRun) -> None:
    result = call("run", "job.yaml")
    assert result.exit_code == 0
    assert "step 1/9  loss 2.5  world 2" in result.stdout
    assert "digest    ab12" in result.stdout
    assert "2.5 → 2.5" in result.stdout
    assert isinstance(fake.asked["observer"], LiveView)


def test_quiet(fake: FakeRun) -> None:
    result = call("run", "job.yaml", "--quiet")
    assert (result.exit_code, result.output) == (0, "")
    assert isinstance(fake.asked["observer"], Blind)


def test_run_hands_its_options_on(fake: FakeRun, folder: Path) -> None:
    (folder / "faults.yaml").write_text("- {do: kill, worker: 1, step: 3}\n- {do: add, step: 5}\n")
    options = [
        "--faults",
        "faults.yaml",
        "--run-dir",
        "here",
        "--workers",
        "5",
        "--steps",
        "4",
        "--address",
        "ray://h:1",
    ]
    assert call("run", "job.yaml", *options).exit_code == 0
    job = fake.asked["job"]
    assert fake.asked["faults"] == (kill(1, 3), add(5))
    assert (fake.asked["address"], fake.asked["resume"]) == ("ray://h:1", False)
    assert (job.run_dir, job.steps) == ("here", 4)
    assert (job.workers.min, job.workers.initial, job.workers.max) == (2, 5, 5)
    assert call("run", "job.yaml", "--workers", "1").exit_code == 0
    job = fake.asked["job"]
    assert (job.workers.min, job.workers.initial, job.workers.max) == (1, 1, 3)
    assert fake.asked["faults"] == ()


@pytest.mark.parametrize(
    ("place", "checkpoint", "step"),
    [("hf", "hf", None), ("s3://b/runs@40", "s3://b/runs", 40), ("who@home", "who@home", None)],
)
def test_run_begins_with_other_weights(
    fake: FakeRun, folder: Path, place: str, checkpoint: str, step: int | None
) -> None:
    assert call("run", "job.yaml", "--start-from", place).exit_code == 0
    found = fake.asked["job"].start_from
    assert (found.checkpoint, found.step, found.strict) == (checkpoint, step, True)
    text = (folder / "job.yaml").read_text()
    (folder / "job.yaml").write_text(
        f"{text}\nstart_from: {{checkpoint: old, step: 7, strict: false, mapping: m.json}}\n"
    )
    assert call("run", "job.yaml", "--start-from", place).exit_code == 0
    found = fake.asked["job"].start_from
    assert (found.checkpoint, found.step) == (checkpoint, step), "the step is of the other place"
    assert (found.strict, found.mapping) == (False, "m.json")


def test_more_workers_than_lanes_is_said(fake: FakeRun) -> None:
    result = call("run", "job.yaml", "--workers", "9")
    assert result.exit_code == 2
    assert result.stderr == (
        "job.yaml: lanes=8 < workers.max=9: every worker needs a lane; raise lanes or lower workers.max\n"
    )
    assert fake.asked == {}


def test_resume_finds_the_latest_run_of_the_job(fake: FakeRun, folder: Path) -> None:
    result = call("run", "job.yaml", "--resume")
    assert result.exit_code == 2
    assert result.stderr.startswith("--resume: no run of name='gpt' under ")
    tell(folder / "runs" / "gpt-20260101T000000Z")
    fake.error = ConfigError("seen enough")
    call("run", "job.yaml", "--resume")
    assert fake.asked["resume"] is True
    assert fake.asked["job"].run_dir == "runs/gpt-20260101T000000Z"
    assert fake.asked["data_changed"] == "fail"
    call("run", "job.yaml", "--resume", "--data-changed", "new_stage")
    assert fake.asked["data_changed"] == "new_stage"


@pytest.mark.parametrize(
    ("error", "code", "text"),
    [
        (ConfigError("[red]lanes[/red]: got 3"), 2, "[red]lanes[/red]: got 3\n"),
        (DataError("data.path: empty"), 2, "data.path: empty\n"),
        (CapacityError("no room"), 3, "no room\n"),
        (PeerLost("gone"), 3, "gone\n"),
        (InternalError("x > y"), 4, "x > y\nThis is a bug in elastictrain; please report it.\n"),
        (KeyboardInterrupt(), 130, "stopped\n"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_errors_are_messages_with_exit_codes(fake: FakeRun, error: BaseException, code: int, text: str) -> None:
    fake.error = error
    result = call("run", "job.yaml", "--quiet")
    assert (result.exit_code, result.stderr, result.stdout) == (code, text, "")


def test_messages_are_red_on_a_terminal(fake: FakeRun) -> None:
    fake.error = ConfigError("lanes")
    result = CliRunner().invoke(app, ["run", "job.yaml", "--quiet"], color=True)
    assert "\x1b[31mlanes\x1b[0m" in result.stderr


def test_other_errors_keep_their_traceback(fake: FakeRun) -> None:
    fake.error = ZeroDivisionError("ours")
    assert isinstance(call("run", "job.yaml", "--quiet").exception, ZeroDivisionError)


@pytest.mark.parametrize(("outcome", "code"), [("stopped", 130), ("failed", 3)])
def test_outcomes_that_are_not_success(fake: FakeRun, outcome: str, code: int) -> None:
    fake.outcome = outcome
    result = call("run", "job.yaml", "--json", "--quiet")
    assert result.exit_code == code
    assert json.loads(result.stdout)["outcome"] == outcome
    assert ("failed: it broke" in result.stderr) == (outcome == "failed")


def test_bad_input_is_said_before_anything_starts(fake: FakeRun, folder: Path) -> None:
    (folder / "bad.yaml").write_text(JOB + "lane: 3\n")
    for command in (
        ["run", "bad.yaml"],
        ["submit", "bad.yaml", "--address", "http://h:8265"],
        ["validate", "bad.yaml"],
    ):
        result = call(*command)
        assert (result.exit_code, result.stderr) == (2, "bad.yaml: unknown setting 'lane'; did you mean 'lanes'?\n")
    result = call("run", "job.yaml", "--faults", "none.yaml")
    assert (result.exit_code, result.stderr) == (
        2,
        "--faults none.yaml: no such file; expected YAML with a list of faults\n",
    )
    assert fake.asked == {}


def test_submit(fake: FakeRun) -> None:
    result = call("submit", "job.yaml", "--address", "http://h:8265", "--no-wait")
    assert (result.exit_code, result.stdout) == (0, "raysubmit_1\n")
    assert fake.asked == {"job_path": Path("job.yaml"), "address": "http://h:8265", "wait": False}
    result = call("submit", "job.yaml", "--address", "http://h:8265", "--json")
    assert json.loads(result.stdout) == {"submission_id": "raysubmit_1", "address": "http://h:8265"}
    assert fake.asked["wait"] is True


def test_status(folder: Path) -> None:
    tell(folder / "runs" / "a")
    for run in ("latest", "a", "runs/a", str(folder / "runs" / "a")):
        result = call("status", run, "--json")
        assert result.exit_code == 0, result.output
        found = json.loads(result.stdout)
        assert (found["state"], found["step"], found["generation"], found["world"]) == ("finished", 40, 4, 2)
        assert (found["held_by"], found["summary"]["digest"]) == (None, "ab12")
        assert found["tokens_per_s"] == 200
    text = call("status", "a").stdout
    assert "finished" in text
    assert "signal 9, 0.25 s, 1 step redone" in text
    result = call("status", "b")
    assert result.exit_code == 2
    assert result.stderr == (
        "RUN 'b': no such run; expected a path, a name under runs/, or latest; the newest under runs/: a\n"
    )


def test_status_says_who_writes_or_that_nobody_does(folder: Path) -> None:
    run = tell(folder / "runs" / "a", end=None)
    assert "nobody writes to this run at this moment" in call("status", "a").stdout
    silence(run)
    assert "nobody writes to this run any more" in call("status", "a").stdout
    (run.path / "lock").write_text(json.dumps({"pid": os.getpid(), "host": "elsewhere"}))
    assert f"written by process {os.getpid()} on elsewhere" in call("status", "a").stdout


def test_events(folder: Path) -> None:
    run = tell(folder / "runs" / "a")
    lines = call("events", "latest").stdout.splitlines()
    assert len(lines) == len(run.events())
    assert lines[0].endswith("Z  run started (gpt) with 3 workers, 40 steps")
    assert lines[2].endswith("worker 1 is lost: signal 9")
    first = json.loads(call("events", "latest", "--json").stdout.splitlines()[0])
    assert (first["kind"], first["data"]["steps"]) == ("run_started", 40)


def test_follow_prints_what_comes_and_ends_with_the_run(folder: Path) -> None:
    tell(folder / "runs" / "a", end="stopped")
    run = RunDirectory.resume("runs/a", summarised_job())
    before = len(run.events())
    run.event("run_resumed", {"step": 40})
    result: list[Any] = []
    follower = threading.Thread(target=lambda: result.append(call("events", "a", "--follow", "--json")))
    follower.start()
    run.event("checkpoint", {"step": 41, "path": "p"})
    run.event("finished", {"step": 41, "digest": "ab"})
    follower.join(60)
    run.close()
    assert not follower.is_alive()
    kinds = [json.loads(line)["kind"] for line in result[0].stdout.splitlines()]
    assert kinds[before:] == ["run_resumed", "checkpoint", "finished"]


def silence(run: RunDirectory) -> None:
    """As if nobody had written to it for an hour."""
    for file in run.path.iterdir():
        os.utime(file, (time.time() - 3600,) * 2)


def summarised_job() -> Any:
    from tests.unit.observe.story import job

    return job()


def test_follow_ends_when_nobody_writes(folder: Path) -> None:
    run = tell(folder / "runs" / "a", end=None)
    silence(run)
    assert len(call("events", "a", "-f").stdout.splitlines()) == len(run.events())


def test_plot(folder: Path) -> None:
    tell(folder / "runs" / "a")
    result = call("plot", "a")
    assert (result.exit_code, result.stdout) == (0, "runs/a/loss.png\n")
    assert call("plot", "a", "--out", "b.png").stdout == "b.png\n"
    assert (folder / "b.png").read_bytes() == (folder / "runs" / "a" / "loss.png").read_bytes()


def test_validate(folder: Path) -> None:
    (folder / "ok_recipe.py").write_text(
        "class R:\n    def model(self): ...\n    def optimizer(self, p): ...\n    def loss(self, m, b): ...\n"
    )
    (folder / "rows.jsonl").write_text("".join(f'{{"x": {i}}}\n' for i in range(40)))
    job = JOB.replace("mod:Class", "ok_recipe.py:R").replace("path: x", "path: rows.jsonl, columns: [x]")
    (folder / "job.yaml").write_text(job)
    result = call("validate", "job.yaml")
    assert result.exit_code == 0, result.output
    assert "settings  9 steps of 8 lanes, 2 to 3 workers\n" in result.stdout
    assert ":R\n" in result.stdout
    assert "data      40 samples, 5 steps an epoch\n" in result.stdout
    (folder / "job.yaml").write_text(job.replace("rows.jsonl", "none.jsonl"))
    result = call("validate", "job.yaml")
    assert result.exit_code == 2
    assert "none.jsonl" in result.stderr
    (folder / "job.yaml").write_text(JOB.replace("mod:Class", "ok_recipe.py:Q"))
    result = call("validate", "job.yaml")
    assert result.exit_code == 2
    assert result.stderr == "recipe='ok_recipe.py:Q': ok_recipe.py has no 'Q'; it defines R\n"


def test_validate_says_how_far_a_live_source_is_and_writes_nothing(folder: Path) -> None:
    from elastictrain.data.segments import SegmentWriter

    (folder / "ok_recipe.py").write_text(
        "class R:\n    def model(self): ...\n    def optimizer(self, p): ...\n    def loss(self, m, b): ...\n"
    )
    (folder / "rows.jsonl").write_text("".join(f'{{"x": {i}}}\n' for i in range(40)))
    job = JOB.replace("mod:Class", "ok_recipe.py:R").replace("path: x", "path: s, live: {record: order}")
    (folder / "job.yaml").write_text(job)
    result = call("validate", "job.yaml")
    assert result.exit_code == 2
    assert "holds no manifest of segments" in result.stderr
    SegmentWriter("s").append("rows.jsonl")
    result = call("validate", "job.yaml")
    assert result.exit_code == 0, result.output
    assert "data      live: 0 segments in the order, 1 to come; 0 steps are decided\n" in result.stdout
    assert not (folder / "order").exists()


def test_validate_looks_at_the_weights_to_begin_with(folder: Path) -> None:
    (folder / "line.py").write_text(
        "from torch import nn, optim\n\n\nclass R:\n    def model(self):\n        return nn.Linear(2, 3)\n\n"
        "    def optimizer(self, p):\n        return optim.SGD(p, lr=1)\n\n    def loss(self, m, b): ...\n"
    )
    (folder / "rows.jsonl").write_text("".join(f'{{"x": {i}}}\n' for i in range(40)))
    job = JOB.replace("mod:Class", "line.py:R").replace("path: x", "path: rows.jsonl, columns: [x]")
    (folder / "job.yaml").write_text(job + "\nstart_from: {checkpoint: w.safetensors}\n")
    save_file({"weight": np.zeros((3, 2), np.float32), "bias": np.zeros(3, np.float32)}, folder / "w.safetensors")
    result = call("validate", "job.yaml")
    assert result.exit_code == 0, result.output
    assert result.stdout.endswith("weights   2 tensors of w.safetensors\n")
    save_file({"weight": np.zeros((3, 2), np.float32), "bias": np.zeros(4, np.float32)}, folder / "w.safetensors")
    result = call("validate", "job.yaml")
    assert result.exit_code == 2
    assert "model/bias has shape [3] in the model and [4] in the checkpoint" in result.stderr


def test_ckpt_is_the_checkpoint_library(folder: Path) -> None:
    for arguments in (["--help"], []):
        result = call("ckpt", *arguments)
        assert result.exit_code == 0
        assert {"ls", "show", "verify", "digest"} <= set(result.stdout.split())
    store = Store(str(folder / "store"))
    save(store, make_state({"w": ("U8", (3,))}), step=5)
    result = call("ckpt", "ls", "store", "--json")
    assert result.exit_code == 0
    assert [row["step"] for row in json.loads(result.stdout)] == [5]
    result = call("ckpt", "digest", "store", "--step", "3")
    assert result.exit_code == 2
    assert "3" in result.stderr


def test_as_a_program(folder: Path) -> None:
    def program(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", "from elastictrain.cli import main; main()", *arguments]
        return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)

    done = program("run", "missing.yaml")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == ("job file missing.yaml: no such file; expected YAML with at least recipe, data and steps\n")
    assert program("--help").returncode == 0
    assert program("run", "job.yaml", "--no-such").returncode == 2
