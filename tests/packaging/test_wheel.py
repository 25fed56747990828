"""The wheel, built here without a network, is what users get: three packages, nothing else, and it works elsewhere."""

from __future__ import annotations

import configparser
import email
import importlib
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = {
    "elastictrain": ROOT / "elastictrain",
    "elastictrain_actors": ROOT / "actors/elastictrain_actors",
    "elastictrain_checkpoint": ROOT / "checkpoint/elastictrain_checkpoint",
}
INFO = "elastictrain-0.1.0.dist-info"


def build(folder: Path, source: Path = ROOT) -> Path:
    """Build the wheel with the build backend itself: no pip, no isolation, so no network."""
    command = [sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", str(folder)]
    done = subprocess.run(command, cwd=source, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, done.stderr
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def names(wheel: Path) -> list[str]:
    with zipfile.ZipFile(wheel) as archive:
        return archive.namelist()


@pytest.fixture(scope="module")
def unpacked(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    return folder


def test_the_top_level_is_three_packages_and_their_metadata(names: list[str]) -> None:
    assert {name.partition("/")[0] for name in names} == {*PACKAGES, INFO}


def test_every_module_is_inside_and_nothing_that_python_has_made(names: list[str]) -> None:
    def sources(package: str, folder: Path) -> set[str]:
        return {f"{package}/{file.relative_to(folder).as_posix()}" for file in folder.rglob("*.py")}

    expected = set().union(*(sources(package, folder) for package, folder in PACKAGES.items()))
    assert {name for name in names if name.endswith(".py")} == expected
    assert not [name for name in names if "__pycache__" in name or name.endswith((".pyc", ".so"))]


@pytest.mark.parametrize("package", PACKAGES)
def test_each_package_says_that_it_is_typed(names: list[str], package: str) -> None:
    assert f"{package}/py.typed" in names


def test_the_licence_is_inside(unpacked: Path) -> None:
    text = (unpacked / INFO / "licenses/LICENSE").read_text(encoding="utf-8")
    assert text == (ROOT / "LICENSE").read_text(encoding="utf-8")
    assert "Apache License" in text
    assert metadata(unpacked)["License-Expression"] == "Apache-2.0"


def metadata(unpacked: Path) -> email.message.Message:
    return email.message_from_string((unpacked / INFO / "METADATA").read_text(encoding="utf-8"))


def test_the_metadata_gives_ranges_and_only_the_constraints_pin(unpacked: Path) -> None:
    required = metadata(unpacked).get_all("Requires-Dist") or []
    unconditional = [line for line in required if ";" not in line]
    assert "torch>=2.8" in unconditional
    assert "ray>=2.50" in unconditional
    assert not [line for line in required if "==" in line.partition(";")[0]]
    pins = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line and not line.startswith("#")]
    assert pins == ["torch==2.13.0"]


def test_the_version_is_the_same_everywhere(unpacked: Path) -> None:
    import elastictrain

    assert metadata(unpacked)["Version"] == elastictrain.__version__


def test_the_console_script_leads_to_a_function(unpacked: Path) -> None:
    parser = configparser.ConfigParser()
    parser.read(unpacked / INFO / "entry_points.txt")
    assert dict(parser["console_scripts"]) == {"elastictrain": "elastictrain.cli:main"}
    module, _, function = parser["console_scripts"]["elastictrain"].partition(":")
    assert callable(getattr(importlib.import_module(module), function))


def in_the_wheel(code: str, unpacked: Path, elsewhere: Path) -> str:
    """Run `code` with the unpacked wheel first on the path, in another folder, as `python -P` (no current folder)."""
    done = subprocess.run(
        [sys.executable, "-P", "-c", code],
        cwd=elsewhere,
        env={**os.environ, "PYTHONPATH": str(unpacked)},
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_it_imports_from_elsewhere(unpacked: Path, tmp_path: Path) -> None:
    out = in_the_wheel(
        f"import importlib\nfor name in {list(PACKAGES)}:\n    print(importlib.import_module(name).__file__)",
        unpacked,
        tmp_path,
    )
    assert out.splitlines() == [str(unpacked / package / "__init__.py") for package in PACKAGES]


def test_a_users_own_modules_of_the_folders_names_do_not_collide(unpacked: Path, tmp_path: Path) -> None:
    (tmp_path / "checkpoint.py").write_text("mine = 1\n")
    (tmp_path / "actors.py").write_text("mine = 2\n")
    code = (
        "import sys; sys.path.insert(0, '.')\n"
        "import elastictrain, elastictrain_actors, elastictrain_checkpoint, elastictrain.cli\n"
        "assert not {'checkpoint', 'actors'} & set(sys.modules)\n"
        "import checkpoint, actors; print(checkpoint.mine, actors.mine)"
    )
    assert in_the_wheel(code, unpacked, tmp_path).strip() == "1 2"


def test_the_command_line_of_the_wheel_answers(unpacked: Path, tmp_path: Path) -> None:
    code = "import sys; sys.argv = ['elastictrain', '--help']\nfrom elastictrain.cli import main; main()"
    out = in_the_wheel(code, unpacked, tmp_path)
    assert "the mathematics is fixed, only its placement moves" in " ".join(out.split())
    for command in ("run", "submit", "status", "events", "plot", "validate", "ckpt"):
        assert command in out


def test_it_builds_from_a_copy_without_git(tmp_path: Path) -> None:
    """Whoever unpacks a source archive can build: nothing depends on the repository around it."""
    copy = tmp_path / "source"
    copy.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy / name)
    for package, folder in PACKAGES.items():
        assert folder.name == package
        skip = shutil.ignore_patterns("__pycache__")
        shutil.copytree(folder, copy / folder.relative_to(ROOT), ignore=skip)
    with zipfile.ZipFile(build(tmp_path / "out", copy)) as archive:
        assert {name.partition("/")[0] for name in archive.namelist()} == {*PACKAGES, INFO}
