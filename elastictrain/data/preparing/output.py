"""The second pass: a range of slots, out of all runs, into one Parquet file."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import xxhash

from elastictrain.data.preparing.near import is_among
from elastictrain.data.preparing.part import HELPERS, Work, begin_unit, published, record_path
from elastictrain.data.preparing.plan import Range, row_group_rows
from elastictrain.data.preparing.rows import Words, sorted_rows
from elastictrain.data.preparing.runs import read_slots
from elastictrain.data.preparing.transform import KEY, PLACE, TOKENS, TWIN

_CHUNK_BYTES = 8 << 20


def file_name(number: int) -> str:
    """Return the name of a file that is written."""
    return f"part-{number:06d}.parquet"


class FileMaker:
    """Makes files out of the runs of all parts."""

    def __init__(
        self, work: Work, runs: Sequence[str], files: Sequence[Range], schema: pa.Schema, gone: Words | None = None
    ) -> None:
        """`gone`: places that are left out, ascending."""
        work.check()
        self._gone = gone
        self._work, self._store = work, work.store()
        self._runs, self._files, self._schema = runs, files, schema

    def make(self, number: int) -> dict[str, Any]:
        """Write a file and its record, and return the record. Raises DataError for a run that is damaged.

        The same bytes whoever makes it and how often, so a file that is there already is replaced by itself.
        """
        begin_unit(self._store, "file", number)
        table, order, duplicates, near = self._rows(number)
        settings = self._work.settings
        if not len(order):  # all of it was nearly the same as what is elsewhere
            nothing = {"file": number, "name": file_name(number), "bytes": 0, "rows": 0, "row_groups": 0,
                       "decoded_bytes": 0, "tokens": 0 if settings.tokenizer else None, "duplicates": duplicates,
                       "near_duplicates": near, "xxh3": ""}  # fmt: skip
            return published(self._store, record_path("file", number), nothing)
        size_bytes = table.nbytes * len(order) // table.num_rows  # without those that are left out
        group = row_group_rows(len(order), size_bytes, settings.row_group_bytes)
        sink, tokens, decoded = pa.BufferOutputStream(), 0, 0
        with pq.ParquetWriter(
            sink,
            table.schema,
            compression=settings.compression,
            write_page_checksum=True,
            use_dictionary=False,  # of text and tokens hardly two values are the same
        ) as writer:
            # Group by group: taking rows of lists needs several times their memory.
            for first in range(0, len(order), group):
                rows = table.take(order[first : first + group]).combine_chunks()
                writer.write_table(rows, row_group_size=group)
                decoded += rows.nbytes
                tokens += _tokens(rows) if settings.tokenizer else 0
        del table
        content = memoryview(sink.getvalue())
        name = file_name(number)
        self._store.replace(name, _chunks(content))
        record = {
            "file": number,
            "name": name,
            "bytes": len(content),
            "rows": len(order),
            "row_groups": -(-len(order) // group),
            "decoded_bytes": decoded,
            "tokens": tokens if settings.tokenizer else None,
            "duplicates": duplicates,
            "near_duplicates": near,
            "xxh3": xxhash.xxh3_128_hexdigest(content),
        }
        return published(self._store, record_path("file", number), record)

    def close(self) -> None:
        """Nothing stays open."""

    def _rows(self, number: int) -> tuple[pa.Table, npt.NDArray[np.int64], int, int]:
        """The rows of a file, in which order they are written, and how many are not, as equal and as near ones."""
        first, end = self._files[number]
        pieces = [self._schema.empty_table()]
        for run in self._runs:
            pieces += read_slots(self._store, run, self._work.plan.slots, first, end)
        # In one piece: taking rows out of many joins them each time.
        table = pa.concat_tables([piece.cast(self._schema) for piece in pieces]).combine_chunks()
        del pieces
        keys, places = (np.asarray(table.column(name)) for name in (KEY, PLACE))
        twins = np.asarray(table.column(TWIN)) if TWIN in table.column_names else None
        order, duplicates = sorted_rows(keys, twins, places)
        near = 0
        if self._gone is not None:
            goes = is_among(places[order], self._gone)
            order, near = order[~goes], int(goes.sum())
        table = table.drop_columns([name for name in HELPERS if name in table.column_names])
        return table, order, duplicates, near


def _tokens(table: pa.Table) -> int:
    return int(pc.sum(pc.list_value_length(table.column(TOKENS))).as_py() or 0)


def _chunks(content: memoryview) -> Iterator[memoryview]:
    for start in range(0, len(content), _CHUNK_BYTES):
        yield content[start : start + _CHUNK_BYTES]
