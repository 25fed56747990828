"""What an embedded Ray is started with, and a cluster that was there before is not."""

from __future__ import annotations

import inspect
import socket
from types import SimpleNamespace
from typing import Any

import pytest
import ray
from ray._private.node import Node

import elastictrain as et
from elastictrain.errors import ClusterError
from elastictrain.prepare_settings import Preparation
from elastictrain_actors import cluster, head, preparation, profiling

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
    monkeypatch.setattr(head, "knock", lambda _: None)
    cluster._start(JOB, address, {})
    assert [options["address"] for options in inits] == [address or "local"]
    assert environment[kept] == "1"
    assert {name for name in others if name in environment} == (set() if address else others)
    assert ended == ([] if address else [False])


def test_ray_still_has_the_door_that_is_used() -> None:
    assert "check_alive" in inspect.signature(Node.kill_log_monitor).parameters


@pytest.fixture
def gone(monkeypatch: pytest.MonkeyPatch) -> str:
    """Address of a head that was there; Ray must not be asked: it would try for minutes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(ray, "init", lambda **_: pytest.fail("Ray was asked"))
    return f"127.0.0.1:{port}"


@pytest.mark.parametrize("auto", [False, True])
@pytest.mark.parametrize("who", ["run", "profile", "prepare"])
def test_a_head_that_has_gone_is_said_at_once(gone: str, who: str, auto: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """`ray start` leaves a file with its address, which `auto` follows also when that cluster has died."""
    address = gone
    if auto:
        address = "auto"
        monkeypatch.setattr(ray._private.services, "find_gcs_addresses", list)
        monkeypatch.setattr(ray._private.utils, "read_ray_address", lambda _=None: gone)
    joins = {
        "run": lambda: cluster._start(JOB, address, {}),
        "profile": lambda: profiling.nodes_of(address).__enter__(),
        "prepare": lambda: preparation._Pool(Preparation.model_construct(), address)._connect(),
    }
    with pytest.raises(ClusterError, match=f"cannot connect to Ray at {address}: nobody listens at {gone}.*refused"):
        joins[who]()
