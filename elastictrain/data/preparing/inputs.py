"""What is prepared: blocks of any format that `elastictrain.data` reads, with columns of any type.

Training reads either documents or numbers; a filter wants more, such as a language or a score. So here every column may
be had. The driver lists files and finds blocks (Parquet: by footers; else by a pass for the borders, which parses
nothing); tasks take that index over and read blocks.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from elastictrain.data.byte_format import ByteBlocks
from elastictrain.data.columns import as_pairs, is_text, nearest, show_schema
from elastictrain.data.files import FileSet, find_files
from elastictrain.data.formats import byte_blocks
from elastictrain.data.index import NEVER_A_HOLE, BlockTable, Hole, Progress
from elastictrain.data.parquet_format import ParquetFiles
from elastictrain.data_settings import Data
from elastictrain.errors import ConfigError, DataError
from elastictrain.prepare_settings import Preparation


@dataclass(frozen=True)
class InputIndex:
    """Where the blocks are; what a task needs to read them. `arrays` and `notes`: of Parquet."""

    files: FileSet
    table: BlockTable
    schema: pa.Schema
    holes: tuple[Hole, ...]
    arrays: Mapping[str, npt.NDArray[Any]]
    notes: Mapping[str, Any]

    @property
    def block_bytes(self) -> npt.NDArray[np.int64]:
        """Of each block: decoded (Parquet), or in its file; shape [blocks]."""
        return self.table.stop - self.table.start


class Inputs:
    """The blocks of an input; not thread-safe. `close` it."""

    def __init__(self, settings: Preparation, index: InputIndex) -> None:
        self.index, self.schema = index, index.schema
        self._blocks: ParquetFiles | ByteBlocks
        if settings.kind == "parquet":
            self._blocks = _parquet(settings, index.files)
            self._blocks.restore(dict(index.arrays), dict(index.notes))
        else:
            self._blocks = byte_blocks(_spec(settings), index.files)
            self._blocks.blocks = index.table

    def read(self, block: int) -> pa.Table:
        """Return a block's rows, with the input's columns and types. Raises DataError that names the place."""
        if isinstance(self._blocks, ParquetFiles):
            return conform(self._blocks.read(block), self.schema, self.where(block))
        table = self.index.table
        number, start, stop = (int(column[block]) for column in (table.file, table.start, table.stop))
        found = _parse(self._blocks, self.index.files.files[number].path, (number, start, stop), self.schema)
        return conform(found, self.schema, self.where(block)) if found.num_rows else self.schema.empty_table()

    def where(self, block: int) -> str:
        """Name the file and the row group, or the bytes."""
        return self._blocks.where(block)

    def name(self, block: int) -> tuple[str, int]:
        """Return the name of the block's file below the input, and its number in it."""
        table = self.index.table
        return self.index.files.files[int(table.file[block])].name, int(table.number[block])

    def close(self) -> None:
        """Close all files."""
        self._blocks.close()


def open_input(settings: Preparation, progress: Progress | None = None) -> InputIndex:
    """List the files and find their blocks. Raises DataError: nothing there, not readable, columns that are missing."""
    files = find_files(settings.path, settings.kind, settings.storage_options)
    if settings.kind == "parquet":
        parquet = _parquet(settings, files)
        try:
            parquet.index(progress)
            arrays, notes = parquet.save()
            first = pa.ipc.read_schema(pa.py_buffer(bytes.fromhex(notes["schema"])))
            schema = settle_schema(settings, first, files.files[0].path)
            return InputIndex(files, parquet.blocks, schema, parquet.holes, arrays, notes)
        finally:
            parquet.close()
    blocks = byte_blocks(_spec(settings), files)
    table, holes = _find_blocks(settings, blocks, files, progress)
    found, path = _first_schema(settings, blocks, files, table)
    return InputIndex(files, table, settle_schema(settings, found, path), tuple(holes), {}, {})


def settle_schema(settings: Preparation, found: pa.Schema, path: str) -> pa.Schema:
    """Return the columns that are read, with the types in which they are handed on.

    Dictionaries become their values. Documents whose type the first rows do not tell are strings. Raises DataError.
    """
    types = settings.columns if isinstance(settings.columns, dict) else {}
    fields = []
    for name in settings.column_names or found.names:
        if name not in found.names:
            setting = "text_column" if name == settings.text_column else "columns"
            raise DataError(
                f"{path}: {setting} names {name!r}{nearest(name, found.names)}, which is not there. The columns are: "
                f"{show_schema(as_pairs(found))}"
            )
        kind = found.field(name).type
        if name in types:
            kind = _type_named(name, types[name])
        elif pa.types.is_dictionary(kind):
            kind = kind.value_type
        elif pa.types.is_null(kind) or (name == settings.text_column and settings.kind == "csv"):
            kind = pa.string()
        if name == settings.text_column and not is_text(kind):
            raise DataError(f"{path}: text_column {name!r} has type {kind}; expected strings or bytes")
        fields.append(pa.field(name, kind))
    return pa.schema(fields)


