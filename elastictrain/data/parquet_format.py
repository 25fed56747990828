"""Parquet files as blocks: one row group is one block, read in place."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from elastictrain.data.columns import Schema, as_pairs, select_columns, show_schema
from elastictrain.data.files import FileSet
from elastictrain.data.index import NEVER_A_HOLE, BlockTable, Hole, Progress, checksum_of
from elastictrain.data.ranges import FetchedFile, Range, coalesced
from elastictrain.errors import DataError, DataMismatch, NoSamples

_MAX_OPEN_FILES = 16
_TAIL_BYTES = 64 << 10
"""Read at once at a file's end: most footers are in it, so that a file is opened with one request."""
_MAGIC = b"PAR1"


@dataclass(frozen=True, slots=True)
class _File:
    """An open file. `fetched`: of a remote one, which is asked for the bytes of whole row groups."""

    parquet: pq.ParquetFile
    fetched: FetchedFile | None = None

    def read(self, group: int, names: list[str]) -> pa.Table:
        """Read columns of a row group. Raises what Arrow raises; StoreFailed."""
        if self.fetched is not None:
            self.fetched.fetch(coalesced(_column_ranges(self.parquet.metadata.row_group(group), names)))
        try:
            # One thread: decoding runs beside training, whose threads are part of the job's numerics.
            return self.parquet.read_row_group(group, columns=names, use_threads=False)
        finally:
            if self.fetched is not None:
                self.fetched.forget()

    def close(self) -> None:
        self.parquet.close(force=True)


class ParquetFiles:
    """Row groups of Parquet files with one schema; `index()` or `restore()` must run before `read`.

    `read` may be called by several threads at once: each has an open file to itself while it reads.
    """

    def __init__(
        self,
        files: FileSet,
        *,
        text_column: str | None,
        columns: tuple[str, ...] | None,
        on_corrupt: str = "stop",
    ) -> None:
        self._files, self._on_corrupt = files, on_corrupt
        self._text_column, self._columns = text_column, columns
        self._lock = threading.Lock()  # of `_open`
        self._open: OrderedDict[int, _File] = OrderedDict()  # that nobody reads just now, the last used last
        self._footers: list[int] = []
        self.holes: tuple[Hole, ...] = ()
        self.blocks = BlockTable.of([])
        self.schema: Schema = ()

    def index(self, progress: Progress | None = None) -> None:
        """Read the footers; with `data.on_corrupt: skip`, also all row groups once.

        Raises DataError: a file is no Parquet file or is cut short, a column is missing or has the wrong type, a
        file's schema differs from the first one's.
        """
        expected: pa.Schema | None = None
        entries: list[tuple[int, int, int, int, int, int]] = []
        first = ""
        for number, file in enumerate(self._files.files):
            parquet = self._parquet_or_hole(number)
            if parquet is None:
                continue
            schema = self._select(parquet.schema_arrow, file.path, expected)
            if expected is None:
                expected, first = schema, file.path
            elif as_pairs(schema) != as_pairs(expected):
                raise _schema_differs(file.path, schema, expected, first)
            for group in range(parquet.metadata.num_row_groups):
                meta = parquet.metadata.row_group(group)
                entries.append((number, group, meta.num_rows, 0, meta.total_byte_size, self._footers[number]))
            if progress:
                progress("reading Parquet footers", number + 1, len(self._files.files))
        if expected is None:
            raise NoSamples(f"data.path: no file can be read; {self.holes[0].file}: {self.holes[0].why}")
        self._take(expected, BlockTable.of(entries))
        if self._on_corrupt == "skip":
            self._check_row_groups(progress)

    def _select(self, schema: pa.Schema, path: str, expected: pa.Schema | None) -> pa.Schema:
        return _selected(schema, path, self._text_column, self._columns, expected)

    def save(self) -> tuple[dict[str, npt.NDArray[Any]], dict[str, Any]]:
        """Return what `restore` takes."""
        arrays = {f"blocks_{name}": value for name, value in vars(self.blocks).items()}
        serialised = self._arrow_schema.serialize().to_pybytes().hex()
        notes = {"schema": serialised, "holes": [list(hole) for hole in self.holes]}
        return arrays | {"footers": np.asarray(self._footers, dtype=np.uint64)}, notes

    def restore(self, arrays: dict[str, npt.NDArray[Any]], notes: dict[str, Any]) -> None:
        """Take over an index that `save` gave. A file's footer is compared with it when the file is first read."""
        self._footers = [int(footer) for footer in arrays["footers"]]
        self.holes = tuple(Hole(*hole) for hole in notes["holes"])
        schema = pa.ipc.read_schema(pa.py_buffer(bytes.fromhex(notes["schema"])))
        self._take(schema, BlockTable(**{name: arrays[f"blocks_{name}"] for name in BlockTable.__dataclass_fields__}))

    def _take(self, schema: pa.Schema, blocks: BlockTable) -> None:
        self._arrow_schema, self.schema, self.blocks = schema, as_pairs(schema), blocks
        self._names = [name for name, _ in self.schema]

    def _check_row_groups(self, progress: Progress | None) -> None:
        """Those that cannot be read have no rows from then on."""
        rows, found = self.blocks.rows.copy(), list(self.holes)
        for block in range(len(rows)):
            try:
                self.read(block).validate(full=True)
            except NEVER_A_HOLE:
                raise
            except (DataError, pa.ArrowException) as error:
                rows[block] = 0
                name = self._files.files[int(self.blocks.file[block])].name
                found.append(Hole(name, int(self.blocks.number[block]), str(error)))
            if progress:
                progress("checking row groups", block + 1, len(rows))
        self.blocks, self.holes = replace(self.blocks, rows=rows), tuple(found)

    def _parquet_or_hole(self, number: int) -> pq.ParquetFile | None:
        try:
            with self._parquet(number) as file:
                return file.parquet
        except NEVER_A_HOLE:
            raise
        except DataError as error:
            if self._on_corrupt != "skip":
                raise
            self.holes += (Hole(self._files.files[number].name, -1, str(error)),)
            if len(self._footers) == number:
                self._footers.append(0)
            return None

    @contextmanager
    def _parquet(self, number: int) -> Iterator[_File]:
        """Lend a file that is open, or open it; nobody else has it meanwhile, and it stays open."""
        with self._lock:
            file = self._open.pop(number, None)
        if file is None:
            file = self._open_file(number)
        try:
            yield file
        finally:
            with self._lock:
                surplus = [self._open.pop(number)] if number in self._open else []
                self._open[number] = file
                if len(self._open) > _MAX_OPEN_FILES:
                    surplus.append(self._open.popitem(last=False)[1])
            for one in surplus:
                one.close()

    def _open_file(self, number: int) -> _File:
        path = self._files.files[number].path
        handle = self._files.open(number)
        content = _footer(handle, self._files.files[number].size_bytes, path)
        footer = checksum_of(content)
        if number == len(self._footers):
            self._footers.append(footer)
        elif footer != self._footers[number]:
            raise DataError(
                f"{path}: changed since the run opened it (its footer is another one). Data must not be "
                "written to while a run reads them: restore the file, or write to a new data.path"
            )
        try:
            if self._files.is_local:  # read without the interpreter: a Python file would take its lock
                handle.close()
                return _File(pq.ParquetFile(pa.OSFile(path), page_checksum_verification=True))
            whole = b"".join([_MAGIC, content, len(content).to_bytes(4, "little"), _MAGIC])
            metadata = pq.read_metadata(pa.BufferReader(whole))  # the footer is not asked for again
            fetched = FetchedFile(handle)
            return _File(pq.ParquetFile(fetched, metadata=metadata, page_checksum_verification=True), fetched)
        except (pa.ArrowException, OSError) as error:
            raise _corrupt(path, "its footer cannot be read", error) from error

    def read(self, block: int) -> pa.Table:
        """Return the columns of a row group. Raises DataError if it is corrupt or has changed."""
        if not self.blocks.rows[block]:
            return self._arrow_schema.empty_table()
        group = int(self.blocks.number[block])
        path = self._files.files[int(self.blocks.file[block])].path
        with self._parquet(int(self.blocks.file[block])) as file:
            try:
                table = file.read(group, self._names)
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
        with self._lock:
            surplus = list(self._open.values())
            self._open.clear()
        for file in surplus:
            file.close()


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
    return DataMismatch(
        f"{path}: its columns differ from those of the first file. Got {show_schema(as_pairs(got))}; expected "
        f"{show_schema(as_pairs(expected))}, as in {first}. Write the file again with that schema, or set "
        "data.columns or data.path so that all files agree"
    )


