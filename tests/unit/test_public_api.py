from __future__ import annotations

import subprocess
import sys
from types import ModuleType
from typing import Any

import pytest

import elastictrain as et

PUBLIC = [
    "CapacityError", "Checkpoint", "CheckpointMismatch", "ClusterError", "ConfigError", "CorruptCheckpoint",
    "CorruptWorker", "Data", "DataEnded", "DataError", "DataMismatch", "ElasticTrainError", "Integrity",
    "InternalError", "Job", "NoSamples", "Numerics", "PeerLost", "Recipe", "RecipeError", "StoreFailed", "Summary",
    "UserError", "WorkerStartError", "Workers", "__version__", "data", "dump_job", "faults", "load_job", "run",
    "submit", "warmup_cosine",
]  # fmt: skip


def in_a_fresh_process(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_public_names_are_these() -> None:
    assert et.__all__ == PUBLIC
    assert set(PUBLIC) <= set(dir(et))


@pytest.mark.parametrize("name", [name for name in PUBLIC if name not in ("run", "submit")])
def test_every_public_name_is_there(name: str) -> None:
    assert getattr(et, name) is not None


def test_names_are_those_of_their_modules() -> None:
    from elastictrain import errors, faults, job, recipe

    assert et.Job is job.Job
    assert et.ConfigError is errors.ConfigError
    assert et.Recipe is recipe.Recipe
    assert et.faults is faults
    assert (et.faults.kill, et.faults.fail, et.faults.add, et.faults.drain) == (
        faults.kill, faults.fail, faults.add, faults.drain,
    )  # fmt: skip


def test_every_error_is_public() -> None:
    from elastictrain import errors

    assert {name for name, value in vars(errors).items() if isinstance(value, type)} <= set(PUBLIC)


def test_unknown_name() -> None:
    with pytest.raises(
        AttributeError, match="module 'elastictrain' has no attribute 'Trainer'; it has CapacityError, "
    ):
        _ = et.Trainer  # type: ignore[attr-defined]


def test_importing_is_light() -> None:
    heavy = "torch ray pyarrow numpy pydantic rich matplotlib typer"
    out = in_a_fresh_process(
        f"import sys, elastictrain; print([m for m in {heavy.split()} if m in sys.modules]);"
        "elastictrain.Job; elastictrain.Summary; elastictrain.faults.kill;"
        "print([m for m in ('torch', 'ray', 'pyarrow', 'matplotlib') if m in sys.modules])"
    )
    assert out.splitlines() == ["[]", "[]"]


def test_the_command_line_is_light() -> None:
    out = in_a_fresh_process(
        "import sys, elastictrain.cli;"
        "print([m for m in ('torch', 'ray', 'pyarrow', 'numpy', 'matplotlib', 'pydantic') if m in sys.modules])"
    )
    assert out.strip() == "[]"


STAND_IN = """
import sys, types, importlib.abc, importlib.machinery
class Loader(importlib.abc.Loader):
    def create_module(self, spec): return None
    def exec_module(self, module):
        module.run = lambda job: "ran " + job
        module.submit = lambda job: "submitted " + job
class Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        return importlib.machinery.ModuleSpec(name, Loader()) if name == "elastictrain.run" else None
sys.meta_path.insert(0, Finder())
"""


@pytest.mark.parametrize("before", ["", "import elastictrain.run", "from elastictrain.run import submit"])
def test_run_is_the_function_whoever_imported_the_module_of_that_name(before: str) -> None:
    out = in_a_fresh_process(
        f"{STAND_IN}\nimport elastictrain as et\n{before}\nprint(et.run('a'))\nprint(et.submit('b'))\n"
        "import elastictrain.run\nprint(et.run('c'))\n"
        "from elastictrain.run import run\nprint(run('d'))\n"
    )
    assert out.splitlines() == ["ran a", "submitted b", "ran c", "ran d"]


def test_other_submodules_are_bound_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    module: Any = ModuleType("elastictrain.something")
    monkeypatch.setattr(et, "something", module, raising=False)
    assert et.something is module  # type: ignore[attr-defined]
