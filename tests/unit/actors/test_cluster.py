"""What an embedded Ray is started with, and a cluster that was there before is not."""

from __future__ import annotations

import inspect
from types import SimpleNamespace
from typing import Any

import pytest
import ray
from ray._private.node import Node

import elastictrain as et
from elastictrain_actors import cluster

JOB = et.Job(recipe="m:R", data={"kind": "jsonl", "path": "d", "text_column": "t", "sequence_length": 8}, steps=1)  # type: ignore[arg-type]


@pytest.mark.parametrize("address", [None, "auto"])
def test_only_the_embedded_ray_is_made_quiet_and_the_users_settings_come_first(
    monkeypatch: pytest.MonkeyPatch, address: str | None
) -> None:
    inits: list[dict[str, Any]] = []
    ended: list[bool] = []
    kept, others = "RAY_enable_metrics_collection", set(cluster.EMBEDDED) - {"RAY_enable_metrics_collection"}
    environment = {kept: "1"}
    monkeypatch.setattr(cluster.os, "environ", environment)
    monkeypatch.setattr(ray, "init", lambda **options: inits.append(options))
    node = SimpleNamespace(kill_log_monitor=lambda *, check_alive: ended.append(check_alive))
    monkeypatch.setattr(ray._private.worker, "_global_node", node)
    cluster._start(JOB, address, {})
    assert [options["address"] for options in inits] == [address or "local"]
    assert environment[kept] == "1"
    assert {name for name in others if name in environment} == (set() if address else others)
    assert ended == ([] if address else [False])


def test_ray_still_has_the_door_that_is_used() -> None:
    assert "check_alive" in inspect.signature(Node.kill_log_monitor).parameters
