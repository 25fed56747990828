"""Reading safetensors, one file or several with an index, by ranges and believing nothing.

The format: 8 bytes little-endian length, a JSON header of that length, data. Only needed bytes are read.
"""

from __future__ import annotations

import json
import struct
from typing import Any

import numpy as np

from elastictrain_checkpoint.dtypes import item_bytes, num_elements
from elastictrain_checkpoint.errors import CorruptData, ForeignFormat, InvalidPiece
from elastictrain_checkpoint.source import Bytes, Shape, check_range
from elastictrain_checkpoint.store import Store

INDEX = "model.safetensors.index.json"
MAX_HEADER_BYTES = 100_000_000
"""As in the reference implementation."""

_Entry = tuple[str, Shape, int, int]
"""dtype, shape, first byte in the file, bytes."""


class SafetensorsSource:
    """A folder of safetensors, or one file of it. See `elastictrain_checkpoint.source.Source`.

    Attributes:
        tensors: name → (dtype, shape).
        tree: the metadata of the files, joined.

    Raises:
        ForeignFormat: no such files, a tensor in two of them, an index that does not fit, an unknown type.
        CorruptData: a file whose header and size contradict each other.

    """

    format = "safetensors"

    def __init__(self, store: Store, file: str | None = None) -> None:
        self._store = store
        self.skipped: list[str] = []
        self.tree: dict[str, Any] = {}
        self._where: dict[str, tuple[str, int]] = {}
        self.tensors: dict[str, tuple[str, Shape]] = {}
        index = None if file else self._read_index()
        for path in [file] if file else self._files(index):
            entries, metadata = read_header(store, path)
            self.tree |= metadata
            for name, (dtype, shape, start, _) in entries.items():
                if name in self.tensors:
                    raise ForeignFormat(
                        f"{name} is in {self._where[name][0]} and in {path}: shards of one tensor are not joined here; "
                        f"consolidate them first, or name one file"
                    )
                self.tensors[name] = (dtype, shape)
                self._where[name] = (path, start)
        if index is not None:
            self._check_index(index)

    def read_flat(self, name: str, start: int, stop: int) -> Bytes:
        """Bytes of the elements [start, stop) of a tensor.

        Raises:
            KeyError: no such tensor.
            InvalidPiece: the range lies outside of it.
            CorruptData: the file is gone or cut short.

        """
        dtype, shape = self.tensors[name]
        check_range(name, shape, start, stop)
        item = item_bytes(dtype)
        path, begin = self._where[name]
        out = np.empty((stop - start) * item, np.uint8)
        if len(out):
            _fill(self._store, path, begin + start * item, out.data, (name,))
        return out

    def _read_index(self) -> dict[str, str] | None:
        try:
            raw = self._store.read_all(INDEX)
        except (FileNotFoundError, NotADirectoryError):
            return None
        try:
            found = json.loads(raw)["weight_map"]
            if not all(isinstance(name, str) and isinstance(file, str) for name, file in found.items()):
                raise TypeError("weight_map is not names of files by names of tensors")
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise ForeignFormat(f"{self._store.url}/{INDEX} is not an index: {error!r}") from None
        return dict(found)

    def _files(self, index: dict[str, str] | None) -> list[str]:
        if index is not None:
            bad = [file for file in index.values() if "/" in file or not file.endswith(".safetensors")]
            if bad:
                raise ForeignFormat(f"{INDEX}: {bad[0]!r} is not the name of a safetensors file beside it")
            return sorted(set(index.values()))
        files = [name for name in self._store.list() if name.endswith(".safetensors")]
        if not files:
            raise ForeignFormat(f"{self._store.url} holds neither {INDEX} nor any *.safetensors")
        return files

    def _check_index(self, index: dict[str, str]) -> None:
        absent = sorted(name for name in index if name not in self.tensors)
        if absent:
            raise CorruptData(f"{absent[0]} (and {len(absent) - 1} more) of {INDEX} is in no file", file=INDEX)
        for name, file in index.items():
            if self._where[name][0] != file:
                raise CorruptData(f"{INDEX} says that {name} is in {file}; it is in {self._where[name][0]}", file=INDEX)


def read_header(store: Store, path: str) -> tuple[dict[str, _Entry], dict[str, Any]]:
    """Entries and metadata of one file, checked.

    Raises:
        ForeignFormat: a type that is not known here, or not a safetensors file.
        CorruptData: the file is gone, cut short, or contradicts itself.

    """
    size = store.size(path)
    if size is None:
        raise CorruptData(f"{path} is missing", file=path)
    if size < 8:
        raise CorruptData(f"{path} has {size} bytes: not a safetensors file", file=path)
    head = bytearray(8)
    _fill(store, path, 0, memoryview(head), ())
    (length,) = struct.unpack("<Q", head)
    if length > min(MAX_HEADER_BYTES, size - 8):
        raise CorruptData(f"{path}: its header would have {length} bytes, the file has {size}", file=path)
    text = bytearray(length)
    _fill(store, path, 8, memoryview(text), ())
    try:
        header = json.loads(text)
        metadata = header.pop("__metadata__", {})
        entries = {name: _entry(name, value, 8 + length, size) for name, value in header.items()}
        if not isinstance(metadata, dict):
            raise TypeError("__metadata__ is not a table")
    except InvalidPiece as error:
        raise ForeignFormat(f"{path}: {error}") from None
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise CorruptData(f"{path}: its header is damaged: {error}", file=path) from None
    _refuse_overlap(path, entries)
    return entries, {str(key): value for key, value in metadata.items() if isinstance(value, str)}


def _entry(name: str, value: Any, data_start: int, size: int) -> _Entry:
    dtype, shape, (begin, end) = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str) or not isinstance(shape, list):
        raise TypeError(f"{name} has no type or no shape")
    try:
        want = num_elements(shape) * item_bytes(dtype)
    except InvalidPiece as error:
        raise InvalidPiece(f"{name}: {error}") from None
    if type(begin) is not int or type(end) is not int or not 0 <= begin <= end <= size - data_start:
        raise ValueError(f"{name} would lie in bytes [{begin}, {end}) of {size - data_start}")
    if end - begin != want:
        raise ValueError(f"{name} has {end - begin} bytes, expected {want} for {dtype} {shape}")
    return dtype, tuple(shape), data_start + begin, want


def _refuse_overlap(path: str, entries: dict[str, _Entry]) -> None:
    reached, before = 0, ""
    for name, (_, _, start, size) in sorted(entries.items(), key=lambda item: (item[1][2], item[1][3])):
        if size and start < reached:
            raise CorruptData(f"{path}: {before} and {name} lie in the same bytes", file=path, tensors=(before, name))
        if size:
            reached, before = start + size, name


def _fill(store: Store, path: str, start: int, out: memoryview, tensors: tuple[str, ...]) -> None:
    try:
        got = store.read_into(path, start, out)
    except FileNotFoundError:
        raise CorruptData(f"{path} is missing", file=path, tensors=tensors) from None
    if got != len(out):
        raise CorruptData(
            f"{path} is cut short ({got} of {len(out)} bytes from {start} on)", file=path, tensors=tensors
        )
