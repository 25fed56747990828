"""Being connected to a Ray cluster for the length of a run: the one that is there, or an embedded one."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, TypeVar

import ray

from elastictrain.errors import CapacityError, ClusterError, ConfigError
from elastictrain.job import Job
from elastictrain_actors.head import join_cluster
from elastictrain_actors.runtime_env import needs_shipping, prepare

OBJECT_STORE_BYTES = 100 * 2**20
"""Nothing on the path of a step goes through the object store; the embedded one can be small. With `data.feeder: node`
decoded row groups do: it then has room for `WINDOWS_TIMES` the budget more, as far as shared memory has.
"""
WINDOWS_TIMES = 4
"""The budget is for what is read ahead; the windows that lanes are in, and a reserve, come on top."""

EMBEDDED = {
    "RAY_USAGE_STATS_ENABLED": "0",
    # Idle processes that Ray starts in advance take the cores from the ones that are asked for.
    "RAY_prestart_worker_first_driver": "0",
    # Collected for a dashboard; the embedded Ray has none. All its processes together then take 2 % less of a core.
    "RAY_enable_metrics_collection": "0",
    "RAY_task_events_report_interval_ms": "0",
}
"""Settings of the embedded Ray, which shares its cores with the workers; what the user has set comes first."""

T = TypeVar("T")


@contextmanager
def connected(job: Job, address: str | None, meanwhile: Callable[[], T]) -> Iterator[tuple[Job, dict[str, Any], T]]:
    """Yield (the job as workers must see it, the runtime_env for actors, the result of `meanwhile`).

    `meanwhile` (checking the job, which imports torch) runs while Ray starts; its error comes first. A Ray that this
    function has started or connected to is shut down in the end; one that was there before is left alone.
    """
    prepared = prepare(job, address=address)
    here_before = ray.is_initialized()
    starting = _InBackground(meanwhile)
    try:
        if not here_before:
            _start(prepared.job, address, prepared.runtime_env)
        result = starting.result()
        environment = {"env_vars": prepared.runtime_env.get("env_vars", {})} if here_before else {}
        yield prepared.job, environment, result
    finally:
        starting.settle()
        if not here_before and ray.is_initialized():
            ray.shutdown()


def _start(job: Job, address: str | None, environment: dict[str, Any]) -> None:
    if (address or "").startswith("ray://"):
        raise ConfigError(
            f"address={address!r}: a run's controller and run directory live on the cluster, so Ray client is not "
            "supported; use `elastictrain submit --address http://HEAD:8265`, or run on the head with --address auto"
        )
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    shared: dict[str, Any] = {"runtime_env": environment, "log_to_driver": False, "logging_level": logging.ERROR}
    try:
        if needs_shipping(address):
            join_cluster(address or os.environ.get("RAY_ADDRESS") or "auto", **shared)
        else:
            for name, value in EMBEDDED.items():
                os.environ.setdefault(name, value)
            ray.init(address="local", include_dashboard=False, **_embedded(job), **shared)
            _end_log_monitor()
    except (OSError, ValueError, RuntimeError) as error:
        where = address or os.environ.get("RAY_ADDRESS") or "this machine"
        raise ClusterError(f"cannot connect to Ray at {where}: {error}; start it with `ray start --head`") from error


def _embedded(job: Job) -> dict[str, Any]:
    """Workers of a local run share the machine's cores: Ray counts, it does not fence."""
    wanted = (job.workers.max + job.workers.spares + 1) * job.workers.cpus
    resources: dict[str, Any] = {
        "num_cpus": max(os.cpu_count() or 1, int(wanted) + 1),
        "object_store_memory": object_store_bytes(job, _shared_memory_bytes()),
    }
    return resources


def object_store_bytes(job: Job, free_bytes: int) -> int:
    """How large the object store of an embedded Ray is, where so much shared memory is free; pure."""
    if job.data.feeder != "node":
        return OBJECT_STORE_BYTES
    return max(OBJECT_STORE_BYTES, min(OBJECT_STORE_BYTES + WINDOWS_TIMES * job.data.prefetch_bytes, free_bytes // 2))


def _shared_memory_bytes() -> int:
    try:
        found = os.statvfs("/dev/shm")
    except OSError:
        return 0
    return found.f_bavail * found.f_frsize


def _end_log_monitor() -> None:
    """It looks at all log files ten times a second for a driver that wants their lines; ours does not
    (`log_to_driver`). Ray has no setting for that: should its private door be gone, the log monitor stays.
    """
    with suppress(Exception):
        ray._private.worker._global_node.kill_log_monitor(check_alive=False)


def check_gpus(job: Job) -> None:
    """Say at once when the job asks for GPUs and the cluster has none at all (an autoscaler could still add some)."""
    total = ray.cluster_resources()
    if job.workers.gpus and not total.get("GPU") and not os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR"):
        raise CapacityError(
            f"workers.gpus={job.workers.gpus}, but the cluster has no GPU ({dict(total)}); set workers.gpus: 0 or "
            "use a cluster with GPUs (--address)"
        )


class _InBackground:
    """Runs a function in a thread and hands over its result or its error."""

    def __init__(self, function: Callable[[], T]) -> None:
        self._result: Any = None
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, args=(function,), daemon=True)
        self._thread.start()

    def _run(self, function: Callable[[], T]) -> None:
        try:
            self._result = function()
        except BaseException as error:
            self._error = error

    def settle(self) -> None:
        self._thread.join()

    def result(self) -> Any:
        self.settle()
        if self._error is not None:
            raise self._error
        return self._result
