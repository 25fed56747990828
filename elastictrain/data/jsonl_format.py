"""JSON lines as blocks: byte ranges cut at newlines, `rows_per_block` lines each."""

from __future__ import annotations

import json
from typing import Any

import pyarrow as pa
import pyarrow.json as paj

from elastictrain.data.byte_format import BOM, CHUNK_BYTES, ByteBlocks
from elastictrain.data.columns import as_pairs, nearest, show_schema
from elastictrain.errors import DataError, DataMismatch


class JsonLines(ByteBlocks):
    """Blocks of JSON-lines files. Integers become floats where both occur."""

    noun = "JSON lines"

    def ranges(self, number: int) -> list[tuple[int, int]]:
        """Cut a file after every `rows_per_block`-th newline."""
        return self._lines(number)

    def parse(self, content: bytes, number: int, start: int, schema: pa.Schema | None) -> pa.Table:
        """See `ByteBlocks`."""
        body = content[len(BOM) :] if start == 0 and content.startswith(BOM) else content
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
        first = self.bytes_of(number, 0, start).count(b"\n") + 1 if start else 1
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
                raise DataMismatch(
                    f"{path}, line {line_number}: {self._text_column!r} is a {type(text).__name__}, "
                    "expected a string (data.text_column)"
                )
        raise DataMismatch(
            f"{path}, lines {first} to {first + body.count(10)}: the lines cannot be read as one table ({reason}). "
            "Every key must have one type in all lines; name the columns to use in data.columns"
        )

    def merge(self, schema: pa.Schema, other: pa.Schema, path: str) -> pa.Schema:
        """Return the schema of both; numbers may become wider."""
        try:
            return pa.unify_schemas([schema, other], promote_options="permissive")
        except pa.ArrowException as error:
            raise DataMismatch(
                f"{path}: its columns do not fit those of the lines before ({error}). Got "
                f"{show_schema(as_pairs(other))}; expected {show_schema(as_pairs(schema))}. "
                "Every key must have one type in all files"
            ) from error

    def after_file(self, number: int, text_seen: bool) -> None:
        """Raise DataError if the first line of a file lacks the text column; empty files are fine."""
        if text_seen:
            return
        with self._files.open(number) as handle:
            lines = [line for line in handle.read(CHUNK_BYTES).removeprefix(BOM).split(b"\n") if line.strip()]
        keys = list(json.loads(lines[0])) if lines else []
        if lines and self._text_column not in keys:
            name = str(self._text_column)
            raise DataMismatch(
                f"{self._files.files[number].path}: data.text_column names {name!r}{nearest(name, keys)}, which no "
                f"line has. The keys of its first line are: {', '.join(keys) or 'none'}"
            )
