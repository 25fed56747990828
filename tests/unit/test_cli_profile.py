"""`elastictrain profile --local`: really measured, on this machine, and quickly."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from elastictrain.cli import app
from elastictrain.engine import measure
from elastictrain.errors import ClusterError
from elastictrain.planner.profiles import load_cluster


@pytest.fixture(autouse=True)
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sizes with which measuring takes a moment; the times are whatever they are."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr(measure, "SIDES", (16, 64))
    monkeypatch.setattr(measure, "WIDE", 64)
    monkeypatch.setattr(measure, "DISK_BYTES", 1 << 20)


def test_this_machine_is_measured_and_plan_reads_it(tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["profile", "--local", "--seconds", "1", "--out", "here.yaml"])
    assert done.exit_code == 0, done.output
    assert "Next: elastictrain plan JOB.yaml --cluster here.yaml" in done.output
    cluster = load_cluster(tmp_path / "here.yaml")
    (group,) = cluster.groups
    device = cluster.device(group)
    assert sorted(device.gemm_efficiency) == [16, 64]
    assert max(device.gemm_efficiency.values()) == 1.0
    assert device.memory_bytes * group.per_node == pytest.approx(measure.host_memory_bytes())
    assert group.disk_bytes_s is not None
    link = cluster.link(group.intra)
    assert 0 <= link.alpha_s < 1
    assert link.beta_bytes_s > 1e6
    again = CliRunner().invoke(app, ["profile", "--local", "--out", "here.yaml"])
    assert again.exit_code == 2
    assert "there is such a file already; name another one, or replace it with --force" in again.output
    model = {"layers": 2, "hidden": 64, "heads": 2, "sequence": 32, "vocab": 100}
    (tmp_path / "model.yaml").write_text(yaml.safe_dump(model))
    (tmp_path / "text.jsonl").write_text(json.dumps({"text": "words"}))
    data = {"kind": "jsonl", "path": "text.jsonl", "text_column": "text", "sequence_length": 16}
    (tmp_path / "job.yaml").write_text(yaml.safe_dump({"recipe": "a:B", "data": data, "steps": 1, "lanes": 4}))
    planned = CliRunner().invoke(app, ["plan", "job.yaml", "--cluster", "here.yaml", "--model", "model.yaml", "--json"])
    assert planned.exit_code == 0, planned.output
    assert json.loads(planned.stdout)["usable_now"]["workers"]["max"] <= group.per_node


def test_wrong_places_are_refused_before_anything_is_measured(tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["profile", "--local", "--out", "none/here.yaml"])
    assert done.exit_code == 2
    assert "there is no folder" in done.output
    with pytest.raises(ClusterError, match=r"cannot be written to measure the disk: No such file or directory"):
        measure.measure_disk(tmp_path / "none")


def test_the_other_end_of_a_link_that_does_not_come_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "PATIENCE_S", 0.5)
    port = measure.free_port()
    with pytest.raises(ClusterError, match=rf"^the link between this node and 127.0.0.1:{port} could not be measured"):
        measure.measure_pair("127.0.0.1", port, 0, "127.0.0.1", 1.0)
