"""Reading torch.distributed.checkpoint, and Megatron's torch_dist on top of it, without a process group.

``.metadata`` is a pickle. It is read with an unpickler that makes the few classes of such a file and nothing else, so
that it cannot run code. Every chunk is a ``torch.save`` file of its own, read with ``weights_only=True`` and checked
against its CRC-32, which torch writes and does not check.
"""

from __future__ import annotations

import argparse
import io
import json
import pathlib
import pickle
from collections import OrderedDict
from dataclasses import dataclass
from enum import EnumMeta
from typing import Any

import numpy as np
import torch
from torch.distributed.checkpoint import filesystem
from torch.distributed.checkpoint import metadata as dcp

from elastictrain_checkpoint import tagged
from elastictrain_checkpoint.boxes import box_runs, first_overlap
from elastictrain_checkpoint.cast import bit_type
from elastictrain_checkpoint.convert import torch_files
from elastictrain_checkpoint.dtypes import num_elements
from elastictrain_checkpoint.errors import CheckpointError, CorruptData, ForeignFormat, InvalidPiece
from elastictrain_checkpoint.source import Bytes, Shape, check_range
from elastictrain_checkpoint.store import Store

_DCP_CLASSES = (
    "Metadata", "TensorStorageMetadata", "TensorProperties", "ChunkStorageMetadata", "BytesStorageMetadata",
    "MetadataIndex", "StorageMeta", "_MEM_FORMAT_ENCODING",
)  # fmt: skip


def _member(kind: Any, name: str) -> Any:
    """Early Python 3.11 pickles a member of an enum as `getattr(enum, name)`: that, and no other attribute."""
    if isinstance(kind, EnumMeta):  # one of those below: `find_class` gives no others
        return kind[name]
    raise pickle.UnpicklingError(f"it asks for {name!r} of {kind!r}, which no such file needs")


_ALLOWED: dict[tuple[str, str], Any] = {
    ("builtins", "getattr"): _member,
    **{("torch.distributed.checkpoint.metadata", name): getattr(dcp, name) for name in _DCP_CLASSES},
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"): filesystem._StorageInfo,
    ("torch", "Size"): torch.Size,
    ("torch.serialization", "_get_layout"): lambda name: {"torch.strided": torch.strided}[name],
    ("collections", "OrderedDict"): OrderedDict,
    **{
        (module, name): pathlib.PurePosixPath
        for module in ("pathlib", "pathlib._local")
        for name in ("PosixPath", "PurePosixPath", "WindowsPath", "PureWindowsPath")
    },
}


class _MetadataUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _ALLOWED:
            return _ALLOWED[module, name]
        found = getattr(torch, name, None) if module == "torch" else None
        if isinstance(found, torch.dtype):
            return found
        raise pickle.UnpicklingError(f"it names {module}.{name}, which no such file needs")


def read_metadata(raw: bytes, what: str) -> dcp.Metadata:
    """Unpickle ``.metadata``, making nothing but its own classes.

    Raises:
        ForeignFormat: it is none, or names other classes.

    """
    try:
        found = _MetadataUnpickler(io.BytesIO(raw)).load()
    except Exception as error:  # a damaged pickle can raise anything
        raise ForeignFormat(f"{what} is not the metadata of torch.distributed.checkpoint: {error}") from None
    if not isinstance(found, dcp.Metadata) or not isinstance(getattr(found, "state_dict_metadata", None), dict):
        raise ForeignFormat(f"{what} is not the metadata of torch.distributed.checkpoint: it is a {type(found)}")
    return found


@dataclass(frozen=True)
class _Chunk:
    offsets: Shape
    sizes: Shape
    path: str
    start: int
    length: int


