"""Loading some tensors of a checkpoint into memory that is there, strictly or not."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from elastictrain_checkpoint.dtypes import item_bytes, num_elements
from elastictrain_checkpoint.errors import InvalidPiece, StateMismatch
from elastictrain_checkpoint.source import BLOCK_BYTES, Shape, Source

SHOWN = 10


@dataclass(frozen=True)
class Target:
    """Where a tensor goes.

    Attributes:
        dtype, shape: what is expected; a source of another type or shape does not fit (map it with rules first).
        out: writable C-contiguous buffer of exactly that many bytes.

    """

    dtype: str
    shape: Shape
    out: Any = field(repr=False)


@dataclass(frozen=True)
class Loaded:
    """What `load_into` did.

    Attributes:
        loaded: names that were filled.
        missing: names that were asked for and are not there; their memory is untouched.
        extra: names that are there and were not asked for.
        different: name → sentence, for those of another shape or type; their memory is untouched.

    """

    loaded: tuple[str, ...]
    missing: tuple[str, ...]
    extra: tuple[str, ...]
    different: dict[str, str]

    def __str__(self) -> str:
        return _sentence(self) or f"all {len(self.loaded)} tensors fit"


def compare(wanted: Mapping[str, tuple[str, Shape]], there: Mapping[str, tuple[str, Shape]]) -> Loaded:
    """What of ``wanted`` can be loaded from ``there``, and what not. Pure.

    Args:
        wanted: name → (dtype, shape).
        there: as `Source.tensors`.

    """
    different = {}
    for name in sorted(wanted.keys() & there.keys()):
        dtype, shape = wanted[name]
        have_dtype, have = there[name]
        if tuple(shape) != tuple(have):
            different[name] = f"{name} has shape {list(have)} there, expected {list(shape)}"
        elif dtype != have_dtype:
            different[name] = f"{name} is {have_dtype} there, expected {dtype}"
    return Loaded(
        loaded=tuple(name for name in wanted if name in there and name not in different),
        missing=tuple(name for name in wanted if name not in there),
        extra=tuple(name for name in there if name not in wanted),
        different=different,
    )


def load_into(source: Source, targets: Mapping[str, Target], *, strict: bool = True) -> Loaded:
    """Fill buffers with tensors of the same names; what differs is listed, all of it, before a byte is read.

    Args:
        source: a `Reader`, or one seen through rules (`elastictrain_checkpoint.mapping.Mapped`).
        targets: name → where it goes.
        strict: everything must fit exactly; otherwise what does not fit is left alone and said in the result.

    Raises:
        StateMismatch: ``strict``, and something is missing, extra, or of another shape or type.
        InvalidPiece: a buffer that cannot be written, or is not of the size of its tensor.
        CorruptData: stored bytes are not those that were written; buffers may be partly filled.

    """
    plan = compare({name: (target.dtype, target.shape) for name, target in targets.items()}, source.tensors)
    outs = {name: _writable(name, targets[name]) for name in plan.loaded}
    if strict and (plan.missing or plan.extra or plan.different):
        raise StateMismatch(
            f"the checkpoint does not fit: {_sentence(plan)}; map names and shapes with rules, or pass strict=False",
            missing=plan.missing,
            extra=plan.extra,
            different=tuple(plan.different.values()),
        )
    for name, out in outs.items():
        dtype, shape = source.tensors[name]
        item, count = item_bytes(dtype), num_elements(shape)
        step = max(1, BLOCK_BYTES // item)
        for start in range(0, count, step):
            stop = min(start + step, count)
            out[start * item : stop * item] = source.read_flat(name, start, stop)
    return plan


def _writable(name: str, target: Target) -> np.ndarray[Any, np.dtype[np.uint8]]:
    want = num_elements(target.shape) * item_bytes(target.dtype)
    view = memoryview(target.out)
    if view.readonly or not view.c_contiguous or view.nbytes != want:
        raise InvalidPiece(
            f"{name}: out must be a writable contiguous buffer of {want} bytes, "
            f"got {view.nbytes} bytes{', read-only' if view.readonly else ''}"
        )
    return np.frombuffer(view.cast("B") if want else bytearray(), dtype=np.uint8)


def _sentence(plan: Loaded) -> str:
    said = [
        f"{len(names)} {what}: {', '.join(names[:SHOWN])}" + (", …" if len(names) > SHOWN else "")
        for what, names in (
            ("missing", plan.missing),
            ("not asked for", plan.extra),
            ("different", tuple(plan.different.values())),
        )
        if names
    ]
    return "; ".join(said)
