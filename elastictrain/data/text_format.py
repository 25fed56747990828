"""Raw text as blocks: a document is a line, or a whole file (`data.document`); its column is called `text`."""

from __future__ import annotations

import pyarrow as pa

from elastictrain.data.byte_format import BOM, ByteBlocks
from elastictrain.errors import DataError, DataMismatch

COLUMN = "text"


class TextLines(ByteBlocks):
    """Blocks of `rows_per_block` lines; empty lines are no documents."""

    noun = "lines"

    def ranges(self, number: int) -> list[tuple[int, int]]:
        """Cut a file after every `rows_per_block`-th newline."""
        return self._lines(number)

    def parse(self, content: bytes, number: int, start: int, schema: pa.Schema | None) -> pa.Table:
        """See `ByteBlocks`."""
        lines = self._decode(content, number, start).split("\n")
        documents = [line.removesuffix("\r") for line in lines if line.strip()]
        return pa.table({COLUMN: pa.array(documents, pa.string())}, schema=schema)

    def _decode(self, content: bytes, number: int, start: int) -> str:
        body = content[len(BOM) :] if start == 0 and content.startswith(BOM) else content
        try:
            return body.decode("utf-8")
        except UnicodeDecodeError as error:
            before = self.bytes_of(number, 0, start).count(b"\n") if start else 0
            line = before + body[: error.start].count(b"\n") + 1
            raise DataError(
                f"{self._files.files[number].path}, line {line}: not valid UTF-8 ({error.reason}, byte "
                f"0x{body[error.start]:02x}). Convert the file to UTF-8, take it out of data.path, or set "
                "data.on_corrupt: skip"
            ) from error


class TextFiles(TextLines):
    """Every file is one document and one block; empty files are none."""

    noun = "files"

    def ranges(self, number: int) -> list[tuple[int, int]]:
        """The whole file."""
        with self._files.open(number) as handle:
            size = int(handle.seek(0, 2))
        if size > self._max_document_bytes:
            raise DataMismatch(
                f"{self._files.files[number].path}: has {size} bytes, more than data.max_document_bytes="
                f"{self._max_document_bytes}. Cut the file, raise the limit if there is memory for it, or set "
                "data.document: line"
            )
        return [(0, size)] if size else []

    def parse(self, content: bytes, number: int, start: int, schema: pa.Schema | None) -> pa.Table:
        """See `ByteBlocks`."""
        return pa.table({COLUMN: pa.array([self._decode(content, number, start)], pa.string())}, schema=schema)
