"""What lies beside a manifest when it would make its JSON too large: the chunk table, and the cell hashes.

*Chunks.* Up to `TABLE_CHUNKS` chunks stand in the JSON, for people and tools to read. More of them go into an Arrow IPC
file, a row for each tensor, which is opened without a loop per chunk.

*Cells.* The hashes of the digest's cells, 16 bytes each (0.1 % of fp32 data), in the order of the tensors' names. Only
who saves with this step as a base needs them; the checkpoint is whole without.

Both are named after a hash of what they hold, lie in the folder of the attempt, and are published before the manifest
that names them.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import xxhash

from elastictrain_checkpoint.boxes import Ints
from elastictrain_checkpoint.dtypes import num_elements
from elastictrain_checkpoint.hashing import CELL_HASH_BYTES, cells, unbase64
from elastictrain_checkpoint.part import NAME, PartTensor, SidecarRecord, TensorRecord
from elastictrain_checkpoint.paths import step_folder
from elastictrain_checkpoint.table import Columns

if TYPE_CHECKING:
    import pyarrow as pa

TABLE_CHUNKS = 20_000
"""More chunks than this go into an Arrow file beside the manifest."""

CHUNKS, CELLS = "chunks", "cells"
_ENDINGS = {CHUNKS: "arrow", CELLS: "bin"}


def record_of(kind: str, attempt: str, data: bytes) -> SidecarRecord:
    """How the manifest names a sidecar that holds ``data``."""
    hashed = xxhash.xxh3_128_hexdigest(data)
    return SidecarRecord(path=f"{attempt}/{kind}-{hashed}.{_ENDINGS[kind]}", size_bytes=len(data), hash=hashed)


def sidecar_path(kind: str, step: int, record: SidecarRecord) -> str:
    """Where a sidecar lies in the store.

    Raises:
        ValueError: the path is not that of a sidecar of this kind in the folder of its own step.

    """
    if not re.fullmatch(rf"{NAME}/{kind}-{record.hash}\.{_ENDINGS[kind]}", record.path):
        raise ValueError(f"path {record.path!r} is not that of {kind} beside the packs of this step")
    return f"{step_folder(step)}/{record.path}"


def check_sidecar(record: SidecarRecord, data: bytes) -> bytes:
    """``data``, if it is what the manifest says.

    Raises:
        ValueError: it is not.

    """
    if len(data) != record.size_bytes or xxhash.xxh3_128_hexdigest(data) != record.hash:
        raise ValueError(f"{record.path} is not as it was written ({len(data)} of {record.size_bytes} bytes)")
    return data


def encode_chunks(tensors: Mapping[str, TensorRecord]) -> bytes:
    """The chunk table as an Arrow IPC file: a row for each tensor, names ascending."""
    import pyarrow as pa

    names = sorted(tensors)
    records = [tensors[name] for name in names]
    many = pa.list_(pa.int64())
    columns: dict[str, pa.Array] = {
        "name": pa.array(names, pa.string()),
        "dtype": pa.array([record.dtype for record in records], pa.string()),
        "shape": pa.array([record.shape for record in records], many),
        "file": pa.array([[chunk[0] for chunk in record.chunks] for record in records], many),
        "start": pa.array([[chunk[1] for chunk in record.chunks] for record in records], many),
        "offsets": pa.array([[at for chunk in record.chunks for at in chunk[2]] for record in records], many),
        "sizes": pa.array([[at for chunk in record.chunks for at in chunk[3]] for record in records], many),
    }
    table = pa.table(columns)
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    return bytes(sink.getvalue())


def decode_chunks(data: bytes) -> Columns:
    """Inverse of `encode_chunks`; whether the chunks make sense is checked by `table.table_of`.

    Raises:
        ValueError: this is no such table.

    """
    import pyarrow as pa

    try:
        table = pa.ipc.open_file(pa.BufferReader(data)).read_all().combine_chunks()
        table.validate(full=True)
        names, dtypes = table["name"].to_pylist(), table["dtype"].to_pylist()
        (shape_bounds, shape), (bounds, file), (_, start), (_, offsets), (_, sizes) = (
            _lists(table, column) for column in ("shape", "file", "start", "offsets", "sizes")
        )
    except (pa.ArrowException, KeyError, TypeError) as error:
        raise ValueError(f"not a table of chunks: {error}") from None
    if None in names or None in dtypes or any(a >= b for a, b in itertools.pairwise(names)):
        raise ValueError("not a table of chunks: its names are not ascending, or one is missing")
    chunks = np.diff(bounds)
    axes = np.repeat(np.diff(shape_bounds), chunks)
    box_bounds = np.zeros(len(axes) + 1, dtype=np.int64)
    np.cumsum(axes, out=box_bounds[1:])
    if not len(start) == len(file) == len(axes) or not len(offsets) == len(sizes) == box_bounds[-1]:
        raise ValueError("not a table of chunks: its columns are of different lengths")
    return Columns(
        names,
        dtypes,
        shape_bounds,
        shape,
        np.repeat(np.arange(len(names), dtype=np.int64), chunks),
        file,
        start,
        box_bounds,
        offsets,
        box_bounds,
        sizes,
    )


def _lists(table: pa.Table, name: str) -> tuple[Ints, Ints]:
    import pyarrow as pa

    column: Any = table[name]
    array = column.chunk(0) if column.num_chunks else pa.array([], pa.list_(pa.int64()))
    if array.type != pa.list_(pa.int64()) or array.null_count or array.values.null_count:
        raise TypeError(f"column {name} is not of lists of whole numbers")
    bounds = array.offsets.to_numpy().astype(np.int64)
    values = array.values.to_numpy().astype(np.int64)[bounds[0] : bounds[-1]]
    return bounds - bounds[0], values


def encode_cells(tensors: Mapping[str, PartTensor]) -> bytes:
    """The cell hashes of all tensors, names ascending; every tensor's cells in order."""
    return b"".join(unbase64(text) for name in sorted(tensors) for _, text in sorted(tensors[name].cells))


def decode_cells(tensors: Mapping[str, tuple[str, Sequence[int]]], data: bytes) -> dict[str, bytes]:
    """Name → cell hashes; the inverse of `encode_cells`.

    Raises:
        ValueError: too few or too many for these tensors.

    """
    out, at = {}, 0
    for name in sorted(tensors):
        size = cells(num_elements(tensors[name][1])) * CELL_HASH_BYTES
        out[name] = data[at : at + size]
        at += size
    if at != len(data):
        raise ValueError(f"{len(data)} bytes of cell hashes, expected {at} for the tensors of the manifest")
    return out
