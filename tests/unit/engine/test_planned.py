"""`plan: auto` from a job file to the job as it runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from elastictrain.engine.planned import plan_job
from elastictrain.errors import CapacityError, ConfigError, RecipeError
from elastictrain.job import Job, parse_job
from elastictrain.observe.sentences import SENTENCES
from elastictrain_actors.luggage import relative_paths

RECIPE = """
import torch
from torch import nn

class Tiny:
    def model(self):
        return nn.Embedding(320, 8)
    def optimizer(self, params):
        return torch.optim.SGD(params, lr=0.1)
    def loss(self, model, batch):
        return model(batch["tokens"]).mean()

class Peeks(Tiny):
    def loss(self, model, batch):
        return self.peek(model(batch["tokens"]).mean())
    def peek(self, loss):
        return loss * loss.item()
"""


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny.py").write_text(RECIPE)
    (tmp_path / "text.jsonl").write_text("\n".join(json.dumps({"text": "words " * 20}) for _ in range(200)))
    return tmp_path


def job(devices: int, workers: dict[str, Any], recipe: str = "Tiny", **device: Any) -> Job:
    groups = [{"device": "a100-80", "nodes": devices, "inter": "eth-10", **device}]
    Path("cluster.yaml").write_text(yaml.safe_dump({"groups": groups}))
    data = {"kind": "jsonl", "path": "text.jsonl", "text_column": "text", "sequence_length": 16}
    raw = {"recipe": f"tiny.py:{recipe}", "data": data, "steps": 3, "lanes": 12, "plan": "auto"}
    return parse_job(raw | {"cluster": "cluster.yaml", "workers": workers})


def test_only_the_number_of_workers_changes() -> None:
    before = job(12, {"min": 2, "max": 12})
    after, note, pace = plan_job(before)
    assert 2 <= after.workers.max < 12  # a tiny model does not pay for its exchange
    assert after.model_copy(update={"workers": before.workers}) == before
    assert after.workers.model_copy(update={"max": 12}) == before.workers
    assert note["workers"] == after.workers.max
    assert SENTENCES["plan_chosen"](note).startswith(f"plan: auto: {after.workers.max} workers (")
    assert json.loads(json.dumps(note)) == note
    assert len(pace.rest_s) == after.workers.max
    assert pace.step_s(12, (1.0,) * after.workers.max) == pytest.approx(note["step_s"])


def test_what_cannot_be_is_said() -> None:
    with pytest.raises(CapacityError, match=r"^plan: auto: workers.min=3, but cluster.yaml has 2 devices; lower"):
        plan_job(job(2, {"min": 3, "max": 12}))
    with pytest.raises(
        CapacityError, match=r"^plan: auto: a model of 2,560 parameters, whole on every worker, does not"
    ):
        plan_job(job(2, {"min": 1, "max": 12}, memory_limit_bytes=1e6))
    with pytest.raises(RecipeError, match=r"^plan: auto is not possible for this recipe; remove `plan` from the job"):
        plan_job(job(2, {"min": 1, "max": 12}, recipe="Peeks"))
    missing = job(2, {"min": 1, "max": 2})
    Path("cluster.yaml").unlink()
    with pytest.raises(ConfigError, match=r"^cluster file cluster.yaml: no such file"):
        plan_job(missing)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"cluster": None}, "plan='auto' needs cluster: a file that says which devices there are; measure them with"),
        (
            {"workers": {"max": 2, "lane_shares": {0: 2}}},
            "plan='auto' and workers.lane_shares both say who does how much",
        ),
        ({"workers": {"max": 2, "start": 2}}, "plan='auto' and workers.start both say who does how much"),
        ({"plan": "best"}, "plan: Input should be 'auto'"),
    ],
)
def test_contradictions_are_refused(change: dict[str, Any], message: str) -> None:
    raw = job(2, {"min": 1, "max": 2}).model_dump(mode="json")
    with pytest.raises(ConfigError, match=message.replace("(", r"\(")):
        parse_job(raw | change)


def test_the_cluster_file_travels_with_the_job() -> None:
    assert relative_paths(job(2, {"max": 2}))["cluster"] == ["cluster.yaml"]
