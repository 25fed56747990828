"""Tensors made from other tensors without storing them: reshaped, transposed, sliced, joined, cast.

A view knows its type and shape from those of its inputs alone, and is computed when it is read. A flat range of a view
is read as flat ranges of its inputs wherever it is one (reshape, slices and joins along the first axis of more than
one element); only what really moves elements about (transpose, other slices and joins) reads whole inputs.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from elastictrain_checkpoint import cast
from elastictrain_checkpoint.dtypes import item_bytes, num_elements
from elastictrain_checkpoint.errors import InvalidMapping
from elastictrain_checkpoint.source import Bytes, Shape, check_range

Read = Callable[[str, int, int], Bytes]
"""Reads a flat range of a tensor of the source: (name, start, stop)."""


@dataclass(frozen=True)
class View(ABC):
    """Base of all views.

    Attributes:
        dtype: safetensors name.
        shape: shape of the view.

    """

    dtype: str
    shape: Shape

    @abstractmethod
    def read(self, source: Read, start: int, stop: int) -> Bytes:
        """Bytes of the elements [start, stop) of this view, row-major."""

    @abstractmethod
    def inputs(self) -> set[str]:
        """Names of the tensors of the source that it is made from."""


@dataclass(frozen=True)
class Stored(View):
    """A tensor of the source as it is."""

    name: str

    def read(self, source: Read, start: int, stop: int) -> Bytes:
        check_range(self.name, self.shape, start, stop)
        return source(self.name, start, stop)

    def inputs(self) -> set[str]:
        return {self.name}


@dataclass(frozen=True)
class _Over(View):
    of: View

    def inputs(self) -> set[str]:
        return self.of.inputs()


@dataclass(frozen=True)
class Reshaped(_Over):
    """The same elements in the same order, another shape."""

    def read(self, source: Read, start: int, stop: int) -> Bytes:
        return self.of.read(source, start, stop)


@dataclass(frozen=True)
class Cast(_Over):
    """The same numbers in another floating-point type."""

    def read(self, source: Read, start: int, stop: int) -> Bytes:
        return cast.cast(self.of.read(source, start, stop), self.of.dtype, self.dtype)


@dataclass(frozen=True)
class Transposed(_Over):
    """Axes in another order: axis ``i`` is axis ``axes[i]`` of the input."""

    axes: tuple[int, ...]

    def read(self, source: Read, start: int, stop: int) -> Bytes:
        return _cut(_whole(self.of, source).transpose(self.axes), self.dtype, start, stop)


@dataclass(frozen=True)
class Sliced(_Over):
    """Indices [begin, end) along one axis."""

    axis: int
    begin: int
    end: int

    def read(self, source: Read, start: int, stop: int) -> Bytes:
        if math.prod(self.of.shape[: self.axis]) == 1:  # one flat run of the input
            at = self.begin * math.prod(self.of.shape[self.axis + 1 :])
            return self.of.read(source, at + start, at + stop)
        where = (slice(None),) * self.axis + (slice(self.begin, self.end),)
        return _cut(_whole(self.of, source)[where], self.dtype, start, stop)


@dataclass(frozen=True)
class Joined(View):
    """Several views, one after the other along one axis."""

    parts: tuple[View, ...]
    axis: int

    def read(self, source: Read, start: int, stop: int) -> Bytes:
        if math.prod(self.shape[: self.axis]) != 1:
            whole = np.concatenate([_whole(part, source) for part in self.parts], axis=self.axis)
            return _cut(whole, self.dtype, start, stop)
        out, at = [], 0
        for part in self.parts:
            count = num_elements(part.shape)
            low, high = max(start - at, 0), min(stop - at, count)
            if low < high:
                out.append(part.read(source, low, high))
            at += count
        return np.concatenate(out) if len(out) > 1 else out[0] if out else np.empty(0, np.uint8)

    def inputs(self) -> set[str]:
        return set().union(*(part.inputs() for part in self.parts))


def _whole(view: View, source: Read) -> np.ndarray[Any, np.dtype[Any]]:
    """All elements as bits, in the view's shape."""
    data = view.read(source, 0, num_elements(view.shape))
    return data.view(cast.bit_type(view.dtype)).reshape(view.shape)