def conform(table: pa.Table, schema: pa.Schema, where: str) -> pa.Table:
    """Return the table with the columns and types of `schema`. Raises DataError that begins with `where`."""
    columns = []
    for field in schema:
        if field.name not in table.column_names:
            raise DataError(
                f"{where}: there is no column {field.name!r}; expected {show_schema(as_pairs(schema))}, got "
                f"{show_schema(as_pairs(table.schema))}"
            )
        column = table.column(field.name)
        if pa.types.is_dictionary(column.type):
            column = pa.chunked_array([one.dictionary_decode() for one in column.chunks], column.type.value_type)
        try:
            columns.append(column if column.type == field.type else column.cast(field.type))
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
            raise DataError(
                f"{where}: column {field.name!r} has type {column.type} and cannot become {field.type} ({error}). All "
                "rows need one type; name it in columns, as in columns: {score: double}"
            ) from error
    return pa.table(columns, schema=schema)


def _type_named(name: str, kind: str) -> pa.DataType:
    try:
        return pa.type_for_alias(kind)
    except ValueError:
        raise ConfigError(
            f"columns.{name}: {kind!r} is no Arrow type; expected one such as string, int64, double or bool"
        ) from None


class _AnyColumns(ParquetFiles):
    """Parquet without the rules of training about types."""

    def _select(self, schema: pa.Schema, path: str, expected: pa.Schema | None) -> pa.Schema:
        names = list(self._columns or schema.names)
        missing = [name for name in names if name not in schema.names]
        if missing and expected is None:
            raise DataError(
                f"{path}: text_column or columns name {missing[0]!r}{nearest(missing[0], schema.names)}, which is not "
                f"there. The columns are: {show_schema(as_pairs(schema))}"
            )
        return pa.schema([schema.field(name) for name in names if name in schema.names])

    def _check_row_groups(self, progress: Progress | None) -> None:
        """Whoever prepares a row group reads it."""
        del progress


def _parquet(settings: Preparation, files: FileSet) -> ParquetFiles:
    return _AnyColumns(files, text_column=None, columns=settings.column_names, on_corrupt=settings.on_corrupt)


def _spec(settings: Preparation) -> Data:
    """The settings as formats know them, in table mode: it is that mode which hands on every column."""
    names = ("kind", "path", "rows_per_block", "document", "on_corrupt", "max_document_bytes", "storage_options")
    same = {name: getattr(settings, name) for name in names}
    words = {"text_column": "text", "sequence_length": 1} if settings.kind == "text" else {}
    # A copy is not validated: table mode of raw text is of no use in training.
    return Data(**same, **words).model_copy(update={"text_column": None, "columns": settings.column_names})


def _find_blocks(
    settings: Preparation, blocks: ByteBlocks, files: FileSet, progress: Progress | None
) -> tuple[BlockTable, list[Hole]]:
    entries: list[tuple[int, int, int, int, int, int]] = []
    holes: list[Hole] = []
    for number, file in enumerate(files.files):
        try:
            found = list(blocks.ranges(number))
            if settings.kind == "csv":
                blocks.check_columns(number)
        except NEVER_A_HOLE:
            raise
        except DataError as error:
            if settings.on_corrupt != "skip":
                raise
            holes.append(Hole(file.name, -1, str(error)))
            continue
        entries += [(number, block, 0, start, stop, 0) for block, (start, stop) in enumerate(found)]
        if progress:
            progress("looking for blocks", number + 1, len(files.files))
    return BlockTable.of(entries), holes


def _first_schema(
    settings: Preparation, blocks: ByteBlocks, files: FileSet, table: BlockTable
) -> tuple[pa.Schema, str]:
    """The columns of the first block that can be read and has rows, and the path of its file."""
    for number, start, stop in zip(table.file.tolist(), table.start.tolist(), table.stop.tolist(), strict=True):
        try:
            found = _parse(blocks, files.files[number].path, (number, start, stop), None)
        except NEVER_A_HOLE:
            raise
        except DataError:
            if settings.on_corrupt != "skip":
                raise
            continue
        if found.num_rows:
            return found.schema, files.files[number].path
    raise DataError(f"path: no rows in {len(files.files)} file(s), the first being {files.files[0].path}")


def _parse(blocks: ByteBlocks, path: str, place: tuple[int, int, int], schema: pa.Schema | None) -> pa.Table:
    number, start, stop = place
    try:
        return blocks.parse(blocks.bytes_of(number, start, stop), number, start, schema)
    except KeyError as error:  # Arrow files know their columns themselves
        raise DataError(f"{path}: text_column or columns name a column that is not there ({error})") from error
