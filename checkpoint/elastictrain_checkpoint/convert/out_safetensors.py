"""Writing safetensors that any tool of the Hugging Face world opens: streamed, sharded, with an index."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from elastictrain_checkpoint.cast import FLOATS
from elastictrain_checkpoint.convert.in_safetensors import INDEX
from elastictrain_checkpoint.convert.undo import removing
from elastictrain_checkpoint.dtypes import item_bytes
from elastictrain_checkpoint.errors import ForeignFormat, InvalidMapping
from elastictrain_checkpoint.mapping import Mapped, apply_rules
from elastictrain_checkpoint.source import Source, read_blocks, tensor_bytes
from elastictrain_checkpoint.store import Store
from elastictrain_checkpoint.views import as_dtype

Progress = Callable[[int, int], None]
DEFAULT_SHARD_BYTES = 5_000_000_000
"""As Hugging Face libraries split."""


@dataclass(frozen=True)
class Exported:
    """What was written.

    Attributes:
        files: names, in order; the index last.
        tensors: number of tensors.
        size_bytes: bytes of their data.

    """

    files: tuple[str, ...]
    tensors: int
    size_bytes: int


def plan_shards(sizes: Mapping[str, int], shard_bytes: int) -> list[list[str]]:
    """Share tensors out to shards in the order given, each filled up to ``shard_bytes``; a larger tensor has one of
    its own. Pure.
    """
    shards: list[list[str]] = []
    held = 0
    for name, size in sizes.items():
        if not shards or (shards[-1] and held + size > shard_bytes):
            shards.append([])
            held = 0
        shards[-1].append(name)
        held += size
    return shards or [[]]


def export_safetensors(
    source: Source,
    store: Store,
    *,
    shard_bytes: int = DEFAULT_SHARD_BYTES,
    cast: str | None = None,
    metadata: Mapping[str, str] | None = None,
    progress: Progress | None = None,
) -> Exported:
    """Write a source as ``model.safetensors``, or as shards with an index, which is written last.

    Memory: a block of 16 MiB (a whole tensor where a mapping moves its elements about).

    Args:
        source: what to write, names as they shall be.
        store: an empty folder; nothing is overwritten.
        shard_bytes: most bytes in a file.
        cast: floating-point type ("BF16", …) that every floating-point tensor is stored as.
        metadata: more entries for the header.
        progress: called with (bytes done, bytes in all).

    Raises:
        FileExistsError: a file is there.
        InvalidMapping: no such cast.
        ForeignFormat: a name that the format reserves, or nothing to write.
        CorruptData: stored bytes are not those that were written; the files that were written are removed.

    """
    seen = source if cast is None else cast_floats(source, cast)
    if not seen.tensors:
        raise ForeignFormat("there is no tensor to write; check the rules of the mapping")
    if "__metadata__" in seen.tensors:
        raise ForeignFormat("a tensor cannot be called __metadata__: the format reserves that name")
    sizes = {name: tensor_bytes(seen, name) for name in sorted(seen.tensors)}
    shards = plan_shards(sizes, shard_bytes)
    total, done = sum(sizes.values()), 0
    files = _file_names(len(shards))
    clash = sorted(set(store.list()).intersection([*files, INDEX]))
    if clash:
        raise FileExistsError(f"{store.url} already holds {clash[0]}; export into an empty folder")
    made: list[str] = []
    for file, names in zip(files, shards, strict=True):

        def moved(count: int, before: int = done) -> None:
            if progress:
                progress(before + count, total)

        with removing(store, made):
            store.create(file, _stream(seen, names, {"format": "pt", **(metadata or {})}, moved))
        made.append(file)
        done += sum(sizes[name] for name in names)
    if len(files) > 1:
        index = {
            "metadata": {"total_size": total},
            "weight_map": {name: file for file, names in zip(files, shards, strict=True) for name in names},
        }
        store.publish(INDEX, json.dumps(index, indent=2, sort_keys=True).encode() + b"\n")
        files = (*files, INDEX)
    return Exported(files, len(sizes), total)


def cast_floats(source: Source, dtype: str) -> Mapped:
    """A source with every floating-point tensor of more than a byte as ``dtype``; others as they are.

    Raises:
        InvalidMapping: no such type.

    """
    if dtype not in FLOATS:
        raise InvalidMapping(f"cast={dtype!r} is not one of {', '.join(FLOATS)}")
    views = apply_rules(source.tensors, [])
    return Mapped.of(source, {n: as_dtype(view, dtype) if view.dtype in FLOATS else view for n, view in views.items()})


def _file_names(count: int) -> tuple[str, ...]:
    if count == 1:
        return ("model.safetensors",)
    return tuple(f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1))


def _stream(
    source: Source, names: Sequence[str], metadata: Mapping[str, str], moved: Callable[[int], None]
) -> Iterator[memoryview]:
    # Larger elements first: every tensor is aligned to its elements, as the reference writer has it.
    order = sorted(names, key=lambda name: (-item_bytes(source.tensors[name][0]), name))
    header: dict[str, object] = {"__metadata__": dict(metadata)}
    at = 0
    for name in order:
        dtype, shape = source.tensors[name]
        size = tensor_bytes(source, name)
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    yield memoryview(struct.pack("<Q", len(text)) + text)
    done = 0
    for name in order:
        for block in read_blocks(source, name):
            yield block.data
            done += len(block)
            moved(done)
