"""The Ray actor of a node agent: an `Agent` and nothing else.

One per node, without torch and without a share of the node's resources. Its `run` is a call that ends only with the
agent: when Ray says that the call has failed, the *agent* has died, which says nothing about the node.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from elastictrain.pulse import pulse_folder, sweep
from elastictrain_actors.agent import Agent
from elastictrain_actors.clouds import CLOUDS, NoticeReader
from elastictrain_actors.procfs import KillAnswer


class NodeAgent:
    """`token`: the run's secret, which also names the folder of its pulses (`pulse_folder(token)` in the workers).
    `cloud`: whose metadata service is asked whether the machine goes.
    """

    def __init__(self, token: str, number: int, home: str | None = None, cloud: str | None = None) -> None:
        sweep(None if home is None else Path(home))
        folder = pulse_folder(token, None if home is None else Path(home))
        notices = self._notices = None if cloud is None else NoticeReader(CLOUDS[cloud])
        self._agent = Agent(
            ray.get_runtime_context().get_node_id(), folder, token, number=number,
            going=lambda: None if notices is None else notices.going,
        )  # fmt: skip

    def follow(self, epoch: int, host: str, port: int, number: int) -> bool:
        """Report to this controller; False when a newer one is in charge. The first call after the start."""
        return self._agent.follow(epoch, host, port, number)

    def run(self) -> None:
        """Report until `stop`."""
        self._agent.run()
        self._agent.close()
        if self._notices is not None:
            self._notices.close()

    def kill(self, epoch: int, pid: int, start_ticks: int, deadline_s: float = 2.0) -> KillAnswer:
        """End one worker of this run on this node, for certain."""
        return self._agent.kill(epoch, pid, start_ticks, deadline_s)

    def kill_all_but(
        self, epoch: int, keep: Iterable[tuple[int, int]], deadline_s: float = 2.0
    ) -> dict[int, KillAnswer]:
        """End the workers of this run on this node that the controller of `epoch` does not know."""
        return self._agent.kill_all_but(epoch, keep, deadline_s)

    def stop(self) -> None:
        """End the loop; `run` then returns. Workers are left alone."""
        self._agent.stop()


def start_agent(
    node_id: str, token: str, number: int, *, environment: dict[str, Any] | None = None, detached_as: str | None = None,
    home: str | None = None, namespace: str | None = None, cloud: str | None = None,
) -> Any:  # fmt: skip
    """The handle of a new agent on exactly that node. `detached_as`: a name under which it outlives its controller, and
    a later controller finds it. Ray does not restart it: a new one gets a higher number from us.
    """
    options: dict[str, Any] = {
        "num_cpus": 0,
        "num_gpus": 0,
        "max_restarts": 0,
        "max_task_retries": 0,
        "max_concurrency": 8,
        "scheduling_strategy": NodeAffinitySchedulingStrategy(node_id, soft=False),
    }
    if environment:
        options["runtime_env"] = environment
    if detached_as is not None:
        options |= {"name": detached_as, "lifetime": "detached", "namespace": namespace, "get_if_exists": True}
    return ray.remote(NodeAgent).options(**options).remote(token, number, home, cloud)