def _corrupt(path: str, what: str, error: BaseException) -> DataError:
    return DataError(
        f"{path}: corrupt Parquet file: {what} ({error}). Write or copy the file again, or take it out of data.path"
    )


def _column_ranges(group: Any, names: list[str]) -> list[Range]:
    """Where the column chunks lie that a row group's columns are read from."""
    found = []
    for number in range(group.num_columns):
        chunk = group.column(number)
        if any(chunk.path_in_schema == name or chunk.path_in_schema.startswith(f"{name}.") for name in names):
            dictionary = chunk.dictionary_page_offset
            start = chunk.data_page_offset if dictionary is None else min(dictionary, chunk.data_page_offset)
            found.append((start, start + chunk.total_compressed_size))
    return found


def _footer(handle: Any, size_bytes: int, path: str) -> bytes:
    """Return a Parquet footer; it holds schema, sizes, offsets and statistics."""
    if size_bytes < 12:
        raise DataError(
            f"{path}: an empty or cut-off file of {size_bytes} bytes; expected a Parquet file. "
            "Write it again, or take it out of data.path"
        )
    tail_bytes = min(size_bytes, _TAIL_BYTES)
    handle.seek(size_bytes - tail_bytes)
    tail: bytes = handle.read(tail_bytes)
    length = int.from_bytes(tail[-8:-4], "little")
    if tail[-4:] != _MAGIC or length > size_bytes - 12:
        raise DataError(
            f"{path}: not a whole Parquet file: it does not end with a footer (truncated, or of another format). "
            "Write or copy it again, take it out of data.path, or set data.kind to its format"
        )
    if length > len(tail) - 8:
        handle.seek(size_bytes - 8 - length)
        return bytes(handle.read(length))
    return tail[len(tail) - 8 - length : len(tail) - 8]
