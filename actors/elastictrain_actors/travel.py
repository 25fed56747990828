"""Where the recipe and the paths of a job lie, and how they must be written down so that a worker finds them."""

from __future__ import annotations

import importlib.util
import os
import sys
import sysconfig
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import ray.cloudpickle

from elastictrain.job import Checkpoint, Job
from elastictrain.origin import StartFrom

HOME_VARIABLE = "ELASTICTRAIN_HOME"


def split_reference(reference: str) -> tuple[Path | None, str, str]:
    """The parts of a recipe's name: (file, "", Class) of "file.py:Class", (None, module, Class) of "module:Class"."""
    source, _, name = reference.rpartition(":")
    return (Path(source), "", name) if source.endswith(".py") else (None, source, name)


def recipe_modules(recipe: object, travelled: Path | None, ours: Sequence[Path]) -> list[str]:
    """The local package or file of "module:Class"; installed ones, and what lies in `travelled`, are there already."""
    if not isinstance(recipe, str) or split_reference(recipe)[0] is not None:
        return []
    top = split_reference(recipe)[1].partition(".")[0]
    spec = importlib.util.find_spec(top)
    if spec is None:  # only the cluster may have it; there, load_recipe says it when it has not
        return []
    origin = spec.origin if spec.has_location else None
    found = Path(next(iter(spec.submodule_search_locations))) if spec.submodule_search_locations else origin
    if found is None or is_installed(Path(found)) or Path(found).resolve() in ours:
        return []
    if travelled is not None and Path(found).resolve().is_relative_to(travelled.resolve()):
        return []
    return [str(Path(found).resolve())]


def is_installed(path: Path) -> bool:
    """In site-packages or the standard library, as opposed to the user's own files."""
    paths = sysconfig.get_paths()
    homes = {Path(paths[key]).resolve() for key in ("stdlib", "platstdlib", "purelib", "platlib")}
    whole = path.resolve()
    return any(whole.is_relative_to(home) for home in homes) or "site-packages" in whole.parts


def absolute_recipe(recipe: str) -> str:
    file, _, name = split_reference(recipe)
    return recipe if file is None else f"{file.resolve()}:{name}"


def absolute(path: str, base: Path | None = None) -> str:
    """`path` below `base` (default: the working directory); URLs and absolute paths as they are."""
    expanded = Path(path).expanduser()
    return path if "://" in path else str(expanded if expanded.is_absolute() else (base or Path.cwd()) / expanded)


def absolute_paths(job: Job) -> Job:
    changes: dict[str, Any] = {"data": job.data.relocated(absolute)}
    if job.run_dir is not None:
        changes["run_dir"] = absolute(job.run_dir)
    if job.checkpoint is not None:
        changes["checkpoint"] = _stores_below(job.checkpoint, None)
    if job.start_from is not None:
        changes["start_from"] = _origin_below(job.start_from, None)
    return job.model_copy(update=changes)


def paths_in_job(job: Job, within: Mapping[str, Any]) -> Job:
    """Inside a Ray job's copy of the working_dir: what is read stays relative, what is written must outlive it."""
    home = Path(os.environ.get(HOME_VARIABLE) or "~/elastictrain").expanduser()
    submission = str((within.get("metadata") or {}).get("job_submission_id") or os.getpid())
    changes: dict[str, Any] = {"run_dir": absolute(job.run_dir or f"runs/{job.name}-{submission}", home)}
    if job.checkpoint is not None:
        changes["checkpoint"] = _stores_below(job.checkpoint, home)
    if job.start_from is not None:
        changes["start_from"] = _origin_below(job.start_from, home)
    return job.model_copy(update=changes)


def _stores_below(settings: Checkpoint, base: Path | None) -> Checkpoint:
    """Every place that checkpoints are written to."""
    copies = tuple(copy.model_copy(update={"path": absolute(copy.path, base)}) for copy in settings.copy_to)
    return settings.model_copy(update={"path": absolute(settings.path, base), "copy_to": copies})


def _origin_below(origin: StartFrom, base: Path | None) -> StartFrom:
    """Of another run: it lies where checkpoints lie. Rules are read here, by whoever starts the run."""
    return origin.model_copy(update={"checkpoint": absolute(origin.checkpoint, base)})


def register_recipe(job: Job, ours: Sequence[Path]) -> list[str]:
    """Make a recipe object, or class, travel by value: its module and the neighbours that it has imported.

    Workers cannot import the user's script or a file that was loaded by path; pickle would only write its name.
    `__main__` travels by value anyway. Returns the names of the modules that were registered.
    """
    if isinstance(job.recipe, str):
        return []
    return register_code(job.recipe if isinstance(job.recipe, type) else type(job.recipe), ours)


def register_code(kind: Any, ours: Sequence[Path]) -> list[str]:
    """As `register_recipe`, for any class or function of the user's."""
    home = sys.modules.get(kind.__module__)
    file = getattr(home, "__file__", None)
    if home is None or file is None or is_installed(Path(file)):
        return []
    if any(Path(file).resolve().is_relative_to(folder) for folder in ours):
        return []
    top, _, inner = kind.__module__.partition(".")
    if inner:  # the whole of its package
        ray.cloudpickle.register_pickle_by_value(sys.modules[top])
        return [top]
    folder = Path(file).resolve().parent
    names = [name for name, module in sorted(sys.modules.items()) if name != "__main__" and _lies_in(module, folder)]
    for name in names:
        ray.cloudpickle.register_pickle_by_value(sys.modules[name])
    return names


def _lies_in(module: ModuleType, folder: Path) -> bool:
    file = getattr(module, "__file__", None)
    return isinstance(file, str) and Path(file).resolve().parent == folder
