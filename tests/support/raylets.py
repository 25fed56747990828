"""A cluster of five raylets on this machine: one node is drained, another falls silent and comes back. A script run by
a test in a process of its own, because that process connects to a cluster of its own.

python -m tests.support.raylets FOLDER -> one line of JSON
"""

from __future__ import annotations

import json
import os
import select
import signal
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import ray
from ray.cluster_utils import Cluster
from ray.core.generated import autoscaler_pb2

import elastictrain as et
from elastictrain.observe import RunDirectory
from elastictrain.observe.incidents import incidents
from tests.ray.test_controller_death import AtRow, job

WORKERS = 3
SILENT_S = 15.0
"""Longer than our heartbeats need to see it, with room for a busy machine."""


class SilentNode:
    """All processes of one node, stopped and continued together: nothing of it answers, and nothing says so."""

    def __init__(self, raylet: int) -> None:
        self.pids = [raylet, *descendants(raylet)]
        self.stopped_s = 0.0

    def signal(self, number: int) -> None:
        for pid in self.pids:
            with suppress(ProcessLookupError):
                os.kill(pid, number)
        self.stopped_s = self.stopped_s or time.time()


def descendants(pid: int) -> list[int]:
    own = [
        int(child) for task in Path(f"/proc/{pid}/task").iterdir() for child in (task / "children").read_text().split()
    ]
    return [*own, *(further for child in own for further in descendants(child))]


def raylet_of(cluster: Cluster, pid: int) -> int:
    raylets = [node.all_processes["raylet"][0].process.pid for node in cluster.list_all_nodes()]
    return next(raylet for raylet in raylets if pid in descendants(raylet))


def ends_within(pid: int, timeout_s: float) -> bool:
    try:
        with os.fdopen(os.pidfd_open(pid)) as process:
            return bool(select.select([process], [], [], timeout_s)[0])
    except ProcessLookupError:
        return True


def drain(node: str) -> None:
    """As `ray drain-node`, an autoscaler or `ray start` on SIGTERM does."""
    until_ms = int(1000 * (time.time() + 120.0))
    reason = autoscaler_pb2.DrainNodeReason.DRAIN_NODE_REASON_PREEMPTION
    accepted, refusal = ray._private.worker.global_worker.gcs_client.drain_node(node, reason, "spot", until_ms)
    assert accepted, refusal


def drained(folder: Path, address: str) -> dict[str, Any]:
    """The node of a member is announced to go while a spare waits on another one."""
    leaving: list[int] = []

    def announce() -> None:
        leaving.append(watcher.members[0])
        drain(watcher.nodes[leaving[0]])

    watcher = AtRow({20: announce})
    planned = job(folder, "drained")
    workers = planned.workers.model_copy(update={"replace": True, "spares": 1})
    planned = planned.model_copy(update={"workers": workers})
    run = et.run(planned, observer=watcher, address=address)
    found = RunDirectory.open(folder / "drained")
    return {
        "digest": run.digest,
        "worlds": run.world_sizes,
        "redone": [r.steps_redone for r in run.recoveries],
        "rows": [row.step for row in found.metrics()],
        "incidents": [i.model_dump(mode="json") for i in incidents(found.events())],
        "nodes": [watcher.nodes[worker] for worker in sorted(watcher.nodes)],
        "gone": ends_within(watcher.pids[leaving[0]], 20.0),
    }


def by_address(folder: Path, address: str) -> dict[str, Any]:
    """A script of faults makes the node of worker 1 silent, for longer than it takes to notice."""
    watcher = AtRow({})
    script = [et.faults.lose_node(worker=1, step=20, phase="exchange", silent_s=SILENT_S)]
    run = et.run(job(folder, "addressed"), faults=script, observer=watcher, address=address)
    found = RunDirectory.open(folder / "addressed")
    return {
        "digest": run.digest,
        "worlds": run.world_sizes,
        "redone": [r.steps_redone for r in run.recoveries],
        "rows": [row.step for row in found.metrics()],
        "lost": [e.data for e in found.events() if e.kind == "node_lost"],
        "worker_events": [e.kind for e in found.events() if e.kind == "node_lost" or e.data.get("worker") == 1],
        "node": watcher.nodes[1],
        "fenced_ended": ends_within(watcher.pids[1], 2 * SILENT_S),
    }


def main(folder: Path) -> dict[str, Any]:
    cluster = Cluster(
        initialize_head=True,
        head_node_args={"num_cpus": 0, "include_dashboard": False, "object_store_memory": 80_000_000},
    )
    for _ in range(WORKERS + 1):
        cluster.add_node(num_cpus=1, object_store_memory=80_000_000)
    planned = drained(folder, cluster.address)
    scripted = by_address(folder, cluster.address)
    silent: list[SilentNode] = []
    beside_us: list[bool] = []

    def stop() -> None:
        controller = json.loads((folder / "lost" / "lock").read_text())["pid"]
        beside_us.append(raylet_of(cluster, controller) == cluster.head_node.all_processes["raylet"][0].process.pid)
        silent.append(SilentNode(raylet_of(cluster, watcher.pids[1])))
        silent[0].signal(signal.SIGSTOP)

    def back() -> None:
        silent[0].signal(signal.SIGCONT)

    watcher = AtRow({20: stop, 150: back})
    disturbed = et.run(job(folder, "lost"), observer=watcher, address=cluster.address)
    found = RunDirectory.open(folder / "lost")
    commits = [e.time.timestamp() for e in found.events() if e.kind == "incident"]
    return {
        "digest": disturbed.digest,
        "worlds": disturbed.world_sizes,
        "redone": [r.steps_redone for r in disturbed.recoveries],
        "events": [[e.kind, e.data.get("reason", "")] for e in found.events()],
        "rows": [row.step for row in found.metrics()],
        "to_commit_s": commits[0] - silent[0].stopped_s,
        "controller_beside_us": beside_us == [True],
        "drained": planned,
        "addressed": scripted,
        "fenced_ended": ends_within(watcher.pids[1], 20.0),
    }


if __name__ == "__main__":
    try:
        print(json.dumps(main(Path(sys.argv[1]))))
    finally:
        ray.shutdown()
