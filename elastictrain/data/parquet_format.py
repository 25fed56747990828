"""Parquet files as blocks: one row group is one block, read in place."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from elastictrain.data.columns import as_pairs, select_columns, show_schema
from elastictrain.data.files import FileSet
from elastictrain.data.index import BlockTable, Progress, checksum_of
from elastictrain.errors import DataError

_MAX_OPEN_FILES = 16
_MAGIC = b"PAR1"


class ParquetFiles:
    """Row groups of Parquet files with one schema.

    Opening reads the footers only. Raises DataError: a file is no Parquet file or is cut short, a column is
    missing or has the wrong type, a file's schema differs from the first one's.
    """

    def __init__(
        self,
        files: FileSet,
        *,
        text_column: str | None,
        columns: tuple[str, ...] | None,
        progress: Progress | None = None,
    ) -> None:
        self._files = files
        self._open: OrderedDict[int, pq.ParquetFile] = OrderedDict()
        self._footers: list[int] = []
        expected: pa.Schema | None = None
        entries: list[tuple[int, int, int, int, int, int]] = []
        for number, file in enumerate(files.files):
            parquet = self._parquet(number)
            schema = _selected(parquet.schema_arrow, file.path, text_column, columns, expected)
            if expected is None:
                expected = schema
            elif as_pairs(schema) != as_pairs(expected):
                raise _schema_differs(file.path, schema, expected, files.files[0].path)
            for group in range(parquet.metadata.num_row_groups):
                meta = parquet.metadata.row_group(group)
                entries.append((number, group, meta.num_rows, 0, meta.total_byte_size, self._footers[number]))
            if progress:
                progress("reading Parquet footers", number + 1, len(files.files))
        assert expected is not None  # find_files returns at least one file
        self.schema = as_pairs(expected)
        self.blocks = BlockTable.of(entries)
        self._names = [name for name, _ in self.schema]

    def _parquet(self, number: int) -> pq.ParquetFile:
        parquet = self._open.pop(number, None)
        if parquet is None:
            path = self._files.files[number].path
            handle = self._files.open(number)
            footer = _footer_checksum(handle, self._files.files[number].size_bytes, path)
            if number == len(self._footers):
                self._footers.append(footer)
            elif footer != self._footers[number]:
                raise DataError(
                    f"{path}: changed since the run opened it (its footer is another one). Data must not be "
                    "written to while a run reads them: restore the file, or write to a new data.path"
                )
            try:
                parquet = pq.ParquetFile(handle, page_checksum_verification=True)
            except (pa.ArrowException, OSError) as error:
                raise _corrupt(path, "its footer cannot be read", error) from error
        self._open[number] = parquet
        if len(self._open) > _MAX_OPEN_FILES:
            _, oldest = self._open.popitem(last=False)
            oldest.close(force=True)
        return parquet

    def read(self, block: int) -> pa.Table:
        """Return the columns of a row group. Raises DataError if it is corrupt or has changed."""
        group = int(self.blocks.number[block])
        parquet = self._parquet(int(self.blocks.file[block]))
        path = self._files.files[int(self.blocks.file[block])].path
        try:
            # One thread: decoding runs beside training, whose threads are part of the job's numerics.
            table = parquet.read_row_group(group, columns=self._names, use_threads=False)
        except (pa.ArrowException, OSError) as error:
            raise _corrupt(path, f"row group {group} cannot be decoded", error) from error
        if table.num_rows != int(self.blocks.rows[block]):
            raise DataError(
                f"{path}: row group {group} holds {table.num_rows} rows, expected {self.blocks.rows[block]}. "
                "The file is corrupt or has changed since the run opened it"
            )
        return table.select(self._names)

    def where(self, block: int) -> str:
        """Name the file and the row group."""
        return f"{self._files.files[int(self.blocks.file[block])].path}, row group {self.blocks.number[block]}"

    def close(self) -> None:
        """Close all files."""
        while self._open:
            self._open.popitem()[1].close(force=True)


def _selected(
    schema: pa.Schema,
    path: str,
    text_column: str | None,
    columns: tuple[str, ...] | None,
    expected: pa.Schema | None,
) -> pa.Schema:
    """Select a file's columns; from the second file on, a missing column is a schema that differs."""
    if expected is not None and text_column is None:
        names = [name for name in columns or schema.names if name in schema.names]
        return pa.schema([schema.field(name) for name in names])
    return select_columns(schema, path, text_column=text_column, columns=columns)


def _schema_differs(path: str, got: pa.Schema, expected: pa.Schema, first: str) -> DataError:
    return DataError(
        f"{path}: its columns differ from those of the first file. Got {show_schema(as_pairs(got))}; expected "
        f"{show_schema(as_pairs(expected))}, as in {first}. Write the file again with that schema, or set "
        "data.columns or data.path so that all files agree"
    )


def _corrupt(path: str, what: str, error: BaseException) -> DataError:
    return DataError(
        f"{path}: corrupt Parquet file: {what} ({error}). Write or copy the file again, or take it out of data.path"
    )


def _footer_checksum(handle: Any, size_bytes: int, path: str) -> int:
    """Return the checksum of a Parquet footer; it holds schema, sizes, offsets and statistics."""
    if size_bytes < 12:
        raise DataError(
            f"{path}: an empty or cut-off file of {size_bytes} bytes; expected a Parquet file. "
            "Write it again, or take it out of data.path"
        )
    handle.seek(size_bytes - 8)
    end = handle.read(8)
    length = int.from_bytes(end[:4], "little")
    if end[4:] != _MAGIC or length > size_bytes - 12:
        raise DataError(
            f"{path}: not a whole Parquet file: it does not end with a footer (truncated, or of another format). "
            "Write or copy it again, take it out of data.path, or set data.kind to its format"
        )
    handle.seek(size_bytes - 8 - length)
    checksum = checksum_of(handle.read(length))
    handle.seek(0)
    return checksum
