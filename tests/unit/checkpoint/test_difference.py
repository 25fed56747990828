"""Differences in numbers, against NumPy and by hand."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from elastictrain_checkpoint import difference
from elastictrain_checkpoint.difference import compare_tensor, diff, statistics
from elastictrain_checkpoint.source import Arrays


def arrays(dtype: str, kind: str, **held: Any) -> Arrays:
    return Arrays({name: (dtype, np.shape(a), np.asarray(a, dtype=kind)) for name, a in held.items()})


@pytest.fixture(autouse=True, params=[3, 1 << 20])
def small_steps(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(difference, "STEP_ELEMENTS", request.param)


def test_norms() -> None:
    rng = np.random.default_rng(0)
    one = rng.normal(size=(5, 7)).astype("<f4")
    two = one.copy()
    two[1, 2] += 3
    two[4, 6] -= 1
    found = compare_tensor(arrays("F32", "<f4", t=one), arrays("F32", "<f4", t=two), "t")
    gap = two.astype(float) - one.astype(float)
    assert (found.kind, found.elements, found.not_finite) == ("values", 2, 0)
    assert found.l2 == pytest.approx(np.linalg.norm(gap), rel=1e-12)
    assert found.max_abs == np.abs(gap).max()
    assert found.relative == pytest.approx(np.linalg.norm(gap) / np.linalg.norm(one.astype(float)), rel=1e-12)


def test_kinds() -> None:
    a = Arrays(
        {
            "gone": ("F32", (1,), np.zeros(1, "<f4")),
            "same": ("F32", (4,), np.arange(4, dtype="<f4")),
            "shape": ("F32", (4,), np.zeros(4, "<f4")),
            "dtype": ("F32", (4,), np.arange(4, dtype="<f4")),
            "zero": ("F32", (4,), np.zeros(4, "<f4")),
            "scales": ("F8_E8M0", (4,), np.zeros(4, "u1")),
            "empty": ("F32", (0,), b""),
        }
    )
    b = Arrays(
        {
            "new": ("U8", (2,), b"ab"),
            "same": ("F32", (4,), np.arange(4, dtype="<f4")),
            "shape": ("F32", (2, 2), np.zeros(4, "<f4")),
            "dtype": ("F64", (4,), np.array([0, 1, 2, 4], dtype="<f8")),
            "zero": ("F32", (4,), np.array([0, -0.0, 0, -0.0], "<f4")),
            "scales": ("F8_E8M0", (4,), np.array([0, 0, 1, 0], "u1")),
            "empty": ("F32", (0,), b""),
        }
    )
    seen: list[tuple[int, int]] = []
    found = {entry.name: entry for entry in diff(a, b, lambda *told: seen.append(told))}
    assert list(found) == sorted({*a.tensors, *b.tensors})
    assert seen[-1] == (72, 72)
    kinds = {name: entry.kind for name, entry in found.items()}
    assert kinds == {
        "gone": "missing", "new": "extra", "same": "same", "shape": "shape", "dtype": "dtype", "zero": "bits",
        "scales": "bits", "empty": "same",
    }  # fmt: skip
    assert (found["shape"].a, found["shape"].b) == ("F32 [4]", "F32 [2, 2]")
    assert (found["dtype"].elements, found["dtype"].max_abs) == (1, 1.0)
    assert (found["zero"].elements, found["scales"].elements) == (2, 1)


def test_nan_and_infinities_are_counted_apart() -> None:
    one = arrays("F32", "<f4", t=[math.nan, math.inf, 1, 2, math.nan, math.inf])
    two = arrays("F32", "<f4", t=[math.nan, math.inf, math.nan, 2.5, 0, -math.inf])
    found = compare_tensor(one, two, "t")
    assert (found.kind, found.elements, found.not_finite) == ("values", 4, 3)
    assert (found.l2, found.max_abs) == (0.5, 0.5)
    assert found.relative == pytest.approx(0.5 / math.sqrt(5))
    zero = compare_tensor(arrays("F32", "<f4", t=[0, 0]), arrays("F32", "<f4", t=[0, 1]), "t")
    assert zero.relative == math.inf


def test_whole_numbers_beyond_float64_are_told_apart() -> None:
    one, two = ((arrays("I64", "<i8", t=[1, value])) for value in (2**53, 2**53 + 1))
    found = compare_tensor(one, two, "t")
    assert (found.kind, found.elements) == ("values", 1)
    flags = (arrays("BOOL", "?", t=value) for value in ([True, False], [True, True]))
    assert compare_tensor(*flags, "t").elements == 1


def test_statistics_are_those_of_numpy() -> None:
    rng = np.random.default_rng(1)
    data = (rng.normal(size=(17, 5)) * 3 + 100).astype("<f4")
    found = statistics(arrays("F32", "<f4", t=data), "t")
    wide = data.astype(float)
    assert (found.elements, found.nan, found.infinite, found.zeros) == (85, 0, 0, 0)
    assert (found.minimum, found.maximum) == (wide.min(), wide.max())
    assert found.mean == pytest.approx(wide.mean(), rel=1e-12)
    assert found.deviation == pytest.approx(wide.std(), rel=1e-9)
    assert found.l2 == pytest.approx(np.linalg.norm(wide), rel=1e-12)
    odd = statistics(arrays("F32", "<f4", t=[math.nan, math.inf, 0, 2]), "t")
    assert (odd.nan, odd.infinite, odd.zeros, odd.minimum, odd.mean) == (1, 1, 1, 0.0, 1.0)
    none = statistics(arrays("F32", "<f4", t=[math.nan]), "t")
    assert (none.nan, none.mean) == (1, None)
    assert statistics(Arrays({"t": ("F8_E8M0", (3,), b"abc")}), "t").mean is None