class DcpSource:
    """A folder that ``torch.distributed.checkpoint.save`` wrote. See `elastictrain_checkpoint.source.Source`.

    Values that are not tensors are in ``tree``, by their names, as far as they are plain; the others are in
    ``skipped``. A chunk is read whole; the last one is kept.

    Raises:
        ForeignFormat: not such a folder, or written with extensions that are not known here.
        CorruptData: the chunks of a tensor do not tile it.

    """

    format = "dcp"

    def __init__(self, store: Store, *, check_crc: bool = True) -> None:
        self._store = store
        self._check_crc = check_crc
        self._kept: tuple[_Chunk, Bytes] | None = None
        self.skipped: list[str] = []
        self.tensors: dict[str, tuple[str, Shape]] = {}
        self._chunks: dict[str, list[_Chunk]] = {}
        what = f"{store.url}/.metadata"
        try:
            found = read_metadata(store.read_all(".metadata"), what)
        except FileNotFoundError:
            raise ForeignFormat(f"{what} is not there: the save did not end, or this is no such folder") from None
        plain: list[tuple[str, _Chunk]] = []
        try:
            where = {
                (i.fqn, tuple(i.offset) if i.offset is not None else None): s for i, s in found.storage_data.items()
            }
            for name, record in found.state_dict_metadata.items():
                if isinstance(record, dcp.TensorStorageMetadata):
                    self._take(str(name), record, where)
                else:
                    plain.append((str(name), _chunk((), (), where[name, None])))
        except CheckpointError:
            raise
        except Exception as error:  # anything may stand in a damaged file
            raise ForeignFormat(f"{what} contradicts itself: {type(error).__name__}: {error}") from None
        self.tree: dict[str, Any] = {}
        for name, chunk in plain:
            self._take_plain(name, chunk)

    def _take(self, name: str, record: dcp.TensorStorageMetadata, where: dict[Any, Any]) -> None:
        dtype = torch_files.dtype_name(record.properties.dtype, name)
        shape = tuple(int(dim) for dim in record.size)
        count = num_elements(shape)
        chunks = [
            _chunk(tuple(c.offsets), tuple(c.sizes), where[name, tuple(c.offsets)])
            for c in record.chunks
            if num_elements(tuple(c.sizes)) or not count
        ]
        for chunk in chunks:
            if len(chunk.offsets) != len(shape) or any(
                o < 0 or o + s > d for o, s, d in zip(chunk.offsets, chunk.sizes, shape, strict=True)
            ):
                raise CorruptData(f"{name}: chunk {chunk.offsets} {chunk.sizes} lies outside of {list(shape)}")
        offsets, sizes = (
            np.array(kind, dtype=np.int64).reshape(len(chunks), len(shape))
            for kind in ([c.offsets for c in chunks], [c.sizes for c in chunks])
        )
        held = sum(num_elements(c.sizes) for c in chunks)
        if held != count or first_overlap(offsets, sizes) is not None:
            raise CorruptData(f"{name}: its chunks hold {held} elements of {count}, or overlap", tensors=(name,))
        self.tensors[name] = (dtype, shape)
        self._chunks[name] = chunks

    def _take_plain(self, name: str, chunk: _Chunk) -> None:
        try:
            value = torch_files.load(self._slice(chunk), f"{chunk.path} ({name})", check_crc=False)
            tagged.encode(value)
        except CorruptData:
            raise
        except CheckpointError as error:
            self.skipped.append(f"{name}: {error}")
        else:
            self.tree[name] = value

    def read_flat(self, name: str, start: int, stop: int) -> Bytes:
        """Bytes of the elements [start, stop) of a tensor, put together from its chunks.

        Raises:
            KeyError: no such tensor.
            InvalidPiece: the range lies outside of it.
            CorruptData: a file is missing, cut short, or its CRC-32 differs.
            ForeignFormat: a chunk holds something else than its tensor.

        """
        dtype, shape = self.tensors[name]
        check_range(name, shape, start, stop)
        out = np.empty(stop - start, bit_type(dtype))
        for chunk in self._chunks[name]:
            starts, run = box_runs(shape, chunk.offsets, chunk.sizes)
            near = np.flatnonzero((starts < stop) & (starts + run > start))
            if not len(near) or not run:
                continue
            data = self._load(name, dtype, chunk).view(bit_type(dtype))
            for number in near:
                low, high = max(int(starts[number]), start), min(int(starts[number]) + run, stop)
                at = int(number) * run + low - int(starts[number])
                out[low - start : high - start] = data[at : at + high - low]
        return out.view(np.uint8)

    def _load(self, name: str, dtype: str, chunk: _Chunk) -> Bytes:
        if self._kept is not None and self._kept[0] is chunk:
            return self._kept[1]
        what = f"{chunk.path} ({name} at {list(chunk.offsets)})"
        value = torch_files.load(self._slice(chunk), what, check_crc=self._check_crc)
        if not isinstance(value, torch.Tensor) or torch_files.NAMES.get(value.dtype) != dtype:
            raise ForeignFormat(f"{what} is not a tensor of {dtype}")
        if value.numel() != num_elements(chunk.sizes):
            raise CorruptData(f"{what} has shape {list(value.shape)}, expected {list(chunk.sizes)}", tensors=(name,))
        data = torch_files.to_bytes(value)
        self._kept = (chunk, data)
        return data

    def _slice(self, chunk: _Chunk) -> memoryview:
        out = memoryview(bytearray(chunk.length))
        try:
            got = self._store.read_into(chunk.path, chunk.start, out)
        except (FileNotFoundError, InvalidPiece):
            raise CorruptData(f"{chunk.path} is missing", file=chunk.path) from None
        if got != chunk.length:
            raise CorruptData(
                f"{chunk.path} is cut short ({got} of {chunk.length} bytes from {chunk.start} on)", file=chunk.path
            )
        return out


