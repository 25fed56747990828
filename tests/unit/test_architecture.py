"""ARCHITECTURE.md says what the code says.

`python tests/unit/test_architecture.py` writes the diagram anew from the transition table.
"""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from elastictrain.controller import diagram, invariants

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "ARCHITECTURE.md"
BEGIN, END = "<!-- diagram:begin -->\n```mermaid\n", "```\n<!-- diagram:end -->"
RULES = [f"R{number}" for number in range(1, 8)]


def page() -> str:
    return PAGE.read_text(encoding="utf-8")


def with_diagram(text: str) -> str:
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    return before + BEGIN + diagram() + END + after


def row(rule: str) -> tuple[str, str]:
    """The second and third column of a rule's row: where it lives, and which tests guard it."""
    (found,) = re.findall(rf"^\| \*\*{rule}\*\* [^|]*\|([^|]*)\|([^|]*)\|$", page(), re.M)
    return found


def functions(file: Path) -> set[str]:
    return {node.name for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.FunctionDef)}


def test_the_diagram_is_printed_from_the_transition_table() -> None:
    assert page().count(BEGIN) == page().count(END) == 1
    assert with_diagram(page()) == page(), "run: python tests/unit/test_architecture.py"


def test_the_controllers_invariants_are_those_of_the_code() -> None:
    def numbered(text: str) -> list[str]:
        found = re.findall(r"^- (\*\*I\d+\*\* .*?)(?=\n\n|\n- |\Z)", text, re.M | re.S)
        return [" ".join(entry.split()) for entry in found]

    in_code = numbered(invariants.__doc__ or "")
    assert len(in_code) >= 13
    assert numbered(page()) == in_code


@pytest.mark.parametrize("rule", RULES)
def test_every_rule_names_tests_that_exist(rule: str) -> None:
    named = re.findall(r"`([^`]+)`", row(rule)[1])
    assert named
    file = ""
    for test in named:
        path, _, function = test.partition("::")
        file = path or file
        assert function in functions(ROOT / file), f"{rule}: {file} has no {function}"


@pytest.mark.parametrize("rule", RULES)
def test_every_rule_names_code_that_exists(rule: str) -> None:
    source = "\n".join(
        file.read_text()
        for folder in ("engine", "controller", ".")
        for file in (ROOT / "elastictrain" / folder).glob("*.py")
    )
    named = re.findall(r"`([^`]+)`", row(rule)[0])
    assert named
    for name in named:
        attribute = name.rpartition(".")[2]
        assert re.search(rf"\b(def|class) {attribute}\b|\b(self\.)?{attribute}\s*:", source), f"{rule}: no {name}"


def test_every_file_that_it_names_exists() -> None:
    for name in re.findall(r"`((?:elastictrain|actors|checkpoint|docs|tests|examples)/[\w./]*\w(?:\.\w+)?)`", page()):
        assert (ROOT / name).exists(), name
    for name in re.findall(r"`((?:engine|controller|data)/\w+\.py)`", page()):
        assert (ROOT / "elastictrain" / name).exists(), name


if __name__ == "__main__":
    PAGE.write_text(with_diagram(page()), encoding="utf-8")
