"""Compressed files of a source: unpacked once into the cache, so that any place of them can be read.

`.gz`, `.zst`, `.bz2` and `.lz4` cannot be read from the middle. Their content is written to
`$XDG_CACHE_HOME/elastictrain/unpacked-…`, named by path, size and version of the compressed file; it is made again when
it is missing, and whoever is first makes it for all workers of the node.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import xxhash

from elastictrain.data.files import DataFile, FileSet
from elastictrain.errors import DataError

CODECS = {".gz": "gzip", ".tgz": "gzip", ".zst": "zstd", ".bz2": "bz2", ".lz4": "lz4"}
_CHUNK_BYTES = 8 << 20


def codec_of(path: str) -> str | None:
    """Return the name of Arrow's codec for a file name; None: it is not compressed."""
    return CODECS.get(os.path.splitext(path.lower())[1])  # noqa: PTH122 (URLs too)


@dataclass(frozen=True)
class UnpackedFiles(FileSet):
    """A file set that opens the unpacked content of compressed files."""

    folder: Path = field(default_factory=Path)

    def open(self, number: int, read_ahead_bytes: int = 0) -> Any:
        """Open a file, or what a compressed one holds. Raises DataError if that cannot be unpacked or stored."""
        if codec_of(self.files[number].path) is None:
            return super().open(number, read_ahead_bytes)
        place = self._place(number)
        if not place.exists():
            super().open(number).close()  # that it is still the file that was listed
            self._unpack(number, place)
        return place.open("rb")

    def read_range(self, number: int, start: int, stop: int) -> bytes:
        """Read bytes `[start, stop)` of a file, or of what a compressed one holds."""
        if codec_of(self.files[number].path) is None:
            return super().read_range(number, start, stop)
        with self.open(number) as handle:
            handle.seek(start)
            return bytes(handle.read(stop - start))

    def _place(self, number: int) -> Path:
        file = self.files[number]
        version = file.version or f"{self._checksum(number):016x}"
        key = hashlib.sha256("\0".join([file.path, str(file.size_bytes), version]).encode()).hexdigest()
        return self.folder / f"unpacked-{key[:32]}"

    def _checksum(self, number: int) -> int:
        """Of the compressed bytes, where a store tells nothing of a file but its size."""
        digest = xxhash.xxh3_64()
        with super().open(number) as handle:
            while chunk := handle.read(_CHUNK_BYTES):
                digest.update(chunk)
        return digest.intdigest()

    def _unpack(self, number: int, place: Path) -> None:
        file = self.files[number]
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            descriptor, temporary = tempfile.mkstemp(dir=self.folder, prefix=".unpacked-")
        except OSError as error:
            raise DataError(
                f"{file.path}: compressed, and its content cannot be stored in {self.folder} ({error}). Set "
                "XDG_CACHE_HOME to a folder with room, or unpack the file yourself"
            ) from error
        try:
            with os.fdopen(descriptor, "wb") as target, super().open(number, _CHUNK_BYTES) as handle:
                stream = pa.CompressedInputStream(pa.PythonFile(handle, mode="r"), codec_of(file.path))
                while chunk := _next(stream, file):
                    target.write(chunk)
            Path(temporary).replace(place)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise


def _next(stream: pa.CompressedInputStream, file: DataFile) -> bytes:
    try:
        return bytes(stream.read(_CHUNK_BYTES))
    except (OSError, pa.ArrowException) as error:
        raise DataError(
            f"{file.path}: corrupt or truncated compressed file ({error}). Write or copy it again, take it out of "
            "data.path, or set data.on_corrupt: skip"
        ) from error


def with_unpacking(files: FileSet, folder: Path) -> FileSet:
    """Return the file set, with compressed files opened unpacked if there are any."""
    if not any(codec_of(file.path) for file in files.files):
        return files
    return UnpackedFiles(files.filesystem, files.files, files.retry_s, folder)