def _chunk(offsets: Shape, sizes: Shape, info: Any) -> _Chunk:
    if getattr(info, "transform_descriptors", None):
        raise ForeignFormat(f"it was written with extensions ({info.transform_descriptors}), which are not known here")
    path, start, length = str(info.relative_path), int(info.offset), int(info.length)
    if start < 0 or length < 0:
        raise ForeignFormat(f"{path}: bytes from {start}, {length} of them")
    return _Chunk(tuple(map(int, offsets)), tuple(map(int, sizes)), path, start, length)


class MegatronSource(DcpSource):
    """Megatron-Core's ``torch_dist``: DCP files, ``metadata.json`` as the mark of completeness, ``common.pt``.

    Of ``common.pt`` what is plain comes into ``tree["common"]``; the arguments, a namespace, as a table.
    """

    format = "megatron"

    def __init__(self, store: Store, *, check_crc: bool = True) -> None:
        try:
            told = json.loads(store.read_all("metadata.json"))
            backend = told["sharded_backend"]
        except FileNotFoundError:
            raise ForeignFormat(f"{store.url}/metadata.json is not there: the save did not end") from None
        except (ValueError, KeyError, TypeError) as error:
            raise ForeignFormat(f"{store.url}/metadata.json is not Megatron's: {error!r}") from None
        if backend != "torch_dist":
            raise ForeignFormat(f"{store.url} was saved with sharded_backend {backend!r}, expected 'torch_dist'")
        super().__init__(store, check_crc=check_crc)
        try:
            raw = store.read_all("common.pt")
            with torch.serialization.safe_globals([argparse.Namespace]):
                common = torch_files.load(raw, "common.pt", check_crc=check_crc)
        except (FileNotFoundError, ForeignFormat) as error:
            self.skipped.append(f"common.pt: {error}")
            return
        kept: dict[str, Any] = {}
        for key, value in common.items() if isinstance(common, dict) else ():
            self._keep_plain(str(key), vars(value) if isinstance(value, argparse.Namespace) else value, kept)
        self.tree["common"] = kept

    def _keep_plain(self, key: str, value: Any, kept: dict[str, Any]) -> None:
        """Plain values as they are; of a table, those entries that are plain."""
        try:
            tagged.encode(value)
            kept[key] = value
        except CheckpointError:
            if not isinstance(value, dict):
                self.skipped.append(f"common.pt: {key} is a {type(value).__name__}")
                return
            inner: dict[str, Any] = {}
            for name, one in value.items():
                try:
                    tagged.encode(one)
                    inner[str(name)] = one
                except CheckpointError:
                    self.skipped.append(f"common.pt: {key}.{name} is a {type(one).__name__}")
            kept[key] = inner
