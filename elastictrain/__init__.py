"""elastictrain: elastic, fault-tolerant PyTorch training on Ray.

The mathematics is fixed; only its placement moves. `import elastictrain as et` is quick: it imports neither torch nor
ray nor pyarrow; each name below is imported when it is first used.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from elastictrain import data as data
    from elastictrain import faults as faults
    from elastictrain.errors import CapacityError as CapacityError
    from elastictrain.errors import CheckpointMismatch as CheckpointMismatch
    from elastictrain.errors import ClusterError as ClusterError
    from elastictrain.errors import ConfigError as ConfigError
    from elastictrain.errors import CorruptCheckpoint as CorruptCheckpoint
    from elastictrain.errors import CorruptWorker as CorruptWorker
    from elastictrain.errors import DataEnded as DataEnded
    from elastictrain.errors import DataError as DataError
    from elastictrain.errors import DataMismatch as DataMismatch
    from elastictrain.errors import ElasticTrainError as ElasticTrainError
    from elastictrain.errors import InternalError as InternalError
    from elastictrain.errors import NoSamples as NoSamples
    from elastictrain.errors import PeerLost as PeerLost
    from elastictrain.errors import RecipeError as RecipeError
    from elastictrain.errors import StoreFailed as StoreFailed
    from elastictrain.errors import UserError as UserError
    from elastictrain.errors import WorkerStartError as WorkerStartError
    from elastictrain.job import Checkpoint as Checkpoint
    from elastictrain.job import Data as Data
    from elastictrain.job import Integrity as Integrity
    from elastictrain.job import Job as Job
    from elastictrain.job import Numerics as Numerics
    from elastictrain.job import Workers as Workers
    from elastictrain.job import dump_job as dump_job
    from elastictrain.job import load_job as load_job
    from elastictrain.observe.summary import Summary as Summary
    from elastictrain.recipe import Recipe as Recipe
    from elastictrain.recipe import warmup_cosine as warmup_cosine
    from elastictrain.run import run as run
    from elastictrain.run import submit as submit

_HOMES = {
    "elastictrain.errors": (
        "CapacityError", "CheckpointMismatch", "ClusterError", "ConfigError", "CorruptCheckpoint", "CorruptWorker",
        "DataEnded", "DataError", "DataMismatch", "ElasticTrainError", "InternalError", "NoSamples", "PeerLost",
        "RecipeError", "StoreFailed", "UserError", "WorkerStartError",
    ),
    "elastictrain.job": ("Checkpoint", "Data", "Integrity", "Job", "Numerics", "Workers", "dump_job", "load_job"),
    "elastictrain.observe.summary": ("Summary",),
    "elastictrain.recipe": ("Recipe", "warmup_cosine"),
    "elastictrain.run": ("run", "submit"),
}  # fmt: skip
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}
_MODULES = ("data", "faults")

__version__ = "0.1.0"
__all__ = [
    "CapacityError",
    "Checkpoint",
    "CheckpointMismatch",
    "ClusterError",
    "ConfigError",
    "CorruptCheckpoint",
    "CorruptWorker",
    "Data",
    "DataEnded",
    "DataError",
    "DataMismatch",
    "ElasticTrainError",
    "Integrity",
    "InternalError",
    "Job",
    "NoSamples",
    "Numerics",
    "PeerLost",
    "Recipe",
    "RecipeError",
    "StoreFailed",
    "Summary",
    "UserError",
    "WorkerStartError",
    "Workers",
    "__version__",
    "data",
    "dump_job",
    "faults",
    "load_job",
    "run",
    "submit",
    "warmup_cosine",
]


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(f"elastictrain.{name}")
    home = _HOME_OF.get(name)
    if home is None:
        raise AttributeError(f"module 'elastictrain' has no attribute {name!r}; it has {', '.join(__all__)}")
    found = getattr(importlib.import_module(home), name)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


class _Package(ModuleType):
    """`et.run` is the function, before and after somebody imports the module `elastictrain.run`.

    The import system binds a submodule as an attribute of its package, which would put the module over the function.
    """

    def __setattr__(self, name: str, value: object) -> None:
        if name == "run" and isinstance(value, ModuleType):
            value = value.run
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
