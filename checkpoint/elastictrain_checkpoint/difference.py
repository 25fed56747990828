"""How two checkpoints differ, tensor by tensor, in numbers: streamed, so neither is ever whole in memory."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from elastictrain_checkpoint.cast import bit_type, values
from elastictrain_checkpoint.dtypes import num_elements
from elastictrain_checkpoint.source import Bytes, Source, tensor_bytes

Progress = Callable[[int, int], None]
Kind = Literal["same", "values", "bits", "dtype", "shape", "missing", "extra"]
STEP_ELEMENTS = 1 << 20


@dataclass(frozen=True)
class TensorDifference:
    """One tensor in two checkpoints, A and B.

    Attributes:
        name: its name.
        kind: "same" bytes; "values" differ; "bits" differ where types have no values here, or only in signs of zero
            or kinds of NaN; "dtype" (compared by value all the same) or "shape" differs; "missing" in B; "extra" in B.
        a, b: "F32 [3, 4]", or None.
        elements: that differ.
        l2: norm of B − A, over elements that are finite in both.
        max_abs: largest |B − A|.
        relative: l2 over the norm of A; infinite where A is zero.
        not_finite: elements that are NaN or infinite in one and not the same in the other.

    """

    name: str
    kind: Kind
    a: str | None
    b: str | None
    elements: int = 0
    l2: float = 0.0
    max_abs: float = 0.0
    relative: float = 0.0
    not_finite: int = 0


@dataclass
class _Sums:
    """What is summed up while two tensors stream by."""

    elements: int = 0
    squares: float = 0.0
    squares_a: float = 0.0
    max_abs: float = 0.0
    not_finite: int = 0
    bits: int = 0

    def add(self, a: NDArray[Any], b: NDArray[Any]) -> None:
        wide = np.complex128 if "c" in (a.dtype.kind, b.dtype.kind) else np.float64
        with np.errstate(invalid="ignore", over="ignore"):  # NaN of any kind is data here
            one, two = a.astype(wide), b.astype(wide)
            finite = np.isfinite(one) & np.isfinite(two)
            same = (one == two) | (np.isnan(one) & np.isnan(two))
            # Whole numbers beyond 2^53 are not told apart as float64.
            if a.dtype.kind in "iu" and a.dtype == b.dtype:
                same = a == b
            gap = np.abs(np.where(finite, two - one, 0))
            size = np.abs(np.where(np.isfinite(one), one, 0))
        self.elements += int(np.count_nonzero(~same))
        self.not_finite += int(np.count_nonzero(~same & ~finite))
        self.squares += float(np.square(gap).sum())
        self.squares_a += float(np.square(size).sum())
        self.max_abs = max(self.max_abs, float(gap.max(initial=0.0)))


def diff(a: Source, b: Source, progress: Progress | None = None) -> Iterator[TensorDifference]:
    """Compare two sources; gives one entry for each name, sorted, as soon as it is known.

    Args:
        a: any source, also a mapped one or one of another format.
        b: the one that is compared with it.
        progress: called with (bytes of A done, bytes of A in all).

    Raises:
        CorruptData: stored bytes are not those that were written.

    """
    names = sorted({*a.tensors, *b.tensors})
    total = sum(tensor_bytes(a, name) for name in a.tensors)
    done = 0
    for name in names:
        yield compare_tensor(a, b, name)
        if name in a.tensors:
            done += tensor_bytes(a, name)
        if progress:
            progress(done, total)


def compare_tensor(a: Source, b: Source, name: str) -> TensorDifference:
    """One tensor of two sources; see `diff`."""
    if name not in a.tensors:
        return TensorDifference(name, "extra", None, _said(b, name))
    if name not in b.tensors:
        return TensorDifference(name, "missing", _said(a, name), None)
    told = (_said(a, name), _said(b, name))
    (dtype_a, shape_a), (dtype_b, shape_b) = a.tensors[name], b.tensors[name]
    if tuple(shape_a) != tuple(shape_b):
        return TensorDifference(name, "shape", *told)
    sums = _Sums()
    count = num_elements(shape_a)
    for start in range(0, count, STEP_ELEMENTS):
        stop = min(start + STEP_ELEMENTS, count)
        _add(sums, a.read_flat(name, start, stop), dtype_a, b.read_flat(name, start, stop), dtype_b)
    kind: Kind = "dtype" if dtype_a != dtype_b else "values" if sums.elements else "bits" if sums.bits else "same"
    if sums.bits and not sums.elements:
        return TensorDifference(name, kind, *told, elements=sums.bits)
    l2 = math.sqrt(sums.squares)
    relative = 0.0 if l2 == 0 else l2 / math.sqrt(sums.squares_a) if sums.squares_a else math.inf
    return TensorDifference(name, kind, *told, sums.elements, l2, sums.max_abs, relative, sums.not_finite)


def _add(sums: _Sums, a: Bytes, dtype_a: str, b: Bytes, dtype_b: str) -> None:
    one, two = values(a, dtype_a), values(b, dtype_b)
    equal = dtype_a == dtype_b and np.array_equal(a, b)
    if one is not None and two is not None:
        before = sums.elements
        sums.add(one, one if equal else two)
        equal = equal or dtype_a != dtype_b or sums.elements > before
    if not equal:
        width = bit_type(dtype_a)
        sums.bits += (
            int(np.count_nonzero(a.view(width) != b.view(width))) if dtype_a == dtype_b else len(a) // width.itemsize
        )


def _said(source: Source, name: str) -> str:
    dtype, shape = source.tensors[name]
    return f"{dtype} {list(shape)}"


@dataclass(frozen=True)
class Statistics:
    """Of the values of one tensor; NaN and infinities are counted, and left out of the rest.

    Attributes:
        elements, nan, infinite, zeros: counts.
        minimum, maximum, mean, deviation, l2: None where there are no finite values, or the type has none; of complex
            numbers only l2.

    """

    elements: int
    nan: int = 0
    infinite: int = 0
    zeros: int = 0
    minimum: float | None = None
    maximum: float | None = None
    mean: float | None = None
    deviation: float | None = None
    l2: float | None = None


def statistics(source: Source, name: str, progress: Progress | None = None) -> Statistics:
    """Streamed statistics of a tensor; two passes in one by Chan's pairwise update of mean and variance.

    Raises:
        KeyError: no such tensor.
        CorruptData: stored bytes are not those that were written.

    """
    dtype, shape = source.tensors[name]
    count = num_elements(shape)
    nan = infinite = zeros = held = complex_held = 0
    low, high, mean, spread, squares = math.inf, -math.inf, 0.0, 0.0, 0.0
    for start in range(0, count, STEP_ELEMENTS):
        stop = min(start + STEP_ELEMENTS, count)
        found = values(source.read_flat(name, start, stop), dtype)
        if progress:
            progress(stop, count)
        if found is None:
            continue
        if found.dtype.kind == "c":
            with np.errstate(invalid="ignore", over="ignore"):
                size = np.abs(found.astype(np.complex128))
            sizes = size[np.isfinite(size)]
            nan, infinite = (
                nan + int(np.count_nonzero(np.isnan(size))),
                infinite + int(np.count_nonzero(np.isinf(size))),
            )
            zeros, complex_held = zeros + int(np.count_nonzero(size == 0)), complex_held + len(sizes)
            squares += float(np.square(sizes).sum())
            continue
        with np.errstate(invalid="ignore"):
            wide = found.astype(np.float64)
        nan += int(np.count_nonzero(np.isnan(wide)))
        infinite += int(np.count_nonzero(np.isinf(wide)))
        zeros += int(np.count_nonzero(wide == 0))
        finite = wide[np.isfinite(wide)]
        if not len(finite):
            continue
        low, high = min(low, float(finite.min())), max(high, float(finite.max()))
        part_mean = float(finite.mean())
        gap, both = part_mean - mean, held + len(finite)
        spread += float(np.square(finite - part_mean).sum()) + gap * gap * held * len(finite) / both
        mean += gap * len(finite) / both
        squares += float(np.square(finite).sum())
        held = both
    if complex_held:
        return Statistics(count, nan, infinite, zeros, l2=math.sqrt(squares))
    if not held:
        return Statistics(count, nan, infinite, zeros)
    return Statistics(count, nan, infinite, zeros, low, high, mean, math.sqrt(spread / held), math.sqrt(squares))
