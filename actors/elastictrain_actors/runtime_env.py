"""What Ray workers must have before they start: our code, the user's recipe, environment variables.

`prepare(job)` is what a driver calls before `ray.init(runtime_env=...)`. Three situations:

- An embedded Ray on this machine: same files, so nothing travels; paths become absolute.
- A cluster, reached by `ray.init(address=...)`: the three packages travel as `py_modules`; the folder of the recipe
  travels as `working_dir`, and the reference is rewritten relative to it. Data, checkpoints and the run directory
  stay where they are: their paths become absolute and must be reachable from every node.
- Inside a Ray job (`elastictrain submit`, `ray job submit -- elastictrain run ...`): the job has a runtime_env
  already, which Ray merges with that of `ray.init`. Ray's rule: no field in both (`env_vars`: no variable in both), or
  `ray.init` raises; with RAY_OVERRIDE_JOB_RUNTIME_ENV=1 the driver's field replaces the job's, whole. So a field that
  the job already has is left out when it says the same, lists are joined to the job's, and the override is switched
  on only when a field must be replaced by such a joined one. With the job's `working_dir` every process starts in its
  own copy of it: relative paths of recipe and data stay relative, while what is written (run directory, checkpoints)
  goes to `~/elastictrain` (or $ELASTICTRAIN_HOME), since Ray removes the copy some time after the job.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import elastictrain
import elastictrain_checkpoint
from elastictrain.errors import ConfigError
from elastictrain.job import Job
from elastictrain_actors.dependencies import ShipDependencies, beyond_ray_and_torch, check_choice
from elastictrain_actors.parcel import CACHES, collect, pack
from elastictrain_actors.travel import (
    absolute_paths,
    absolute_recipe,
    paths_in_job,
    recipe_modules,
    register_recipe,
    split_reference,
)

JOB_CONFIG_VARIABLE = "RAY_JOB_CONFIG_JSON_ENV_VAR"  # Ray sets it in the entrypoint of a submitted job
OVERRIDE_VARIABLE = "RAY_OVERRIDE_JOB_RUNTIME_ENV"
SHIP_VARIABLE = "ELASTICTRAIN_SHIP_DEPENDENCIES"
_INSTALLERS = ("pip", "uv", "conda")


@dataclass(frozen=True, slots=True)
class Prepared:
    """`job`: as workers must see it (paths and recipe resolve there). `runtime_env`: for `ray.init`."""

    job: Job
    runtime_env: dict[str, Any]


def needs_shipping(address: str | None = None) -> bool:
    """Whether code must travel: not to an embedded Ray (`address` None or "local", and no RAY_ADDRESS)."""
    given = address or os.environ.get("RAY_ADDRESS")
    return JOB_CONFIG_VARIABLE in os.environ or given not in (None, "", "local")


def runtime_env(
    job: Job,
    extra: Mapping[str, Any] | None = None,
    *,
    ship: bool | None = None,
    ship_dependencies: ShipDependencies | None = None,
) -> dict[str, Any]:
    """The `runtime_env` of `prepare` alone."""
    return prepare(job, extra, ship=ship, ship_dependencies=ship_dependencies).runtime_env


def prepare(
    job: Job,
    extra: Mapping[str, Any] | None = None,
    *,
    address: str | None = None,
    ship: bool | None = None,
    ship_dependencies: ShipDependencies | None = None,
) -> Prepared:
    """The job and the runtime_env with which workers of it must start.

    `extra`: the user's own runtime_env. `ship`: default `needs_shipping(address)`. `ship_dependencies`: "pip" asks
    every node for what Ray and torch do not bring; "none" and "auto" do not ("auto" looks at the cluster only in
    `submit_job`); default $ELASTICTRAIN_SHIP_DEPENDENCIES, else "auto". Raises ConfigError.
    """
    choice = check_choice(ship_dependencies or os.environ.get(SHIP_VARIABLE, "auto"))
    within = surrounding_job()
    parent: dict[str, Any] = within.get("runtime_env") or {}
    register_recipe(job, package_folders())
    ours: dict[str, Any] = {"env_vars": env_vars(job)}
    users = dict(extra or {})
    in_place = bool(parent.get("working_dir")) and "working_dir" not in users
    recipe = job.recipe
    if needs_shipping(address) if ship is None else ship:
        there = Path.cwd() if in_place else None
        ours["py_modules"] = [*own_modules(parent), *recipe_modules(recipe, there, package_folders())]
        if choice == "pip":
            ours["pip"] = beyond_ray_and_torch()
        if not in_place:
            recipe = _ship_recipe(job, ours, users)
    elif isinstance(recipe, str) and not in_place:
        recipe = absolute_recipe(recipe)
    merged = merge_user(ours, users)
    if merged.get("py_modules"):
        merged["excludes"] = list(CACHES)
    merged = {key: value for key, value in merged.items() if value or key == "env_vars"}
    child, override = beside_job(parent, merged)
    if override:
        os.environ[OVERRIDE_VARIABLE] = "1"
    settled = paths_in_job(job, within) if in_place else absolute_paths(job)
    return Prepared(settled.model_copy(update={"recipe": recipe}), child)


def surrounding_job() -> dict[str, Any]:
    """The config of the Ray job that this process is the entrypoint of (`runtime_env`, `metadata`), or {}."""
    return dict(json.loads(os.environ.get(JOB_CONFIG_VARIABLE) or "{}"))


def env_vars(job: Job) -> dict[str, str]:
    """What must be in a worker's environment before Python, torch and CUDA start."""
    wanted = {
        # Ray sets OMP_NUM_THREADS from num_cpus when nobody else does; the number of threads is part of the sums.
        "OMP_NUM_THREADS": str(job.numerics.threads),
        "MKL_NUM_THREADS": str(job.numerics.threads),
        # A recipe that walks over a set of strings must see one order on all workers.
        "PYTHONHASHSEED": "0",
        # What newer Ray does anyway; older ones print a FutureWarning until it is set.
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    }
    if job.numerics.deterministic:
        wanted["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"  # cuBLAS reads it once, when CUDA starts
    return wanted


def package_folders() -> list[Path]:
    """The folders of the three import packages, wherever this process has them from."""
    return [
        Path(str(elastictrain.__file__)).resolve().parent,
        Path(__file__).resolve().parent,
        Path(str(elastictrain_checkpoint.__file__)).resolve().parent,
    ]


def merge_user(ours: Mapping[str, Any], users: Mapping[str, Any]) -> dict[str, Any]:
    """Our fields and the user's: modules and pip packages are joined, other fields are the user's.

    `excludes` is dropped (it was for the parcel, see `parcel`). Raises ConfigError where the user sets a variable of
    ours to something else, or another installer than pip while dependencies are to travel.
    """
    merged = {**ours, **{key: value for key, value in users.items() if key != "excludes"}}
    merged["env_vars"] = _joined_variables(ours.get("env_vars") or {}, users.get("env_vars") or {}, "runtime_env")
    if "py_modules" in ours:
        merged["py_modules"] = [*ours["py_modules"], *(users.get("py_modules") or [])]
    if ours.get("pip"):
        if users.get("uv") or users.get("conda"):
            raise ConfigError(
                f"runtime_env has {'uv' if users.get('uv') else 'conda'} and ship_dependencies is pip: Ray takes one "
                f"installer; set ship_dependencies to none and add {', '.join(ours['pip'])} to yours"
            )
        merged["pip"] = _joined_pip(ours["pip"], users.get("pip"))
    return merged


def _joined_pip(ours: Sequence[str], users: Any) -> Any:
    if users is None:
        return list(ours)
    if isinstance(users, Mapping):
        return {**users, "packages": [*ours, *users.get("packages", ())]}
    if isinstance(users, str):
        raise ConfigError(
            f"runtime_env.pip={users!r}: expected a list of packages beside ship_dependencies=pip, got the name of a "
            "requirements file; list its lines, or set ship_dependencies to none"
        )
    return [*ours, *users]


def _joined_variables(ours: Mapping[str, str], users: Mapping[str, str], where: str) -> dict[str, str]:
    settings = {"OMP_NUM_THREADS": "numerics.threads", "MKL_NUM_THREADS": "numerics.threads"}
    for name in sorted(ours.keys() & users.keys()):
        if str(users[name]) != ours[name]:
            setting = settings.get(name, "numerics.deterministic" if name.startswith("CUBLAS") else None)
            raise ConfigError(
                f"{where}.env_vars: {name}={users[name]}, but the job needs {name}={ours[name]}; remove it there"
                + (f" and set {setting} in the job" if setting else "")
            )
    return {**users, **ours}


def beside_job(parent: Mapping[str, Any], child: Mapping[str, Any]) -> tuple[dict[str, Any], bool]:
    """What `ray.init` must be given inside a Ray job whose runtime_env is `parent`, and whether Ray must override.

    Raises ConfigError where the job sets one of our variables to something else, or installs by other means.
    """
    if not parent:
        return dict(child), False
    wanted = dict(child)
    if parent.get("py_modules") and wanted.get("py_modules"):
        wanted["py_modules"] = [*wanted["py_modules"], *parent["py_modules"]]
    if parent.get("pip") and wanted.get("pip"):
        already = _packages(parent["pip"])
        missing = [line for line in _packages(wanted["pip"]) if line not in already]
        wanted["pip"] = {"packages": [*already, *missing]} if missing else parent["pip"]
    for installer in _INSTALLERS:
        if parent.get(installer) and any(wanted.get(other) for other in _INSTALLERS if other != installer):
            raise ConfigError(
                f"the Ray job's runtime_env has {installer}, and Ray takes one installer: set ship_dependencies to "
                f"none (${SHIP_VARIABLE}) and install elastictrain's requirements with {installer} too"
            )
    variables = _joined_variables(wanted.pop("env_vars", {}), parent.get("env_vars") or {}, "the Ray job's runtime_env")
    new = {name: value for name, value in variables.items() if (parent.get("env_vars") or {}).get(name) != value}
    differing = {key: value for key, value in wanted.items() if parent.get(key) != value}
    override = any(key in parent for key in differing)
    return {**differing, **({"env_vars": new} if new else {})}, override


def _packages(pip: Any) -> list[str]:
    return list(pip["packages"] if isinstance(pip, Mapping) else pip)


def own_modules(parent: Mapping[str, Any]) -> list[str]:
    """Our packages, unless this process itself has them from the Ray job's own modules or working_dir."""
    uris = [*(parent.get("py_modules") or ()), *([parent["working_dir"]] if parent.get("working_dir") else ())]
    unpacked = {str(uri).rsplit("/", 1)[-1].split(".", 1)[0] for uri in uris}
    return [str(folder) for folder in package_folders() if not unpacked & set(folder.parts)]


def _ship_recipe(job: Job, ours: dict[str, Any], users: dict[str, Any]) -> Any:
    """Pack what the recipe needs as `working_dir` (into `ours`, or in place of the user's); the new reference."""
    file = split_reference(job.recipe)[0] if isinstance(job.recipe, str) else None
    given = users.get("working_dir")
    folder = Path(str(given)) if given is not None and "://" not in str(given) else None
    if folder is not None and folder.is_dir():
        users["working_dir"] = str(_packed(folder, [folder], users, job))
    if file is None:
        return job.recipe
    name = split_reference(job.recipe)[2]
    whole = file.resolve()
    if not whole.is_file():
        raise ConfigError(f"recipe={job.recipe!r}: no such file {whole}")
    if given is not None:
        if folder is None:
            return job.recipe  # an archive elsewhere: the path is the user's, relative to its root
        if not whole.is_relative_to(folder.resolve()):
            raise ConfigError(
                f"recipe={job.recipe!r}: {whole} lies outside of runtime_env.working_dir={str(given)!r}; move it "
                "there, or leave working_dir out, then the recipe's own folder travels"
            )
        return f"{whole.relative_to(folder.resolve()).as_posix()}:{name}"
    base = Path.cwd().resolve() if whole.is_relative_to(Path.cwd().resolve()) else whole.parent.parent
    ours["working_dir"] = str(_packed(base, [whole.parent], users, job))
    return f"{whole.relative_to(base).as_posix()}:{name}"


_parcels: list[tempfile.TemporaryDirectory[str]] = []  # until the process ends: Ray may read an archive once more


def _packed(base: Path, roots: list[Path], users: Mapping[str, Any], job: Job) -> Path:
    """Code travels, not what the job reads and writes by absolute path."""
    _parcels.append(tempfile.TemporaryDirectory(prefix="elastictrain-parcel-"))
    parcel = collect(
        base, roots, excludes=users.get("excludes") or (), without=_places(job), setting="runtime_env.working_dir"
    )
    return pack(parcel, Path(_parcels[-1].name))


def _places(job: Job) -> list[Path]:
    places = [*job.data.paths, job.run_dir, job.checkpoint.path if job.checkpoint else None]
    return [Path(place) for place in places if place is not None and "://" not in place]
