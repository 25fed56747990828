"""The files of torch.distributed.checkpoint, streamed into any store. Imports torch.

DCP's own writer takes a state dict that is in memory, syncs the whole host on remote file systems, and cannot stream;
its format is small: ``torch.save`` files one after the other, and a pickled `Metadata` that says where each lies. Only
classes of torch are pickled.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch.distributed.checkpoint import filesystem
from torch.distributed.checkpoint import metadata as dcp

from elastictrain_checkpoint.convert import torch_files
from elastictrain_checkpoint.convert.undo import removing
from elastictrain_checkpoint.source import Source, read_whole, tensor_bytes
from elastictrain_checkpoint.store import Store

VERSION = "1.0.0"
BLOCK_BYTES = 16 << 20

Path = tuple[Any, ...]


def write(
    source: Source,
    store: Store,
    places: Mapping[str, Path],
    extras: Mapping[Path, Any],
    odd: Mapping[str, str],
    file_bytes: int,
    progress: Callable[[int, int], None] | None,
) -> int:
    """See `elastictrain_checkpoint.convert.export_dcp`, which checks what is asked for."""
    records: dict[str, Any] = {}
    stored: dict[dcp.MetadataIndex, Any] = {}
    total = sum(tensor_bytes(source, name) for name in places)
    done = 0
    waiting = sorted(places)
    for name in waiting:  # all types are looked at before anything is written
        torch_files.to_tensor(_nothing(), source.tensors[name][0], (0,), name)
    number, made = 0, list[str]()
    while waiting or (extras and not number):
        file = f"__0_{number}.distcp"

        def stream(file: str = file, first: bool = number == 0) -> Iterator[memoryview]:
            nonlocal done
            at = 0
            for place, value in extras.items() if first else ():
                raw = _saved(value)
                index = dcp.MetadataIndex(_flat(place))
                records[index.fqn] = dcp.BytesStorageMetadata()
                stored[index] = filesystem._StorageInfo(file, at, len(raw))
                at += len(raw)
                yield from _blocks(raw)
            while waiting and at < file_bytes:
                name = waiting.pop(0)
                dtype, shape = source.tensors[name]
                data = read_whole(source, name)
                tensor = torch_files.to_tensor(data if data.flags.writeable else data.copy(), dtype, tuple(shape), name)
                if name in odd:  # the last dimension is that of an element's bytes
                    tensor = tensor.view(getattr(torch, odd[name])).reshape(shape[:-1])
                raw = _saved(tensor)
                index, records[_flat(places[name])] = _record(_flat(places[name]), tensor)
                stored[index] = filesystem._StorageInfo(file, at, len(raw))
                at += len(raw)
                del data, tensor
                yield from _blocks(raw)
                done += tensor_bytes(source, name)
                if progress:
                    progress(done, total)

        with removing(store, made):
            store.create(file, stream())
        made.append(file)
        number += 1
    planner = {_flat(place): place for place in [*places.values(), *extras]}
    found = dcp.Metadata(records, planner_data=planner, storage_data=stored)
    found.storage_meta = dcp.StorageMeta()
    found.version = VERSION
    store.publish(".metadata", pickle.dumps(found))
    return total


def _flat(place: Path) -> str:
    return ".".join(map(str, place))


def _nothing() -> Any:
    return torch.empty(0, dtype=torch.uint8).numpy()


def _record(name: str, tensor: torch.Tensor) -> tuple[dcp.MetadataIndex, dcp.TensorStorageMetadata]:
    zero = torch.Size([0] * tensor.dim())
    chunk = dcp.ChunkStorageMetadata(offsets=zero, sizes=tensor.size())
    properties = dcp.TensorProperties.create_from_tensor(tensor)
    return dcp.MetadataIndex(name, zero, 0), dcp.TensorStorageMetadata(properties, tensor.size(), [chunk])


def _saved(value: Any) -> memoryview:
    out = io.BytesIO()
    torch.save(value, out)
    return out.getbuffer()


def _blocks(raw: memoryview) -> Iterator[memoryview]:
    for at in range(0, len(raw), BLOCK_BYTES):
        yield raw[at : at + BLOCK_BYTES]
