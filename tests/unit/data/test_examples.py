"""The examples' own parts: preparation is idempotent and repairs itself, the jobs are valid, the models learn."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch

from elastictrain.data import LaneReader, open_source
from elastictrain.data.feeder import Feeder
from elastictrain.job import Data, Job, load_job
from elastictrain.recipe import load_recipe

ROOT = Path(__file__).parents[3]
EXAMPLES = ROOT / "examples"


def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"prepare_{name}", EXAMPLES / name / "prepare.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def small_library(root: Path) -> Path:
    for number in range(150):
        folder = root / f"package{number % 7}"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"module{number}.py").write_text(f"def f{number}():\n    return {number}\n" * 40)
    (root / "package0" / "broken.py").write_bytes(b"# coding: utf-8\nx = '\xff'\n")
    (root / "site-packages").mkdir()
    (root / "site-packages" / "installed.py").write_text("x = 1\n")
    return root


def content_of(out: Path) -> dict[str, bytes]:
    return {path.relative_to(out).as_posix(): path.read_bytes() for path in out.rglob("*") if path.is_file()}


def test_gpt_prepare(tmp_path: Path) -> None:
    gpt = script("gpt")
    root, out = small_library(tmp_path / "lib"), tmp_path / "out"
    notes = gpt.prepare(out, root=root)
    assert notes["unreadable_files"] == 1
    first = content_of(out)
    assert set(first) == {"train/stdlib.parquet", "validation.parquet", "prepared.json"}
    stamp = (out / "train/stdlib.parquet").stat().st_mtime_ns
    assert gpt.prepare(out, root=root) == notes
    assert (out / "train/stdlib.parquet").stat().st_mtime_ns == stamp
    (out / "train/stdlib.parquet").write_bytes(first["train/stdlib.parquet"][:-100])
    assert gpt.prepare(out, root=root) == notes
    assert content_of(out) == first
    train, held_out = (pq.read_table(out / name).column("path").to_pylist() for name in list(notes["files"]))
    assert not set(train) & set(held_out)
    assert len(train) + len(held_out) == 150
    assert not any("site-packages" in path for path in train)
    (root / "package0" / "new.py").write_text("x = 1\n")
    assert gpt.prepare(out, root=root) != notes
    with pytest.raises(SystemExit, match="expected the sources of the standard library"):
        gpt.prepare(out, root=tmp_path / "nothing")


def test_gpt_prepare_writes_several_row_groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gpt = script("gpt")
    monkeypatch.setattr(gpt, "ROW_GROUP_BYTES", 20_000)
    notes = gpt.prepare(tmp_path / "out", root=small_library(tmp_path / "lib"))
    groups = notes["files"]["train/stdlib.parquet"]["row_groups"]
    assert groups == pq.read_metadata(tmp_path / "out/train/stdlib.parquet").num_row_groups > 5


def test_digits_prepare(tmp_path: Path) -> None:
    pytest.importorskip("sklearn")
    digits = script("digits")
    rows = digits.prepare(tmp_path)
    assert rows == {"train/digits.parquet": 1438, "test.parquet": 359}
    first = content_of(tmp_path)
    stamp = (tmp_path / "test.parquet").stat().st_mtime_ns
    (tmp_path / "train/digits.parquet").write_bytes(b"PAR1")
    assert digits.prepare(tmp_path) == rows
    assert content_of(tmp_path) == first
    assert (tmp_path / "test.parquet").stat().st_mtime_ns == stamp


def job_of(name: str, monkeypatch: pytest.MonkeyPatch) -> Job:
    monkeypatch.chdir(ROOT)  # as the commands in the job files do
    return load_job(EXAMPLES / name / "job.yaml")


def train(job: Job, recipe: Any, data: Data, steps: int, lanes: int) -> list[float]:
    torch.manual_seed(job.seed)
    model = recipe.model()
    optimizer = recipe.optimizer(list(model.named_parameters()))
    source = open_source(data, seed=job.seed, lanes=job.lanes, lane_batch_size=job.lane_batch_size)
    rates = [group["lr"] for group in optimizer.param_groups]
    losses = []
    reader = LaneReader(source)
    with Feeder(reader) as feeder:
        for step in range(steps):
            feeder.expect([(s, lane) for s in (step, step + 1) for lane in range(lanes)])
            optimizer.zero_grad()
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * recipe.schedule(step + 1)
            total = 0.0
            for lane in range(lanes):
                loss = recipe.loss(model, feeder.batch(step, lane)) / lanes
                loss.backward()
                total += float(loss.detach())
            optimizer.step()
            losses.append(total)
    reader.close()
    with torch.no_grad():
        metrics = recipe.evaluate(model.eval())
    assert all(torch.isfinite(torch.tensor(value)) for value in metrics.values())
    return losses


def test_gpt_job_learns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = job_of("gpt", monkeypatch)
    recipe = load_recipe(job.recipe, job.recipe_args)
    parameters = sum(parameter.numel() for parameter in recipe.model().parameters())
    assert 2_000_000 < parameters < 8_000_000
    assert recipe.total_steps == job.steps
    assert recipe.config.sequence_length == job.data.sequence_length
    arguments = job.recipe_args | {"warmup_steps": 2, "model": {**job.recipe_args["model"], "layers": 2, "width": 48}}
    small = load_recipe(job.recipe, arguments)
    script("gpt").prepare(tmp_path / "data", root=small_library(tmp_path / "lib"))
    monkeypatch.setitem(small.evaluate.__func__.__globals__, "VALIDATION", tmp_path / "data/validation.parquet")
    data = job.data.model_copy(update={"path": str(tmp_path / "data/train")})
    losses = train(job, small, data, steps=12, lanes=3)
    assert losses[-1] < losses[0] - 0.5
    groups = small.optimizer(list(small.model().named_parameters())).param_groups
    assert [{p.dim() >= 2 for p in group["params"]} for group in groups] == [{True}, {False}]


@pytest.mark.parametrize("tied", [True, False])
def test_gpt_looks_only_back(tied: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    job = job_of("gpt", monkeypatch)
    model_arguments = {"layers": 1, "width": 24, "sequence_length": 16, "tied_head": tied}
    model = load_recipe(job.recipe, {"model": model_arguments}).model().eval()
    assert (model.head.weight is model.token.weight) == tied
    tokens = torch.arange(16)[None]
    changed = tokens.clone()
    changed[0, 10] = 99
    before, after = model(tokens), model(changed)
    assert torch.equal(before[:, :10], after[:, :10])
    assert not torch.equal(before[:, 10:], after[:, 10:])
    with pytest.raises(ValueError, match="17 tokens; the model has 16 positions"):
        model(torch.zeros(1, 17, dtype=torch.long))


def test_digits_job_learns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("sklearn")
    job = job_of("digits", monkeypatch)
    recipe = load_recipe(job.recipe, job.recipe_args)
    assert recipe.total_steps == job.steps
    script("digits").prepare(tmp_path)
    monkeypatch.setitem(recipe.evaluate.__func__.__globals__, "HELD_OUT", tmp_path / "test.parquet")
    data = job.data.model_copy(update={"path": str(tmp_path / "train")})
    losses = train(job, recipe, data, steps=20, lanes=4)
    assert losses[-1] < losses[0] / 2
