"""A cluster of two nodes with two workers each, fed by an actor on each node; a worker is drained in the middle. A
script run by a test in a process of its own, because that process connects to a cluster of its own.

python -m tests.support.fed_nodes FOLDER -> one line of JSON
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import ray
from ray.cluster_utils import Cluster

import elastictrain as et
from elastictrain.observe import Event, RunDirectory
from tests.ray.test_node_feeder import Watcher, hurry, node_job

WORKERS = 4


def main(folder: Path) -> dict[str, Any]:
    cluster = Cluster(
        initialize_head=True,
        head_node_args={"num_cpus": 0, "include_dashboard": False, "object_store_memory": 80_000_000},
    )
    for _ in range(2):
        cluster.add_node(num_cpus=WORKERS // 2, object_store_memory=80_000_000)
    stats: list[dict[str, int]] = []

    class Both(Watcher):
        """The run takes its time until feeders were asked and the worker was drained."""

        is_resized = False

        def event(self, event: Event) -> None:
            super().event(event)
            self.is_resized |= event.kind == "resized"
            self.go_on()

        def go_on(self) -> None:
            if stats and self.is_resized:
                hurry(folder)

    def look() -> None:
        stats.extend(watcher.stats())
        watcher.go_on()

    def both() -> None:
        watcher.acts[watcher.rows + 40] = look

    watcher = Both({}, {2: both})
    script = [et.faults.drain(worker=1, step=120)]
    run = et.run(node_job(folder, WORKERS), faults=script, observer=watcher, address=cluster.address)
    return {
        "digest": run.digest,
        "feeders": [one["node"] for one in watcher.feeders],
        "workers": sorted(watcher.nodes),
        "handed_out": [one["handed_out"] for one in stats],
        "rows": [row.step for row in RunDirectory.open(folder / "run").metrics()],
        "worlds": run.world_sizes,
        "redone": [r.steps_redone for r in run.recoveries],
    }


if __name__ == "__main__":
    try:
        print(json.dumps(main(Path(sys.argv[1]))))
    finally:
        ray.shutdown()
