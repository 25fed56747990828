"""What travels to workers, how references are rewritten, and Ray's rules for a runtime_env inside a Ray job."""

from __future__ import annotations

import sys
import types
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ray.runtime_env.runtime_env import _merge_runtime_env

from elastictrain.errors import ConfigError
from elastictrain_actors import travel
from elastictrain_actors.runtime_env import (
    OVERRIDE_VARIABLE,
    beside_job,
    env_vars,
    merge_user,
    needs_shipping,
    package_folders,
    prepare,
    runtime_env,
)
from tests.support.travelling import PACKAGES, a_job, inside, names_in

pytestmark = pytest.mark.usefixtures("folder_with_a_recipe")


# What workers get


def test_an_embedded_ray_gets_variables_only_and_absolute_paths(tmp_path: Path) -> None:
    origin = {"checkpoint": "other", "mapping": "rules.json"}
    places = [{"path": "far"}, {"path": "s3://b/c"}]
    job = a_job(
        checkpoint={"path": "ckpt", "copy_to": places}, run_dir="out", numerics={"threads": 3}, start_from=origin
    )
    prepared = prepare(job)
    assert prepared.runtime_env == {
        "env_vars": {
            "OMP_NUM_THREADS": "3",
            "MKL_NUM_THREADS": "3",
            "PYTHONHASHSEED": "0",
            "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
            "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
        }
    }
    assert prepared.job.recipe == f"{tmp_path}/code/recipe.py:Mine"
    assert prepared.job.data.path == f"{tmp_path}/data"
    assert prepared.job.checkpoint is not None
    assert prepared.job.checkpoint.path == f"{tmp_path}/ckpt"
    assert [place.path for place in prepared.job.checkpoint.copy_to] == [f"{tmp_path}/far", "s3://b/c"]
    assert prepared.job.run_dir == f"{tmp_path}/out"
    assert prepared.job.start_from is not None
    assert prepared.job.start_from.checkpoint == f"{tmp_path}/other"


def test_urls_stay_as_they_are() -> None:
    job = a_job(data={"kind": "jsonl", "path": ["s3://b/x", "y"]}, checkpoint={"path": "s3://b/c"})
    prepared = prepare(job).job
    assert prepared.data.path == ("s3://b/x", str(Path.cwd() / "y"))
    assert prepared.checkpoint is not None
    assert prepared.checkpoint.path == "s3://b/c"


def test_without_determinism_cublas_is_left_alone() -> None:
    assert "CUBLAS_WORKSPACE_CONFIG" not in env_vars(a_job(numerics={"deterministic": False}))


def test_a_cluster_gets_the_three_packages_and_the_folder_of_the_recipe() -> None:
    prepared = prepare(a_job(), ship=True)
    modules = prepared.runtime_env["py_modules"]
    assert [Path(module).name for module in modules] == PACKAGES
    assert all((Path(module) / "py.typed").is_file() for module in modules)
    assert names_in(prepared.runtime_env["working_dir"]) == ["code/neighbour.py", "code/recipe.py"]
    assert prepared.job.recipe == "code/recipe.py:Mine"
    # These reach into our packages too: nothing but caches may be in them.
    assert "data" not in prepared.runtime_env["excludes"]
    assert "__pycache__" in prepared.runtime_env["excludes"]


def test_a_recipe_elsewhere_travels_with_its_folder_and_is_renamed(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path / "elsewhere")
        prepared = prepare(a_job(recipe="../code/recipe.py:Mine"), ship=True)
    assert prepared.job.recipe == "code/recipe.py:Mine"
    assert names_in(prepared.runtime_env["working_dir"]) == ["code/neighbour.py", "code/recipe.py"]


def test_what_the_job_reads_and_writes_does_not_travel_with_the_recipe(tmp_path: Path) -> None:
    (tmp_path / "recipe.py").write_text("")
    (tmp_path / "ckpt").mkdir()
    (tmp_path / "ckpt" / "pack").write_text("")
    job = a_job(recipe="recipe.py:Mine", checkpoint={"path": "ckpt"})
    names = names_in(prepare(job, ship=True).runtime_env["working_dir"])
    assert names == ["code/neighbour.py", "code/recipe.py", "recipe.py"]


def test_the_users_working_dir_holds_the_recipe_and_its_excludes_stay_off_our_packages(tmp_path: Path) -> None:
    extra = {"working_dir": str(tmp_path), "excludes": ["neighbour.py"], "env_vars": {"A": "1"}}
    prepared = prepare(a_job(), extra, ship=True)
    assert names_in(prepared.runtime_env["working_dir"]) == ["code/recipe.py"]
    assert "neighbour.py" not in prepared.runtime_env["excludes"]
    assert prepared.runtime_env["env_vars"]["A"] == "1"
    with pytest.raises(
        ConfigError, match=r"^recipe='code/recipe.py:Mine': .* lies outside of runtime_env.working_dir="
    ):
        prepare(a_job(), {"working_dir": str(tmp_path / "data")}, ship=True)


