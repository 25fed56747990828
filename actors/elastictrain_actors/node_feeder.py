"""The Ray actor of a node's feeder: a `BlockServer` whose blocks lie in Ray's object store, and how a worker asks it.

One per node, without torch and without a share of the node's resources. It owns what it has put into the store; a
worker that has a block keeps it, even when the feeder dies.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from elastictrain.errors import ClusterError

if TYPE_CHECKING:
    from elastictrain.data.block_server import BlockServer
    from elastictrain.data.sharing import Answer, Ask
    from elastictrain.data.warm import Arrays
    from elastictrain.data_settings import Data, Mixture

STORE_SHARE = 0.6
"""Of the node's object store may be taken by blocks; others use it too, and what does not fit Ray writes to disk."""
CALLS_AT_ONCE = 64
"""Each worker has three at most: a thread that reads ahead, one that makes batches, and its training thread."""
OPEN_S = 600.0
"""One question whether the data are open lasts no longer; it is put again as long as they are being opened."""


class NodeFeeder:
    """`lanes` and `lane_batch_size` only open the data; which samples are whose is the workers' affair."""

    def __init__(self, data: Data | Mixture, lanes: int, lane_batch_size: int, limit_bytes: int | None = None) -> None:
        from elastictrain.data import open_data  # reads Parquet: a controller that names this class need not
        from elastictrain.data.block_server import BlockServer

        opener: Callable[[], Any] = partial(open_data, data, seed=0, lanes=lanes, lane_batch_size=lane_batch_size)
        self._server: BlockServer = BlockServer(
            opener, _put, limit_bytes=limit_bytes or int(STORE_SHARE * _store_bytes()), cpus=os.cpu_count() or 1
        )
        self._end = threading.Event()

    def opened(self) -> tuple[int, str | None, bool]:
        """The process; None when the data are open, or why they are not; and whether they may still be: ask again."""
        why = self._server.opened(OPEN_S)
        if why is not None and self._server.is_opening:
            return os.getpid(), why, True
        return os.getpid(), self._server.opened(0.0), False  # it may have come to an end since the first answer

    def run(self) -> None:
        """Ends only with the actor: when Ray says that this call has failed, the feeder is dead."""
        self._end.wait()

    def ask(self, ask: Ask) -> Answer:
        """See `BlockServer.ask`. A block that is here comes as a reference in a list, which Ray does not open."""
        return self._server.ask(ask)

    def tell(self, ask: Ask) -> None:
        """See `BlockServer.tell`."""
        self._server.tell(ask)

    def forget(self, worker: int) -> None:
        """A worker of this node is gone."""
        self._server.forget(worker)

    def stats(self) -> dict[str, int]:
        """See `BlockServer.stats`."""
        return self._server.stats()


def _put(arrays: Arrays) -> object:
    return [ray.put(arrays)]


def _store_bytes() -> int:
    """Size of this node's object store."""
    here = ray.get_runtime_context().get_node_id()
    found = [node["Resources"].get("object_store_memory", 0) for node in ray.nodes() if node["NodeID"] == here]
    if not found or not found[0]:
        raise ClusterError("Ray does not say how large this node's object store is; set data.feeder: worker")
    return int(found[0])


def start_feeder(
    node: str, data: Data | Mixture, lanes: int, lane_batch_size: int, *, name: str, namespace: str,
    environment: dict[str, Any] | None = None,
) -> Any:  # fmt: skip
    """The handle of a new feeder on exactly that node. Ray does not restart it: a new one gets a higher number."""
    options: dict[str, Any] = {
        "num_cpus": 0,
        "num_gpus": 0,
        "max_restarts": 0,
        "max_task_retries": 0,
        "max_concurrency": CALLS_AT_ONCE,
        "scheduling_strategy": NodeAffinitySchedulingStrategy(node, soft=False),
        "name": name,
        "namespace": namespace,
        "lifetime": "detached",
        "get_if_exists": True,
    }
    if environment:
        options["runtime_env"] = environment
    return ray.remote(NodeFeeder).options(**options).remote(data, lanes, lane_batch_size)


class FeederLine:
    """How a worker reaches its node's feeder (`data.block_client.Line`), once the controller has said which it is."""

    def __init__(self) -> None:
        self._at: tuple[int, Any] = (0, None)

    def use(self, number: int, handle: Any) -> None:
        """There is a feeder; one with a lower number than the one before is old news."""
        if number > self._at[0]:
            self._at = number, handle

    @property
    def number(self) -> int:
        return self._at[0]

    def call(self, number: int, ask: Ask, deadline_s: float) -> tuple[Answer, Arrays | None]:
        """Ask, and map the block: its arrays are read-only views of the object store, and keep it alive. `deadline_s`:
        for both together. Raises what Ray raises, GetTimeoutError among it.
        """
        now, handle = self._at
        if now != number:
            raise ClusterError(f"feeder {number} has been replaced by feeder {now}")
        until_s = time.monotonic() + deadline_s
        answer: Answer = ray.get(handle.ask.remote(ask), timeout=deadline_s)
        if not isinstance(answer.item, list):
            return answer, None
        return replace(answer, item=None), ray.get(answer.item[0], timeout=max(0.0, until_s - time.monotonic()))

    def tell(self, number: int, ask: Ask) -> None:
        """Send what the worker holds; nothing is heard of how that went."""
        now, handle = self._at
        if now == number and handle is not None:
            handle.tell.remote(ask)
