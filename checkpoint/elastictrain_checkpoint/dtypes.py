"""Data types by their safetensors names, and raw bytes. Nothing here computes with tensors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from elastictrain_checkpoint.errors import InvalidPiece

ITEM_BYTES = {
    "BOOL": 1,
    "U8": 1,
    "I8": 1,
    "F8_E5M2": 1,
    "F8_E4M3": 1,
    "F8_E8M0": 1,
    "I16": 2,
    "U16": 2,
    "F16": 2,
    "BF16": 2,
    "I32": 4,
    "U32": 4,
    "F32": 4,
    "I64": 8,
    "U64": 8,
    "F64": 8,
    "C64": 8,
}
"""Bytes of one element. Types of less than a byte (F4, F6) are refused: a flat range of them has no byte
address."""

_SHOWN_BYTES = {"C128": 16, "F8_E4M3FNUZ": 1, "F8_E5M2FNUZ": 1}
"""Types that packs do not have, but tensors may be seen as (`true_types`)."""

MAX_ELEMENTS = 1 << 56
"""No tensor is larger, so that element and byte counts fit into 64 bits with room to spare."""


def item_bytes(dtype: str) -> int:
    """Bytes of one element of ``dtype``.

    Raises:
        InvalidPiece: the format does not know the type.

    """
    try:
        return ITEM_BYTES[dtype]
    except KeyError:
        raise InvalidPiece(f"dtype {dtype!r} is not one of {', '.join(sorted(ITEM_BYTES))}") from None


def width_of(dtype: str) -> int:
    """Bytes of one element, of types that packs do not have as well. Raises InvalidPiece: there is no such type."""
    return _SHOWN_BYTES.get(dtype) or item_bytes(dtype)


def num_elements(shape: Sequence[int]) -> int:
    """Elements of a tensor of ``shape``; 1 for a scalar.

    Raises:
        InvalidPiece: a dimension is negative or the tensor is larger than `MAX_ELEMENTS`.

    """
    count = filled = 1
    for dim in shape:
        if type(dim) is not int or not 0 <= dim <= MAX_ELEMENTS:
            raise InvalidPiece(f"shape {list(shape)} has a dimension that is not an integer in [0, 2^56]")
        count *= dim
        # Zeros are left out: the strides of an empty tensor must fit into 64 bits too.
        filled *= dim or 1
    if filled > MAX_ELEMENTS:
        raise InvalidPiece(f"shape {list(shape)} has more than 2^56 elements")
    return count


def as_bytes(data: Any, what: str) -> memoryview:
    """Flat, read-only view of a C-contiguous buffer (bytes, memoryview, NumPy array …); nothing is copied.

    Raises:
        InvalidPiece: ``data`` is no buffer, or not contiguous.

    """
    try:
        view = memoryview(data)
    except TypeError:
        raise InvalidPiece(
            f"{what}: data is a {type(data).__name__}, expected a buffer such as a NumPy array "
            f"(for a torch tensor: tensor.contiguous().view(torch.uint8).numpy())"
        ) from None
    if not view.c_contiguous:
        raise InvalidPiece(f"{what}: data is not C-contiguous; pass a contiguous copy")
    if view.nbytes == 0:
        return memoryview(b"")
    return view.cast("B").toreadonly()
