"""Runs: the sorted rows of a part, cut by slots, in a file out of which any range of slots is read with two requests.

**File**: `ETRUN001`, the number of slots (8 bytes, little-endian), for every slot where it ends and the XXH3 of its
bytes (8 bytes each), then the slots: each an Arrow IPC stream compressed with LZ4, or nothing if it has no rows.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import xxhash

from elastictrain.errors import DataError
from elastictrain_checkpoint.store import Store

_MAGIC = b"ETRUN001"
_HEAD_BYTES = 16


def run_content(
    table: pa.Table, order: npt.NDArray[np.int64], edges: npt.NDArray[np.int64], *, without: Sequence[str] = ()
) -> tuple[list[memoryview], npt.NDArray[np.int64]]:
    """Return the content of a run of the table's rows in `order`, and about how many bytes those of each slot take in
    memory, not counting the columns `without`. Slot `i` has the rows `order[edges[i] : edges[i + 1]]`.
    """
    slots = len(edges) - 1
    streams, sizes = [], np.zeros(slots, dtype=np.int64)
    for slot, (first, end) in enumerate(zip(edges[:-1].tolist(), edges[1:].tolist(), strict=True)):
        # Slot by slot: taking rows of lists needs several times their memory.
        rows = table.take(order[first:end]).combine_chunks()
        streams.append(_stream(rows))
        if rows.num_rows:  # at least one byte, so that a slot with rows is told apart from one without
            sizes[slot] = max(1, rows.drop_columns([name for name in without if name in rows.column_names]).nbytes)
    index = np.zeros((slots, 2), dtype="<u8")
    index[:, 0] = np.cumsum([len(stream) for stream in streams])
    index[:, 1] = [xxhash.xxh3_64_intdigest(stream) for stream in streams]
    head = memoryview(_MAGIC + slots.to_bytes(8, "little") + index.tobytes())
    return [head, *(stream for stream in streams if len(stream))], sizes


def read_slots(store: Store, path: str, slots: int, first: int, end: int) -> list[pa.Table]:
    """Read the rows of slots `[first, end)` of a run. Raises DataError if it is damaged."""
    try:
        head = _read(store, path, 0, _HEAD_BYTES)
        if head[:8] != _MAGIC or int.from_bytes(head[8:], "little") != slots:
            raise ValueError(f"it is no run of {slots} slots")
        before = max(0, first - 1)
        index = np.frombuffer(_read(store, path, _HEAD_BYTES + 16 * before, 16 * (end - before)), dtype="<u8")
        stops, sums = index[0::2].tolist(), index[1::2].tolist()
        start = stops.pop(0) if first else 0
        sums = sums[1:] if first else sums
        data = _read(store, path, _HEAD_BYTES + 16 * slots + start, stops[-1] - start)
        found = []
        for number, (stop, expected) in enumerate(zip(stops, sums, strict=True), start=first):
            piece, data = data[: stop - start], data[stop - start :]
            if xxhash.xxh3_64_intdigest(piece) != expected:
                raise ValueError(f"slot {number} differs from its checksum")
            if len(piece):
                found.append(pa.ipc.open_stream(pa.py_buffer(piece)).read_all())
            start = stop
    except (OSError, ValueError, OverflowError, MemoryError, pa.ArrowException) as error:
        raise DataError(
            f"{store.url}/{path}: an intermediate file is missing or damaged ({error}). Remove the record of its part "
            f"({path.rpartition('-')[0]}.json) and go on with --resume: that part is then made again"
        ) from error
    return found


def _stream(rows: pa.Table) -> memoryview:
    if not rows.num_rows:
        return memoryview(b"")
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, rows.schema, options=pa.ipc.IpcWriteOptions(compression="lz4")) as writer:
        writer.write_table(rows)
    return memoryview(sink.getvalue())


def _read(store: Store, path: str, start: int, size: int) -> memoryview:
    if size < 0:
        raise ValueError("its index is out of order")
    out = memoryview(bytearray(size))
    got = store.read_into(path, start, out) if size else 0
    if got != size:
        raise ValueError(f"it is cut short: {got} bytes from {start} on, expected {size}")
    return out