def test_a_missing_recipe_file_is_said_before_anything_travels() -> None:
    with pytest.raises(ConfigError, match=r"^recipe='nowhere.py:Mine': no such file .*/nowhere.py$"):
        prepare(a_job(recipe="nowhere.py:Mine"), ship=True)


def test_a_local_package_travels_and_an_installed_one_does_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "lib" / "mylib").mkdir(parents=True)
    (tmp_path / "lib" / "mylib" / "__init__.py").write_text("")
    (tmp_path / "lib" / "single.py").write_text("")
    monkeypatch.syspath_prepend(str(tmp_path / "lib"))
    ours = package_folders()
    assert travel.recipe_modules("mylib.deep:Mine", None, ours) == [str(tmp_path / "lib" / "mylib")]
    assert travel.recipe_modules("single:Mine", None, ours) == [str(tmp_path / "lib" / "single.py")]
    assert travel.recipe_modules("mylib:Mine", tmp_path, ours) == [], "it is in what has travelled"
    for there in ("torch.nn:Linear", "json:X", "elastictrain.recipe:Recipe", "nowhere:X", "sys:X"):
        assert travel.recipe_modules(there, None, ours) == [], there


def test_a_recipe_object_from_a_file_travels_by_value(tmp_path: Path) -> None:
    from ray import cloudpickle

    from elastictrain.recipe import load_recipe

    source = "import helper\nclass Mine:\n  def model(self): return helper.WIDTH\n"
    (tmp_path / "code" / "helper.py").write_text("WIDTH = 7\n")
    (tmp_path / "code" / "recipe.py").write_text(
        source + "  def optimizer(self, p): ...\n  def loss(self, m, b): ...\n"
    )
    recipe = load_recipe("code/recipe.py:Mine")
    registered = travel.register_recipe(a_job(recipe=recipe), package_folders())
    try:
        assert registered == ["_elastictrain_recipe_code_recipe", "helper"]
        data = cloudpickle.dumps(recipe)
        kept = {name: sys.modules.pop(name) for name in registered}  # as in a worker, which has never heard of them
        assert cloudpickle.loads(data).model() == 7
    finally:
        sys.modules.update(kept)
        for name in registered:
            cloudpickle.unregister_pickle_by_value(sys.modules[name])
            del sys.modules[name]
        sys.path.remove(str(tmp_path / "code"))


def test_recipes_by_name_and_installed_ones_are_not_registered() -> None:
    class Installed(types.SimpleNamespace):
        model = optimizer = loss = lambda self: None

    Installed.__module__ = "json"
    assert travel.register_recipe(a_job(), package_folders()) == []
    assert travel.register_recipe(a_job(recipe=Installed()), package_folders()) == []


