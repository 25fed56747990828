from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from elastictrain.errors import ConfigError
from elastictrain.planner.profiles import DEVICES, LINKS, dump_cluster, load_cluster, parse_cluster

TITAN = {
    "name": "titan", "peak_flops": {"f32": 16e12}, "memory_bytes": 24e9, "bandwidth_bytes_s": 672e9,
    "gemm_efficiency": {64: 0.2, 1024: 0.6},
}  # fmt: skip


def test_a_cluster_survives_being_written(tmp_path: Path) -> None:
    cluster = parse_cluster(
        {"groups": [{"device": "a100-80", "nodes": 2, "per_node": 8}, {"device": "titan"}], "devices": [TITAN]}
    )
    file = tmp_path / "cluster.yaml"
    file.write_text(dump_cluster(cluster))
    assert load_cluster(file) == cluster
    assert cluster.size == 17
    assert cluster.device(cluster.groups[1]).memory_bytes == 24e9


def test_a_measured_profile_takes_precedence() -> None:
    own = DEVICES["l4"].model_copy(update={"peak_flops": {"bf16": 1e12}}).model_dump()
    cluster = parse_cluster({"groups": [{"device": "l4"}], "devices": [own]})
    assert cluster.device(cluster.groups[0]).peak("bf16") == 1e12


def test_every_built_in_value_names_its_source() -> None:
    assert all(len(profile.source) > 10 for profile in [*DEVICES.values(), *LINKS.values()])
    assert DEVICES["t4"].peak("bf16") == DEVICES["t4"].peak("f32")  # it has no bf16 units


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (
            {"groups": [{"device": "a100"}]},
            ("cluster: groups.0.device='a100' has no profile; did you mean a100-80 or a100-40? For another device "
            "measure the nodes (`elastictrain profile`, or with --local on one of them), or write its name, "
            "peak_flops, memory_bytes and bandwidth_bytes_s from the data sheet under devices:"),
        ),
        (
            {"groups": [{"device": "l4", "intra": "pcie9"}]},
            "cluster: groups.0.intra='pcie9' is no known link; did you mean 'pcie5'?",
        ),
        (
            {"groups": [{"device": "l4", "memory_limit_bytes": 1e12}]},
            "cluster: groups.0.memory_limit_bytes=1e+12 is more than the 2.384e+10 bytes that a l4 has; lower it",
        ),
        ({"groups": [{"device": "b300"}]}, "cluster: groups.0.device='b300' has no profile; known devices: a100-40, "),
        ({"groups": [{"device": "h10"}]}, "cluster: groups.0.device='h10' has no profile; did you mean h100 or h100-"),
        ({"groups": [{"device": "rtx4080"}]}, "cluster: groups.0.device='rtx4080' has no profile; did you mean rtx4"),
        (
            {"groups": [{"device": "l4"}], "devices": [DEVICES["l4"].model_dump(), DEVICES["l4"].model_dump()]},
            "cluster: devices has 'l4' twice; remove one of them, or give it another name",
        ),
        (
            {"groups": [{"device": "l4"}], "links": [LINKS["pcie4"].model_dump()] * 2},
            "cluster: links has 'pcie4' twice; remove one of them, or give it another name",
        ),
        ({"groups": []}, "cluster: groups is empty; expected at least one group of nodes"),
        ({"groups": [{"device": "l4"}], "between": "rope"}, "cluster: between='rope' is no known link"),
        ({"groups": [{"device": "l4", "node": 3}]}, "cluster: unknown setting 'groups.0.node'"),
        ([], "cluster: expected a mapping with `groups`, got list"),
    ],
)  # fmt: skip
def test_a_wrong_cluster_is_refused_in_words(raw: Any, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_cluster(raw)
    assert str(caught.value).startswith(message)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no such file; expected YAML with `groups` of nodes$"):
        load_cluster(tmp_path / "none.yaml")
    (tmp_path / "bad.yaml").write_text("groups: [")
    with pytest.raises(ConfigError, match="not valid YAML"):
        load_cluster(tmp_path / "bad.yaml")
