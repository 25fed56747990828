"""`elastictrain plan` as a user sees it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from matplotlib.figure import Figure
from typer.testing import CliRunner

from elastictrain.cli import app
from elastictrain.job import parse_job
from elastictrain.observe.plan_view import draw_pipeline
from elastictrain.planner.model import Cut
from elastictrain.planner.plan import Plan, StageWork

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
"""
MODEL = {"layers": 8, "hidden": 2048, "heads": 16, "sequence": 1024, "vocab": 32000, "gated": True}
CLUSTER = {
    "groups": [
        {"device": "a100-80", "per_node": 2},
        {"device": "l4", "per_node": 2, "intra": "pcie4", "island": "b"},
    ],
    "between": "eth-100",
}


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "160")
    (tmp_path / "tiny.py").write_text(RECIPE)
    (tmp_path / "text.jsonl").write_text("\n".join(json.dumps({"text": "words " * 20}) for _ in range(200)))
    data = {"kind": "jsonl", "path": "text.jsonl", "text_column": "text", "sequence_length": 16}
    job = {"recipe": "tiny.py:Tiny", "data": data, "steps": 3, "lanes": 24, "numerics": {"compute_dtype": "bf16"}}
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(job))
    (tmp_path / "model.yaml").write_text(yaml.safe_dump(MODEL))
    (tmp_path / "cluster.yaml").write_text(yaml.safe_dump(CLUSTER))
    return tmp_path


DECODER = """
class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv, self.out = nn.Linear(64, 192, bias=False), nn.Linear(64, 64, bias=False)
        self.up, self.down = nn.Linear(64, 256), nn.Linear(256, 64)
    def forward(self, x):
        q, k, v = self.qkv(x).chunk(3, -1)
        x = x + self.out(nn.functional.scaled_dot_product_attention(q, k, v))
        return x + self.down(self.up(x))

class Decoder(Tiny):
    def model(self):
        return nn.Sequential(nn.Embedding(320, 64), *(Block() for _ in range(4)), nn.Linear(64, 320))
"""
PLAN = ["plan", "job.yaml", "--cluster", "cluster.yaml"]


def test_a_decoder_is_recognised_in_the_recipe(folder: Path) -> None:
    (folder / "tiny.py").write_text(RECIPE + DECODER)
    job = (folder / "job.yaml").read_text()
    (folder / "job.yaml").write_text(job.replace("tiny.py:Tiny", "tiny.py:Decoder"))
    done = CliRunner().invoke(app, [*PLAN, "--json"])
    assert done.exit_code == 0, done.output
    said = "found in the recipe's model: 4 layers of width 64, MLP 256, 320 tokens, sequences of 17, flash2"
    assert said in done.stderr, done.stderr
    found = json.loads(done.stdout)
    shape = {"layers": 4, "hidden": 64, "heads": 1, "sequence": 17, "vocab": 320, "ffn": 256, "fused_norm": False}
    (folder / "model.yaml").write_text(yaml.safe_dump(shape))
    told = CliRunner().invoke(app, [*PLAN, "--json", "--model", "model.yaml"])
    assert found == json.loads(told.stdout), "as from a file that says the same"
    (folder / "job.yaml").write_text(job)
    done = CliRunner().invoke(app, [*PLAN, "--json"])
    assert done.exit_code == 0, done.output
    assert done.stderr.startswith("the recipe's model was not recognised as a decoder: no nn.ModuleList")
    assert "only lanes and blocks are planned. Describe a decoder in a file for more: --model model.yaml" in done.stderr
    assert {plan["family"] for plan in json.loads(done.stdout)["plans"]} == {"lanes"}


def test_json_says_what_can_be_used_now_as_settings_of_a_job(folder: Path) -> None:
    done = CliRunner().invoke(app, [*PLAN, "--model", "model.yaml", "--json"])
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert found["plans"][0]["step_s"] >= found["bound_s"] > 0
    assert found["gap"] == pytest.approx(0, abs=1e-9)
    workers = found["usable_now"]["workers"]
    assert sum(workers["lane_shares"].values()) == 24
    raw = yaml.safe_load((folder / "job.yaml").read_text())
    job = parse_job(raw | {"workers": dict(workers)})
    assert len(job.workers.lane_shares) == job.workers.max


