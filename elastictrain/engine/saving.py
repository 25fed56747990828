"""Between live blocks and what is stored: names, pieces, digests, restoring. Any layout writes, any layout reads.

Names: `model/<parameter>` (fp32 masters), `buffer/<buffer>`, `counter/<integer buffer>`, `ema/<parameter>`,
`optim/<parameter>/<key>`. Numbers an optimizer keeps outside tensors travel in the manifest's tree.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from elastictrain.engine.flat import FlatModel
from elastictrain.engine.held import HeldState
from elastictrain.engine.space import Block
from elastictrain.engine.to_host import is_staged
from elastictrain.errors import CorruptCheckpoint
from elastictrain.job import Checkpoint
from elastictrain.layout import Shard
from elastictrain_checkpoint import (
    CheckpointError,
    Found,
    Piece,
    Reader,
    Store,
    block_hashes,
    combine_digest,
    find,
    load,
)

NAMES = {
    torch.float32: "F32", torch.float64: "F64", torch.bfloat16: "BF16", torch.float16: "F16", torch.int64: "I64",
    torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip
TYPES = {name: dtype for dtype, name in NAMES.items()}
Copier = Callable[[Mapping[str, torch.Tensor]], Mapping[str, torch.Tensor]]


def as_buffer(tensor: torch.Tensor) -> memoryview:
    """The bytes of a tensor as a flat read-only-in-spirit view (a copy from a device)."""
    flat = tensor.detach().to("cpu").contiguous().reshape(-1)
    return memoryview(flat.view(torch.uint8).numpy())  # type: ignore[arg-type]


def weight_name(kind: str, name: str) -> str:
    """Under which a parameter or floating buffer of this kind is stored."""
    return f"{'buffer' if kind == 'buffer' else 'model'}/{name}"


def stored_name(block: Block, key: str) -> str:
    name = block.entry.name
    if key == "master":
        return weight_name(block.entry.kind, name)
    return f"ema/{name}" if key == "ema" else f"optim/{name}/{key.removeprefix('optim/')}"


@dataclass(slots=True)
class Owned:
    """What one worker contributes to a checkpoint or a digest: pieces of tensors, and plain numbers."""

    pieces: list[Piece] = field(default_factory=list)
    numbers: dict[str, Any] = field(default_factory=dict)
    copies: set[str] = field(default_factory=set)
    """Names of tensors that lie on a device: their pieces are copies."""
    to_host: Copier | None = None
    """Begins to copy what lies on a device, and gives what will hold it; without it that is copied at once."""
    is_staged: bool = False
    """Whether it has: some copies may be read only when it says that they are there."""

    _staged: list[tuple[torch.Tensor, list[memoryview], int]] = field(default_factory=list, repr=False)
    _ends: dict[tuple[str, str], tuple[int, list[memoryview]]] = field(default_factory=dict, repr=False)

    def add(self, name: str, shape: Sequence[int], start: int, value: torch.Tensor) -> None:
        """Take up elements of a tensor of `shape` from `start` on. What follows on the last ones of that name joins
        their piece: a pack holds one box of a tensor at most, so a piece for every block would be a file for every
        block.
        """
        dtype = NAMES[value.dtype]
        stop, buffers = self._ends.get((name, dtype), (-1, []))
        if stop != start:
            buffers = []
            self.pieces.append(Piece(name, dtype, tuple(shape), start, buffers))
        staged = self.to_host is not None and is_staged(value)
        if staged or value.device.type != "cpu":
            self.copies.add(name)
        if staged:
            self._staged.append((value, buffers, len(buffers)))
            buffers.append(memoryview(b""))  # `stage` puts the copy here
        else:
            buffers.append(as_buffer(value))
        self._ends[name, dtype] = (start + value.numel(), buffers)

    def stage(self) -> None:
        """Begin to copy what lies on a device, all of it in one call; nothing is added afterwards."""
        if self._staged:
            assert self.to_host is not None
            hosts = self.to_host({str(number): value for number, (value, _, _) in enumerate(self._staged)})
            for number, (_, buffers, place) in enumerate(self._staged):
                buffers[place] = as_buffer(hosts[str(number)])
            self._staged, self.is_staged = [], True


def owned_state(
    flat: FlatModel,
    held: HeldState,
    shards: Iterable[Shard],
    *,
    with_counters: bool,
    to_host: Copier | None = None,
) -> Owned:
    """The state of the blocks that this worker owns, without a copy on the CPU. Neighbouring blocks of one tensor are
    one piece of several buffers, since each block lies in memory of its own. `to_host`: see `Owned`.
    """
    owned = Owned(to_host=to_host)
    for shard in sorted(shards, key=lambda shard: shard.lo):
        for number in range(shard.lo, shard.hi):
            block = flat.space.blocks[number]
            for key, value in held.tensors(number):
                name = stored_name(block, key)
                if not isinstance(value, torch.Tensor):
                    owned.numbers[name] = value
                elif value.dim() == 0 or (flat.space.whole_parameters and value.numel() != block.elements):
                    if block.offset == 0:  # the same in every block of a parameter: its first block speaks for all
                        owned.add(name, value.shape, 0, value)
                else:
                    owned.add(name, block.entry.shape, block.offset, value)
    if with_counters:
        for name, value in flat.counters.items():
            owned.add(f"counter/{name}", value.shape, 0, value)
    owned.stage()
    return owned


# --- digest of the live state ---


def digest_share(owned: Owned) -> bytes:
    """This worker's cell hashes, to be gathered; JSON."""
    hashed = [[p.name, p.dtype, list(p.shape), p.start, base64.b64encode(_hashes(p)).decode()] for p in owned.pieces]
    return json.dumps(hashed).encode()


