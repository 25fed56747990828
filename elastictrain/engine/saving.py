"""Between live blocks and what is stored: names, pieces, digests, restoring. Any layout writes, any layout reads.

Names: `model/<parameter>` (fp32 masters), `buffer/<buffer>`, `counter/<integer buffer>`, `ema/<parameter>`,
`optim/<parameter>/<key>`. Numbers an optimizer keeps outside tensors travel in the manifest's tree.
"""

from __future__ import annotations

import base64
import json
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import torch

from elastictrain.engine.flat import FlatModel
from elastictrain.engine.held import HeldState
from elastictrain.engine.space import Block
from elastictrain.errors import CheckpointMismatch, ClusterError, CorruptCheckpoint
from elastictrain.job import Checkpoint
from elastictrain.layout import Shard
from elastictrain_checkpoint import (
    AlreadyCommitted,
    CheckpointError,
    CorruptData,
    Part,
    Piece,
    Reader,
    StaleGeneration,
    Store,
    block_hashes,
    combine_digest,
    commit,
    discard,
    list_steps,
    load,
    prune,
)
from elastictrain_checkpoint.errors import SaveFailed
from elastictrain_checkpoint.handle import SaveHandle
from elastictrain_checkpoint.lazy import LazySaver

_NAMES = {
    torch.float32: "F32", torch.float64: "F64", torch.bfloat16: "BF16", torch.float16: "F16", torch.int64: "I64",
    torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip
_TYPES = {name: dtype for dtype, name in _NAMES.items()}


def as_buffer(tensor: torch.Tensor) -> memoryview:
    """The bytes of a tensor as a flat read-only-in-spirit view (a copy from a device)."""
    flat = tensor.detach().to("cpu").contiguous().reshape(-1)
    return memoryview(flat.view(torch.uint8).numpy())  # type: ignore[arg-type]


def _stored_name(block: Block, key: str) -> str:
    name = block.entry.name
    if key == "master":
        return f"{'buffer' if block.entry.kind == 'buffer' else 'model'}/{name}"
    return f"ema/{name}" if key == "ema" else f"optim/{name}/{key.removeprefix('optim/')}"


@dataclass(slots=True)
class Owned:
    """What one worker contributes to a checkpoint or a digest: pieces of tensors, and plain numbers."""

    pieces: list[Piece] = field(default_factory=list)
    numbers: dict[str, Any] = field(default_factory=dict)
    copies: set[str] = field(default_factory=set)
    """Names of tensors that lie on a device: their pieces are copies already."""

    _ends: dict[tuple[str, str], tuple[int, list[memoryview]]] = field(default_factory=dict, repr=False)

    def add(self, name: str, shape: Sequence[int], start: int, value: torch.Tensor) -> None:
        """Take up elements of a tensor of `shape` from `start` on. What follows on the last ones of that name joins
        their piece: a pack holds one box of a tensor at most, so a piece for every block would be a file for every
        block.
        """
        dtype = _NAMES[value.dtype]
        stop, buffers = self._ends.get((name, dtype), (-1, []))
        if stop != start:
            buffers = []
            self.pieces.append(Piece(name, dtype, tuple(shape), start, buffers))
        if value.device.type != "cpu":
            self.copies.add(name)
        buffers.append(as_buffer(value))
        self._ends[name, dtype] = (start + value.numel(), buffers)


def owned_state(flat: FlatModel, held: HeldState, shards: Iterable[Shard], *, with_counters: bool) -> Owned:
    """The state of the blocks that this worker owns, without a copy on the CPU. Neighbouring blocks of one tensor are
    one piece of several buffers, since each block lies in memory of its own.
    """
    owned = Owned()
    for shard in sorted(shards, key=lambda shard: shard.lo):
        for number in range(shard.lo, shard.hi):
            block = flat.space.blocks[number]
            for key, value in held.tensors(number):
                name = _stored_name(block, key)
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
    return owned


# --- digest of the live state ---


def digest_share(owned: Owned) -> bytes:
    """This worker's cell hashes, to be gathered; JSON."""
    hashed = [[p.name, p.dtype, list(p.shape), p.start, base64.b64encode(_hashes(p)).decode()] for p in owned.pieces]
    return json.dumps(hashed).encode()


def _hashes(piece: Piece) -> bytes:
    return block_hashes(piece.data, _TYPES[piece.dtype].itemsize)


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
    """The store of a job's checkpoints."""
    return Store(settings.path, storage_options=settings.storage_options)


STORE_DEADLINE_S = 600.0
"""As long as peers wait for one that stores."""


@dataclass(slots=True)
class Writing:
    """One worker's share of a checkpoint, on its way to the storage."""

    saver: Saver
    handle: SaveHandle
    attempt: str
    numbers: dict[str, Any]

    @property
    def done(self) -> bool:
        """Whether `share` returns, or raises, at once."""
        return self.handle.done

    def share(self) -> dict[str, Any]:
        """The share as JSON data, durable. Raises ClusterError when it could not be written."""
        return self.saver.share_of(self)


class Saver:
    """Writes this worker's share of a checkpoint, and commits it when all shares are known to be durable."""

    def __init__(self, settings: Checkpoint) -> None:
        self._settings = settings
        self._store = open_store(settings)
        self._lazy = LazySaver(self._store)

    def begin(self, owned: Owned, *, step: int, generation: int, worker: int) -> Writing:
        """Begin to write this worker's packs, in the background: call `before_apply` before the state changes."""
        # Every generation is an attempt of its own, so nothing is ever overwritten; the suffix keeps a worker apart
        # from itself when it writes the same step again after the job went back.
        writer = f"w{worker:04d}-{uuid.uuid4().hex[:6]}"
        attempt = f"g{generation:06d}"
        with self._storage(step):
            # Each name has pieces of one kind: a tensor lies on a device, or on the host.
            handle = self._lazy.save(owned.pieces, step=step, attempt=attempt, writer=writer, stable=owned.copies)
        return Writing(self, handle, attempt, dict(owned.numbers))

    def before_apply(self) -> None:
        """The state is about to change: copy what is not written yet, up to a fifth of all; wait for what is beyond."""
        self._lazy.before_mutation()

    def give_up(self) -> list[int]:
        """The generation is over, and what it still writes will not be whole. Gives the steps."""
        return [handle.step for handle in self._lazy.give_up()]

    def share_of(self, writing: Writing) -> dict[str, Any]:
        """See `Writing.share`."""
        with self._storage(writing.handle.step):
            try:
                part: Part = writing.handle.result(STORE_DEADLINE_S)
            except SaveFailed as error:
                raise error.__cause__ or error from None  # what the storage said
        return {"attempt": writing.attempt, "part": part.to_json(), "numbers": writing.numbers}

    @contextmanager
    def _storage(self, step: int) -> Iterator[None]:
        """Storage that fails is the cluster's to mend, not the recipe's."""
        try:
            yield
        except (OSError, CheckpointError) as error:
            raise ClusterError(
                f"checkpoint step {step} cannot be stored in checkpoint.path={self._settings.path!r}: "
                f"{type(error).__name__}: {error}"
            ) from error

    def commit(
        self,
        shares: Sequence[Mapping[str, Any]],
        *,
        step: int,
        generation: int,
        tree: Mapping[str, Any],
        aliases: Mapping[str, str],
        info: Mapping[str, Any],
    ) -> str:
        """Create the manifest: from here on the checkpoint exists. Returns its path."""
        numbers = {name: value for share in shares for name, value in share["numbers"].items()}
        facts: dict[str, Any] = {
            "step": step,
            "attempt": shares[0]["attempt"],
            "generation": generation,
            "parts": [Part.from_json(share["part"]) for share in shares],
            "tree": {**tree, "numbers": numbers},
            "aliases": stored_aliases(aliases),
            "info": dict(info),
        }
        with self._storage(step):
            try:
                manifest = commit(self._store, **facts)
            except StaleGeneration:
                raise
            except (AlreadyCommitted, CorruptData):
                # The job went back before this step, so what is stored there is damaged or has not happened. The new
                # packs lie in the same folder.
                discard(self._store, step, keep_attempt=facts["attempt"])
                manifest = commit(self._store, **facts)
        with suppress(OSError, CheckpointError):  # what cannot be cleaned away now is cleaned away next time
            prune(self._store, keep=self._settings.keep, verified={step}, current=step)
        return f"{self._settings.path.rstrip('/')}/step-{manifest.step:08d}"

    def discard_after(self, step: int) -> None:
        """Remove every checkpoint newer than `step`: what it holds is not to be trusted, and nobody may resume it."""
        with self._storage(step):
            for newer in [found for found in list_steps(self._store) if found > step]:
                discard(self._store, newer)


# --- restoring ---


def open_checkpoint(settings: Checkpoint, step: int) -> Reader:
    """A reader of one committed step. Raises CorruptCheckpoint when it cannot be believed."""
    store = open_store(settings)
    try:
        return Reader(store, load(store, step))
    except CheckpointError as error:
        raise CorruptCheckpoint(f"checkpoint step {step} in {settings.path}: {error}") from error


def model_differences(flat: FlatModel, reader: Reader) -> list[str]:
    """What the job's model has and the checkpoint has not, and the other way round; sentences."""
    wanted = {_stored_name(b, "master"): list(b.entry.shape) for b in flat.space.blocks}
    wanted |= {f"counter/{name}": list(value.shape) for name, value in flat.counters.items()}
    wanted |= {alias: wanted[first] for alias, first in stored_aliases(flat.space.aliases).items()}
    stored = {n: list(s) for n, (_, s) in reader.tensors.items() if n.split("/")[0] in ("model", "buffer", "counter")}
    found = [f"{n} {wanted[n]} is in the model but not in the checkpoint" for n in wanted if n not in stored]
    found += [f"{n} {stored[n]} is in the checkpoint but not in the model" for n in stored if n not in wanted]
    found += [
        f"{n} has shape {wanted[n]} in the model and {stored[n]} in the checkpoint"
        for n in wanted
        if n in stored and stored[n] != wanted[n]
    ]
    return found


def optimizer_differences(held: HeldState, reader: Reader) -> list[str]:
    """What the job's optimizer needs to find and the checkpoint has not; sentences. A checkpoint without any optimizer
    state (imported weights) is a fresh start and differs in nothing.
    """
    found: dict[str, set[str]] = {}
    for stored in [*reader.tensors, *reader.tree.get("numbers", {})]:
        if stored.startswith("optim/"):
            name, _, key = stored.removeprefix("optim/").rpartition("/")
            found.setdefault(name, set()).add(key)
    if not found:
        return []
    return [
        f"optimizer {type(held.optimizer).__name__} needs {', '.join(sorted(wanted))} for {name}, the checkpoint has "
        f"{', '.join(sorted(found.get(name, ()))) or 'nothing'}"
        for name, wanted in held.state_keys().items()
        if wanted - found.get(name, set())
    ]


def restore(flat: FlatModel, held: HeldState, reader: Reader) -> None:
    """Fill every held block, and the counters, from a checkpoint; the parameters of other blocks come by gather.

    Raises CheckpointMismatch listing what differs, and CorruptCheckpoint naming what is damaged.
    """
    problems = model_differences(flat, reader) or optimizer_differences(held, reader)
    if problems:
        shown = "\n  ".join(problems[:20]) + (f"\n  and {len(problems) - 20} more" if len(problems) > 20 else "")
        raise CheckpointMismatch(
            f"the checkpoint does not belong to this job:\n  {shown}\n"
            "use another checkpoint.path, or the model and the optimizer it was made with"
        )
    numbers = reader.tree.get("numbers", {})
    try:
        held.optimizer.state.clear()
        for number in held.masters:
            values = dict(_stored_values(flat.space.blocks[number], reader, flat.space.whole_parameters))
            values |= _numbers_of(flat.space.blocks[number], numbers)
            held.load(number, {k: held.placed(k, v) for k, v in values.items()})
            held.flat.publish(number, held.masters[number])
        for name, counter in flat.counters.items():
            counter.copy_(_tensor(reader, f"counter/{name}", 0, counter.numel()).view(counter.shape))
    except CorruptData as error:
        raise CorruptCheckpoint(str(error)) from error


def _stored_values(block: Block, reader: Reader, whole_parameters: bool) -> Iterator[tuple[str, torch.Tensor]]:
    span = (block.offset, block.offset + block.elements)
    yield "master", _tensor(reader, _stored_name(block, "master"), *span)
    if block.entry.kind != "param":
        return
    if f"ema/{block.entry.name}" in reader.tensors:
        yield "ema", _tensor(reader, f"ema/{block.entry.name}", *span)
    prefix = f"optim/{block.entry.name}/"
    for name in _optimizer_names(reader).get(block.entry.name, ()):
        shape = reader.tensors[name][1]
        same = tuple(shape) == block.entry.shape
        key = f"optim/{name.removeprefix(prefix)}"
        if not same:
            yield key, _tensor(reader, name, 0, int(torch.Size(shape).numel())).view(tuple(shape))
        else:
            value = _tensor(reader, name, *span)
            yield key, value.view(block.entry.shape) if whole_parameters else value


def _optimizer_names(reader: Reader) -> dict[str, list[str]]:
    cached: dict[str, list[str]] | None = getattr(reader, "_elastictrain_optimizer_names", None)
    if cached is None:
        cached = {}
        for name in reader.tensors:
            if name.startswith("optim/"):
                cached.setdefault(name.removeprefix("optim/").rpartition("/")[0], []).append(name)
        reader._elastictrain_optimizer_names = cached  # type: ignore[attr-defined]
    return cached


def _numbers_of(block: Block, numbers: Mapping[str, Any]) -> dict[str, Any]:
    prefix = f"optim/{block.entry.name}/"
    if block.entry.kind != "param":
        return {}
    return {f"optim/{n.removeprefix(prefix)}": v for n, v in numbers.items() if n.startswith(prefix)}


def _tensor(reader: Reader, name: str, start: int, stop: int) -> torch.Tensor:
    dtype = _TYPES[reader.tensors[name][0]]
    out = torch.empty(stop - start, dtype=dtype)
    if out.numel():
        reader.read_flat(name, start, stop, out=as_buffer(out))
    return out.view(()) if not reader.tensors[name][1] else out
