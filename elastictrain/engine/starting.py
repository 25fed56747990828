"""Taking up the weights that a new run begins with (the setting `start_from`), as its first generation forms.

Each owner reads its own blocks and hands a copy to the mirror; parameters that a worker does not hold come by gather,
as always. Whoever fails takes part to the end, and everybody learns of it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from elastictrain.engine.flat import FlatModel
from elastictrain.engine.held import HeldState
from elastictrain.engine.origins import fit, numbers_in, open_origin, wanted_of
from elastictrain.engine.restoring import Company, Slot, Slots, destination, numbers_of
from elastictrain.engine.saving import TYPES, as_buffer, stored_aliases
from elastictrain.errors import CheckpointMismatch, ClusterError, UserError
from elastictrain.layout import Layout
from elastictrain.origin import StartFrom
from elastictrain_checkpoint import CheckpointError
from elastictrain_checkpoint.mapping import Mapped
from elastictrain_checkpoint.source import Source
from elastictrain_checkpoint.views import Stored

ROUND_BYTES = 16 << 20
_MESSAGE_BYTES = 1024
_SOUND, _USERS, _FAILED = range(3)


def begin(
    flat: FlatModel, held: HeldState, settings: StartFrom, layout: Layout, counters_from: int, company: Company | None,
    worker: int,
) -> None:  # fmt: skip
    """Set the held blocks, which have the recipe's initial state, to what the run begins with.

    Every member calls this. Owners read, mirrors get a copy; integer buffers are read by worker `counters_from`, which
    hands them on later. Raises UserError, CorruptCheckpoint, ClusterError (on all members alike) and PeerLost.
    """
    error: Exception | None = None
    source: Source | None = None
    try:
        source = _chosen(flat, settings)
    except (UserError, ClusterError) as found:
        error = found
    _agree(company, _as_ours(settings, error))
    assert source is not None, "else there was an error"
    slots, error = Slots(flat, held, source.tensors), None
    taken: list[tuple[Slot, torch.Tensor]] = []
    for batch in _rounds(flat, layout):
        error = _one_round(source, held, slots, batch, company, worker, taken, before=error)
    if worker == counters_from and error is None:
        mine = [slot for slot in slots.of(()) if slot.name in source.tensors]
        error = _read_all(source, held, mine, taken)
    _agree(company, _as_ours(settings, error))
    _take_up(flat, held, numbers_in(source) if settings.optimizer else {}, taken)


def _chosen(flat: FlatModel, settings: StartFrom) -> Source:
    """The source with the names of this run, and only what is taken."""
    origin = open_origin(settings)
    there, ties = origin.source.tensors, stored_aliases(flat.space.aliases)
    wanted = wanted_of(flat.space, flat.counters)
    found = fit(wanted, ties, there, origin.aliases, optimizer=settings.optimizer)
    return Mapped.of(origin.source, {new: Stored(*there[old], old) for new, old in found.names.items()})


Batch = dict[int, list[tuple[int, int | None]]]
"""By owner: (block, its mirror)."""


def _rounds(flat: FlatModel, layout: Layout) -> Iterator[Batch]:
    """Blocks in batches of about `ROUND_BYTES` of weights for each owner; the same on every member."""
    each: dict[int, list[list[tuple[int, int | None]]]] = {}
    filled: dict[int, int] = {}
    for shard in layout.shards:
        for number in range(shard.lo, shard.hi):
            size = 4 * flat.space.blocks[number].elements
            if filled.get(shard.owner, ROUND_BYTES) + size > ROUND_BYTES:
                each.setdefault(shard.owner, []).append([])
                filled[shard.owner] = 0
            each[shard.owner][-1].append((number, shard.mirror))
            filled[shard.owner] += size
    for turn in range(max(map(len, each.values()), default=0)):
        yield {owner: batches[turn] for owner, batches in each.items() if turn < len(batches)}


def _one_round(
    source: Source, held: HeldState, slots: Slots, batch: Batch, company: Company | None, worker: int,
    taken: list[tuple[Slot, torch.Tensor]], *, before: Exception | None,
) -> Exception | None:  # fmt: skip
    """Read the own blocks of a batch and swap copies; gives what went wrong, here or `before`. Whoever has failed takes
    part to the end: what it sends then has its size and no meaning.
    """

    def of(blocks: Iterable[int]) -> list[Slot]:
        return [slot for slot in slots.of(blocks) if slot.number is not None and slot.name in source.tensors]

    read: list[tuple[Slot, torch.Tensor]] = []
    own = batch.get(worker, [])
    error = before or _read_all(source, held, of(number for number, _ in own), read)
    taken += read
    if company is None:
        return error
    values = {(slot.number, slot.key): value for slot, value in read}
    sent: list[list[np.ndarray[Any, Any]]] = []
    coming: list[list[tuple[Slot, torch.Tensor]]] = []
    for member in company.workers:
        mine = of(number for number, mirror in own if mirror == member)
        out = [values.get((s.number, s.key), torch.zeros(s.shape, dtype=_type(source, s))) for s in mine]
        sent.append([np.frombuffer(as_buffer(value), dtype=np.uint8) for value in out])
        theirs = of(number for number, mirror in batch.get(member, []) if mirror == worker)
        coming.append([(slot, destination(held, slot, _type(source, slot))) for slot in theirs])
    came = company.exchange(sent, [sum(as_buffer(value).nbytes for _, value in one) for one in coming])
    for data, one in zip(came, coming, strict=True):
        at = 0
        for _, value in one:
            view = as_buffer(value)
            view[:] = data[at : at + view.nbytes]
            at += view.nbytes
        taken += one
    return error


def _type(source: Source, slot: Slot) -> torch.dtype:
    return TYPES[source.tensors[slot.name][0]]


def _read_all(
    source: Source, held: HeldState, slots: Sequence[Slot], into: list[tuple[Slot, torch.Tensor]]
) -> Exception | None:
    try:
        for slot in slots:
            value = destination(held, slot, _type(source, slot))
            as_buffer(value)[:] = source.read_flat(slot.name, slot.start, slot.stop).data
            into.append((slot, value))
    except (CheckpointError, OSError) as error:
        return error
    return None


def _as_ours(settings: StartFrom, error: Exception | None) -> Exception | None:
    """There is no older one to go back to: whoever runs the cluster, or the user, must act."""
    if error is None or isinstance(error, UserError):
        return error
    if isinstance(error, ClusterError):
        return ClusterError(str(error))
    return ClusterError(
        f"start_from.checkpoint={settings.checkpoint!r} cannot be read: {type(error).__name__}: {error}"
    )


def _agree(company: Company | None, error: Exception | None) -> None:
    """Raise on every member what one of them has met."""
    if company is not None:
        message = b"" if error is None else str(error).encode()[: _MESSAGE_BYTES - 1]
        status = _SOUND if error is None else _USERS if isinstance(error, UserError) else _FAILED
        said = company.agree((bytes([status]) + message).ljust(_MESSAGE_BYTES))
        for one in said if error is None else ():
            if one[0] != _SOUND:
                words = one[1:].rstrip().decode(errors="replace")
                raise (CheckpointMismatch if one[0] == _USERS else ClusterError)(words)
    if error is not None:
        raise error


def _take_up(
    flat: FlatModel, held: HeldState, numbers: Mapping[str, Any], taken: Sequence[tuple[Slot, torch.Tensor]]
) -> None:
    """Make what was read the state of the held blocks; what was not keeps its initial values."""
    values: dict[int, dict[str, Any]] = {number: {"master": held.masters[number]} for number in held.masters}
    for slot, value in taken:
        if slot.number is None:
            flat.counters[slot.key].copy_(value)
        else:
            values[slot.number][slot.key] = held.placed(slot.key, value)
    for number, one in values.items():
        held.load(number, one | numbers_of(flat.space.blocks[number], numbers))
        flat.publish(number, held.masters[number])
