"""What tensors are read from: our checkpoints, and, through `elastictrain_checkpoint.convert`, those of others.

A source knows names, types and shapes without reading data, and reads one flat range at a time. Mappings
(`elastictrain_checkpoint.mapping`) turn a source into another one; importing, exporting, comparing and partial loads
all take a source, so each works with any format.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from elastictrain_checkpoint.dtypes import item_bytes, num_elements, width_of
from elastictrain_checkpoint.errors import InvalidPiece

Bytes = NDArray[np.uint8]
Shape = tuple[int, ...]
BLOCK_BYTES = 16 << 20


class Source(Protocol):
    """Tensors by name. `elastictrain_checkpoint.Reader` is one.

    Attributes:
        tensors: name → (dtype, shape), further names of tied tensors included.
        tree: state that is not tensors, as far as there is any.

    """

    @property
    def tensors(self) -> Mapping[str, tuple[str, Shape]]: ...

    @property
    def tree(self) -> Any: ...

    def read_flat(self, name: str, start: int, stop: int) -> Bytes:
        """Bytes of the elements [start, stop) of a tensor, row-major; shape [bytes], dtype uint8."""
        ...


@dataclass(frozen=True)
class Arrays:
    """A source in memory: name → (dtype, shape, buffer)."""

    held: Mapping[str, tuple[str, Shape, Any]]
    tree: Any = None
    tensors: dict[str, tuple[str, Shape]] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "tensors", {n: (d, tuple(s)) for n, (d, s, _) in self.held.items()})
        for name, (dtype, shape, data) in self.held.items():
            want = num_elements(shape) * item_bytes(dtype)
            if memoryview(data).nbytes != want:
                raise InvalidPiece(
                    f"{name}: {memoryview(data).nbytes} bytes, expected {want} for {dtype} {list(shape)}"
                )

    def read_flat(self, name: str, start: int, stop: int) -> Bytes:
        """See `Source`."""
        dtype, shape, data = self.held[name]
        check_range(name, shape, start, stop)
        item = item_bytes(dtype)
        view = memoryview(data)
        flat = view.cast("B") if view.nbytes else memoryview(b"")
        return np.frombuffer(flat, dtype=np.uint8)[start * item : stop * item]


def check_range(name: str, shape: Shape, start: int, stop: int) -> None:
    """Refuse a flat range that does not lie in a tensor.

    Raises:
        InvalidPiece: naming the tensor.

    """
    if not 0 <= start <= stop <= num_elements(shape):
        raise InvalidPiece(f"{name}: elements [{start}, {stop}) do not lie in shape {list(shape)}")


def tensor_bytes(source: Source, name: str) -> int:
    """Bytes of one whole tensor."""
    dtype, shape = source.tensors[name]
    return num_elements(shape) * width_of(dtype)


def total_bytes(source: Source) -> int:
    """Bytes of all tensors; tied ones count once for each name."""
    return sum(tensor_bytes(source, name) for name in source.tensors)


def read_whole(source: Source, name: str) -> Bytes:
    """Bytes of a whole tensor."""
    return source.read_flat(name, 0, num_elements(source.tensors[name][1]))


def read_blocks(source: Source, name: str, block_bytes: int = BLOCK_BYTES) -> Iterator[Bytes]:
    """A tensor in runs of about ``block_bytes``, in order; none for an empty tensor."""
    dtype, shape = source.tensors[name]
    count = num_elements(shape)
    step = max(1, block_bytes // item_bytes(dtype))
    for start in range(0, count, step):
        yield source.read_flat(name, start, min(start + step, count))
