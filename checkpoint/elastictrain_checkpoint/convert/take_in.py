"""A whole checkpoint of any source into ours, pack by pack."""

from __future__ import annotations

import contextlib
import uuid
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from elastictrain_checkpoint.commit import commit
from elastictrain_checkpoint.errors import AlreadyCommitted, InvalidMapping, StateMismatch
from elastictrain_checkpoint.manifest import Manifest
from elastictrain_checkpoint.pack import PackWriter, Piece
from elastictrain_checkpoint.part import Part
from elastictrain_checkpoint.paths import manifest_path, step_folder
from elastictrain_checkpoint.source import Source, read_blocks, read_whole, tensor_bytes
from elastictrain_checkpoint.store import Store

Progress = Callable[[int, int], None]
DEFAULT_PACK_BYTES = 256 << 20


def import_checkpoint(
    source: Source,
    store: Store,
    *,
    step: int = 0,
    attempt: str | None = None,
    tree: Any = None,
    aliases: Mapping[str, str] | None = None,
    info: Mapping[str, Any] | None = None,
    pack_bytes: int = DEFAULT_PACK_BYTES,
    progress: Progress | None = None,
) -> Manifest:
    """Write every tensor of a source as the checkpoint of ``step``; committed at generation 0, below that of any run.

    Memory: one pack, or one tensor where that is larger. If reading or writing fails, what was written is removed.

    Args:
        source: from where, names as a run expects them (see `elastictrain_checkpoint.convert.default_rules`).
        store: where to.
        step: the step that the state belongs to.
        attempt: as for `PackWriter`; random if not given.
        tree: state that is not tensors; that of the source, under "foreign", if not given.
        aliases: further name → tensor it is tied to. A name that the source has too must be equal byte for byte; it
            is then stored once.
        info: facts for the manifest.
        pack_bytes: size of the packs.
        progress: called with (bytes done, bytes in all).

    Raises:
        AlreadyCommitted: the step is there; nothing was read.
        StateMismatch: tensors that should be tied differ.
        InvalidMapping: an alias of a tensor that is not there.
        ForeignFormat, CorruptData: the source cannot be read.
        OSError: storage failed.

    """
    tied = dict(aliases or {})
    if store.size(manifest_path(step)) is not None:
        raise AlreadyCommitted(f"{store.url} has a checkpoint of step {step}; choose another step or another store")
    _check_ties(source, tied)
    chosen = attempt or f"import-{uuid.uuid4().hex[:8]}"
    writer = PackWriter(store, step=step, attempt=chosen, writer="import", pack_bytes=pack_bytes)
    names = [name for name in source.tensors if name not in tied]
    total = sum(tensor_bytes(source, name) for name in names)
    parts: list[Part] = []
    done = 0
    try:
        for batch in _batches(source, names, pack_bytes):
            parts.append(writer.write([_piece(source, name) for name in batch]))
            done += sum(tensor_bytes(source, name) for name in batch)
            if progress:
                progress(done, total)
    except BaseException:
        _remove(store, f"{step_folder(step)}/{chosen}")
        raise
    told = {"foreign": source.tree} if tree is None and source.tree else tree
    return commit(store, step=step, attempt=chosen, generation=0, parts=parts, tree=told, aliases=tied, info=info or {})


def _batches(source: Source, names: list[str], pack_bytes: int) -> Iterator[list[str]]:
    batch: list[str] = []
    held = 0
    for name in names:
        size = tensor_bytes(source, name)
        if batch and held + size > pack_bytes:
            yield batch
            batch, held = [], 0
        batch.append(name)
        held += size
    if batch:
        yield batch


def _piece(source: Source, name: str) -> Piece:
    dtype, shape = source.tensors[name]
    return Piece(name, dtype, tuple(shape), 0, read_whole(source, name))


def _check_ties(source: Source, tied: Mapping[str, str]) -> None:
    for alias, target in tied.items():
        if target not in source.tensors or target in tied:
            raise InvalidMapping(f"alias {alias!r} → {target!r}: there is no tensor {target!r} to tie it to")
        if alias not in source.tensors:
            continue
        same = source.tensors[alias] == source.tensors[target] and all(
            np.array_equal(one, two)
            for one, two in zip(read_blocks(source, alias), read_blocks(source, target), strict=True)
        )
        if not same:
            raise StateMismatch(f"{alias} and {target} differ, so they cannot be tied", different=(alias,))


def _remove(store: Store, folder: str) -> None:
    """Best effort: what stays is garbage that `prune` removes later."""
    with contextlib.suppress(Exception):
        for name in store.list(folder):
            store.remove(f"{folder}/{name}")
        store.remove(folder)
