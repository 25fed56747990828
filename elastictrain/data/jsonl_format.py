"""JSON lines as blocks: byte ranges cut at newlines, `rows_per_block` lines each."""

from __future__ import annotations

import itertools
import json
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.json as paj

from elastictrain.data.columns import as_pairs, nearest, select_columns, show_schema
from elastictrain.data.files import FileSet
from elastictrain.data.index import BlockTable, Progress, checksum_of
from elastictrain.errors import DataError

_CHUNK_BYTES = 16 << 20
_MAX_BLOCK_BYTES = (1 << 31) - 2  # Arrow's JSON reader counts in 32 bits
_BOM = b"\xef\xbb\xbf"


class JsonLines:
    """Blocks of JSON-lines files; `index()` or `restore()` must run before `read`.

    `index` parses every line once, so that an invalid line is an error when the run opens its data and not
    hours later, and infers one schema for all blocks (integers become floats where a file holds both).
    """

    def __init__(
        self, files: FileSet, *, text_column: str | None, columns: tuple[str, ...] | None, rows_per_block: int
    ) -> None:
        self._files = files
        self._text_column, self._columns = text_column, columns
        self._rows_per_block = rows_per_block
        self._arrow_schema = pa.schema([(text_column, pa.string())]) if text_column else None
        self.schema = as_pairs(self._arrow_schema) if self._arrow_schema else ()
        self.blocks = BlockTable.of([])

    def index(self, progress: Progress | None = None) -> None:
        """Find the blocks and check every line. Raises DataError naming file and line."""
        entries: list[tuple[int, int, int, int, int, int]] = []
        schema: pa.Schema | None = self._arrow_schema
        done, total = 0, sum(file.size_bytes for file in self._files.files)
        for number, file in enumerate(self._files.files):
            present = False  # whether any line of the file has a text
            for block, (start, stop) in enumerate(self._ranges(number)):
                content = self._bytes(number, start, stop)
                table = self._parse(content, number, start, self._arrow_schema)
                if self._text_column:
                    present = present or table.column(0).null_count < table.num_rows
                elif table.num_rows:
                    schema = self._merge(schema, table.schema, file.path)
                entries.append((number, block, table.num_rows, start, stop, checksum_of(content)))
                done += stop - start
                if progress:
                    progress("reading JSON lines", done, total)
            if self._text_column and not present:
                self._require_text_column(number)
        if schema is not None and not self._text_column:
            self._arrow_schema = select_columns(
                schema, self._files.files[0].path, text_column=None, columns=self._columns
            )
        self.schema = as_pairs(self._arrow_schema) if self._arrow_schema else ()
        self.blocks = BlockTable.of(entries)

    def save(self) -> tuple[dict[str, npt.NDArray[Any]], dict[str, Any]]:
        """Return what `restore` takes."""
        arrays = {f"blocks_{name}": value for name, value in vars(self.blocks).items()}
        serialised = self._arrow_schema.serialize().to_pybytes().hex() if self._arrow_schema else ""
        return arrays, {"schema": serialised}

    def restore(self, arrays: dict[str, npt.NDArray[Any]], notes: dict[str, Any]) -> None:
        """Take over an index that `save` gave."""
        self.blocks = BlockTable(**{name: arrays[f"blocks_{name}"] for name in BlockTable.__dataclass_fields__})
        serialised = bytes.fromhex(notes["schema"])
        self._arrow_schema = pa.ipc.read_schema(pa.py_buffer(serialised)) if serialised else None
        self.schema = as_pairs(self._arrow_schema) if self._arrow_schema else ()

    def read(self, block: int) -> pa.Table:
        """Return a block's columns. Raises DataError if its bytes have changed since the index was made."""
        number, start = int(self.blocks.file[block]), int(self.blocks.start[block])
        content = self._bytes(number, start, int(self.blocks.stop[block]))
        if checksum_of(content) != int(self.blocks.checksum[block]):
            raise DataError(
                f"{self.where(block)}: changed since the run opened it. Data must not be written to while a run "
                "reads them: restore the file, or write to a new data.path"
            )
        return self._parse(content, number, start, self._arrow_schema).select([name for name, _ in self.schema])

    def where(self, block: int) -> str:
        """Name the file and the bytes."""
        path = self._files.files[int(self.blocks.file[block])].path
        return f"{path}, bytes {self.blocks.start[block]} to {self.blocks.stop[block]}"

    def close(self) -> None:
        """Nothing stays open."""

    def _ranges(self, number: int) -> list[tuple[int, int]]:
        """Cut a file after every `rows_per_block`-th newline."""
        cuts, position, lines = [0], 0, 0
        with self._files.open(number) as handle:
            while chunk := handle.read(_CHUNK_BYTES):
                ends = np.flatnonzero(np.frombuffer(chunk, dtype=np.uint8) == 10) + position + 1
                first = self._rows_per_block - 1 - lines % self._rows_per_block
                cuts += ends[first :: self._rows_per_block].tolist()
                position += len(chunk)
                lines += len(ends)
        if cuts[-1] != position:
            cuts.append(position)
        return list(itertools.pairwise(cuts))

    def _bytes(self, number: int, start: int, stop: int) -> bytes:
        if stop - start > _MAX_BLOCK_BYTES:
            raise DataError(
                f"{self._files.files[number].path}: {self._rows_per_block} lines take {stop - start} bytes; a block "
                f"may have {_MAX_BLOCK_BYTES}. Lower data.rows_per_block"
            )
        with self._files.open(number) as handle:
            handle.seek(start)
            content: bytes = handle.read(stop - start)
        return content

    def _parse(self, content: bytes, number: int, start: int, schema: pa.Schema | None) -> pa.Table:
        body = content[len(_BOM) :] if start == 0 and content.startswith(_BOM) else content
        if not body.strip():
            return (schema or pa.schema([])).empty_table()
        try:
            table = paj.read_json(
                pa.BufferReader(body),
                read_options=paj.ReadOptions(use_threads=False, block_size=len(body) + 1),
                parse_options=paj.ParseOptions(
                    explicit_schema=schema, unexpected_field_behavior="ignore" if schema else "infer"
                ),
            )
        except (pa.ArrowException, OSError) as error:
            self._explain(body, number, start, str(error))
        # Arrow takes two objects on one line, and an object on two; the cuts between blocks do not.
        lines = sum(not line.isspace() for line in body.split(b"\n") if line)
        if table.num_rows != lines:
            self._explain(body, number, start, f"{table.num_rows} objects on {lines} lines")
        return table

    def _explain(self, body: bytes, number: int, start: int, reason: str) -> Any:
        """Raise DataError that names the first bad line of a block; only Arrow's own word is left without one."""
        path = self._files.files[number].path
        first = self._bytes(number, 0, start).count(b"\n") + 1 if start else 1
        for line_number, line in enumerate(body.split(b"\n"), start=first):
            if not line.strip():
                continue
            try:
                value = json.loads(line)
            except ValueError as error:
                raise DataError(
                    f"{path}, line {line_number}: not valid JSON ({error}). Expected one JSON object per line; "
                    "mend or remove the line"
                ) from error
            if not isinstance(value, dict):
                raise DataError(
                    f"{path}, line {line_number}: got a JSON {type(value).__name__}, expected an object "
                    'such as {"text": "…"}'
                )
            text = value.get(self._text_column) if self._text_column else None
            if text is not None and not isinstance(text, str):
                raise DataError(
                    f"{path}, line {line_number}: {self._text_column!r} is a {type(text).__name__}, "
                    "expected a string (data.text_column)"
                )
        raise DataError(
            f"{path}, lines {first} to {first + body.count(10)}: the lines cannot be read as one table ({reason}). "
            "Every key must have one type in all lines; name the columns to use in data.columns"
        )

    def _merge(self, schema: pa.Schema | None, other: pa.Schema, path: str) -> pa.Schema:
        if self._columns:
            other = pa.schema([field for field in other if field.name in self._columns])
        if schema is None:
            return other
        try:
            return pa.unify_schemas([schema, other], promote_options="permissive")
        except pa.ArrowException as error:
            raise DataError(
                f"{path}: its columns do not fit those of the lines before ({error}). Got "
                f"{show_schema(as_pairs(other))}; expected {show_schema(as_pairs(schema))}. "
                "Every key must have one type in all files"
            ) from error

    def _require_text_column(self, number: int) -> None:
        """Raise DataError if the first line of a file lacks the text column; empty files are fine."""
        with self._files.open(number) as handle:
            lines = [line for line in handle.read(_CHUNK_BYTES).removeprefix(_BOM).split(b"\n") if line.strip()]
        keys = list(json.loads(lines[0])) if lines else []
        if lines and self._text_column not in keys:
            name = str(self._text_column)
            raise DataError(
                f"{self._files.files[number].path}: data.text_column names {name!r}{nearest(name, keys)}, which no "
                f"line has. The keys of its first line are: {', '.join(keys) or 'none'}"
            )
