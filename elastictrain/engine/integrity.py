"""Sums of a worker's state and of a lane's gradient: 64 bits that tell whether a single bit has changed.

On a CPU the sum is XXH3 (64 bits) over the memory as it lies; on a device it is a weighted sum of the elements' bits,
computed there, and all sums of a step come to the host in one copy. Both change with any single flipped bit (XXH3: but
for one case in 2^64). Sums are compared between workers of the same numerics only, so the two kinds never meet.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
import xxhash

from elastictrain.engine.flat import FlatModel
from elastictrain.engine.held import HeldState
from elastictrain.engine.verdict import Statement, mix
from elastictrain.layout import Shard

_MASK = 2**64 - 1
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_DIRECT = {torch.float32, torch.float64, torch.int64, torch.int32, torch.uint8}
_CHUNK = 1 << 22
"""Elements that are summed at a time on a device: 64 MiB beside the state."""


Views = dict[int, tuple[torch.Tensor, int, Any]]
"""NumPy's view of a tensor's memory, by the tensor's id, with the tensor (so that the id stays its own) and the address
(it may be given other memory). To make a view takes longer than to hash a block.
"""


def sums(
    groups: Sequence[Iterable[torch.Tensor | bytes]], device: torch.device, views: Views | None = None
) -> list[int]:
    """One 64-bit sum of each group's tensors, in their order. `views`: kept from one call to the next."""
    if device.type == "cpu":
        return [_host_sum(group, views) for group in groups]
    return device_sums(groups, device)


def _host_sum(group: Iterable[torch.Tensor | bytes], views: Views | None = None) -> int:
    digest = xxhash.xxh3_64()
    for part in group:
        if isinstance(part, bytes):
            digest.update(part)
        else:
            digest.update(_host_bytes(part) if views is None else _known_bytes(part, views))
    return digest.intdigest()


def _known_bytes(tensor: torch.Tensor, views: Views) -> Any:
    found = views.get(id(tensor))
    if found is not None and found[1] == tensor.data_ptr():
        return found[2]
    view = _host_bytes(tensor)
    if tensor.is_contiguous() and tensor.device.type == "cpu":  # else it is a copy
        views[id(tensor)] = tensor, tensor.data_ptr(), view
    return view


def _host_bytes(tensor: torch.Tensor) -> Any:
    if not tensor.is_contiguous() or tensor.device.type != "cpu":
        tensor = tensor.cpu().contiguous()
    # As it is where NumPy knows the dtype: views cost more than hashing a block.
    return tensor.numpy() if tensor.dtype in _DIRECT else tensor.reshape(-1).view(torch.uint8).numpy()


def device_sums(groups: Sequence[Iterable[torch.Tensor | bytes]], device: torch.device) -> list[int]:
    """Kernels for all of them first, then one copy: what waits for the device waits once."""
    totals: list[torch.Tensor] = []
    places: list[list[int]] = []  # per group: a number as it is, or the place of one in `totals`, below zero
    for group in groups:
        found: list[int] = []
        for part in _chunks(group, device):
            if isinstance(part, torch.Tensor):
                totals.append(_weighted(part))
                found.append(-len(totals))
            else:
                found.append(_host_sum([part]))
        places.append(found)
    copied = torch.stack(totals).tolist() if totals else []
    return [mix(*(copied[-1 - n] & _MASK if n < 0 else n for n in found)) for found in places]


def _chunks(parts: Iterable[torch.Tensor | bytes], device: torch.device) -> Iterator[torch.Tensor | bytes]:
    """The bits of tensors on `device` as runs of up to `_CHUNK` whole numbers; what lies on the host as bytes. Small
    tensors are put together: a kernel for every block would cost more than the sum.
    """
    waiting: list[torch.Tensor] = []
    numbers = 0
    for part in parts:
        if isinstance(part, bytes) or part.device != device:
            yield from _together(waiting)
            numbers = 0
            yield part if isinstance(part, bytes) else bytes(_host_bytes(part))
            continue
        for bits in torch.split(_bits(part), _CHUNK):
            if waiting and (numbers + bits.numel() > _CHUNK or waiting[0].dtype != bits.dtype):
                yield from _together(waiting)
                numbers = 0
            waiting.append(bits)
            numbers += bits.numel()
    yield from _together(waiting)


def _together(waiting: list[torch.Tensor]) -> Iterator[torch.Tensor]:
    if waiting:
        yield waiting[0] if len(waiting) == 1 else torch.cat(waiting)
        waiting.clear()


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().contiguous().view(-1).view(_BITS[tensor.element_size()])


