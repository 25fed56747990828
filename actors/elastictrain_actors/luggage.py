"""What of the user's files a submitted job takes along: from where, what, and the command that finds it again."""

from __future__ import annotations

import shlex
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from elastictrain.errors import ConfigError
from elastictrain.job import Job
from elastictrain_actors.travel import split_reference


@dataclass(frozen=True, slots=True)
class Luggage:
    """`roots` (below `base`) become the working_dir of the job; None: the user's runtime_env names an archive."""

    base: Path | None
    roots: tuple[Path, ...]
    entrypoint: str


def relative_paths(job: Job, faults: str | Path | None = None) -> dict[str, list[str]]:
    """What the job reads by relative path, by setting. URLs and absolute paths must be reachable on the cluster."""
    recipe = split_reference(job.recipe)[0] if isinstance(job.recipe, str) else None
    named = {
        "recipe": [str(recipe)] if recipe is not None else [],
        "data.path": list(job.data.paths),
        "data.tokenizer": list(job.data.tokenizer_paths),
        "start_from.mapping": [job.start_from.mapping]
        if job.start_from is not None and isinstance(job.start_from.mapping, str)
        else [],
        "cluster": [job.cluster] if job.cluster is not None else [],
        "faults": [str(faults)] if faults is not None else [],
    }
    return {
        setting: [path for path in paths if "://" not in path and not Path(path).expanduser().is_absolute()]
        for setting, paths in named.items()
    }


def luggage(job_path: Path, job: Job, *, faults: str | Path | None = None, working_dir: str | None = None) -> Luggage:
    """Decide what travels.

    Relative paths mean what they mean to `elastictrain run`: relative to the working directory; if they are not all
    there, relative to the folder of `job.yaml`. Of that base travels the folder of `job.yaml` and what the job names,
    not the whole of it. `working_dir` (the user's runtime_env) takes the place of both when it is a folder.

    Raises ConfigError for a path that is in neither, or that leaves the folder.
    """
    if working_dir is not None and "://" in str(working_dir):
        return Luggage(None, (), _entrypoint(job_path, faults))
    folder = job_path.resolve().parent
    bases = [Path(working_dir).resolve()] if working_dir is not None else [Path.cwd().resolve(), folder]
    named = relative_paths(job, faults)
    problems = [_problem(base, job_path, named) for base in bases]
    for base, problem in zip(bases, problems, strict=True):
        if problem is None:
            roots = {folder, *_roots(base, named)} if working_dir is None else {base}
            inside = job_path.resolve().relative_to(base)
            there = None if faults is None else _absolute_or(base, str(faults))
            return Luggage(base, tuple(sorted(roots)), _entrypoint(inside, there))
    raise ConfigError(f"{job_path} cannot travel: " + "; ".join(dict.fromkeys(p for p in problems if p)))


def _problem(base: Path, job_path: Path, named: dict[str, list[str]]) -> str | None:
    if not job_path.resolve().is_relative_to(base):
        return f"it lies outside of {base}"
    for setting, paths in named.items():
        for path in paths:
            found = list(_matches(base, path))
            if not (base / path).resolve().is_relative_to(base):
                return (
                    f"{setting}={path!r} leads out of {base}, the folder that travels to the cluster; put it inside, "
                    "or name it by a URL or an absolute path that every node can read"
                )
            if not found:
                return f"{setting}={path!r}: nothing there in {base}"
    return None


def _roots(base: Path, named: dict[str, list[str]]) -> Iterable[Path]:
    for setting, paths in named.items():
        for path in paths:
            # A recipe imports its neighbours and reads files beside itself: its folder travels.
            yield from ((found.parent if setting == "recipe" else found) for found in _matches(base, path))


def _matches(base: Path, path: str) -> Iterable[Path]:
    whole = base / path
    if whole.exists():
        return [whole]
    return sorted(base.glob(path)) if any(mark in path for mark in "*?[") and ".." not in Path(path).parts else []


def _absolute_or(base: Path, path: str) -> Path:
    given = Path(path)
    return given if given.is_absolute() else (base / given).resolve().relative_to(base)


def _entrypoint(job_path: Path, faults: str | Path | None) -> str:
    words = ["python", "-m", "elastictrain.cli", "run", job_path.as_posix(), "--json"]
    if faults is not None:
        words += ["--faults", Path(faults).as_posix()]
    return shlex.join(words)
