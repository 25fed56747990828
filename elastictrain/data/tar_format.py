"""WebDataset tar shards as blocks: `rows_per_block` samples each, a sample being neighbouring files of one key.

`a/0017.image.npy` has key `a/0017` and column `image.npy`. By the end of a column's name: `.npy` is an array, `cls`,
`index` and `id` are whole numbers, `txt`, `text`, `json` and `jsonl` are strings, all else are bytes, which can be
`data.text_column` but not stacked. (The format: https://github.com/webdataset/webdataset.)
"""

from __future__ import annotations

import io
import posixpath
import tarfile
from typing import Any

import numpy as np
import pyarrow as pa

from elastictrain.data.byte_format import CHUNK_BYTES, ByteBlocks
from elastictrain.data.columns import nearest
from elastictrain.data.files import WALK_BYTES
from elastictrain.errors import DataError, DataMismatch

_NUMBERS = ("cls", "index", "id")
_STRINGS = ("txt", "text", "json", "jsonl")


class TarSamples(ByteBlocks):
    """Blocks of WebDataset shards; all samples of a block must have the columns that are read."""

    noun = "samples"

    def ranges(self, number: int) -> list[tuple[int, int]]:
        """Walk over the headers; a block begins with every `rows_per_block`-th key."""
        file = self._files.files[number]
        starts: list[int] = []
        last, end, count = None, 0, 0
        with self._files.open(number, WALK_BYTES) as handle:
            size = int(handle.seek(0, 2))
            handle.seek(0)
            try:
                with tarfile.open(fileobj=handle, mode="r:") as tar:
                    for member in tar:
                        if not member.isfile():
                            continue
                        key, _ = split_name(member.name)
                        if key != last:
                            if count % self._rows_per_block == 0:
                                starts.append(member.offset)
                            last, count = key, count + 1
                        end = member.offset_data + -(-member.size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
                    walked = tar.offset
            except (tarfile.TarError, ValueError) as error:  # ValueError: damaged numbers in extended headers
                raise _corrupt(file.path, str(error)) from error
            if end > size:
                raise _corrupt(file.path, f"it has {size} bytes, its last file ends at {end}")
            self._check_end(handle, file.path, walked)
        return list(zip(starts, [*starts[1:], end], strict=True))

    def _check_end(self, handle: Any, path: str, walked: int) -> None:
        """Raise DataError unless a shard ends where the walk over its headers did: `tarfile` takes a header that it
        cannot read for the end. An end is at least one block of zeros, and nothing else behind it.
        """
        handle.seek(walked)
        at = walked
        while chunk := handle.read(CHUNK_BYTES):
            if chunk.count(0) < len(chunk):
                place = at + int(np.flatnonzero(np.frombuffer(chunk, dtype=np.uint8))[0])
                if place < walked + tarfile.BLOCKSIZE:
                    raise _corrupt(path, f"the header at byte {walked} cannot be read")
                raise _corrupt(
                    path,
                    f"zeros from byte {walked} on, as at the end of an archive, but more at byte {place}: a part that "
                    "was lost, or archives that were joined with cat (tar --concatenate joins them rightly)",
                )
            at += len(chunk)
        if at < walked + tarfile.BLOCKSIZE:
            raise _corrupt(path, f"it has no end (a block of zeros behind its last file, at byte {walked})")

    def parse(self, content: bytes, number: int, start: int, schema: pa.Schema | None) -> pa.Table:
        """See `ByteBlocks`."""
        path = self._files.files[number].path
        samples: list[tuple[str, dict[str, bytes]]] = []
        try:
            with tarfile.open(fileobj=io.BytesIO(content + bytes(2 * tarfile.BLOCKSIZE)), mode="r:") as tar:
                for member in tar:
                    body = tar.extractfile(member) if member.isfile() else None
                    if body is None:
                        continue
                    key, column = split_name(member.name)
                    if not samples or samples[-1][0] != key:
                        samples.append((key, {}))
                    samples[-1][1][column] = body.read()
                walked = tar.offset
        except (tarfile.TarError, ValueError) as error:
            raise _corrupt(path, f"bytes {start} to {start + len(content)}: {error}") from error
        if walked != len(content):
            raise _corrupt(path, f"the header at byte {start + walked} cannot be read")
        there = list(dict.fromkeys(column for _, columns in samples for column in columns))
        names = [self._text_column] if self._text_column else list(self._columns or (schema.names if schema else there))
        return pa.table({name: _column(path, samples, str(name)) for name in names})


def split_name(name: str) -> tuple[str, str]:
    """Return (key, column) of a file in a shard: the name is cut at the first dot behind the last slash."""
    folder, base = posixpath.split(name)
    stem, _, column = base.partition(".")
    return posixpath.join(folder, stem), column.lower()


def _column(path: str, samples: list[tuple[str, dict[str, bytes]]], name: str) -> pa.Array:
    values = []
    for key, columns in samples:
        if name not in columns:
            raise DataMismatch(
                f"{path}: sample {key!r} has no file {key}.{name}{nearest(name, columns)}; it has "
                f"{', '.join(columns)}. Every sample needs each column of data.columns or data.text_column"
            )
        values.append(columns[name])
    kind = name.rpartition(".")[2]
    try:
        if kind == "npy":
            arrays = [np.load(io.BytesIO(value), allow_pickle=False) for value in values]
            shapes = sorted({array.shape for array in arrays})
            if len(shapes) > 1:
                raise DataMismatch(
                    f"{path}: the arrays .{name} of samples {samples[0][0]!r} to {samples[-1][0]!r} have different "
                    f"shapes ({', '.join(map(str, shapes[:5]))}). Expected one, so that rows can be stacked: pad them "
                    "before, or leave the column out of data.columns"
                )
            return _arrays(arrays)
        if kind in _NUMBERS:
            return pa.array([int(value) for value in values], pa.int64())
        if kind in _STRINGS:
            return pa.array([value.decode("utf-8") for value in values], pa.string())
        return pa.array(values, pa.binary())
    except (ValueError, EOFError, pa.ArrowException) as error:  # UnicodeDecodeError is a ValueError
        first, last = samples[0][0], samples[-1][0]
        raise DataError(
            f"{path}: the files .{name} of samples {first!r} to {last!r} cannot be read ({error}). Expected "
            f"{'an array' if kind == 'npy' else 'whole numbers' if kind in _NUMBERS else 'UTF-8'}; mend the "
            "shard, leave the column out of data.columns, or set data.on_corrupt: skip"
        ) from error


def _arrays(values: list[Any]) -> pa.Array:
    stacked = np.stack(values)
    flat = pa.array(np.ascontiguousarray(stacked).reshape(-1))
    for size in reversed(stacked.shape[1:]):
        flat = pa.FixedSizeListArray.from_arrays(flat, size)
    return flat


def _corrupt(path: str, what: str) -> DataError:
    return DataError(
        f"{path}: corrupt or truncated tar file: {what}. Write or copy the file again, take it out of data.path, set "
        "data.kind to its format, or set data.on_corrupt: skip"
    )
