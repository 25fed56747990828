"""Memory for large arrays that is used again."""

from __future__ import annotations

import math
import threading
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
_BYTE: np.dtype[Any] = np.dtype(np.uint8)


class Buffers:
    """Memory for large arrays, used again when whoever had it has let go of it, views of it too.

    Thread-safe. To get such memory fresh means that the kernel maps and clears it, which takes longer than to write
    tokens to it; and what several threads map and give back in turn lies in more and more places of the process.
    """

    def __init__(self, kept_bytes: int = KEPT_BYTES) -> None:
        """`kept_bytes`: how much lies free at most, what was used last; two arrays may, whatever their size."""
        self._free: dict[int, npt.NDArray[np.uint8]] = {}  # by `id`; what was used last comes last
        self._lent: dict[int, tuple[weakref.ref[npt.NDArray[Any]], npt.NDArray[np.uint8]]] = {}
        self._kept_bytes, self._largest_bytes = kept_bytes, 0

    def take(self, size: int) -> npt.NDArray[np.uint8]:
        """Return an array of `size` bytes of any content."""
        return self.empty((size,), _BYTE)

    def empty(self, shape: tuple[int, ...], dtype: npt.DTypeLike) -> npt.NDArray[Any]:
        """Return an array of any content, in such memory unless it holds objects."""
        kind = np.dtype(dtype)
        count = math.prod(shape)
        size = count * kind.itemsize
        if size < _LEAST_BYTES or kind.hasobject:
            return np.empty(shape, kind)
        memory = self._fitting(size)
        if memory is None:
            memory = np.empty(size + size // 8, dtype=np.uint8)
            self._largest_bytes = max(self._largest_bytes, memory.nbytes)
        lent: npt.NDArray[Any] = np.frombuffer(memory.data, kind, count)  # what its views refer to, and not `memory`
        loan = weakref.ref(lent, self._back)  # `weakref.finalize` does the same, and takes as long as a small batch
        self._lent[id(loan)] = (loan, memory)
        return lent.reshape(shape)

    def _fitting(self, size: int) -> npt.NDArray[np.uint8] | None:
        """Take memory that lies free and is of about that size: what was used last may be in a processor's cache."""
        for key in reversed(list(self._free)):
            memory = self._free.get(key)
            if memory is not None and size <= memory.nbytes <= 2 * size and self._free.pop(key, None) is memory:
                return memory
        return None

    def _back(self, loan: weakref.ref[npt.NDArray[Any]]) -> None:
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


class Scratch(threading.local):
    """Memory of a thread for what it is done with before it asks again: nobody keeps account of that."""

    def __init__(self) -> None:
        self._memory = np.empty(0, dtype=np.uint8)

    def empty(self, shape: tuple[int, ...], kind: np.dtype[Any]) -> npt.NDArray[Any]:
        """Return an array of any content, which is the caller's until this thread asks for the next one."""
        size = math.prod(shape) * kind.itemsize
        if kind.hasobject:
            return np.empty(shape, kind)
        if not size <= len(self._memory) <= 4 * size + _LEAST_BYTES:  # what was large once is not kept for ever
            self._memory = np.empty(size + size // 8, dtype=np.uint8)
        return np.ndarray(shape, kind, self._memory.data)


of_blocks = Buffers()
"""For decoded blocks, of whatever source of the process: what Arrow decodes is copied here (see `columns.stack`)."""
of_batches = Buffers(kept_bytes=16 << 20)
of_gathers = Buffers(kept_bytes=64 << 20)
"""Where a batch is what was gathered, of tables and of narrow integers, as much as lies ready comes back here."""
of_this_thread = Scratch()
