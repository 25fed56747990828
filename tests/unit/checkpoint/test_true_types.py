"""Types that are stored as bytes, seen by `ckpt show` and `ckpt diff` as what they are."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

import elastictrain_checkpoint.torch as checkpoint
from elastictrain_checkpoint.cast import values
from elastictrain_checkpoint.cli import app
from elastictrain_checkpoint.source import Arrays
from elastictrain_checkpoint.true_types import SHOWN, TrueTypes

COMPLEX = torch.tensor([[3 + 4j, 0], [1 - 1j, complex(math.nan, 1)]], dtype=torch.complex128)


@pytest.fixture
def place(tmp_path: Path) -> Path:
    for step, more in ((1, 0), (2, 2)):
        state = {name: torch.tensor([1.0, -2.0, 0.5 + more]).to(getattr(torch, name)) for name in SHOWN}
        state |= {"complex128": COMPLEX + more * torch.tensor([[1j, 0], [0, 0]]), "raw": torch.zeros(2, 16).byte()}
        checkpoint.save(state | {"tied": state["complex128"]}, tmp_path / "c", step=step)
    return tmp_path / "c"


def run(*args: Any, code: int = 0) -> Any:
    result = CliRunner().invoke(app, [*map(str, args), "--json"])
    assert result.exit_code == code, result.output
    return json.loads(result.stdout)


def test_all_are_shown_with_their_own_type_and_shape(place: Path) -> None:
    shown = run("show", place, "--step", 1)["tensors"]
    assert shown == {
        "complex128": {"dtype": "C128", "shape": [2, 2]},
        "float8_e4m3fnuz": {"dtype": "F8_E4M3FNUZ", "shape": [3]},
        "float8_e5m2fnuz": {"dtype": "F8_E5M2FNUZ", "shape": [3]},
        "float8_e8m0fnu": {"dtype": "F8_E8M0", "shape": [3]},
        "raw": {"dtype": "U8", "shape": [2, 16]},
    }
    text = CliRunner().invoke(app, ["show", str(place), "--step", "1"], env={"COLUMNS": "120"}).stdout
    [line] = [line for line in text.splitlines() if "complex128 " in line and "→" not in line]
    assert [cell.strip() for cell in line.split("│")[2:5]] == ["C128", "[2, 2]", "64 bytes"]


def test_values_and_statistics_are_those_of_the_type(place: Path) -> None:
    found = run("show", place, "--step", 1, "--tensor", "tied")
    assert (found["dtype"], found["shape"], found["range"]) == ("C128", [2, 2], [0, 4])
    assert found["values"] == ["(3+4j)", "0j", "(1-1j)", "(nan+1j)"]
    facts = found["statistics"]
    assert (facts["elements"], facts["nan"], facts["zeros"], facts["minimum"]) == (4, 1, 1, None)
    assert facts["l2"] == pytest.approx(math.sqrt(27))
    assert run("show", place, "--step", 1, "--tensor", "complex128", "--range", "2:3")["values"] == ["(1-1j)"]
    for name in ("float8_e4m3fnuz", "float8_e5m2fnuz"):
        found = run("show", place, "--step", 1, "--tensor", name)
        assert found["values"] == [1.0, -2.0, 0.5]
        assert found["statistics"]["l2"] == pytest.approx(math.sqrt(5.25))


def test_differences_are_those_of_values(place: Path) -> None:
    found = {entry["name"]: entry for entry in run("diff", f"{place}@1", f"{place}@2", code=1)["tensors"]}
    assert set(found) == {"complex128", "tied", *SHOWN}
    assert (found["tied"]["a"], found["tied"]["kind"], found["tied"]["elements"]) == ("C128 [2, 2]", "values", 1)
    assert (found["tied"]["l2"], found["tied"]["max_abs"]) == (2.0, 2.0)
    for name in ("float8_e4m3fnuz", "float8_e5m2fnuz"):
        entry = found[name]
        assert (entry["kind"], entry["elements"], entry["l2"]) == ("values", 1, 2.0)
        assert entry["a"] == f"{SHOWN[name]} [3]"
    assert (found["float8_e8m0fnu"]["kind"], found["float8_e8m0fnu"]["elements"]) == ("bits", 1)


def test_signs_of_zero_are_bits(tmp_path: Path) -> None:
    for step, zero in ((1, 0.0), (2, -0.0)):
        checkpoint.save({"x": torch.tensor([complex(zero, 0), 1], dtype=torch.complex128)}, tmp_path, step=step)
    [entry] = run("diff", f"{tmp_path}@1", f"{tmp_path}@2", code=1)["tensors"]
    assert (entry["kind"], entry["elements"]) == ("bits", 1)


@pytest.mark.parametrize("name", ["float8_e4m3fnuz", "float8_e5m2fnuz"])
def test_every_code_is_what_torch_says(name: str) -> None:
    codes = np.arange(256, dtype=np.uint8)
    expected = torch.from_numpy(codes).view(getattr(torch, name)).float().numpy()
    np.testing.assert_array_equal(values(codes, SHOWN[name]), expected)


def test_what_is_said_of_a_type_must_fit_the_bytes() -> None:
    """A manifest may say anything."""
    tree = {"torch": {"version": 1, "rest": {}, "places": [], "dtypes": {"x": "complex128", "y": "nonsense"}}}
    held = {"x": ("U8", (2, 8), bytes(16)), "y": ("U8", (2, 1), bytes(2))}
    assert TrueTypes(Arrays(held, tree)).tensors == {"x": ("U8", (2, 8)), "y": ("U8", (2, 1))}
