"""The rules of this house: what may import what, how long a file may be, and that its papers tell the truth."""

from __future__ import annotations

import ast
import re
import subprocess
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml
from pydantic import BaseModel
from pydantic_core import PydanticUndefined

import elastictrain as et
from elastictrain import faults
from elastictrain.job import Data, Job, parse_job

ROOT = Path(__file__).parents[2]
SOURCES = ("elastictrain", "actors", "checkpoint", "examples", "tests", "benchmarks")
MAX_LINES = 400
PAPERS = (
    "README.md", "ARCHITECTURE.md", "CONTRIBUTING.md", "CHANGELOG.md", "docs/determinism.md", "docs/faults.md",
    "docs/checkpoint-formats.md", "docs/saving.md",
)  # fmt: skip


def text(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def python_files(*folders: str) -> list[Path]:
    return sorted(file for folder in folders or SOURCES for file in (ROOT / folder).rglob("*.py"))


def statements(node: ast.AST) -> Iterator[ast.AST]:
    """All in a file, in functions too; what is inside of expressions is no statement."""
    for part in ("body", "orelse", "finalbody", "handlers", "cases"):
        for child in getattr(node, part, ()):
            yield child
            yield from statements(child)


@dataclass(frozen=True)
class Facts:
    """`imports`: every module that a file imports anywhere. `evaluates`: it defines things, and evaluates annotations.

    The trees themselves are two million objects, which the garbage collector would search in every test that follows.
    """

    imports: frozenset[str]
    evaluates: bool


@cache
def facts_of(file: Path) -> Facts:
    tree = ast.parse(file.read_text(encoding="utf-8"))
    found: set[str] = set()
    for node in statements(tree):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            found.add(node.module)
    futures = any(isinstance(node, ast.ImportFrom) and node.module == "__future__" for node in tree.body)
    defines = any(isinstance(node, ast.FunctionDef | ast.ClassDef) for node in tree.body)
    return Facts(frozenset(found), defines and not futures)


def importers(package: str, files: list[Path]) -> set[str]:
    return {
        file.relative_to(ROOT).as_posix()
        for file in files
        if any(name == package or name.startswith(package + ".") for name in facts_of(file).imports)
    }


# --- folders and imports ---


@pytest.mark.parametrize("folder", ["actors", "checkpoint"])
def test_a_folder_is_no_package(folder: str) -> None:
    assert (ROOT / folder / f"elastictrain_{folder}" / "__init__.py").is_file()
    assert not (ROOT / folder / "__init__.py").exists()
    assert (ROOT / folder / "README.md").is_file()
    assert importers(folder, python_files()) == set()


def test_ray_is_imported_only_by_the_actors() -> None:
    found = importers("ray", python_files("elastictrain", "checkpoint", "examples"))
    assert found == set()
    assert importers("ray", python_files("actors")), "this test sees no imports at all"


def test_torch_is_imported_only_where_tensors_are() -> None:
    found = importers("torch", python_files("elastictrain", "actors", "checkpoint"))
    feeding = ("feeder", "live_feeder", "streaming")
    allowed = {"elastictrain/recipe.py", *(f"elastictrain/data/{name}.py" for name in feeding)}
    # Files of torch's own formats; `tests/unit/checkpoint/test_package.py` proves that nothing else leads to them.
    formats = ("dcp_writer", "in_dcp", "in_universal", "torch_files")
    allowed |= {f"checkpoint/elastictrain_checkpoint/convert/{name}.py" for name in formats}
    of_torch = ("elastictrain/engine/", "checkpoint/elastictrain_checkpoint/torch/")
    assert {name for name in found if not name.startswith(of_torch)} == allowed


@pytest.mark.parametrize("kind", ["processes", "ray"])
def test_tests_that_need_much_say_so(kind: str) -> None:
    """Else they run among the fast ones, and what their folder sets up stays set for those that follow."""
    files = (ROOT / "tests" / kind).glob("test_*.py")
    assert [file.name for file in files if f"pytest.mark.{kind}" not in file.read_text()] == []


def test_no_file_is_too_long() -> None:
    lines = {file.relative_to(ROOT).as_posix(): len(file.read_text().splitlines()) for file in python_files()}
    assert {name: count for name, count in lines.items() if count > MAX_LINES} == {}


def test_annotations_are_not_evaluated() -> None:
    lacking = [file.relative_to(ROOT).as_posix() for file in python_files() if facts_of(file).evaluates]
    assert lacking == []


def test_nothing_is_left_to_do_in_the_source() -> None:
    word = re.compile(r"\b(" + "TO" + r"DO|FIX" + r"ME|X" + r"XX)\b")
    found = [file.relative_to(ROOT).as_posix() for file in python_files() if word.search(file.read_text())]
    assert found == []


# --- the two commands ---


def test_the_readmes_first_screen_has_the_two_commands_of_the_makefile() -> None:
    first_screen = "\n".join(text("README.md").splitlines()[:20])
    targets = set(re.findall(r"^([a-z]+):", text("Makefile"), re.M))
    for command in ("demo", "test"):
        assert re.search(rf"^make {command}\b", first_screen, re.M)
        assert command in targets
    assert "the mathematics is fixed" in first_screen


def test_ci_runs_what_the_readme_says() -> None:
    script = ROOT / ".ci/run"
    assert re.search(r"^exec make test$", script.read_text(), re.M)
    assert script.stat().st_mode & 0o111


def test_make_test_runs_every_check() -> None:
    done = subprocess.run(["make", "--dry-run", "test"], cwd=ROOT, capture_output=True, text=True, check=True)
    for wanted in ("ruff format --check", "ruff check", "mypy", "lint-imports", "not processes and not ray",
                   "-m 'processes and not alone'", "-m 'processes and alone'", "-m ray"):  # fmt: skip
        assert wanted in done.stdout, wanted
    assert "--constraint constraints.txt" in text("Makefile")


def test_a_commit_is_checked_by_what_make_runs() -> None:
    """Else a commit passes here and is refused by CI."""
    made = re.findall(r"^\t\$\(BIN\)/((?:ruff|mypy|lint-imports).*?)(?: \.)?$", text("Makefile"), re.M)
    hooks = yaml.safe_load(text(".pre-commit-config.yaml"))["repos"][0]["hooks"]
    entries = [hook["entry"].removesuffix(" --force-exclude") for hook in hooks]
    assert entries == [f".venv/bin/{command}" for command in made]
    assert ".venv/bin/pre-commit install" in text("CONTRIBUTING.md")


def test_every_marker_of_the_tests_is_known_and_run() -> None:
    known = {line.partition(":")[0] for line in project()["tool"]["pytest"]["ini_options"]["markers"]}
    used = {mark for file in python_files("tests") for mark in re.findall(r"pytest\.mark\.(\w+)", file.read_text())}
    assert used & {"processes", "ray"}
    assert used <= known | {"parametrize", "skipif", "timeout", "usefixtures", "filterwarnings", "xfail"}


def test_tests_of_a_tier_are_where_it_looks_for_them() -> None:
    places = {"processes": {"processes"}, "alone": {"processes"}, "ray": {"ray", "packaging"}}
    for file in python_files("tests"):
        for mark in set(re.findall(r"pytest\.mark\.(\w+)", file.read_text())) & places.keys():
            assert file.relative_to(ROOT).parts[1] in places[mark], (file, mark)


def project() -> dict[str, Any]:
    return tomllib.loads(text("pyproject.toml"))


# --- the papers ---


def settings(model: type[BaseModel] = Job, prefix: str = "") -> Iterator[tuple[str, str]]:
    """Every setting of a job by its path, with its default as the README shows it."""
    for name, field in model.model_fields.items():
        inner = [t for t in (field.annotation, *get_args(field.annotation)) if isinstance(t, type)]
        nested = next((t for t in inner if issubclass(t, BaseModel)), Data if name == "data" else None)
        if nested is not None:
            yield from settings(nested, f"{prefix}{name}.")
            continue
        default = field.get_default(call_default_factory=True)
        shown = "–" if default is PydanticUndefined else "none" if default is None else str(default).lower()
        yield prefix + name, shown


def test_the_readmes_table_has_every_setting_with_its_default() -> None:
    table = text("README.md").partition("\n## Settings\n")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| `([\w.]+)` \| ([^|]*) \| ([^|]+) \|$", table, re.M)
    assert [(name, default) for name, default, _ in rows] == list(settings())
    assert all(len(words) > 5 for _, _, words in rows)


def test_every_name_of_et_in_the_papers_exists() -> None:
    named = {name for paper in PAPERS for name in re.findall(r"\bet\.((?:data\.|faults\.)?[A-Za-z_]+)", text(paper))}
    assert {"Job", "run", "Recipe", "data.parquet", "faults.kill"} <= named
    for name in named:
        found: Any = et
        for part in name.split("."):
            assert hasattr(found, part), f"et.{name}"
            found = getattr(found, part)


def blocks(paper: str, language: str) -> list[str]:
    """The fenced blocks of a page in one language ("" for commands)."""
    fenced = re.findall(r"^```(\w*)\n(.*?)^```$", text(paper), re.M | re.S)
    return [block for found, block in fenced if found == language]


def test_the_yaml_in_the_papers_is_accepted() -> None:
    seen = []
    for paper in PAPERS:
        for block in blocks(paper, "yaml"):
            raw = yaml.safe_load(block)
            seen.append(parse_job(raw) if isinstance(raw, dict) else faults.parse_faults(raw))
    assert len(seen) >= 3


def test_the_python_in_the_papers_compiles() -> None:
    found = [compile(block, paper, "exec") for paper in PAPERS for block in blocks(paper, "python")]
    assert len(found) >= 2


def test_every_command_in_the_papers_exists() -> None:
    from typer.main import get_command

    from elastictrain.cli import app
    from elastictrain_checkpoint.cli import app as ckpt

    commands: dict[str, Any] = get_command(app).commands  # type: ignore[attr-defined]
    inner: dict[str, Any] = get_command(ckpt).commands  # type: ignore[attr-defined]
    used = [found for paper in PAPERS for found in re.findall(r"\belastictrain ((?:[a-z]+)\b[^`\n]*)", text(paper))]
    seen = set()
    for line in used:
        name, *rest = line.partition("#")[0].split()
        if name not in commands:
            assert f"elastictrain {name}" not in "\n".join(b for p in PAPERS for b in blocks(p, "")), line
            continue
        command = commands[name]
        group = inner if name == "ckpt" else getattr(command, "commands", {})
        if group and rest:
            assert rest[0] in group, line
            command = group[rest[0]]
        options = {option for param in command.params for option in (*param.opts, *param.secondary_opts)}
        assert {word for word in rest if word.startswith("--")} <= options | {"--"}, line
        seen.add(name)
    assert seen >= {"run", "submit", "status", "events", "plot", "validate", "ckpt", "data"}


def test_every_link_of_the_papers_leads_somewhere() -> None:
    for paper in PAPERS:
        for target in re.findall(r"\]\(([^)#]+)[^)]*\)", text(paper)):
            if "://" not in target:
                assert ((ROOT / paper).parent / target).exists(), f"{paper}: {target}"


def test_the_page_on_faults_names_every_phase_and_kind() -> None:
    page = text("docs/faults.md")
    for phase in get_args(faults.Phase):
        assert f"`{phase}`" in page, phase
    for kind in get_args(faults.Fault):
        assert f"do: {kind.model_fields['do'].default}" in page


def test_the_changelog_knows_this_version() -> None:
    assert f"## {et.__version__}" in text("CHANGELOG.md")
    assert project()["project"]["version"] == et.__version__
