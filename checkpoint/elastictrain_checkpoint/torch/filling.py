"""Reading what was decided (`elastictrain_checkpoint.torch.fitting`), straight into place where that lies together."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch.distributed.tensor import DTensor

from elastictrain_checkpoint.dtypes import num_elements
from elastictrain_checkpoint.layouts import Held, boxes_of, runs_of
from elastictrain_checkpoint.reader import Reader, Request
from elastictrain_checkpoint.together import read_boxes
from elastictrain_checkpoint.torch.fitting import Fit
from elastictrain_checkpoint.torch.tree import as_buffer
from elastictrain_checkpoint.wants import Want

FEW_RUNS = 16
"""So many flat ranges of a tensor, at most, are read one by one; more are read as boxes, with the bytes in between."""


@dataclass(slots=True)
class Filling:
    """How everything that fits is read on this process.

    Attributes:
        requests: flat ranges, straight into place.
        wants: boxes; ``parts`` are the tensors that they are read into.
        copies: (place, what was read for it), to be copied afterwards, the last first.

    """

    requests: list[Request] = field(default_factory=list)
    wants: list[Want] = field(default_factory=list)
    parts: list[torch.Tensor] = field(default_factory=list)
    copies: list[tuple[torch.Tensor, torch.Tensor]] = field(default_factory=list)

    @property
    def outs(self) -> list[memoryview]:
        """The bytes of ``parts``."""
        return [as_buffer(part) for part in self.parts]


def prepare(reader: Reader, fit: Fit, *, boxes: bool) -> Filling:
    """Decide how to read what fits, and make the memory for it.

    Args:
        reader: of the checkpoint.
        fit: what to read.
        boxes: everything as boxes, for others to read some of it; else as flat ranges, where these are few.

    """
    filling = Filling()
    for name, target, held in fit.reads:
        out = _room(target, filling.copies)
        if not out.numel():
            continue
        shape = reader.tensors[name][1]
        if held is None:
            if not boxes:
                filling.requests.append(Request(name, 0, num_elements(shape), as_buffer(out)))
                continue
            held = ()
        held = (*held, *(((0, size),) for size in shape[len(held) :]))  # the bytes of an item, where it has them
        found = [] if boxes else _requests(name, shape, held, out)
        filling.requests += found
        if not found:
            for want, part, place in _wants(name, held, out):
                filling.wants.append(want)
                filling.parts.append(part)
                if part is not place:
                    filling.copies.append((place, part))
    return filling


def read_alone(reader: Reader, filling: Filling) -> None:
    """Read all of it, by this process.

    Raises:
        CorruptData: stored bytes are not those that were written; tensors may be partly filled.

    """
    reader.read_many(filling.requests)
    if filling.wants:
        read_boxes(reader, filling.wants, filling.outs)


def put(fit: Fit, filling: Filling) -> None:
    """Put what was read into its places."""
    with torch.no_grad():
        for local, out in reversed(filling.copies):  # parts before the whole that they are parts of
            local.copy_(out)
    for _, target, _ in fit.reads:
        torch.autograd.graph.increment_version(target)
    for container, key, value in fit.sets:
        container[key] = value
    for owner, state in fit.states:
        owner.load_state_dict(state)


def _room(target: torch.Tensor, copies: list[tuple[torch.Tensor, torch.Tensor]]) -> torch.Tensor:
    """Where the bytes of a target's local elements can be read to: there, or beside it, to be copied afterwards."""
    local = (target.to_local() if isinstance(target, DTensor) else target).detach()
    if local.device.type == "cpu" and local.is_contiguous() and not local.is_conj() and not local.is_neg():
        return local
    out = torch.empty(local.shape, dtype=local.dtype)
    copies.append((local, out))
    return out


def _requests(name: str, shape: tuple[int, ...], held: Held, out: torch.Tensor) -> list[Request]:
    """What this process needs of a tensor as flat ranges, where these are few; else nothing."""
    runs = runs_of(shape, held)
    if len(runs.starts) > FEW_RUNS:
        return []
    buffer = as_buffer(out)
    item = len(buffer) // int(runs.bounds[-1])
    bounds = runs.bounds.tolist()
    return [
        Request(name, start, start + last - first, buffer[first * item : last * item])
        for start, first, last in zip(runs.starts.tolist(), bounds[:-1], bounds[1:], strict=True)
    ]


def _wants(name: str, held: Held, out: torch.Tensor) -> list[tuple[Want, torch.Tensor, torch.Tensor]]:
    """The same as boxes: each with the tensor that it is read into, and its place in ``out``."""
    found = []
    for box, place in boxes_of(held):
        part = out[place[: out.dim()]]
        found.append((Want(name, *box), part if part.is_contiguous() else torch.empty_like(part).contiguous(), part))
    return found
