"""The second pass: a range of slots, out of all runs, into one Parquet file."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import xxhash

from elastictrain.data.preparing.part import HELPERS, Work, begin_unit, published, record_path
from elastictrain.data.preparing.plan import Range, row_group_rows
from elastictrain.data.preparing.rows import sorted_rows
from elastictrain.data.preparing.runs import read_slots
from elastictrain.data.preparing.transform import KEY, PLACE, TOKENS, TWIN

_CHUNK_BYTES = 8 << 20


def file_name(number: int) -> str:
    """Return the name of a file that is written."""
    return f"part-{number:06d}.parquet"


class FileMaker:
    """Makes files out of the runs of all parts."""

    def __init__(self, work: Work, runs: Sequence[str], files: Sequence[Range], schema: pa.Schema) -> None:
        self._work, self._store = work, work.store()
        self._runs, self._files, self._schema = runs, files, schema

    def make(self, number: int) -> dict[str, Any]:
        """Write a file and its record, and return the record. Raises DataError for a run that is damaged.

        The same bytes whoever makes it and how often, so a file that is there already is replaced by itself.
        """
        begin_unit(self._store, "file", number)
        table, duplicates = self._rows(number)
        settings = self._work.settings
        group = row_group_rows(table.num_rows, table.nbytes, settings.row_group_bytes)
        sink = pa.BufferOutputStream()
        pq.write_table(
            table,
            sink,
            row_group_size=group,
            compression=settings.compression,
            write_page_checksum=True,
            # Of text and tokens hardly two values are the same.
            use_dictionary=False,
        )
        content = memoryview(sink.getvalue())
        name = file_name(number)
        self._store.replace(name, _chunks(content))
        record = {
            "file": number,
            "name": name,
            "bytes": len(content),
            "rows": table.num_rows,
            "row_groups": -(-table.num_rows // group),
            "decoded_bytes": table.nbytes,
            "tokens": _tokens(table) if settings.tokenizer else None,
            "duplicates": duplicates,
            "xxh3": xxhash.xxh3_128_hexdigest(content),
        }
        return published(self._store, record_path("file", number), record)

    def close(self) -> None:
        """Nothing stays open."""

    def _rows(self, number: int) -> tuple[pa.Table, int]:
        first, end = self._files[number]
        pieces = [self._schema.empty_table()]
        for run in self._runs:
            pieces += read_slots(self._store, run, self._work.plan.slots, first, end)
        table = pa.concat_tables([piece.cast(self._schema) for piece in pieces])
        del pieces
        keys, places = (np.asarray(table.column(name)) for name in (KEY, PLACE))
        twins = np.asarray(table.column(TWIN)) if TWIN in table.column_names else None
        order, duplicates = sorted_rows(keys, twins, places)
        table = table.drop_columns([name for name in HELPERS if name in table.column_names])
        # In one piece: how the writer cuts pages depends on chunks, and they on how many parts there were.
        return table.take(order).combine_chunks(), duplicates


def _tokens(table: pa.Table) -> int:
    return int(pc.sum(pc.list_value_length(table.column(TOKENS))).as_py() or 0)


def _chunks(content: memoryview) -> Iterator[memoryview]:
    for start in range(0, len(content), _CHUNK_BYTES):
        yield content[start : start + _CHUNK_BYTES]
