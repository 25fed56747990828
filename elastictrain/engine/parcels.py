"""Blocks on their way from a holder to a new one, without a copy at either end: what is large is sent from where it
lies and received where it shall lie. Small tensors (an optimizer's step counters) travel together in one.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import xxhash

from elastictrain.engine.held import HeldState
from elastictrain.engine.saving import as_buffer
from elastictrain.errors import InternalError

LOOSE_BYTES = 4096
"""Smaller tensors are copied: a message, or a read, of their own would cost more."""
_DTYPES = {str(d).removeprefix("torch."): d for d in (
    torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64, torch.int32, torch.int16, torch.int8,
    torch.uint8, torch.bool)}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Parcel:
    """`header`: JSON, per block its keys. `loose`: the small tensors, uint8 [bytes]. `pieces`: the others, each uint8
    [bytes], the memory of the state itself: it must not change while the parcel is on its way.
    """

    header: bytes
    loose: torch.Tensor
    pieces: tuple[torch.Tensor, ...]

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        """What is to be sent, or filled, in this order; none of them is empty."""
        return tuple(t for t in (self.loose, *self.pieces) if t.numel())

    def digest(self) -> str:
        """Of all that it holds: the same at both ends."""
        digest = xxhash.xxh3_64(self.header)
        for tensor in self.tensors:
            digest.update(as_buffer(tensor))
        return digest.hexdigest()


def wrap(held: HeldState, lo: int, hi: int) -> Parcel:
    """Blocks `lo .. hi-1` of a holder."""
    header: list[dict[str, Any]] = []
    loose: list[torch.Tensor] = []
    pieces: list[torch.Tensor] = []
    for number in range(lo, hi):
        described: dict[str, Any] = {}
        for key, value in held.tensors(number):
            if not isinstance(value, torch.Tensor):
                described[key] = {"value": value}
                continue
            facts = {"dtype": str(value.dtype).removeprefix("torch."), "shape": list(value.shape)}
            if _is_loose(held, key, value):
                described[key] = facts
                loose.append(_bytes_of(value.detach().to(held.flat.device)))
            else:
                described[key] = facts | {"piece": len(pieces)}
                pieces.append(_bytes_of(value.detach()))
        header.append(described)
    together = torch.cat(loose) if loose else torch.empty(0, dtype=torch.uint8, device=held.flat.device)
    return Parcel(json.dumps(header).encode(), together, tuple(pieces))


def _is_loose(held: HeldState, key: str, value: torch.Tensor) -> bool:
    small = value.numel() * value.element_size() < LOOSE_BYTES
    return small or key == "optim/step" or value.device != held.flat.device or not value.is_contiguous()


def _bytes_of(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)


class Arrival:
    """A parcel that is expected: `parcel` is to be filled with what the other end has sent, then `unwrap` makes it the
    state of blocks `lo .. hi-1`, which `hold` has taken up. Raises InternalError when it does not fit them.
    """

    def __init__(self, held: HeldState, lo: int, hi: int, header: bytes, loose_bytes: int) -> None:
        self._held = held
        self._blocks = dict(zip(range(lo, hi), json.loads(header), strict=True))
        self._targets: list[torch.Tensor] = []
        for number, described in self._blocks.items():
            for key, spec in described.items():
                if "piece" in spec:
                    self._targets.append(self._target(number, key, spec))
        loose = torch.empty(loose_bytes, dtype=torch.uint8, device=held.flat.device)
        self.parcel = Parcel(header, loose, tuple(map(_bytes_of, self._targets)))

    def _target(self, number: int, key: str, spec: Mapping[str, Any]) -> torch.Tensor:
        dtype, shape = _DTYPES[spec["dtype"]], tuple(spec["shape"])
        there = self._held.masters[number] if key == "master" else self._held.ema.get(number) if key == "ema" else None
        if there is None:
            return torch.empty(shape, dtype=dtype, device=self._held.flat.device)
        if (there.dtype, tuple(there.shape)) != (dtype, shape) or not there.is_contiguous():
            raise InternalError(
                f"block {number}: {key} comes as {dtype} {list(shape)}, and is {there.dtype} {list(there.shape)} here"
            )
        return there

    def unwrap(self) -> None:
        at = 0
        for number, described in self._blocks.items():
            values: dict[str, Any] = {}
            for key, spec in described.items():
                if "value" in spec:
                    values[key] = spec["value"]
                elif "piece" in spec:
                    values[key] = self._targets[spec["piece"]]
                else:
                    dtype, shape = _DTYPES[spec["dtype"]], spec["shape"]
                    size = dtype.itemsize * int(torch.Size(shape).numel())
                    # clone: the offset need not be aligned for the dtype, and what came together is let go
                    loose = self.parcel.loose[at : at + size].clone().view(dtype).view(shape)
                    values[key] = self._held.placed(key, loose)
                    at += size
            self._held.load(number, values)
