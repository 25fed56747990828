"""What torch's own files need: types by their names, and loading without trusting them. Imports torch."""

from __future__ import annotations

import io
import zipfile
from typing import Any

import numpy as np
import torch

from elastictrain_checkpoint.errors import CorruptData, ForeignFormat
from elastictrain_checkpoint.source import Bytes

NAMES: dict[torch.dtype, str] = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8",
    torch.uint64: "U64", torch.uint32: "U32", torch.uint16: "U16", torch.uint8: "U8",
    torch.bool: "BOOL", torch.complex64: "C64",
}  # fmt: skip
TYPES = {name: dtype for dtype, name in NAMES.items()}


def dtype_name(dtype: torch.dtype, what: str) -> str:
    """Our name of a torch type.

    Raises:
        ForeignFormat: there is none.

    """
    try:
        return NAMES[dtype]
    except KeyError:
        raise ForeignFormat(f"{what} is {dtype}; types that can be stored are {', '.join(sorted(TYPES))}") from None


def to_bytes(tensor: torch.Tensor) -> Bytes:
    """The bytes of a tensor, row-major; a copy only where it is not contiguous."""
    flat = tensor.detach().contiguous().reshape(-1)
    return np.asarray(flat.view(torch.uint8).numpy()) if flat.numel() else np.empty(0, np.uint8)


def to_tensor(data: Bytes, dtype: str, shape: tuple[int, ...], what: str) -> torch.Tensor:
    """A tensor over these bytes, which must be writable.

    Raises:
        ForeignFormat: torch has no such type.

    """
    if dtype not in TYPES:
        raise ForeignFormat(f"{what} is {dtype}, which torch has not; cast it or leave it out")
    if not len(data):
        return torch.empty(shape, dtype=TYPES[dtype])
    return torch.from_numpy(data).view(TYPES[dtype]).reshape(shape)


def load(raw: bytes | memoryview, what: str, *, check_crc: bool) -> Any:
    """What ``torch.save`` wrote, read with ``weights_only=True``: tensors and plain values, no code.

    Args:
        raw: the whole file, or that slice of a file.
        what: names it in messages.
        check_crc: check the sums in it, which torch writes and does not check.

    Raises:
        CorruptData: it was altered or cut short.
        ForeignFormat: it holds what cannot be read without trusting it.

    """
    if check_crc:
        _check_crc(raw, what)
    try:
        return torch.load(io.BytesIO(raw), map_location="cpu", weights_only=True)
    except Exception as error:
        said = str(error).strip().splitlines() or [type(error).__name__]
        raise ForeignFormat(f"{what} cannot be read without trusting it: {said[0][:200]}") from None


def _check_crc(raw: bytes | memoryview, what: str) -> None:
    try:
        with zipfile.ZipFile(io.BytesIO(raw)) as archive:
            bad = archive.testzip()
    except (zipfile.BadZipFile, ValueError, NotImplementedError, EOFError, OSError) as error:
        raise CorruptData(f"{what} is not what torch.save writes, or it was cut short: {error}", file=what) from None
    if bad is not None:
        raise CorruptData(
            f"{what}: the CRC-32 of {bad} differs, so its bytes are not those that were written (or it was written "
            f"without sums: then pass check_crc=False, on the command line --no-crc)",
            file=what,
        )