def _cut(array: np.ndarray[Any, np.dtype[Any]], dtype: str, start: int, stop: int) -> Bytes:
    item = item_bytes(dtype)
    flat = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
    return flat[start * item : stop * item]


# --- making views, with every check ---


def reshape(view: View, shape: Sequence[int]) -> View:
    """A view of another shape; one dimension may be -1.

    Raises:
        InvalidMapping: the number of elements differs.

    """
    wanted = list(shape)
    count = num_elements(view.shape)
    if wanted.count(-1) == 1:
        rest = math.prod(dim for dim in wanted if dim != -1)
        if rest and count % rest == 0:
            wanted[wanted.index(-1)] = count // rest
    if any(dim < 0 for dim in wanted) or math.prod(wanted) != count:
        raise InvalidMapping(f"shape {list(view.shape)} ({count} elements) does not reshape to {list(shape)}")
    return Reshaped(view.dtype, tuple(wanted), view)


def transpose(view: View, axes: Sequence[int] | None = None) -> View:
    """A view with its axes in another order; reversed if none is given.

    Raises:
        InvalidMapping: ``axes`` is not an order of the axes there are.

    """
    order = tuple(reversed(range(len(view.shape)))) if axes is None else tuple(axes)
    if sorted(order) != list(range(len(view.shape))):
        raise InvalidMapping(f"axes {list(order)} are not an order of the {len(view.shape)} axes of {list(view.shape)}")
    return Transposed(view.dtype, tuple(view.shape[axis] for axis in order), view, order)


def split(view: View, sizes: Sequence[int], axis: int = 0) -> list[View]:
    """Views of ``sizes`` indices each along an axis, in order.

    Raises:
        InvalidMapping: no such axis, or the sizes do not add up to it.

    """
    at = _axis(view.shape, axis)
    if any(size < 0 for size in sizes) or sum(sizes) != view.shape[at]:
        raise InvalidMapping(f"sizes {list(sizes)} do not add up to axis {axis} of shape {list(view.shape)}")
    out: list[View] = []
    begin = 0
    for size in sizes:
        shape = (*view.shape[:at], size, *view.shape[at + 1 :])
        out.append(Sliced(view.dtype, shape, view, at, begin, begin + size))
        begin += size
    return out


def join(parts: Sequence[View], axis: int = 0) -> View:
    """One view of several, along an axis.

    Raises:
        InvalidMapping: they differ in type, or in shape beside that axis.

    """
    first = parts[0]
    at = _axis(first.shape, axis)
    for part in parts[1:]:
        same = len(part.shape) == len(first.shape) and all(
            a == b for i, (a, b) in enumerate(zip(part.shape, first.shape, strict=True)) if i != at
        )
        if part.dtype != first.dtype or not same:
            raise InvalidMapping(
                f"{part.dtype} {list(part.shape)} does not join {first.dtype} {list(first.shape)} along axis {axis}"
            )
    shape = (*first.shape[:at], sum(part.shape[at] for part in parts), *first.shape[at + 1 :])
    return Joined(first.dtype, shape, tuple(parts), at)


def as_dtype(view: View, dtype: str) -> View:
    """A view in another floating-point type.

    Raises:
        InvalidMapping: there is no cast between the two.

    """
    if view.dtype == dtype:
        return view
    if dtype not in cast.FLOATS or view.dtype not in cast.FLOATS:
        raise InvalidMapping(f"no cast from {view.dtype} to {dtype}: only between {', '.join(cast.FLOATS)}")
    return Cast(dtype, view.shape, view)


def _axis(shape: Shape, axis: int) -> int:
    if not -len(shape) <= axis < len(shape):
        raise InvalidMapping(f"axis {axis} is none of the {len(shape)} axes of shape {list(shape)}")
    return axis % len(shape)
