"""From a checkpoint back to live blocks: whatever layout wrote it, whatever layout reads it.

The members of a generation restore together. Which elements each of them needs follows from the layout and the manifest
alone, so all find the same plan (`elastictrain_checkpoint.reshard`) without asking; every stored byte is read, and
checked, by one member and handed on: to the owner of its block, and to the mirror. A worker that is alone reads by
itself. Nothing here is sealed: who gives up on the way leaves a state that no layout counts on.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from numpy.typing import NDArray

from elastictrain.engine.collective import GroupSet
from elastictrain.engine.flat import FlatModel
from elastictrain.engine.held import HeldState
from elastictrain.engine.saving import TYPES, as_buffer, find_checkpoint, open_stores, stored_aliases, stored_name
from elastictrain.engine.space import Block
from elastictrain.errors import CheckpointMismatch, ClusterError, CorruptCheckpoint
from elastictrain.job import Checkpoint
from elastictrain_checkpoint import CheckpointError, CorruptData, Found, Reader, Request
from elastictrain_checkpoint.boxes import flat_range_to_boxes
from elastictrain_checkpoint.documents import pack_documents, unpack_documents
from elastictrain_checkpoint.errors import InvalidManifest
from elastictrain_checkpoint.reshard import plan_reads
from elastictrain_checkpoint.together import lay_out, read_together
from elastictrain_checkpoint.wants import Want

_SOUND, _CORRUPT, _FAILED = range(3)
_SIZE_BYTES = 8


@dataclass(frozen=True)
class Company:
    """Those who restore together, seen from one of them.

    `workers`: in the order of their ranks. `held`: the blocks that each of them is to hold. `beat`: called before every
    exchange; raises when the generation is over. `meeting`: called with True when this worker begins to wait for its
    peers, and with False when it goes on.
    """

    groups: GroupSet
    workers: Sequence[int]
    held: Sequence[Collection[int]]
    beat: Callable[[], None]
    meeting: Callable[[bool], None]

    @property
    def rank(self) -> int:
        return self.groups.rank

    def exchange(self, sent: Sequence[Sequence[NDArray[Any]]], sizes: Sequence[int]) -> list[memoryview]:
        """`elastictrain_checkpoint.together.Exchange` over the generation's groups. Raises PeerLost."""
        self.beat()
        out = [torch.empty(sum(part.nbytes for part in parts), dtype=torch.uint8) for parts in sent]
        for parts, tensor in zip(sent, out, strict=True):
            lay_out(parts, as_buffer(tensor))
        came = [torch.empty(size, dtype=torch.uint8) for size in sizes]
        came[self.rank] = out[self.rank]
        self._swap(_peers(out, self.rank), _peers(came, self.rank))
        return [as_buffer(tensor) for tensor in came]

    def agree(self, said: bytes) -> list[bytes]:
        """What everybody says, in the order of the ranks; all say equally many bytes."""
        self.beat()
        self.meeting(True)
        found = self.groups.all_gather_equal(said)
        self.meeting(False)
        return found

    def from_first(self, make: Callable[[], bytes]) -> bytes:
        """What the first member's `make` gives, on every member; its CorruptCheckpoint or ClusterError is all's."""
        self.beat()
        status, body, error = _SOUND, b"", None
        if self.rank == 0:
            try:
                body = make()
            except (CorruptCheckpoint, ClusterError) as found:
                status = _CORRUPT if isinstance(found, CorruptCheckpoint) else _FAILED
                body, error = str(found).encode(), found
        self.meeting(True)
        facts = self.groups.all_gather_equal(bytes([status]) + len(body).to_bytes(_SIZE_BYTES, "little"))[0]
        status, size = facts[0], int.from_bytes(facts[1:], "little")
        text = torch.frombuffer(bytearray(body), dtype=torch.uint8) if body else torch.empty(size, dtype=torch.uint8)
        others = [(rank, text) for rank in range(1, len(self.held))] if self.rank == 0 and size else []
        self._swap(others, [(0, text)] if self.rank and size else [])
        if error is not None:
            raise error
        found_there = bytes(as_buffer(text))
        if status != _SOUND:
            raise (CorruptCheckpoint if status == _CORRUPT else ClusterError)(found_there.decode())
        return found_there

    def _swap(self, sends: Sequence[tuple[int, torch.Tensor]], recvs: Sequence[tuple[int, torch.Tensor]]) -> None:
        self.meeting(True)
        self.groups.exchange(sends, recvs)
        self.meeting(False)


