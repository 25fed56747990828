"""CSV as blocks: byte ranges of `rows_per_block` records; the first record of every file names the columns."""

from __future__ import annotations

import csv
import io
from typing import Any

import pyarrow as pa
import pyarrow.csv as pac

from elastictrain.data.byte_format import BOM, CHUNK_BYTES, ByteBlocks
from elastictrain.data.columns import as_pairs, nearest, show_schema
from elastictrain.data.files import FileSet
from elastictrain.errors import DataError, DataMismatch

_HEADER_BYTES = 16 << 10
"""Read at once when the first record is looked for."""


class CsvRecords(ByteBlocks):
    """Blocks of CSV files (RFC 4180: commas, double quotes; records may hold quoted newlines).

    Types are inferred over all files, numbers becoming as wide as they must; empty fields are nulls, but "" in a
    column of strings.
    """

    noun = "CSV records"

    def __init__(self, files: FileSet, **settings: Any) -> None:
        super().__init__(files, **settings)
        self._known_names: dict[int, list[str]] = {}  # by number of the file: every block of it needs them

    def ranges(self, number: int) -> list[tuple[int, int]]:
        """Cut a file after every `rows_per_block`-th record, the header not counted."""
        header = len(self._header(number))
        found = self._lines(number, b'"')
        return [(max(start, header), stop) for start, stop in found if stop > header]

    def check_columns(self, number: int) -> None:
        """Raise DataError if the header does not name the columns."""
        names = self._names(number)
        for name in [self._text_column] if self._text_column else list(self._columns or ()):
            if name not in names:
                setting = "data.text_column" if self._text_column else "data.columns"
                raise DataMismatch(
                    f"{self._files.files[number].path}: {setting} names {name!r}{nearest(str(name), names)}, which is "
                    f"not there. The columns are: {', '.join(names)}"
                )

    def parse(self, content: bytes, number: int, start: int, schema: pa.Schema | None) -> pa.Table:
        """See `ByteBlocks`."""
        names = self._names(number)
        if not content.strip():
            return (schema or pa.schema([])).empty_table()
        wanted = [field.name for field in schema] if schema else list(self._columns or ())
        try:
            return pac.read_csv(
                pa.BufferReader(content),
                read_options=pac.ReadOptions(use_threads=False, block_size=len(content) + 1, column_names=names),
                parse_options=pac.ParseOptions(newlines_in_values=True),
                convert_options=pac.ConvertOptions(
                    include_columns=wanted or None,
                    column_types=schema,
                    strings_can_be_null=False,
                    check_utf8=True,
                ),
            )
        except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
            raise DataError(
                f"{self._files.files[number].path}, bytes {start} to {start + len(content)}: not valid CSV ({error}). "
                f"Expected UTF-8 records of {len(names)} fields ({', '.join(names)}). Mend the file, take it out of "
                "data.path, or set data.on_corrupt: skip"
            ) from error

    def merge(self, schema: pa.Schema, other: pa.Schema, path: str) -> pa.Schema:
        """Return the schema of both; numbers may become wider, but names must be the same."""
        if schema.names != other.names:
            return super().merge(schema, other, path)
        try:
            return pa.unify_schemas([schema, other], promote_options="permissive")
        except pa.ArrowException as error:
            raise DataMismatch(
                f"{path}: its columns do not fit those of the records before ({error}). Got "
                f"{show_schema(as_pairs(other))}; expected {show_schema(as_pairs(schema))}. "
                "Every column must have one type in all files"
            ) from error

    def _header(self, number: int) -> bytes:
        found, inside = bytearray(), False
        with self._files.open(number) as handle:
            while len(found) < CHUNK_BYTES and (piece := handle.read(_HEADER_BYTES)):
                for place, byte in enumerate(piece, start=len(found) + 1):
                    inside ^= byte == 34
                    if byte == 10 and not inside:
                        return bytes(found + piece)[:place]
                found += piece
        return bytes(found)

    def _names(self, number: int) -> list[str]:
        names = self._known_names.get(number)
        if names is None:
            names = self._known_names[number] = self._read_names(number)
        return names

    def _read_names(self, number: int) -> list[str]:
        header = self._header(number).removeprefix(BOM)
        try:
            rows = list(csv.reader(io.StringIO(header.decode("utf-8"), newline="")))
        except (UnicodeDecodeError, csv.Error) as error:
            raise DataError(
                f"{self._files.files[number].path}: its first record, which must name the columns, cannot be read "
                f"({error}). Expected UTF-8 CSV; set data.kind to the file's format"
            ) from error
        return rows[0] if rows else []
