"""Bad input as a user meets it: through `et.run` and the command line, each with an error that names the setting."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

import elastictrain as et
from elastictrain.cli import app
from elastictrain.data import LaneReader, open_source
from elastictrain.observe import RunDirectory
from elastictrain.observe.lock import RunLock
from elastictrain_checkpoint import Store, load
from tests.support.line_recipe import LANE_BATCH_SIZE, LANES, NAN, RAISE, ROWS, write_rows
from tests.support.process_cluster import run_job

pytestmark = [pytest.mark.ray, pytest.mark.timeout(300), pytest.mark.usefixtures("shared_ray")]

RECIPE = Path(__file__).parents[1] / "support" / "line_recipe.py"
STEPS = 8


@pytest.fixture(autouse=True)
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    write_rows(tmp_path / "data" / "rows.jsonl")


def settings(folder: Path, **overrides: Any) -> dict[str, Any]:
    return {
        "name": "line",
        "recipe": f"{RECIPE}:Line",
        "data": {
            "kind": "jsonl",
            "path": str(folder / "data"),
            "columns": ["a", "b", "y", "mark"],
            "rows_per_block": 16,
        },
        "lanes": LANES,
        "lane_batch_size": LANE_BATCH_SIZE,
        "steps": STEPS,
        "workers": {"min": 1, "max": 1},
        "checkpoint": {"path": str(folder / "checkpoints"), "every_steps": 2, "keep": 5},
        "run_dir": str(folder / "run"),
    } | overrides


def job(folder: Path, **overrides: Any) -> et.Job:
    return et.Job(**settings(folder, **overrides))


def place_of(folder: Path, row: int, seed: int = 0) -> tuple[int, int]:
    """(step of the run, lane) that uses a row, found by its mark."""
    data = job(folder).data
    source = open_source(data, seed=seed, lanes=LANES, lane_batch_size=LANE_BATCH_SIZE)
    reader = LaneReader(source)
    try:
        marked = [(s, lane) for s in range(STEPS) for lane in range(LANES) if reader.batch(s, lane)["mark"].any()]
    finally:
        reader.close()
    assert len(marked) == 1, f"row {row} is used at {marked}"
    return marked[0][0] + 1, marked[0][1]


def mark_a_row(folder: Path, mark: int, *, not_before: int) -> tuple[int, int]:
    """Mark a row that is used at step `not_before` or later; (step, lane)."""
    for row in range(ROWS):
        write_rows(folder / "data" / "rows.jsonl", {row: mark})
        try:
            step, lane = place_of(folder, row)
        except AssertionError:
            continue
        if not_before <= step < STEPS:
            return step, lane
    raise AssertionError("no row is used that late")


# --- before any worker starts ---

BEFORE: list[tuple[str, dict[str, Any], type[et.ElasticTrainError], str]] = [
    ("no such recipe file", {"recipe": "nowhere.py:Line"}, et.UserError, r"recipe='nowhere.py:Line': no such file"),
    (
        "no such module",
        {"recipe": "no.such.module:Line"},
        et.RecipeError,
        r"recipe='no.such.module:Line' does not import",
    ),
    ("no such class", {"recipe": f"{RECIPE}:Lime"}, et.RecipeError, r"has no 'Lime'; it defines Line"),
    (
        "wrong arguments",
        {"recipe_args": {"widht": 3}},
        et.RecipeError,
        r"recipe_args=\{'widht': 3\}.*unexpected keyword",
    ),
    ("two optimizers", {"recipe_args": {"optimizer": "two"}}, et.RecipeError, r"returned 2 optimizers; expected one"),
    (
        "needs whole matrices",
        {"recipe_args": {"optimizer": "matrices"}},
        et.RecipeError,
        r"Adafactor.*ownership.*whole",
    ),
    (
        "model raises",
        {"recipe_args": {"bad_model": True}},
        et.RecipeError,
        r"recipe\.model\(\).*no weights file at /nowhere",
    ),
]


@pytest.mark.parametrize(("overrides", "kind", "words"), [row[1:] for row in BEFORE], ids=[row[0] for row in BEFORE])
def test_recipe(tmp_path: Path, overrides: dict[str, Any], kind: type[et.ElasticTrainError], words: str) -> None:
    with pytest.raises(kind, match=f"(?s){words}"):
        et.run(job(tmp_path, **overrides))
    assert not (tmp_path / "run").exists(), "a run that cannot start leaves nothing behind"
    assert not (tmp_path / "checkpoints").exists()


def test_recipe_that_does_not_import(tmp_path: Path) -> None:
    (tmp_path / "broken.py").write_text("import torch\nimport no_such_package\n")
    with pytest.raises(et.RecipeError, match=r"broken.py:Line' does not import: ModuleNotFoundError.*no_such_package"):
        et.run(job(tmp_path, recipe=f"{tmp_path}/broken.py:Line"))


@pytest.mark.parametrize(
    ("columns", "content", "words"),
    [
        (["a"], None, r"data\.path: '.*other' does not exist"),
        (["a"], "", r"(?i)data.*empty|no (rows|samples|lines)"),
        (["a", "bee"], '{"a": 1, "b": 2}\n' * 20, r"data\.columns names 'bee'.*The columns are"),
        (["a"], '{"a": 1}\n' * 3, r"holds 3 rows; one step needs lanes x lane_batch_size = 4 x 2 = 8\. Add data"),
    ],
    ids=["missing", "empty", "schema", "too few"],
)
def test_data(tmp_path: Path, columns: list[str], content: str | None, words: str) -> None:
    folder = tmp_path / "other"
    if content is not None:
        folder.mkdir()
        (folder / "rows.jsonl").write_text(content)
    with pytest.raises(et.DataError, match=words):
        et.run(job(tmp_path, data={"kind": "jsonl", "path": str(folder), "columns": columns}))
    assert not (tmp_path / "run").exists()


def test_fewer_lanes_than_workers(tmp_path: Path) -> None:
    with pytest.raises(et.ConfigError, match=r"lanes=2 < workers\.max=3.*raise lanes or lower workers\.max"):
        job(tmp_path, lanes=2, workers={"max": 3})
    file = tmp_path / "job.yaml"
    file.write_text(yaml.safe_dump(settings(tmp_path, lanes=2)))
    found = CliRunner().invoke(app, ["run", str(file), "--workers", "3"])
    assert (found.exit_code, found.stdout) == (2, "")
    assert "lanes=2 < workers.max=3" in found.stderr


def test_run_directory_in_use(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    lock = RunLock(tmp_path / "run")
    lock.take()
    try:
        with pytest.raises(et.ConfigError, match=r"run_dir='.*run' is in use by process \d+ on .*--run-dir"):
            et.run(job(tmp_path))
    finally:
        lock.release()


def test_resume_without_checkpoints(tmp_path: Path) -> None:
    with pytest.raises(
        et.ConfigError, match=r"--resume: .*checkpoints holds no checkpoint yet; start without --resume"
    ):
        et.run(job(tmp_path), resume=True)
    with pytest.raises(et.ConfigError, match=r"--resume: the job has no checkpoint setting"):
        et.run(job(tmp_path, checkpoint=None), resume=True)
    with pytest.raises(et.ConfigError, match=r"--resume-step 3: .* has steps none"):
        et.run(job(tmp_path), resume_step=3)


# --- while it runs ---


def test_worker_that_cannot_start(tmp_path: Path) -> None:
    """Every worker computes one lane for trial: what fails there fails alike in each, so nobody tries it again."""
    with pytest.raises(
        et.RecipeError, match=r"(?s)recipe failed in a worker.*line_recipe\.py.*ValueError: never works"
    ):
        et.run(job(tmp_path, recipe_args={"bad_loss": True}, workers={"max": 2}))
    run = RunDirectory.open(tmp_path / "run")
    assert run.metrics() == []
    assert run.events()[-1].kind == "failed"


def test_nan_stops_all_workers_alike(tmp_path: Path) -> None:
    step, lane = mark_a_row(tmp_path, NAN, not_before=4)
    with pytest.raises(et.UserError, match=rf"step {step}: the loss of lane {lane} is not finite.*on_nan: skip"):
        et.run(job(tmp_path, workers={"min": 2, "max": 2}))
    run = RunDirectory.open(tmp_path / "run")
    assert [row.step for row in run.metrics()] == list(range(1, step)), "all before it is published, and nothing of it"
    end = run.events()[-1]
    assert end.kind == "failed"
    assert f"lane {lane}" in end.data["error"]
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["outcome"] == "failed"


def test_nan_skips_the_step(tmp_path: Path) -> None:
    step, lane = mark_a_row(tmp_path, NAN, not_before=3)
    found = [
        et.run(
            job(
                tmp_path,
                on_nan="skip",
                checkpoint=None,
                workers={"max": n, "start": n},
                run_dir=str(tmp_path / f"run{n}"),
            )
        )
        for n in (1, 3)
    ]
    assert found[0].digest == found[1].digest
    assert [s.skipped_steps for s in found] == [[step], [step]]
    rows = RunDirectory.open(tmp_path / "run3").metrics()
    assert [row.skipped for row in rows if row.step == step] == [[lane]]
    assert [row.step for row in rows] == list(range(1, STEPS + 1))


def test_exception_in_the_loss(tmp_path: Path) -> None:
    step, _ = mark_a_row(tmp_path, RAISE, not_before=5)
    with pytest.raises(
        et.RecipeError, match=r"(?s)recipe failed in a worker.*line_recipe\.py.*ValueError: a spoilt sample"
    ):
        et.run(job(tmp_path, workers={"min": 2, "max": 2}))
    run = RunDirectory.open(tmp_path / "run")
    assert max(row.step for row in run.metrics()) >= step - 2
    assert [e.kind for e in run.events() if e.kind in ("recovery", "worker_lost")] == [], "nobody tries it again"


# --- going on from a checkpoint ---


def stopped_at(folder: Path, step: int, **overrides: Any) -> et.Summary:
    """A run of which the first `step` steps are done and stored."""
    return et.run(job(folder, steps=step, **overrides))


def test_resume_gives_the_same_digest(tmp_path: Path) -> None:
    whole = run_job(job(tmp_path, checkpoint=None))
    stopped_at(tmp_path, 4)
    resumed = et.run(job(tmp_path, workers={"max": 2}), resume=True)
    assert resumed.digest == whole.digest
    assert (resumed.steps, resumed.first_loss, resumed.last_loss) == (STEPS, whole.losses[1], whole.losses[STEPS])
    run = RunDirectory.open(tmp_path / "run")
    assert [row.step for row in run.metrics()] == list(range(1, STEPS + 1))
    assert [e.data["step"] for e in run.events() if e.kind == "run_resumed"] == [4]
    again = et.run(job(tmp_path), resume_step=2)
    assert again.digest == whole.digest


def test_another_number_of_lanes_is_a_recorded_stage(tmp_path: Path) -> None:
    stopped_at(tmp_path, 4)
    et.run(job(tmp_path, lanes=2, steps=6), resume=True)
    run = RunDirectory.open(tmp_path / "run")
    said = [e.data for e in run.events() if e.kind == "stage"]
    assert [(s["stage"], s["step"], s["lanes_before"], s["lanes"]) for s in said] == [(1, 4, 4, 2)]
    stages = load(Store(str(tmp_path / "checkpoints")), 6).tree["stages"]
    assert [(s["index"], s["from_step"], s["lanes"]) for s in stages] == [(0, 0, 4), (1, 4, 2)]
    assert [row.samples for row in run.metrics()] == [8] * 4 + [4] * 2


def test_changes_since_the_checkpoint(tmp_path: Path) -> None:
    stopped_at(tmp_path, 4)
    with pytest.raises(
        et.ConfigError, match=r"checkpoint.path='.*checkpoints' already holds checkpoints \(steps 2, 4\)"
    ):
        et.run(job(tmp_path, run_dir=str(tmp_path / "other")))
    with pytest.raises(
        et.CheckpointMismatch, match=r"seed=5, but checkpoint step 4 was made with seed=0; set seed to that"
    ):
        et.run(job(tmp_path, seed=5), resume=True)
    with pytest.raises(et.ConfigError, match=r"--resume-step 3: .* has steps 2, 4; choose one"):
        et.run(job(tmp_path), resume_step=3)
    with pytest.raises(
        et.CheckpointMismatch, match=r"(?s)model/0\.weight has shape \[12, 2\] in the model and \[8, 2\] in the check"
    ):
        et.run(job(tmp_path, recipe_args={"width": 12}), resume=True)
    with pytest.raises(et.CheckpointMismatch, match=r"Adam needs exp_avg, exp_avg_sq, step for .*has momentum_buffer"):
        et.run(job(tmp_path, recipe_args={"optimizer": "adam"}), resume=True)
    write_rows(tmp_path / "data" / "rows.jsonl", {3: NAN})
    with pytest.raises(et.DataError, match=r"(?s)data have changed since checkpoint step 4:.*rows\.jsonl"):
        et.run(job(tmp_path), resume=True)


def test_changed_data_as_a_new_stage(tmp_path: Path) -> None:
    with pytest.raises(et.ConfigError, match=r"data_changed='new_stage' \(--data-changed\) is about a run that is"):
        et.run(job(tmp_path), data_changed="new_stage")
    stopped_at(tmp_path, 4)
    write_rows(tmp_path / "data" / "rows.jsonl", {3: 0.5})
    et.run(job(tmp_path, steps=6), resume=True, data_changed="new_stage")
    done = et.run(job(tmp_path), resume=True)
    run = RunDirectory.open(tmp_path / "run")
    said = [e.data for e in run.events() if e.kind == "data_changed"]
    assert [(s["step"], s["left"][0]["may_repeat"]) for s in said] == [(4, 0)]
    assert [row.step for row in run.metrics()] == list(range(1, STEPS + 1))
    assert done.steps == STEPS
    result = CliRunner().invoke(app, ["data", "audit", str(run.path)])
    assert result.exit_code == 0, result.output
    assert f"agree at {STEPS} of {STEPS} steps" in result.output
    explained = CliRunner().invoke(app, ["data", "explain", str(run.path), "--step", "3", "--lane", "1"])
    assert "step 3: step 2 of the order of stage 0" in explained.output
    assert "lane 1, sample 0: epoch 0, rows.jsonl, row group 1, row 15" in explained.output
    late = CliRunner().invoke(app, ["data", "skip", str(run.path), "--steps", "3", "--lane", "1"])
    assert "step 3: the data have changed since, so these samples do not come again" in late.output + late.stderr


def test_flipped_byte(tmp_path: Path) -> None:
    whole = stopped_at(tmp_path, 4)
    pack = next((tmp_path / "checkpoints").rglob("*00000004*/**/*.safetensors"))
    content = bytearray(pack.read_bytes())
    content[-3] ^= 1
    pack.chmod(0o644)
    pack.write_bytes(content)
    words = (
        rf"checkpoint step 4 .*damaged and refused.*{re.escape(pack.name)}.*take the older step 2 with --resume-step 2"
    )
    with pytest.raises(et.CorruptCheckpoint, match=words):
        et.run(job(tmp_path), resume=True)
    file = tmp_path / "job.yaml"
    file.write_text(yaml.safe_dump(settings(tmp_path, steps=4)))
    refused = CliRunner().invoke(app, ["run", str(file), "--resume", "--quiet"])
    assert refused.exit_code == 3
    assert "--resume-step 2" in refused.stderr
    found = CliRunner().invoke(app, ["run", str(file), "--resume-step", "2", "--json", "--quiet"])
    assert found.exit_code == 0, found.stderr
    assert json.loads(found.stdout)["digest"] == whole.digest
