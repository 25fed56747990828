"""A cluster of four raylets on this machine, one of whose nodes falls silent and comes back: a script run by a test
in a process of its own, because that process connects to a cluster of its own.

python -m tests.support.node_loss FOLDER -> one line of JSON
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

import elastictrain as et
from elastictrain.observe import RunDirectory
from tests.ray.test_controller_death import AtRow, job

WORKERS = 3


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


def main(folder: Path) -> dict[str, Any]:
    cluster = Cluster(
        initialize_head=True,
        head_node_args={"num_cpus": 0, "include_dashboard": False, "object_store_memory": 80_000_000},
    )
    for _ in range(WORKERS):
        cluster.add_node(num_cpus=1, object_store_memory=80_000_000)
    undisturbed = et.run(job(folder, "alone"), address=cluster.address)
    silent: list[SilentNode] = []

    def stop() -> None:
        silent.append(SilentNode(raylet_of(cluster, watcher.pids[1])))
        silent[0].signal(signal.SIGSTOP)

    def back() -> None:
        silent[0].signal(signal.SIGCONT)

    watcher = AtRow({20: stop, 150: back})
    disturbed = et.run(job(folder, "lost"), observer=watcher, address=cluster.address)
    found = RunDirectory.open(folder / "lost")
    commits = [e.time.timestamp() for e in found.events() if e.kind == "incident"]
    return {
        "digests": [undisturbed.digest, disturbed.digest],
        "worlds": [undisturbed.world_sizes, disturbed.world_sizes],
        "redone": [r.steps_redone for r in disturbed.recoveries],
        "events": [[e.kind, e.data.get("reason", "")] for e in found.events()],
        "rows": [row.step for row in found.metrics()],
        "to_commit_s": commits[0] - silent[0].stopped_s,
        "fenced_ended": ends_within(watcher.pids[1], 20.0),
    }


if __name__ == "__main__":
    try:
        print(json.dumps(main(Path(sys.argv[1]))))
    finally:
        ray.shutdown()
