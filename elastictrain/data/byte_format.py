"""Files that are read as ranges of bytes: what formats without an index of their own have in common.

A pass over the files finds the ranges, checks that every one of them can be read, infers one schema for all, and
keeps a checksum of each. So a bad line is an error when a run opens its data and not hours later, and a file that is
written to during the run is noticed.
"""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from elastictrain.data.columns import as_pairs, is_text, select_columns, show_schema
from elastictrain.data.files import FileSet
from elastictrain.data.index import NEVER_A_HOLE, BlockTable, Hole, Progress, check_utf8, checksum_of
from elastictrain.data.ranges import coalesced
from elastictrain.errors import DataError, DataMismatch

CHUNK_BYTES = 16 << 20
MAX_BLOCK_BYTES = (1 << 31) - 2  # Arrow's readers of text count in 32 bits
BOM = b"\xef\xbb\xbf"


class ByteBlocks(ABC):
    """Blocks of files; `index()` or `restore()` must run before `read`. A format says `ranges` and `parse`."""

    noun = "file"

    def __init__(
        self,
        files: FileSet,
        *,
        text_column: str | None,
        columns: tuple[str, ...] | None,
        rows_per_block: int,
        on_corrupt: str = "stop",
        max_document_bytes: int = MAX_BLOCK_BYTES,
    ) -> None:
        self._files = files
        self._text_column, self._columns = text_column, columns
        self._rows_per_block, self._on_corrupt = rows_per_block, on_corrupt
        self._max_document_bytes = max_document_bytes
        self._arrow_schema = pa.schema([(text_column, pa.string())]) if text_column else None
        self.schema = as_pairs(self._arrow_schema) if self._arrow_schema else ()
        self.blocks = BlockTable.of([])
        self.holes: tuple[Hole, ...] = ()

    @abstractmethod
    def ranges(self, number: int) -> Iterable[tuple[int, int]]:
        """Yield the byte ranges of a file's blocks. Raises DataError for a file that is not whole."""

    @abstractmethod
    def parse(self, content: bytes, number: int, start: int, schema: pa.Schema | None) -> pa.Table:
        """Return a block's rows; `schema` None: infer one. Raises DataError that names the place."""

    def after_file(self, number: int, text_seen: bool) -> None:  # noqa: B027 - a format may need nothing here
        """Check a file once all its blocks were read; `text_seen`: some row had a text."""

    def check_columns(self, number: int) -> None:  # noqa: B027 - a format may need nothing here
        """Raise DataError if a file does not have the columns that the settings name; never left out as corrupt."""

    def merge(self, schema: pa.Schema, other: pa.Schema, path: str) -> pa.Schema:
        """Return the schema of both; by default they must be equal."""
        if as_pairs(schema) != as_pairs(other):
            raise DataMismatch(
                f"{path}: its columns differ from those of the files before. Got {show_schema(as_pairs(other))}; "
                f"expected {show_schema(as_pairs(schema))}. Write the file again with that schema, or set data.columns "
                "or data.path so that all files agree"
            )
        return schema

    def index(self, progress: Progress | None = None) -> None:
        """Find the blocks and check every one. Raises DataError naming the place; see `data.on_corrupt`."""
        entries: list[tuple[int, int, int, int, int, int]] = []
        holes: list[Hole] = []
        schema: pa.Schema | None = self._arrow_schema
        done, total = 0, sum(file.size_bytes for file in self._files.files)
        for number, file in enumerate(self._files.files):
            text_seen, here = False, len(holes)
            for block, (start, stop, content) in enumerate(self._contents(number, holes)):
                table = self._parsed(content, number, block, start, holes)
                if table is not None and self._text_column:
                    text_seen = text_seen or table.column(0).null_count < table.num_rows
                elif table is not None and table.num_rows:
                    schema = self._joined(schema, table.schema, file.path)
                entries.append((number, block, table.num_rows if table else 0, start, stop, checksum_of(content)))
                done += stop - start
                if progress:
                    progress(f"reading {self.noun}", min(done, total), total)
            if self._text_column and len(holes) == here:
                self.after_file(number, text_seen)
        if schema is not None and not self._text_column:
            first = self._files.files[0].path
            self._arrow_schema = select_columns(schema, first, text_column=None, columns=self._columns)
        self.schema = as_pairs(self._arrow_schema) if self._arrow_schema else ()
        self.blocks, self.holes = BlockTable.of(entries), tuple(holes)

    def save(self) -> tuple[dict[str, npt.NDArray[Any]], dict[str, Any]]:
        """Return what `restore` takes."""
        arrays = {f"blocks_{name}": value for name, value in vars(self.blocks).items()}
        serialised = self._arrow_schema.serialize().to_pybytes().hex() if self._arrow_schema else ""
        return arrays, {"schema": serialised, "holes": [list(hole) for hole in self.holes]}

    def restore(self, arrays: dict[str, npt.NDArray[Any]], notes: dict[str, Any]) -> None:
        """Take over an index that `save` gave."""
        self.blocks = BlockTable(**{name: arrays[f"blocks_{name}"] for name in BlockTable.__dataclass_fields__})
        serialised = bytes.fromhex(notes["schema"])
        self._arrow_schema = pa.ipc.read_schema(pa.py_buffer(serialised)) if serialised else None
        self.schema = as_pairs(self._arrow_schema) if self._arrow_schema else ()
        self.holes = tuple(Hole(*hole) for hole in notes["holes"])

    def read(self, block: int) -> pa.Table:
        """Return a block's columns. Raises DataError if its bytes have changed since the index was made."""
        if not self.blocks.rows[block]:
            return (self._arrow_schema or pa.schema([])).empty_table()
        number, start = int(self.blocks.file[block]), int(self.blocks.start[block])
        content = self.bytes_of(number, start, int(self.blocks.stop[block]))
        if checksum_of(content) != int(self.blocks.checksum[block]):
            raise DataError(
                f"{self.where(block)}: changed since the run opened it. Data must not be written to while a run reads "
                "them: restore the file, or write to a new data.path"
            )
        return self.parse(content, number, start, self._arrow_schema).select([name for name, _ in self.schema])

    def where(self, block: int) -> str:
        """Name the file and the bytes."""
        path = self._files.files[int(self.blocks.file[block])].path
        return f"{path}, bytes {self.blocks.start[block]} to {self.blocks.stop[block]}"

    def close(self) -> None:  # noqa: B027 - a format may need nothing here
        """Nothing stays open."""

    def bytes_of(self, number: int, start: int, stop: int) -> bytes:
        """Read a range of a file. Raises DataError for one that is longer than a block may be."""
        self._check_length(number, start, stop)
        return self._files.read_range(number, start, stop)

    def _check_length(self, number: int, start: int, stop: int) -> None:
        if stop - start > MAX_BLOCK_BYTES:
            raise DataError(
                f"{self._files.files[number].path}: {self._rows_per_block} {self.noun} take {stop - start} bytes; a "
                f"block may have {MAX_BLOCK_BYTES}. Lower data.rows_per_block"
            )

    def _contents(self, number: int, holes: list[Hole]) -> Iterable[tuple[int, int, bytes]]:
        try:
            found = list(self.ranges(number))
        except NEVER_A_HOLE:
            raise
        except DataError as error:
            if self._on_corrupt != "skip":
                raise
            holes.append(Hole(self._files.files[number].name, -1, str(error)))
            return
        self.check_columns(number)
        if not found:
            return
        for start, stop in found:
            self._check_length(number, start, stop)
        # On one handle: a store says so if the file is written to meanwhile.
        with self._files.open(number) as handle:
            blocks = iter(found)
            for first, last in coalesced(found, most_bytes=CHUNK_BYTES):
                handle.seek(first)
                content = handle.read(last - first)
                for start, stop in blocks:
                    yield start, stop, content[start - first : stop - first]
                    if stop == last:
                        break

    def _parsed(self, content: bytes, number: int, block: int, start: int, holes: list[Hole]) -> pa.Table | None:
        try:
            table = self.parse(content, number, start, self._arrow_schema)
            if self._text_column and table.num_rows and is_text(table.column(0).type):
                path = self._files.files[number].path
                check_utf8(table.column(0), f"{path}, bytes {start} to {start + len(content)}")
            return table
        except NEVER_A_HOLE:
            raise
        except DataError as error:
            if self._on_corrupt != "skip":
                raise
            holes.append(Hole(self._files.files[number].name, block, str(error)))
            return None

    def _joined(self, schema: pa.Schema | None, other: pa.Schema, path: str) -> pa.Schema:
        if self._columns:
            other = pa.schema([field for field in other if field.name in self._columns])
        return other if schema is None else self.merge(schema, other, path)

    def _lines(self, number: int, quote: bytes | None = None) -> list[tuple[int, int]]:
        """Cut a file after every `rows_per_block`-th newline; a newline between two `quote`s is none."""
        cuts, position, lines, quotes = [0], 0, 0, 0
        with self._files.open(number) as handle:
            while chunk := handle.read(CHUNK_BYTES):
                content = np.frombuffer(chunk, dtype=np.uint8)
                ends = np.flatnonzero(content == 10) + position + 1
                if quote is not None:
                    marks = np.flatnonzero(content == quote[0]) + position
                    ends = ends[(quotes + np.searchsorted(marks, ends)) % 2 == 0]
                    quotes += len(marks)
                first = self._rows_per_block - 1 - lines % self._rows_per_block
                cuts += ends[first :: self._rows_per_block].tolist()
                position += len(chunk)
                lines += len(ends)
        if cuts[-1] != position:
            cuts.append(position)
        return list(itertools.pairwise(cuts))
