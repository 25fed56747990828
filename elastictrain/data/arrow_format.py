"""Arrow IPC as blocks: one record batch is one block.

Files (Feather V2) and streams (what Hugging Face's `datasets` saves) alike.
"""

from __future__ import annotations

from typing import Any

import pyarrow as pa

from elastictrain.data.byte_format import ByteBlocks
from elastictrain.data.columns import select_columns
from elastictrain.data.files import WALK_BYTES, FileSet
from elastictrain.errors import DataError

_MAGIC = b"ARROW1"
_PREFIX = 8  # the magic, padded; the messages of a file are those of a stream behind it
_END_OF_STREAM = b"\xff\xff\xff\xff\x00\x00\x00\x00"


class ArrowBatches(ByteBlocks):
    """Record batches of Arrow IPC files and streams with one schema; compressed ones too."""

    noun = "record batches"

    def __init__(self, files: FileSet, **settings: Any) -> None:
        super().__init__(files, **settings)
        self._schemas: dict[int, pa.Schema] = {}  # by number of the file

    def ranges(self, number: int) -> list[tuple[int, int]]:
        """Walk over the messages; those of record batches are the blocks."""
        path, size = self._files.files[number].path, self._files.files[number].size_bytes
        found: list[tuple[int, int]] = []
        with self._files.open(number, WALK_BYTES) as handle:
            is_file = handle.read(len(_MAGIC)) == _MAGIC
            handle.seek(max(0, size - 8))
            end: bytes = handle.read(8)
            if is_file != end.endswith(_MAGIC) or not (is_file or end == _END_OF_STREAM):
                raise _corrupt(path, "it has no end (truncated, or of another format)")
            handle.seek(_PREFIX if is_file else 0)
            source = pa.PythonFile(handle, mode="r")
            try:
                reader = pa.ipc.MessageReader.open_stream(source)
                self._schemas[number] = pa.ipc.read_schema(reader.read_next_message())
                start = source.tell()
                for message in reader:
                    stop = source.tell()
                    if message.type == "record batch":
                        found.append((start, stop))
                    start = stop
            except (pa.ArrowException, OSError, StopIteration) as error:
                raise _corrupt(path, f"record batch {len(found)} cannot be read ({error})") from error
        return found

    def check_columns(self, number: int) -> None:
        """Raise DataError if the columns are missing, cannot be used, or are not those of the files before."""
        path, schema = self._files.files[number].path, self._schemas.get(number)
        if schema is None:  # a hole
            return
        encoded = [field.name for field in schema if pa.types.is_dictionary(field.type)]
        if encoded:
            raise DataError(
                f"{path}: column {encoded[0]!r} is dictionary-encoded ({schema.field(encoded[0]).type}); in Arrow "
                "files its values lie elsewhere than its rows. Cast it to its values, or write Parquet (data.kind)"
            )
        selected = select_columns(schema, path, text_column=self._text_column, columns=self._columns)
        if self._text_column is None:
            first = next(iter(self._schemas))
            self.merge(self._select(self._schemas[first]), selected, path)

    def parse(self, content: bytes, number: int, start: int, schema: pa.Schema | None) -> pa.Table:
        """See `ByteBlocks`."""
        del schema  # the file's own is known
        known = self._schemas.get(number)
        if known is None:  # the index came from the cache
            known = self._schemas[number] = self._read_schema(number)
        try:
            batch = pa.ipc.read_record_batch(pa.ipc.read_message(pa.py_buffer(content)), known)
            table = pa.Table.from_batches([batch]).select(self._select(known).names)
            table.validate(full=True)
        except (pa.ArrowException, OSError) as error:
            place = f"the record batch at bytes {start} to {start + len(content)} cannot be read ({error})"
            raise _corrupt(self._files.files[number].path, place) from error
        return table

    def _select(self, schema: pa.Schema) -> pa.Schema:
        names = [self._text_column] if self._text_column else list(self._columns or schema.names)
        return pa.schema([schema.field(name) for name in names])

    def _read_schema(self, number: int) -> pa.Schema:
        with self._files.open(number, WALK_BYTES) as handle:
            handle.seek(_PREFIX if handle.read(len(_MAGIC)) == _MAGIC else 0)
            return pa.ipc.read_schema(
                pa.ipc.MessageReader.open_stream(pa.PythonFile(handle, mode="r")).read_next_message()
            )


def _corrupt(path: str, what: str) -> DataError:
    return DataError(
        f"{path}: corrupt Arrow IPC file: {what}. Write or copy the file again, take it out of data.path, set "
        "data.kind to its format, or set data.on_corrupt: skip"
    )