def _peers(tensors: Sequence[torch.Tensor], own: int) -> list[tuple[int, torch.Tensor]]:
    return [(rank, tensor) for rank, tensor in enumerate(tensors) if rank != own and tensor.numel()]


def open_together(settings: Checkpoint, step: int, company: Company | None) -> Reader:
    """A reader of one committed step on every member; storage is asked for the manifest once.

    Raises CorruptCheckpoint when it cannot be believed, ClusterError when the storage fails.
    """
    found: list[Found] = []

    def documents() -> bytes:
        try:
            found.append(find_checkpoint(settings, step))
            return _pack_found(settings, found[0]) if company is not None else b""
        except OSError as error:
            raise unreadable(settings, step, error) from error
        except CheckpointError as error:
            raise CorruptCheckpoint(f"checkpoint step {step} in {settings.path}: {error}") from error

    if company is None:
        documents()
        return found[0].reader()
    message = company.from_first(documents)
    if found:
        return found[0].reader()
    stores = open_stores(settings)
    try:
        order, manifest = message[1 : 1 + message[0]], unpack_documents(message[1 + message[0] :], step)
        return Found(manifest, tuple(stores[number] for number in order)).reader()
    except CheckpointError as error:
        raise CorruptCheckpoint(f"checkpoint step {step} in {settings.path}: {error}") from error


def _pack_found(settings: Checkpoint, found: Found) -> bytes:
    """Which stores to read from, in this order, and the documents of the checkpoint. Raises OSError."""
    urls = [store.url for store in open_stores(settings)]
    order = bytes(urls.index(store.url) for store in found.stores)
    for store in found.stores[:-1]:
        with suppress(OSError, InvalidManifest):
            return bytes([len(order)]) + order + pack_documents(store, found.manifest)
    return bytes([len(order)]) + order + pack_documents(found.stores[-1], found.manifest)


def unreadable(settings: Checkpoint, step: int, error: OSError) -> ClusterError:
    """Storage that fails says nothing of what is stored: whoever runs the cluster must mend it."""
    return ClusterError(
        f"checkpoint step {step} cannot be read from checkpoint.path={settings.path!r}: {type(error).__name__}: {error}"
    )


# --- what belongs to this job ---


def model_differences(flat: FlatModel, reader: Reader) -> list[str]:
    """What the job's model has and the checkpoint has not, and the other way round; sentences."""
    wanted = {stored_name(b, "master"): list(b.entry.shape) for b in flat.space.blocks}
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


# --- what goes where ---


@dataclass(frozen=True, slots=True)
class Slot:
    """Elements `start .. stop-1` of the stored tensor `name` are `key` of block `number` (None: the counter `key`), and
    have `shape` there.
    """

    number: int | None
    key: str
    name: str
    start: int
    stop: int
    shape: tuple[int, ...]

    def wants(self, stored: tuple[int, ...]) -> list[Want]:
        """The same as boxes of a tensor of shape `stored`, in flat order."""
        return [Want(self.name, *box) for box in flat_range_to_boxes(stored, self.start, self.stop)]


class Slots:
    """What a worker of this job needs of a checkpoint, by block. `stored`: its tensors, as `Reader.tensors`."""

    def __init__(self, flat: FlatModel, held: HeldState, stored: Mapping[str, tuple[str, tuple[int, ...]]]) -> None:
        self._flat, self._held, self._stored = flat, held, stored
        self._names = _optimizer_names(stored)

    def of(self, blocks: Iterable[int]) -> list[Slot]:
        """For the holder of `blocks`: theirs, ascending, and the integer buffers, which everybody has."""
        counters = self._flat.counters.items()
        mine = [slot for number in sorted(blocks) for slot in self._of_block(self._flat.space.blocks[number])]
        return mine + [Slot(None, n, f"counter/{n}", 0, c.numel(), tuple(c.shape)) for n, c in counters]

    def _of_block(self, block: Block) -> Iterator[Slot]:
        span, entry = (block.offset, block.offset + block.elements), block.entry
        whole = entry.kind == "param" and (self._flat.space.whole_parameters or not entry.shape)
        shape = entry.shape if whole else (block.elements,)
        yield Slot(block.number, "master", stored_name(block, "master"), *span, shape)
        if entry.kind != "param":
            return
        if self._held.ema_decay is not None and f"ema/{entry.name}" in self._stored:
            yield Slot(block.number, "ema", f"ema/{entry.name}", *span, shape)
        for name in self._names.get(entry.name, ()):
            key, own = f"optim/{name.removeprefix(f'optim/{entry.name}/')}", tuple(self._stored[name][1])
            if own == entry.shape:
                yield Slot(block.number, key, name, *span, shape)
            else:  # the same for the whole parameter: a step counter, a row of sums
                yield Slot(block.number, key, name, 0, int(torch.Size(own).numel()), own)