def _hashes(piece: Piece) -> bytes:
    return block_hashes(piece.data, TYPES[piece.dtype].itemsize)


def combine_shares(shares: Sequence[bytes], aliases: Mapping[str, str]) -> str:
    """The digest of the whole state from everybody's share; independent of who owned what."""
    parts: dict[str, list[tuple[int, bytes]]] = {}
    facts: dict[str, tuple[str, list[int]]] = {}
    for share in shares:
        for name, dtype, shape, start, hashes in json.loads(share):
            facts[name] = (dtype, shape)
            parts.setdefault(name, []).append((start, base64.b64decode(hashes)))
    tensors = {name: (*facts[name], b"".join(h for _, h in sorted(runs))) for name, runs in parts.items()}
    return combine_digest(tensors, stored_aliases(aliases))


def stored_aliases(aliases: Mapping[str, str]) -> dict[str, str]:
    return {f"model/{name}": f"model/{first}" for name, first in aliases.items()}


# --- saving ---


def open_store(settings: Checkpoint) -> Store:
    """The store that a job commits its checkpoints to."""
    return Store(settings.path, storage_options=settings.storage_options)


def open_stores(settings: Checkpoint) -> tuple[Store, ...]:
    """That one, and those that checkpoints are copied to, nearest first."""
    copies = (Store(copy.path, storage_options=copy.storage_options) for copy in settings.copy_to)
    return (open_store(settings), *copies)


# --- restoring ---


def find_checkpoint(settings: Checkpoint, step: int) -> Found:
    """One committed step, and the stores to read it from. Raises CorruptCheckpoint when it cannot be believed, OSError
    when it is whole in no store that answers.
    """
    stores = open_stores(settings)
    try:
        return find(stores, step) if settings.copy_to else Found(load(stores[0], step), stores)
    except CheckpointError as error:
        raise CorruptCheckpoint(f"checkpoint step {step} in {settings.path}: {error}") from error


def open_checkpoint(settings: Checkpoint, step: int) -> Reader:
    """A reader of one committed step: of every block from the first store that has it whole. Raises as
    `find_checkpoint`.
    """
    return find_checkpoint(settings, step).reader()