def test_words_for_people_and_a_picture(folder: Path) -> None:
    done = CliRunner().invoke(app, [*PLAN, "--model", "model.yaml", "--picture", "out.png"])
    assert done.exit_code == 0, done.output
    for words in ("Plans, best first", "limited by", "The next best", "No plan of the kinds searched takes less than",
                  "What a job can use today", "lane_shares:", "block_shares:"):  # fmt: skip
        assert words in done.stdout
    assert (folder / "out.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("chunks", [1, 2])
def test_the_timeline_of_a_pipeline_shows_what_is_sent_between_stages(chunks: int) -> None:
    figure = Figure()
    work = StageWork((1.0, 1.0, 1.0), (2.0, 2.0, 2.0), (0.25, 0.5), 0.75)
    cut = Cut(pipeline=3, micro_batches=24, chunks=chunks)
    plan = Plan("grid", 1.0, 1.0, (0,), 3, 1.0, "", cut, (4, 4, 4), (0, 0, 0), (3.0,) * 3, (0,) * 3, 1.0, work)
    panel = figure.subplots()
    said = draw_pipeline(panel, plan)
    assert said == "the first 12 of 24 micro-batches; the exchange of gradients after them is not drawn"
    there = {one.get_label(): one.get_segments() for one in panel.collections}
    assert {label: len(lines) for label, lines in there.items()} == dict.fromkeys(
        ("sent on", "sent back"), 12 * (3 * chunks - 1)
    )
    (first, *_), last = there["sent on"], there["sent back"][-1]
    assert [tuple(point) for point in first] == [(1.0 / chunks, 0.4), (1.0 / chunks + 0.25, 0.6)]
    assert last[0][1] > last[1][1]


@pytest.mark.parametrize("options", [[], ["--model", "model.yaml"]])
def test_in_a_narrow_terminal_times_and_shapes_stay_readable(
    folder: Path, monkeypatch: pytest.MonkeyPatch, options: list[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    found = json.loads(CliRunner().invoke(app, [*PLAN, *options, "--json"]).stdout)["plans"]
    done = CliRunner().invoke(app, [*PLAN, *options])
    assert done.exit_code == 0, done.output
    table = done.stdout.partition("t x p x w: ")[0]
    assert "…" not in table
    assert max(map(len, table.splitlines())) <= 80
    for place, plan in enumerate(found, 1):
        seconds = plan["replayed_s"] if plan["replayed_s"] is not None else plan["step_s"]
        [line] = [line for line in table.splitlines() if line.split()[:1] == [str(place)]]
        assert line.split()[1] == f"{seconds:.3g}"
        assert line.split()[-1] in ("yes", "no")


def test_without_a_model_file_the_recipe_is_looked_at(folder: Path) -> None:
    done = CliRunner().invoke(app, [*PLAN, "--json", "--picture", "out.png"])
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert {plan["family"] for plan in found["plans"]} == {"lanes"}
    assert len({plan["devices"] for plan in found["plans"]}) == len(found["plans"]) > 1
    assert (folder / "out.png").stat().st_size > 1000


def test_what_fits_nowhere_says_what_would_help(folder: Path) -> None:
    (folder / "model.yaml").write_text(yaml.safe_dump(MODEL | {"layers": 96, "hidden": 12288, "heads": 96}))
    done = CliRunner().invoke(app, [*PLAN, "--model", "model.yaml"])
    assert done.exit_code == 3
    assert "does not fit on the 4 devices of this cluster, however it is cut up; the smallest thing" in done.output
    assert "groups." in done.output


def test_a_search_that_ends_early_does_not_say_that_nothing_fits() -> None:
    done = CliRunner().invoke(app, [*PLAN, "--model", "model.yaml", "--seconds", "1e-9"])
    assert done.exit_code == 2
    assert "--seconds" in done.output
    monkey = pytest.MonkeyPatch()
    with monkey.context() as patched:
        patched.setattr("elastictrain.plan_command._after", lambda _: lambda: True)
        done = CliRunner().invoke(app, [*PLAN, "--model", "model.yaml"])
    assert done.exit_code == 3
    assert "was found: 0 of " in done.output
    assert "were tried until the search ended (--seconds 60); what would help was not found" in done.output


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layer": 3}, "model.yaml: unknown setting 'layer'; did you mean 'layers'?"),
        ({"layers": True}, "model.yaml: layers=True: expected no switch"),
        ({"gated": 1}, "model.yaml: gated=1: expected true or false"),
        ({"layers": 0}, "model.layers=0: expected 1 or more"),
        ({"attention": "quick"}, "model.yaml: attention: "),
    ],
)
def test_a_wrong_model_is_refused_in_words(folder: Path, change: dict[str, object], message: str) -> None:
    (folder / "model.yaml").write_text(yaml.safe_dump(MODEL | change))
    done = CliRunner().invoke(app, [*PLAN, "--model", "model.yaml"])
    assert done.exit_code == 2
    assert done.output.startswith(message)


def test_a_missing_model_or_cluster(folder: Path) -> None:
    done = CliRunner().invoke(app, [*PLAN, "--model", "none.yaml"])
    assert done.exit_code == 2
    assert done.output.startswith("model file none.yaml: no such file")
    done = CliRunner().invoke(app, ["plan", "job.yaml", "--cluster", "none.yaml"])
    assert done.exit_code == 2
    assert done.output.startswith("cluster file none.yaml: no such file")


def test_validate_says_what_plan_auto_would_choose_and_looks_at_the_cluster_file(folder: Path) -> None:
    job = yaml.safe_load((folder / "job.yaml").read_text()) | {"plan": "auto", "cluster": "cluster.yaml"}
    (folder / "job.yaml").write_text(yaml.safe_dump(job))
    result = CliRunner().invoke(app, ["validate", "job.yaml"])
    assert result.exit_code == 0, result.output
    said = [line for line in result.stdout.splitlines() if line.startswith("plan      ")]
    assert said
    assert "worker" in said[0]
    (folder / "cluster.yaml").write_text("groups: [{device: nonsuch}]")
    result = CliRunner().invoke(app, ["validate", "job.yaml"])
    assert (result.exit_code, "nonsuch" in result.stderr) == (2, True), result.output