_weights: dict[torch.device, torch.Tensor] = {}


def _weighted(bits: torch.Tensor) -> torch.Tensor:
    """0-dim int64: up to `_CHUNK` numbers, each times an odd number of its own, added up modulo 2^64. Odd numbers have
    inverses there, so any change of one of them changes the sum.
    """
    weights = _weights.get(bits.device)
    if weights is None:
        weights = _weights[bits.device] = torch.arange(1, 2 * _CHUNK, 2, device=bits.device)
    return (bits * weights[: bits.numel()]).sum()


def device_sum(tensor: torch.Tensor) -> torch.Tensor:
    """0-dim int64 on the tensor's device, computed there: changes with any one element."""
    total = torch.zeros((), dtype=torch.int64, device=tensor.device)
    for number, part in enumerate(torch.split(_bits(tensor), _CHUNK)):
        total += _weighted(part) * (mix(number) >> 1 | 1)
    return total


# --- a worker's state ---


def _kept(held: HeldState, flat: FlatModel, number: int, *, master: bool) -> Iterable[torch.Tensor | bytes]:
    """What is kept for a block. Without `master`: but for masters that are views of the published parameters."""
    is_view = flat.dtype == torch.float32 or flat.space.blocks[number].entry.kind == "buffer"
    for key, value in held.tensors(number):
        if key == "master" and is_view and not master:
            continue
        yield value if isinstance(value, torch.Tensor) else repr((key, value)).encode()


def held_sums(flat: FlatModel, held: HeldState, shards: Sequence[Shard], views: Views | None = None) -> tuple[int, ...]:
    """For each shard the sum of masters (where they lie apart from the published parameters), optimizer state, EMA."""

    def parts(shard: Shard) -> Iterable[torch.Tensor | bytes]:
        for number in range(shard.lo, shard.hi):
            yield from _kept(held, flat, number, master=False)

    return tuple(sums([parts(shard) for shard in shards], flat.device, views))


def published_sum(flat: FlatModel) -> int:
    """Of parameters in the compute dtype, floating buffers and integer buffers: the same on every worker, whatever it
    holds.
    """
    return sums([[flat.values, flat.buffers, *flat.counters.values()]], flat.device)[0]


def statement(flat: FlatModel, held: HeldState, changed: str) -> Statement:
    """The sums of every block, for an inquest; as slow as it is."""
    blocks, numbers = flat.space.blocks, sorted(held.masters)
    kept = block_sums(flat, held, numbers)
    published = sums([[flat.published(block)] for block in blocks], flat.device)
    astray = {
        n
        for n in numbers
        if flat.master_view(blocks[n]) is None and not _follows(flat.published(blocks[n]), held.masters[n])
    }
    counters = sums([list(flat.counters.values())], flat.device)[0]
    return Statement(changed, kept, published, frozenset(astray), counters)


def _follows(published: torch.Tensor, master: torch.Tensor) -> bool:
    """By bits: NaN is equal to itself, and -0.0 is not +0.0."""
    wanted = master.detach().reshape(-1).to(published.dtype)
    bits = _BITS[published.element_size()]
    return torch.equal(published.view(bits), wanted.view(bits))


def block_sums(flat: FlatModel, held: HeldState, numbers: Sequence[int]) -> dict[int, int]:
    """For each held block the sum of master, optimizer state and EMA."""
    found = sums([_kept(held, flat, number, master=True) for number in numbers], flat.device)
    return dict(zip(numbers, found, strict=True))


# --- a lane ---


class LaneSum:
    """The sum of one lane's gradient, taken as it arrives: of what came for each parameter, in any order."""

    def __init__(self) -> None:
        self._found: list[tuple[int, int, torch.Tensor | int]] = []

    def add(self, place: int, part: int, values: torch.Tensor) -> None:
        """`place`: the first element of the parameter or buffer; `part`: the micro-batch."""
        found = _host_sum([values.detach()]) if values.device.type == "cpu" else device_sum(values)
        self._found.append((place, part, found))

    def total(self, *numbers: float) -> int:
        """With the lane's loss and weight. The order in which parts came does not matter."""
        on_device = [found for _, _, found in self._found if isinstance(found, torch.Tensor)]
        copied = iter(torch.stack(on_device).tolist() if on_device else [])
        total = _host_sum([repr(numbers).encode()])
        for place, part, found in self._found:
            value = next(copied) if isinstance(found, torch.Tensor) else found
            total = total + mix(place, part, value & _MASK) & _MASK
        return total
