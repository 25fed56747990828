"""A job handed to a real Ray head whose Python has Ray and torch, and nothing of ours on its path."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from elastictrain.errors import RecipeError, UserError
from elastictrain_actors.dependencies import beyond_ray_and_torch
from elastictrain_actors.runtime_env import package_folders
from elastictrain_actors.submission import SubmissionResult, connect, last_json, submit_job
from tests.support.ray_head import RayHead, ray_head

pytestmark = [
    pytest.mark.ray,
    pytest.mark.timeout(180),
    # Ray's client calls aiohttp in a way that newer aiohttp wants otherwise.
    pytest.mark.filterwarnings("ignore:ssl=None is deprecated, please use ssl=True:DeprecationWarning"),
]

ROOT = Path(__file__).resolve().parents[2]
STEPS = 4

NEIGHBOUR = """
import torch
def layers(width):
    return torch.nn.Sequential(torch.nn.Linear(2, width), torch.nn.Tanh(), torch.nn.Linear(width, 1))
"""
RECIPE = """
import os
import torch
import elastictrain
import neighbour

class Line(elastictrain.Recipe):
    def model(self):
        return neighbour.layers(8)
    def optimizer(self, params):
        return torch.optim.SGD(params, lr=0.1)
    def loss(self, model, batch):
        x = torch.stack([batch["a"], batch["b"]], -1).float()
        return ((model(x).squeeze(-1) - batch["y"].float()) ** 2).mean()
    def evaluate(self, model):  # runs in a worker: what does it have, and from where?
        return {
            "elastictrain_shipped": float("_ray_pkg_" in elastictrain.__file__),
            "recipe_shipped": float("_ray_pkg_" in __file__),
            "threads": float(os.environ["OMP_NUM_THREADS"]),
            "hash_seed_fixed": float(os.environ["PYTHONHASHSEED"] == "0"),
        }
"""


@pytest.fixture(scope="module")
def head() -> Iterator[RayHead]:
    with ray_head() as started:
        yield started


def job_folder(tmp_path: Path) -> Path:
    """The folder of a job: recipe, neighbour, data, all named by relative path."""
    (tmp_path / "neighbour.py").write_text(NEIGHBOUR)
    (tmp_path / "recipe.py").write_text(RECIPE)
    (tmp_path / ".gitignore").write_text("data/\n")  # data are not for git; they travel all the same
    (tmp_path / "data").mkdir()
    rows = [{"a": i % 7 / 7, "b": i % 5 / 5, "y": (i % 7 + i % 5) / 12} for i in range(256)]
    (tmp_path / "data" / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    job = {
        "name": "travels",
        "recipe": "recipe.py:Line",
        "data": {"kind": "jsonl", "path": "data", "columns": ["a", "b", "y"], "rows_per_block": 32},
        "lanes": 4,
        "lane_batch_size": 2,
        "steps": STEPS,
        "evaluate_every": STEPS,
        "workers": {"min": 1, "max": 2, "start": 2, "cpus": 0.5},
        "checkpoint": {"path": "runs/checkpoints"},
    }
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(job))
    return tmp_path


def check(result: dict[str, Any] | None, head: RayHead, checkpoints: str) -> None:
    assert result is not None
    assert (result["outcome"], result["steps"], result["world_sizes"]) == ("finished", STEPS, [2])
    assert result["evaluation"] == {
        "elastictrain_shipped": 1.0, "recipe_shipped": 1.0, "threads": 1.0, "hash_seed_fixed": 1.0,
    }  # fmt: skip
    # Written where it outlives the job's copy of the folder, and complete:
    assert Path(result["run_dir"]).is_relative_to(head.home / "elastictrain")
    assert (Path(result["run_dir"]) / "summary.json").is_file()
    assert any((head.home / "elastictrain" / "runs" / checkpoints).rglob("*.safetensors"))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return job_folder(tmp_path)


@pytest.fixture(scope="module")
def submitted(head: RayHead, tmp_path_factory: pytest.TempPathFactory) -> tuple[SubmissionResult, list[str]]:
    """The job, run by `submit_job`, and the lines that it said."""
    log: list[str] = []
    job = job_folder(tmp_path_factory.mktemp("job")) / "job.yaml"
    return submit_job(job, head.dashboard, on_line=log.append), log


def test_submit_runs_the_job_and_brings_back_its_summary(
    head: RayHead, submitted: tuple[SubmissionResult, list[str]]
) -> None:
    found, log = submitted
    assert found.status == "SUCCEEDED", log
    check(found.result, head, "checkpoints")
    assert any(line.startswith("note: checkpoint.path='runs/checkpoints' is relative") for line in log)
    assert not [line for line in log if "Warning" in line or "Traceback" in line], log
    assert not [line for line in log if "install with pip" in line], "auto: nothing is missing on this head"


def test_ray_job_submit_runs_the_same_job(
    head: RayHead, folder: Path, submitted: tuple[SubmissionResult, list[str]]
) -> None:
    # `ray job submit -- elastictrain run`: elastictrain is known to the entrypoint alone, as when only the head has it.
    again = (folder / "job.yaml").read_text().replace("runs/checkpoints", "runs/again")
    (folder / "job.yaml").write_text(again)
    path = os.pathsep.join(str(package.parent) for package in package_folders())
    also = {"RAY_RUNTIME_ENV_IGNORE_GITIGNORE": "1"}  # Ray's own client leaves out what git ignores: here, the data
    ran = subprocess.run(
        [
            *(sys.executable, "-m", "ray.scripts.scripts", "job", "submit", "--address", head.dashboard),
            *("--working-dir", str(folder), "--", "env", f"PYTHONPATH={path}"),
            *("python", "-m", "elastictrain.cli", "run", "job.yaml", "--json"),
        ],
        capture_output=True, text=True, timeout=120, check=False, env={**head.environment, **also}, cwd=folder,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stdout + ran.stderr
    # The CLI adds a few lines of its own after the log.
    result = last_json(ran.stdout.splitlines())
    check(result, head, "again")
    assert result is not None
    first = submitted[0].result
    assert first is not None
    assert result["digest"] == first["digest"]


def test_a_job_that_fails_says_why_with_the_type_of_who_must_act(head: RayHead, folder: Path) -> None:
    text = (folder / "job.yaml").read_text().replace("recipe.py:Line", "recipe.py:Missing")
    (folder / "job.yaml").write_text(text)
    with pytest.raises(UserError, match=r"failed \(exit code 2\)") as caught:
        submit_job(folder / "job.yaml", head.dashboard, on_line=lambda line: None, ship_dependencies="none")
    assert not isinstance(caught.value, RecipeError)  # the exit code does not say more
    assert "it defines Line" in str(caught.value)


def test_the_cluster_says_what_it_lacks(head: RayHead) -> None:
    from elastictrain_actors.probe import read_probe
    from elastictrain_actors.submission import run_probe

    client = connect(head.dashboard)
    wanted = ["ray", "torch>=2", *beyond_ray_and_torch(), "no-such-distribution>=1", "numpy>=99"]
    log = run_probe(client, wanted)
    assert read_probe(log, assumed=("ray", "torch")) == ["no-such-distribution>=1", "numpy>=99"]
