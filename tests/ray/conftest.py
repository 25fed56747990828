"""One Ray for all tests that can share it: starting one takes longer than most tests."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

import elastictrain_actors  # noqa: F401  (before Ray: it sets what Ray reads when it is imported)
from elastictrain_actors.cluster import EMBEDDED
from tests.support.process_cluster import RAY_STEPS, byte_job, run_job


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The digest of `RAY_STEPS` steps of `byte_job`, by one worker on a plain process: what every run must end with."""
    return run_job(byte_job(tmp_path_factory.mktemp("undisturbed"), steps=RAY_STEPS, workers=1)).digest


@pytest.fixture(scope="session")
def shared_ray() -> Iterator[None]:
    os.environ["RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO"] = "0"
    os.environ.update(EMBEDDED)
    import ray

    ray.init(
        address="local",
        num_cpus=8,
        num_gpus=0,
        include_dashboard=False,
        object_store_memory=100_000_000,
        log_to_driver=False,
    )
    yield
    ray.shutdown()
