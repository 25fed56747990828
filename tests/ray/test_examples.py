"""The digits example through `et.run` and through the command line: the same bits whatever happens to the workers,
and as on plain processes.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

import elastictrain as et
from elastictrain.observe import RunDirectory
from elastictrain_checkpoint import Store, digest, load
from tests.support.process_cluster import run_job

pytestmark = [pytest.mark.ray, pytest.mark.timeout(300)]

ROOT = Path(__file__).resolve().parents[2]
DIGITS = ROOT / "examples" / "digits"
STEPS = 400
KILLED = et.faults.kill(1, 30, "mirror")


@pytest.fixture(scope="module")
def prepared() -> None:
    """As `python examples/digits/prepare.py`; it does nothing when all is there."""
    spec = importlib.util.spec_from_file_location("prepare_digits", DIGITS / "prepare.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.prepare()


def settings(folder: Path, **overrides: Any) -> dict[str, Any]:
    """The example's job.yaml, with absolute paths and a short, small run."""
    raw: dict[str, Any] = yaml.safe_load((DIGITS / "job.yaml").read_text())
    raw |= {
        "recipe": f"{DIGITS / 'recipe.py'}:DigitsRecipe",
        "data": raw["data"] | {"path": str(DIGITS / "data" / "train")},
        "steps": STEPS,
        "recipe_args": raw["recipe_args"] | {"total_steps": STEPS},
        "checkpoint": {"path": str(folder / "checkpoints"), "every_steps": STEPS // 2},
        "run_dir": str(folder),
    }
    return raw | overrides


@pytest.mark.usefixtures("prepared", "shared_ray")
def test_killed_and_joined_against_undisturbed(tmp_path: Path) -> None:
    workers = {"min": 1, "max": 3, "start": 2, "replace": False}
    disturbed = et.run(
        et.Job(**settings(tmp_path / "disturbed", workers=workers)), faults=[KILLED, et.faults.add(KILLED.step + 5)]
    )
    alone = run_job(et.Job(**settings(tmp_path / "alone", workers={"max": 1})))
    assert disturbed.outcome == alone.outcome.outcome == "finished"
    assert disturbed.digest == alone.digest
    assert disturbed.world_sizes == [2, 1, 2], "one lost, one joined"
    assert [r.steps_redone for r in disturbed.recoveries] == [1]
    assert "killed or crashed" in disturbed.recoveries[0].cause
    assert len(disturbed.resizes) == 1
    evaluated = [row["evaluation"] for row in alone.record.rows if "evaluation" in row]
    assert (disturbed.evaluation or {})["accuracy"] == evaluated[-1]["accuracy"] > 0.95
    assert disturbed.last_loss == alone.losses[STEPS]
    check_folder(tmp_path / "disturbed", disturbed)


def check_folder(folder: Path, summary: et.Summary) -> None:
    """Everything that a run leaves behind is there and agrees with itself."""
    files = {path.name for path in folder.iterdir()}
    assert files >= {
        "job.yaml",
        "events.jsonl",
        "metrics.jsonl",
        "journal.jsonl",
        "status.json",
        "summary.json",
        "loss.png",
    }
    run = RunDirectory.open(folder)
    assert et.load_job(folder / "job.yaml").steps == STEPS
    assert [row.step for row in run.metrics()] == list(range(1, STEPS + 1)), "every step once"
    assert run.read_summary() == json.loads(summary.line())
    kinds = [event.kind for event in run.events()]
    assert kinds[0] == "run_started"
    assert kinds[-1] == "finished"
    for kind in ("worker_lost", "recovery", "fault", "resized", "checkpoint"):
        assert kind in kinds, kind
    ready = [event.data["worker"] for event in run.events() if event.kind == "worker_ready"]
    assert sorted(ready) == [0, 1, 2], "each worker is ready once"
    status = run.read_status()
    assert status is not None
    assert (status.state, status.step) == ("finished", STEPS)
    assert (folder / "loss.png").read_bytes().startswith(b"\x89PNG")
    store = Store(str(folder / "checkpoints"))
    assert digest(store, load(store, STEPS)) == summary.digest, "what is stored is what was trained"


@pytest.mark.usefixtures("prepared")
def test_command_line_gives_the_same_digest(tmp_path: Path) -> None:
    """With an embedded Ray of its own, a kill on the way, and nothing but JSON on standard output."""
    file, faults = tmp_path / "job.yaml", tmp_path / "faults.yaml"
    short = {"steps": 60, "recipe_args": {"total_steps": 60}, "workers": {"max": 2}, "evaluate_every": 30}
    file.write_text(yaml.safe_dump(settings(tmp_path / "cli", **short)))
    faults.write_text("- {do: kill, worker: 0, step: 20, phase: exchange}\n")
    command = [sys.executable, "-m", "elastictrain.cli", "run", str(file), "--faults", str(faults), "--json"]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    found = subprocess.run(
        command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=240, check=False
    )
    assert found.returncode == 0, found.stderr
    summary = json.loads(found.stdout)  # one object and nothing beside it
    here = run_job(et.Job(**settings(tmp_path / "here", **short)))
    assert summary["digest"] == here.digest
    assert [set(r) for r in summary["recoveries"]] == [{"cause", "generation", "seconds", "steps_redone"}]
    assert summary["run_dir"] == str(tmp_path / "cli")
    assert summary["steps"] == 60
    assert "recovered from the loss of worker 0" in found.stderr, "people read standard error"
