"""`elastictrain profile` on a Ray that is there."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from elastictrain.cli import app
from elastictrain.planner.profiles import load_cluster
from elastictrain_actors.profiling import measure_cluster, nodes_of, parts_of

pytestmark = pytest.mark.ray


def test_the_nodes_of_a_cluster_are_measured(shared_ray: None, tmp_path: Path) -> None:
    out = tmp_path / "cluster.yaml"
    done = CliRunner().invoke(app, ["profile", "--seconds", "2", "--out", str(out), "--disk", str(tmp_path)])
    assert done.exit_code == 0, done.output
    cluster = load_cluster(out)
    assert [(group.nodes, group.per_node) for group in cluster.groups] == [(1, 8)]
    assert len(cluster.device(cluster.groups[0]).gemm_efficiency) == 5


def test_links_between_nodes_are_measured(shared_ray: None, tmp_path: Path) -> None:
    """Two probers on one node stand for two nodes: the pairing, the meeting and the patterns are the same."""
    with nodes_of("auto") as nodes:
        said: list[str] = []
        readings, pairs = measure_cluster(nodes * 4, 1.0, str(tmp_path), done=said.append)
    assert len(readings) == 4
    assert len(said) == parts_of(4)
    assert {pair.pattern for pair in pairs} == {"alone", "contiguous", "strided"}
    assert all(seconds > 0 for pair in pairs for _, seconds in pair.times)
