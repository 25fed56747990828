"""Memory for large arrays that is used again."""

from __future__ import annotations

import weakref
from collections import deque

import numpy as np
import numpy.typing as npt

KEPT_BYTES = 128 << 20
"""What may lie free of each kind of array. Lanes come to the end of their windows at about the same time: so much is
let go of at once, and needed again soon."""
_KEPT_ALWAYS = 2


class Buffers:
    """Memory for arrays of about one size, used again when whoever had it has let go of it, views of it too.

    Thread-safe. To get such memory fresh means that the kernel maps and clears it, which takes longer than to write
    tokens to it; and what several threads map and give back in turn lies in more and more places of the process.
    """

    def __init__(self, kept_bytes: int = KEPT_BYTES) -> None:
        """`kept_bytes`: how much lies free at most; two arrays may, whatever their size."""
        self._free: deque[npt.NDArray[np.uint8]] = deque()
        self._kept_bytes = kept_bytes

    def take(self, size: int) -> npt.NDArray[np.uint8]:
        """Return an array of `size` bytes of any content."""
        memory = self._fitting(size)
        if memory is None:
            memory = np.empty(size + size // 8, dtype=np.uint8)
        lent = np.frombuffer(memory.data, dtype=np.uint8, count=size)  # what its views refer to, and not `memory`
        weakref.finalize(lent, self._back, memory).atexit = False
        return lent

    def _fitting(self, size: int) -> npt.NDArray[np.uint8] | None:
        """Take memory that lies free and is of about that size; what was looked at and is not, is let go of."""
        while True:
            try:
                memory = self._free.pop()  # what was used last may be in a processor's cache
            except IndexError:
                return None
            if size <= memory.nbytes <= 4 * size:
                return memory

    def _back(self, memory: npt.NDArray[np.uint8]) -> None:
        """Called wherever the last reference goes, in the middle of anything: it takes no lock."""
        free = list(self._free)
        if len(free) < _KEPT_ALWAYS or sum(one.nbytes for one in free) + memory.nbytes <= self._kept_bytes:
            self._free.append(memory)
