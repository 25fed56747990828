"""Memory for large arrays that is used again."""

from __future__ import annotations

import math
import weakref
from typing import Any

import numpy as np
import numpy.typing as npt

KEPT_BYTES = 128 << 20
"""What may lie free of each kind of array. Lanes come to the end of their windows at about the same time: so much is
let go of at once, and needed again soon."""
_KEPT_ALWAYS = 2
_LEAST_BYTES = 1 << 14
"""Of smaller arrays the allocator has memory at hand."""


class Buffers:
    """Memory for large arrays, used again when whoever had it has let go of it, views of it too.

    Thread-safe. To get such memory fresh means that the kernel maps and clears it, which takes longer than to write
    tokens to it; and what several threads map and give back in turn lies in more and more places of the process.
    """

    def __init__(self, kept_bytes: int = KEPT_BYTES) -> None:
        """`kept_bytes`: how much lies free at most, what was used last; two arrays may, whatever their size."""
        self._free: dict[int, npt.NDArray[np.uint8]] = {}  # by `id`; what was used last comes last
        self._lent: dict[int, tuple[weakref.ref[npt.NDArray[np.uint8]], npt.NDArray[np.uint8]]] = {}
        self._kept_bytes, self._largest_bytes = kept_bytes, 0

    def take(self, size: int) -> npt.NDArray[np.uint8]:
        """Return an array of `size` bytes of any content."""
        if size < _LEAST_BYTES:
            return np.empty(size, dtype=np.uint8)
        memory = self._fitting(size)
        if memory is None:
            memory = np.empty(size + size // 8, dtype=np.uint8)
            self._largest_bytes = max(self._largest_bytes, memory.nbytes)
        lent = np.frombuffer(memory.data, dtype=np.uint8, count=size)  # what its views refer to, and not `memory`
        loan = weakref.ref(lent, self._back)  # `weakref.finalize` does the same, and takes as long as a small batch
        self._lent[id(loan)] = (loan, memory)
        return lent

    def empty(self, shape: tuple[int, ...], dtype: npt.DTypeLike) -> npt.NDArray[Any]:
        """Return an array of any content, in such memory unless it holds objects."""
        kind = np.dtype(dtype)
        if kind.hasobject:
            return np.empty(shape, kind)
        return self.take(math.prod(shape) * kind.itemsize).view(kind).reshape(shape)

    def _fitting(self, size: int) -> npt.NDArray[np.uint8] | None:
        """Take memory that lies free and is of about that size: what was used last may be in a processor's cache."""
        for key in reversed(list(self._free)):
            memory = self._free.get(key)
            if memory is not None and size <= memory.nbytes <= 2 * size and self._free.pop(key, None) is memory:
                return memory
        return None

    def _back(self, loan: weakref.ref[npt.NDArray[np.uint8]]) -> None:
        """Called wherever the last reference goes, in the middle of anything: it takes no lock."""
        _, memory = self._lent.pop(id(loan))
        self._free[id(memory)] = memory
        if len(self._free) * self._largest_bytes <= self._kept_bytes:
            return
        keys = list(self._free)
        sizes = [one.nbytes if (one := self._free.get(key)) is not None else 0 for key in keys]
        over, left = sum(sizes) - self._kept_bytes, len(keys)
        for key, size in zip(keys, sizes, strict=True):
            if over <= 0 or left <= _KEPT_ALWAYS:
                return
            self._free.pop(key, None)
            over, left = over - size, left - 1


of_blocks = Buffers()
"""For decoded blocks that are copied anyway, of whatever source of the process. What Arrow decodes stays in its memory:
to copy it costs more than to get such memory fresh."""
of_batches = Buffers(kept_bytes=16 << 20)
of_gathers = Buffers(kept_bytes=64 << 20)
"""Where a batch is what was gathered, of tables and of narrow integers, as much as lies ready comes back here."""