def _optimizer_names(stored: Iterable[str]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for name in stored:
        if name.startswith("optim/"):
            found.setdefault(name.removeprefix("optim/").rpartition("/")[0], []).append(name)
    return found


def numbers_of(block: Block, numbers: Mapping[str, Any]) -> dict[str, Any]:
    """What the optimizer keeps for a block outside of tensors."""
    prefix = f"optim/{block.entry.name}/"
    if block.entry.kind != "param":
        return {}
    return {f"optim/{n.removeprefix(prefix)}": v for n, v in numbers.items() if n.startswith(prefix)}


# --- restoring ---


def restore(flat: FlatModel, held: HeldState, reader: Reader, company: Company | None = None) -> None:
    """Fill every held block, and the counters, from a checkpoint; the parameters of other blocks come by gather.

    With `company` every member calls this, and each reads its share of what all of them hold. Raises CheckpointMismatch
    listing what differs, CorruptCheckpoint naming what is damaged and OSError from storage (whoever met it), PeerLost.
    """
    problems = model_differences(flat, reader) or optimizer_differences(held, reader)
    if problems:
        shown = "\n  ".join(problems[:20]) + (f"\n  and {len(problems) - 20} more" if len(problems) > 20 else "")
        raise CheckpointMismatch(
            f"the checkpoint does not belong to this job:\n  {shown}\n"
            "use another checkpoint.path, or the model and the optimizer it was made with"
        )
    held.optimizer.state.clear()
    slots = Slots(flat, held, reader.tensors).of(held.masters)
    values = [destination(held, slot, TYPES[reader.tensors[slot.name][0]]) for slot in slots]
    try:
        if company is None:
            reader.read_many(
                [Request(s.name, s.start, s.stop, as_buffer(v)) for s, v in zip(slots, values, strict=True)]
            )
        else:
            _read_in_company(flat, held, reader, company, slots, values)
    except CorruptData as error:
        raise CorruptCheckpoint(str(error)) from error
    _take_up(flat, held, reader.tree.get("numbers", {}), slots, values)


def destination(held: HeldState, slot: Slot, dtype: torch.dtype) -> torch.Tensor:
    """Where a slot's values are read to: where they belong, if bytes can be put there as they are stored."""
    there = None
    if slot.number is not None and slot.key in ("master", "ema"):
        there = (held.masters if slot.key == "master" else held.ema).get(slot.number)
    if there is not None and there.device.type == "cpu" and there.dtype == dtype and there.is_contiguous():
        return there
    return torch.empty(slot.shape, dtype=dtype)


def _read_in_company(
    flat: FlatModel, held: HeldState, reader: Reader, company: Company, slots: Sequence[Slot],
    values: Sequence[torch.Tensor],
) -> None:  # fmt: skip
    stored, each = reader.tensors, Slots(flat, held, reader.tensors)
    wants = [[want for slot in each.of(blocks) for want in slot.wants(stored[slot.name][1])] for blocks in company.held]
    outs: list[memoryview] = []
    for slot, value in zip(slots, values, strict=True):
        view, at = as_buffer(value), 0
        for want in slot.wants(stored[slot.name][1]):
            size = int(torch.Size(want.sizes).numel()) * value.element_size()
            outs.append(view[at : at + size])
            at += size
    plan = plan_reads(reader.manifest, wants)
    read_together(reader, plan, wants, outs, worker=company.rank, exchange=company.exchange)


def _take_up(
    flat: FlatModel, held: HeldState, numbers: Mapping[str, Any], slots: Sequence[Slot], values: Sequence[torch.Tensor]
) -> None:
    """Make what was read the state of the held blocks."""
    found: dict[int, dict[str, Any]] = {number: {} for number in held.masters}
    for slot, value in zip(slots, values, strict=True):
        if slot.number is None:
            flat.counters[slot.key].copy_(value)
        else:
            found[slot.number][slot.key] = held.placed(slot.key, value)
    for number, one in found.items():
        held.load(number, one | numbers_of(flat.space.blocks[number], numbers))
        flat.publish(number, held.masters[number])
