"""Floating-point types from one to another, without torch: NumPy has no bfloat16, so its bits are made here. Pure."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from elastictrain_checkpoint.dtypes import width_of
from elastictrain_checkpoint.errors import InvalidMapping

Bytes = NDArray[np.uint8]

FLOATS = ("F64", "F32", "F16", "BF16")
"""Types that a cast goes from and to."""

_NUMPY: dict[str, str] = {
    "BOOL": "?", "U8": "u1", "I8": "i1", "I16": "<i2", "U16": "<u2", "F16": "<f2", "I32": "<i4", "U32": "<u4",
    "F32": "<f4", "I64": "<i8", "U64": "<u8", "F64": "<f8", "C64": "<c8",
    "C128": "<c16",
}  # fmt: skip
_BITS = {1: "u1", 2: "<u2", 4: "<u4", 8: "<u8", 16: "V16"}


def bit_type(dtype: str) -> np.dtype[Any]:
    """An unsigned type as wide as one element: to move elements about without looking at them."""
    return np.dtype(_BITS[width_of(dtype)])


def values(data: Bytes, dtype: str) -> NDArray[Any] | None:
    """The numbers behind bytes, shape [elements]: bfloat16 widened to float32, 8-bit floats to float32; None for a type
    that has no values here.
    """
    if dtype == "BF16":
        return (data.view("<u2").astype("<u4") << np.uint32(16)).view("<f4")
    if dtype in _TABLES:
        return _TABLES[dtype][data]
    return data.view(_NUMPY[dtype]) if dtype in _NUMPY else None


def cast(data: Bytes, dtype: str, to: str) -> Bytes:
    """The same numbers in another floating-point type, rounded to the nearest, ties to even.

    Too large numbers become infinite, as in every framework; NaN stays NaN. float64 to bfloat16 goes by way of float32
    (two roundings), as it does in torch.

    Raises:
        InvalidMapping: one of the two is not in `FLOATS`.

    """
    if dtype == to:
        return data
    if dtype not in FLOATS or to not in FLOATS:
        raise InvalidMapping(f"no cast from {dtype} to {to}: only between {', '.join(FLOATS)}")
    found = values(data, dtype)
    assert found is not None
    with np.errstate(over="ignore", invalid="ignore", under="ignore"):
        made = _to_bfloat16(found.astype("<f4")) if to == "BF16" else found.astype(_NUMPY[to])
    return np.ascontiguousarray(made).view(np.uint8)


def _to_bfloat16(numbers: NDArray[np.float32]) -> NDArray[np.uint16]:
    bits = numbers.view("<u4")
    # Half of the last kept bit, less one if that bit is even: ties go to even. NaN must not round into infinity.
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    quiet = (bits >> np.uint32(16)) | np.uint32(0x0040)
    return np.where(np.isnan(numbers), quiet, rounded).astype("<u2")


def _table(
    exponent_bits: int, mantissa_bits: int, bias: int, *, infinite: bool = False, unsigned_zero: bool = False
) -> NDArray[np.float32]:
    """Values of the 256 codes of an 8-bit float (OCP 8-bit floating point, revision 1.0); of those with one zero (fnuz)
    the code of the other is the only NaN.
    """
    codes = np.arange(256)
    sign = np.where(codes & 0x80, -1.0, 1.0)
    mask = (1 << exponent_bits) - 1
    exponent = (codes >> mantissa_bits) & mask
    mantissa = (codes & ((1 << mantissa_bits) - 1)) / (1 << mantissa_bits)
    normal = (1 + mantissa) * 2.0 ** (exponent - bias)
    number = np.where(exponent == 0, mantissa * 2.0 ** (1 - bias), normal)
    if unsigned_zero:
        number = np.where(codes == 0x80, np.nan, number)
    elif infinite:
        number = np.where(exponent == mask, np.where(mantissa == 0, np.inf, np.nan), number)
    else:
        number = np.where((codes & 0x7F) == 0x7F, np.nan, number)
    return (sign * number).astype("<f4")


_TABLES = {
    "F8_E4M3": _table(4, 3, 7),
    "F8_E5M2": _table(5, 2, 15, infinite=True),
    "F8_E4M3FNUZ": _table(4, 3, 8, unsigned_zero=True),
    "F8_E5M2FNUZ": _table(5, 2, 16, unsigned_zero=True),
}
