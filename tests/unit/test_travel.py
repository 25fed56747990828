"""Parcels, what a submission takes along, and which of our requirements a cluster may lack."""

from __future__ import annotations

from pathlib import Path

import pytest

from elastictrain.errors import ConfigError
from elastictrain_actors.dependencies import (
    beyond_ray_and_torch,
    brought_by,
    check_choice,
    name_of,
    own_requirements,
)
from elastictrain_actors.luggage import luggage
from elastictrain_actors.parcel import collect, pack
from elastictrain_actors.runtime_env import runtime_env
from tests.support.travelling import a_job, names_in

pytestmark = pytest.mark.usefixtures("folder_with_a_recipe")


# Parcels


def test_a_parcel_leaves_caches_runs_and_excluded_files_and_is_the_same_every_time(tmp_path: Path) -> None:
    base = tmp_path / "base"
    for name in ("a.py", "runs/x", ".git/config", "sub/runs/y", "sub/b.py", "sub/big.bin", "venv/lib", "data/runs/z"):
        (base / name).parent.mkdir(parents=True, exist_ok=True)
        (base / name).write_text(name)
    (base / "a.py").chmod(0o755)
    parcel = collect(base, [base, base / "data" / "runs"], excludes=["sub/*.bin"], setting="test")
    assert [str(file) for file in parcel.files] == ["a.py", "data/runs/z", "sub/b.py"]
    assert parcel.size_bytes == len("a.py" + "data/runs/z" + "sub/b.py")
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    first, second = pack(parcel, tmp_path / "one"), pack(parcel, tmp_path / "two")
    (base / "a.py").touch()
    assert first.name == second.name
    assert first.read_bytes() == second.read_bytes()
    assert names_in(str(first)) == ["a.py", "data/runs/z", "sub/b.py"]
    assert [file.name for file in (tmp_path / "one").iterdir()] == [first.name]


def test_a_parcel_that_is_too_large_names_the_largest_files(tmp_path: Path) -> None:
    base = tmp_path / "base"
    base.mkdir()
    for number in range(4):
        (base / f"f{number}").write_bytes(b"x" * (number * 2**20))
    with pytest.raises(ConfigError) as caught:
        pack(collect(base, [base], setting="test"), tmp_path, limit_bytes=2**20)
    assert str(caught.value) == (
        f"{base}: 6.0 MiB would travel to the cluster, expected at most 1 MiB; the largest are f3 (3.0 MiB), "
        "f2 (2.0 MiB), f1 (1.0 MiB). Put data where the workers can read them (data.path: s3://… or a shared disk), or "
        "leave files out (runtime_env: {excludes: [...]})"
    )
    assert not list(tmp_path.glob("*.zip"))


def test_a_root_outside_of_the_base_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^there: .*/data lies outside of .*/code, the folder that travels"):
        collect(tmp_path / "code", [tmp_path / "data"], setting="there")


# What a submission takes along


def test_paths_are_relative_to_the_working_directory_as_for_run(tmp_path: Path) -> None:
    (tmp_path / "jobs").mkdir()
    (tmp_path / "jobs" / "job.yaml").write_text("")
    (tmp_path / "unrelated").mkdir()
    found = luggage(Path("jobs/job.yaml"), a_job(), faults=None)
    assert found.base == tmp_path
    assert found.roots == (tmp_path / "code", tmp_path / "data", tmp_path / "jobs"), "not the whole directory"
    assert found.entrypoint == "python -m elastictrain.cli run jobs/job.yaml --json"


def test_else_to_the_folder_of_the_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "job 1.yaml").write_text("")
    (tmp_path / "faults.yaml").write_text("")
    monkeypatch.chdir("/")
    found = luggage(
        tmp_path / "job 1.yaml", a_job(data={"kind": "jsonl", "path": "data/*.jsonl"}), faults="faults.yaml"
    )
    assert found.base == tmp_path
    assert tmp_path in found.roots
    assert found.entrypoint == "python -m elastictrain.cli run 'job 1.yaml' --json --faults faults.yaml"


def test_rules_for_the_weights_to_begin_with_travel_and_the_weights_do_not(tmp_path: Path) -> None:
    (tmp_path / "job.yaml").write_text("")
    (tmp_path / "rules").mkdir()
    (tmp_path / "rules" / "names.json").write_text("[]")
    origin = {"checkpoint": "other/run", "mapping": "rules/names.json"}
    found = luggage(Path("job.yaml"), a_job(start_from=origin))
    assert tmp_path / "rules" / "names.json" in found.roots
    assert not any("other" in str(root.relative_to(tmp_path)) for root in found.roots)
    missing = a_job(start_from=origin | {"mapping": "rules/others.json"})
    with pytest.raises(ConfigError, match=r"start_from.mapping='rules/others.json': nothing there"):
        luggage(Path("job.yaml"), missing)


def test_what_cannot_travel_is_named_with_its_setting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "code" / "job.yaml").write_text("")
    monkeypatch.chdir(tmp_path / "code")
    with pytest.raises(ConfigError) as caught:
        luggage(Path("job.yaml"), a_job(recipe="recipe.py:Mine", data={"kind": "jsonl", "path": "../data"}))
    assert str(caught.value) == (
        f"job.yaml cannot travel: data.path='../data' leads out of {tmp_path}/code, the folder that travels to the "
        "cluster; put it inside, or name it by a URL or an absolute path that every node can read"
    )
    with pytest.raises(ConfigError, match=r"^job.yaml cannot travel: data.path='no\*': nothing there in "):
        luggage(Path("job.yaml"), a_job(recipe="recipe.py:Mine", data={"kind": "jsonl", "path": "no*"}))
    elsewhere = a_job(recipe="recipe.py:Mine", data={"kind": "jsonl", "path": "s3://bucket/x"})
    assert luggage(Path("job.yaml"), elsewhere).roots == (tmp_path / "code",)


# Dependencies


def test_what_ray_and_torch_do_not_bring_is_read_from_metadata() -> None:
    wanted = beyond_ray_and_torch()
    names = {name_of(line) for line in wanted}
    assert {"pyarrow", "numpy", "xxhash", "typer", "rich", "pydantic"} == names
    assert set(wanted) <= set(own_requirements()), "the versions are those of our own metadata"


def test_requirements_are_followed_through_and_extras_are_not() -> None:
    graph = {"a": ["B_x>=1", 'c; extra == "more"'], "b-x": ["D.d[z]<2", "a"], "d-d": None}
    assert brought_by(["a"], requires=lambda name: graph[name]) == {"a", "b-x", "d-d"}


def test_a_wrong_choice_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"^ship_dependencies='yes': expected one of auto, pip, none$"):
        check_choice("yes")


def test_pip_ships_exactly_those(monkeypatch: pytest.MonkeyPatch) -> None:
    assert runtime_env(a_job(), ship=True, ship_dependencies="pip")["pip"] == beyond_ray_and_torch()
    assert "pip" not in runtime_env(a_job(), ship=True)
    monkeypatch.setenv("ELASTICTRAIN_SHIP_DEPENDENCIES", "pip")
    assert "pip" in runtime_env(a_job(), ship=True)