def test_when_code_must_travel(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not needs_shipping()
    assert not needs_shipping("local")
    assert needs_shipping("ray://head:10001")
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    assert needs_shipping()
    assert not needs_shipping("local")
    monkeypatch.delenv("RAY_ADDRESS")
    inside(monkeypatch, {})
    assert needs_shipping()


# The user's runtime_env


def test_modules_and_packages_are_joined_and_other_fields_are_the_users() -> None:
    ours = {"py_modules": ["a"], "env_vars": {"X": "1"}, "pip": ["numpy"]}
    users = {"py_modules": ["b"], "env_vars": {"Y": "2"}, "pip": ["scipy"], "config": {"z": 1}, "excludes": ["data"]}
    assert merge_user(ours, users) == {
        "py_modules": ["a", "b"], "env_vars": {"X": "1", "Y": "2"}, "pip": ["numpy", "scipy"], "config": {"z": 1},
    }  # fmt: skip
    users["pip"] = {"packages": ["scipy"], "pip_check": True}
    assert merge_user(ours, users)["pip"] == {"packages": ["numpy", "scipy"], "pip_check": True}


@pytest.mark.parametrize(
    ("users", "said"),
    [
        (
            {"env_vars": {"OMP_NUM_THREADS": "8"}},
            (
                "runtime_env.env_vars: OMP_NUM_THREADS=8, but the job needs OMP_NUM_THREADS=1; remove it there and set "
                "numerics.threads in the job"
            ),
        ),
        (
            {"uv": ["x"]},
            (
                "runtime_env has uv and ship_dependencies is pip: Ray takes one installer; set ship_dependencies to "
                "none and add numpy to yours"
            ),
        ),
        (
            {"pip": "requirements.txt"},
            (
                "runtime_env.pip='requirements.txt': expected a list of packages beside ship_dependencies=pip, got the "
                "name of a requirements file; list its lines, or set ship_dependencies to none"
            ),
        ),
    ],
)
def test_what_cannot_be_merged_is_said(users: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        merge_user({"env_vars": env_vars(a_job()), "pip": ["numpy"]}, users)
    assert str(caught.value) == said


# Inside a Ray job


def test_in_our_own_submission_nothing_is_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    """py_modules and variables came with the job; this process has its packages from there."""
    job = a_job()
    hashes = [f"_ray_pkg_{number}" for number in range(3)]
    unpacked = [Path("/session/py_modules_files", digest, name) for digest, name in zip(hashes, PACKAGES, strict=True)]
    monkeypatch.setattr("elastictrain_actors.runtime_env.package_folders", lambda: unpacked)
    inside(
        monkeypatch,
        {
            "py_modules": [f"gcs://{digest}.zip" for digest in hashes],
            "working_dir": "gcs://_ray_pkg_9.zip",
            "env_vars": env_vars(job),
        },
    )
    prepared = prepare(job)
    assert prepared.runtime_env == {}
    assert prepared.job.recipe == job.recipe
    assert prepared.job.data == job.data


def test_in_ray_job_submit_the_packages_are_added(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("ELASTICTRAIN_HOME", str(tmp_path / "home"))
    inside(monkeypatch, {"working_dir": "gcs://_ray_pkg_9.zip"})
    prepared = prepare(a_job(checkpoint={"path": "ckpt"}, start_from={"checkpoint": "other"}))
    assert [Path(module).name for module in prepared.runtime_env["py_modules"]] == PACKAGES
    assert "working_dir" not in prepared.runtime_env
    assert OVERRIDE_VARIABLE not in __import__("os").environ
    # Written where it outlives Ray's copy of the working_dir.
    assert prepared.job.run_dir == f"{tmp_path}/home/runs/run-sub-1"
    assert prepared.job.checkpoint is not None
    assert prepared.job.checkpoint.path == f"{tmp_path}/home/ckpt"
    assert prepared.job.start_from is not None
    assert prepared.job.start_from.checkpoint == f"{tmp_path}/home/other"


def test_beside_the_users_modules_ours_are_joined_to_them_and_ray_is_told_to_override(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import os

    inside(monkeypatch, {"py_modules": ["gcs://_ray_pkg_7.zip"], "working_dir": "gcs://_ray_pkg_9.zip"})
    found = runtime_env(a_job())
    assert found["py_modules"][-1] == "gcs://_ray_pkg_7.zip"
    assert len(found["py_modules"]) == 4
    assert os.environ[OVERRIDE_VARIABLE] == "1"


def test_a_job_that_sets_our_variable_otherwise_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    inside(monkeypatch, {"env_vars": {"OMP_NUM_THREADS": "4"}})
    with pytest.raises(ConfigError, match=r"^the Ray job's runtime_env.env_vars: OMP_NUM_THREADS=4, but the job needs"):
        prepare(a_job())


def test_two_installers_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    inside(monkeypatch, {"conda": "env"})
    with pytest.raises(
        ConfigError, match=r"^the Ray job's runtime_env has conda, and Ray takes one installer: set ship"
    ):
        prepare(a_job(), ship_dependencies="pip")


NAMES = st.sampled_from(["A", "B", "C"])
VALUES = st.sampled_from(["1", "2"])
PARENTS = st.fixed_dictionaries(
    {},
    optional={
        "py_modules": st.lists(st.sampled_from(["gcs://p.zip", "gcs://q.zip"]), min_size=1, unique=True),
        "working_dir": st.just("gcs://w.zip"),
        "pip": st.sampled_from([["x"], {"packages": ["x"], "pip_check": True}]),
        "excludes": st.lists(st.just("c"), max_size=1),
        "env_vars": st.dictionaries(NAMES, VALUES),
    },
)
CHILDREN = st.fixed_dictionaries(
    {"env_vars": st.dictionaries(NAMES, VALUES)},
    optional={
        "py_modules": st.just(["/ours"]),
        "pip": st.just(["numpy"]),
        "excludes": st.just(["__pycache__"]),
    },
)


@settings(deadline=None)
@given(PARENTS, CHILDREN)
def test_what_we_hand_to_ray_inside_a_job_never_conflicts_and_loses_nothing(
    parent: dict[str, Any], child: dict[str, Any]
) -> None:
    clash = {name for name, value in child["env_vars"].items() if parent.get("env_vars", {}).get(name, value) != value}
    if clash:
        with pytest.raises(ConfigError, match="env_vars: "):
            beside_job(parent, child)
        return
    given_to_ray, override = beside_job(parent, child)
    merged = _merge_runtime_env(parent, given_to_ray, override=override)  # Ray's own rule
    assert merged is not None, "ray.init would raise"
    assert set(merged.get("py_modules", [])) == {*parent.get("py_modules", []), *child.get("py_modules", [])}
    packages = [
        {*(pip["packages"] if isinstance(pip, dict) else pip)}
        for pip in (merged.get("pip", []), parent.get("pip", []), child.get("pip", []))
    ]
    assert packages[0] == packages[1] | packages[2]
    assert merged.get("env_vars", {}) == {**parent.get("env_vars", {}), **child["env_vars"]}
    assert merged.get("working_dir") == parent.get("working_dir")
    assert not [key for key, value in given_to_ray.items() if parent.get(key) == value], "nothing is said twice"
    if not set(parent) & set(given_to_ray) - {"env_vars"}:
        assert not override, "the override is for conflicts only"
