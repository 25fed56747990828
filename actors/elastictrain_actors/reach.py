"""Reaching a run that is under way from another process: where its cluster is, and its controller by name."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ray

from elastictrain.errors import ClusterError, ConfigError
from elastictrain_actors.controller_actor import CONTROLLER

FILE = "address.json"


def write_address(folder: Path, namespace: str) -> None:
    """Say in the run directory where the run can be reached."""
    where = {"address": ray.get_runtime_context().gcs_address, "namespace": namespace}
    (folder / FILE).write_text(json.dumps(where), encoding="utf-8")


@contextmanager
def controller_of(folder: Path) -> Iterator[Any]:
    """The controller's handle. Raises ConfigError when the run is over or was never started on a cluster, ClusterError
    when its cluster cannot be reached from here.
    """
    try:
        where = json.loads((folder / FILE).read_text(encoding="utf-8"))
        address, namespace = str(where["address"]), str(where["namespace"])
    except (OSError, ValueError, KeyError, TypeError):
        raise ConfigError(f"RUN {str(folder)!r}: it has no {FILE}, so it is not known where it runs") from None
    here_before = ray.is_initialized()
    if not here_before:
        try:
            ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
        except (ConnectionError, RuntimeError, ValueError, TimeoutError) as error:
            raise ClusterError(
                f"RUN {str(folder)!r}: no Ray at {address}, where it was started; it is over, or its cluster is gone "
                f"(then go on with --resume): {str(error).splitlines()[0]}"
            ) from error
    try:
        try:
            handle = ray.get_actor(CONTROLLER, namespace)
        except ValueError:
            raise ConfigError(f"RUN {str(folder)!r}: it is over, nothing runs any more") from None
        yield handle
    finally:
        if not here_before:
            ray.shutdown()
