"""`elastictrain data prepare` on Ray Data: parts and files are rows of a data set that a pool of actors maps.

Ray Data decides how many are done at once and where, starts actors for them, and does again what was lost with a node.
What passes through its object store is one number there and one record back: the data themselves go from storage to
storage. What is written follows from the plan (see `elastictrain.data.preparing`), not from who wrote it.
"""

from __future__ import annotations

import json
import logging
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import ray

from elastictrain import errors
from elastictrain.data.index import Progress
from elastictrain.data.preparing.driver import Maker, prepare_data
from elastictrain.data.preparing.functions import find_function
from elastictrain.errors import ClusterError, ConfigError, ElasticTrainError
from elastictrain.prepare_settings import Preparation
from elastictrain_actors.cluster import EMBEDDED, OBJECT_STORE_BYTES
from elastictrain_actors.head import join_cluster
from elastictrain_actors.runtime_env import beside_job, needs_shipping, own_modules, package_folders, surrounding_job
from elastictrain_actors.travel import absolute, register_code


def prepare(
    settings: Preparation,
    *,
    resume: bool = False,
    address: str | None = None,
    progress: Progress | None = None,
    finished: Callable[[dict[str, Any]], None] | None = None,
) -> dict[str, Any]:
    """Prepare data on Ray and return the index; see `elastictrain.data.preparing.driver.prepare_data`.

    `address`: a Ray cluster; default RAY_ADDRESS, a Ray that this process is connected to, or an embedded one.
    Raises UserError (settings, data, functions) and ClusterError (actors that die, storage).
    """
    settings = settings.model_copy(update=_absolute(settings))
    for name in ("map", "filter"):
        reference = getattr(settings, name)
        if reference is not None:
            register_code(find_function(name, reference), package_folders())
    pool = _Pool(settings, address)
    try:
        return prepare_data(settings, pool.execute, resume=resume, progress=progress, finished=finished)
    except OSError as error:
        raise ClusterError(f"out={settings.out!r} cannot be written or path not read ({error})") from error
    finally:
        pool.close()


class _Pool:
    """Carries out units by Ray Data; Ray is started with the first one."""

    def __init__(self, settings: Preparation, address: str | None) -> None:
        self._settings, self._address = settings, address
        self._is_ours = False

    def execute(self, new_maker: Callable[[], Maker], numbers: Sequence[int]) -> Iterator[dict[str, Any]]:
        self._connect()
        settings = self._settings
        most = settings.workers or max(1, int(ray.cluster_resources().get("CPU", 1) // (settings.cpus or 1)))
        data = _ray_data()
        with _quiet(data.DataContext.get_current()):
            units = data.from_items([{"unit": number} for number in numbers], override_num_blocks=len(numbers))
            records = units.map(
                _Actor,
                fn_constructor_args=(new_maker,),
                compute=data.ActorPoolStrategy(min_size=1, max_size=min(most, len(numbers))),
                num_cpus=settings.cpus,
                num_gpus=settings.gpus or None,
                runtime_env={"env_vars": _variables(settings)},
            )
            try:
                for row in records.iter_rows():
                    if row["error"]:
                        kind, _, message = str(row["error"]).partition(": ")
                        raise getattr(errors, kind)(message)
                    yield json.loads(row["record"])
            except ray.exceptions.RayError as error:
                raise ClusterError(
                    f"a task of the preparation failed: {error}\nWhat is finished stays: go on with --resume"
                ) from error

    def _connect(self) -> None:
        if ray.is_initialized():
            return
        address = self._address
        if (address or "").startswith("ray://"):
            raise ConfigError(
                f"address={address!r}: Ray client is not supported; run on the cluster, or name HOST:PORT"
            )
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
        shared: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
        try:
            if needs_shipping(address):
                parent = surrounding_job().get("runtime_env") or {}
                environment, _ = beside_job(parent, {"py_modules": own_modules(parent)})
                where = address or os.environ.get("RAY_ADDRESS") or "auto"
                join_cluster(where, runtime_env=environment, **shared)
            else:
                for name, value in EMBEDDED.items():
                    os.environ.setdefault(name, value)
                ray.init(address="local", include_dashboard=False, object_store_memory=OBJECT_STORE_BYTES, **shared)
        except (OSError, ValueError, RuntimeError) as error:
            where = address or os.environ.get("RAY_ADDRESS") or "this machine"
            raise ClusterError(
                f"cannot connect to Ray at {where}: {error}; start it with `ray start --head`"
            ) from error
        self._is_ours = True

    def close(self) -> None:
        if self._is_ours and ray.is_initialized():
            ray.shutdown()


class _Actor:
    """One process that makes units; what it makes them with is opened with the first one."""

    def __init__(self, new_maker: Callable[[], Maker]) -> None:
        self._new_maker = new_maker
        self._maker: Maker | None = None

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        try:
            self._maker = self._maker or self._new_maker()
            return {"record": json.dumps(self._maker.make(int(row["unit"]))), "error": ""}
        except ElasticTrainError as error:  # as a value: Ray would wrap it, and print its traceback
            return {"record": "", "error": f"{type(error).__name__}: {error}"}


def _absolute(settings: Preparation) -> dict[str, Any]:
    """Tasks may run in another folder."""
    path = settings.path
    changes: dict[str, Any] = {
        "path": absolute(path) if isinstance(path, str) else tuple(absolute(one) for one in path),
        "out": absolute(settings.out),
    }
    if settings.tokenizer not in (None, "bytes"):
        changes["tokenizer"] = absolute(str(settings.tokenizer))
    return changes


def _variables(settings: Preparation) -> dict[str, str]:
    """So that a task takes the processors that it was given, and a function sees sets in one order everywhere."""
    threads = str(max(1, int(settings.cpus)))
    return {"OMP_NUM_THREADS": threads, "RAYON_NUM_THREADS": threads, "PYTHONHASHSEED": "0"}


def _ray_data() -> Any:
    """Ray Data, imported here: it takes seconds, and needs a package that nothing else needs. Raises ConfigError."""
    with warnings.catch_warnings():  # it warns of settings of its own
        warnings.simplefilter("ignore")
        try:
            import ray.data
        except ImportError as error:
            raise ConfigError(
                f"preparing data needs Ray Data, which does not import ({error}): pip install 'elastictrain[prepare]'"
            ) from error
        ray.data.DataContext.get_current()
    return ray.data


@contextmanager
def _quiet(context: Any) -> Iterator[None]:
    """Ray Data draws bars of its own and logs its plans; we draw ours."""
    logger = logging.getLogger("ray.data")
    bars, level = context.enable_progress_bars, logger.level
    context.enable_progress_bars = False
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        context.enable_progress_bars = bars
        logger.setLevel(level)
