"""Arrow columns as NumPy arrays, and the check that a column's type can become one."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from elastictrain.data.buffers import of_blocks
from elastictrain.errors import DataError, DataMismatch

Schema = tuple[tuple[str, str], ...]


def is_text(kind: pa.DataType) -> bool:
    """Whether a column of this type can be `data.text_column`."""
    if pa.types.is_dictionary(kind):
        return is_text(kind.value_type)
    return str(kind) in ("string", "large_string", "string_view", "binary", "large_binary", "binary_view")


def is_documents(kind: pa.DataType) -> bool:
    """Whether a column of this type can hold documents that are tokenised already: lists of whole numbers."""
    return bool((pa.types.is_list(kind) or pa.types.is_large_list(kind)) and pa.types.is_integer(kind.value_type))


def is_tensor(kind: pa.DataType) -> bool:
    """Whether a column of this type can be stacked: numbers, booleans, and lists of them."""
    if _is_list(kind):
        return is_tensor(kind.value_type)
    return bool(pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_boolean(kind))


def _is_list(kind: pa.DataType) -> bool:
    return bool(pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind))


def stack(column: pa.ChunkedArray, where: str) -> npt.NDArray[Any]:
    """Return a column of `n` numbers, or of lists of equal length, as an array of shape [n, …], in memory of our own.

    Arrow's memory is let go of at once, and is then what it decodes the next row group into. Where decoded row groups
    stay in it, every next one is decoded into fresh memory, which costs more than this copy.

    Raises DataError, beginning with `where`, for nulls and for lists of different lengths.
    """
    parts = [_stack_chunk(chunk, where) for chunk in column.chunks if len(chunk)]
    if not parts:
        return np.zeros(0, dtype=np.float32)
    shapes = sorted({part.shape[1:] for part in parts})
    if len(shapes) > 1:
        raise DataError(f"{where}: rows of different shapes {shapes}. {_EQUAL_LENGTHS}")
    return own_copy(parts)


def own_copy(parts: Sequence[npt.NDArray[Any]]) -> npt.NDArray[Any]:
    """Return arrays that differ in their first dimension at most, at least one, joined in memory that is used again."""
    joined = of_blocks.empty((sum(map(len, parts)), *parts[0].shape[1:]), parts[0].dtype)
    return np.concatenate(parts, out=joined)


_EQUAL_LENGTHS = (
    "Expected lists of equal length, so that rows can be stacked. "
    "Pad them before, or leave the column out of data.columns"
)


def _stack_chunk(chunk: pa.Array, where: str) -> npt.NDArray[Any]:
    if chunk.null_count:
        raise DataError(
            f"{where}: {chunk.null_count} null value(s). Expected none, because a missing number has no place "
            "in a batch. Fill or remove them before, or leave the column out of data.columns"
        )
    if not _is_list(chunk.type):
        return np.asarray(chunk.to_numpy(zero_copy_only=False))
    lengths = np.unique(np.asarray(pc.list_value_length(chunk)))
    if len(lengths) > 1:
        raise DataError(f"{where}: lists of {lengths[0]} to {lengths[-1]} elements. {_EQUAL_LENGTHS}")
    values = _stack_chunk(chunk.flatten(), where)
    return values.reshape(len(chunk), int(lengths[0]), *values.shape[1:])


def nearest(name: str, there: Iterable[str]) -> str:
    """Return " (did you mean 'x'?)" if a name like `name` is there, else nothing."""
    hits = difflib.get_close_matches(name, list(there), n=1)
    return f" (did you mean {hits[0]!r}?)" if hits else ""


def show_schema(schema: Iterable[tuple[str, str]]) -> str:
    """Return a schema in words, as error messages print it."""
    return ", ".join(f"{name}: {kind}" for name, kind in schema) or "no columns"


def select_columns(
    schema: pa.Schema, file: str, *, text_column: str | None, columns: Sequence[str] | None
) -> pa.Schema:
    """Return the part of a file's schema that the job reads, or raise DataError if it cannot be read so."""
    there = [(field.name, str(field.type)) for field in schema]
    names = [text_column] if text_column else list(columns or schema.names)
    setting = "data.text_column" if text_column else "data.columns"
    for name in names:
        if name not in schema.names:
            raise DataMismatch(
                f"{file}: {setting} names {name!r}{nearest(name, schema.names)}, which is not there. "
                f"The columns are: {show_schema(there)}"
            )
        kind = schema.field(name).type
        if text_column and not (is_text(kind) or is_documents(kind)):
            raise DataMismatch(
                f"{file}: data.text_column {name!r} has type {kind}; expected a string. "
                f"The columns are: {show_schema(there)}"
            )
        if not text_column and not is_tensor(kind):
            raise DataMismatch(
                f"{file}: column {name!r} has type {kind}; expected numbers, booleans or lists of them. "
                f"Name the columns to use in data.columns, or set data.text_column to train on text. "
                f"The columns are: {show_schema(there)}"
            )
    return pa.schema([schema.field(name) for name in names])


def as_pairs(schema: pa.Schema) -> Schema:
    """Return (name, type) of every field."""
    return tuple((field.name, str(field.type)) for field in schema)
